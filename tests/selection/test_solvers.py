"""Solvers: exact where everything can be tried, and in the order that is promised."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pockjax.selection.solvers import SOLVERS, Cost, InfeasibleError, Problem


@st.composite
def problems(draw, largest_group: int = 4, groups: int = 4, unit: int = 1):
    sizes = draw(st.lists(st.integers(1, largest_group), min_size=1, max_size=groups))
    n = sum(sizes)
    integers = st.integers(0, 30)
    ends = np.cumsum([0, *sizes])
    n_levels = draw(st.integers(1, 4))
    levels = np.array([draw(st.integers(0, n_levels - 1)) for _ in range(n)])
    values = np.array([draw(st.integers(-5, 40)) for _ in range(n)], float)
    costs = []
    for name in draw(st.sampled_from([("memory",), ("memory", "flops")])):
        own = np.array([draw(integers) for _ in range(n)], float) * unit
        reach = np.array([draw(integers) for _ in range(n_levels)], float) * unit
        costs.append(Cost(name, 7.0 * unit, own, reach, unit * draw(st.integers(10, 150))))
    members = [tuple(range(a, b)) for a, b in itertools.pairwise(ends.tolist())]
    return Problem(values, tuple(members), levels, tuple(costs))


def _brute_force(problem):
    options = [(None, *members) for members in problem.groups]
    choices = ([u for u in pick if u is not None] for pick in itertools.product(*options))
    return max((problem.value(c) for c in choices if problem.is_feasible(c)), default=None)


@settings(max_examples=60)
@given(problem=problems())
def test_solvers_keep_their_order_and_milp_is_exact(problem):
    best = _brute_force(problem)
    if best is None:
        for name in ("milp", "evolution", "greedy", "random"):
            with pytest.raises(InfeasibleError):
                SOLVERS[name](problem)
        return
    small = {"evaluations": 16}
    found = {
        "milp": SOLVERS["milp"](problem),
        "evolution": SOLVERS["evolution"](problem, seed=3, generations=4, population=8, **small),
        "greedy": SOLVERS["greedy"](problem),
        "random": SOLVERS["random"](problem, seed=3, **small),
    }
    for solution in found.values():
        assert problem.is_feasible(solution.chosen)
        assert solution.objective == problem.value(solution.chosen)
    assert found["milp"].objective == pytest.approx(best) and found["milp"].gap == 0
    assert found["milp"].objective >= found["evolution"].objective - 1e-9
    assert found["evolution"].objective >= found["random"].objective
    assert found["evolution"].objective >= found["greedy"].objective


@settings(max_examples=15)
@given(problem=problems(unit=2**23))
def test_large_amounts_are_kept_exactly(problem):
    best = _brute_force(problem)
    if best is not None:
        solution = SOLVERS["milp"](problem)
        assert problem.is_feasible(solution.chosen)
        assert solution.objective == pytest.approx(best)


def _large(n_groups: int = 30, seed: int = 0) -> Problem:
    """As a network has them: four ratios of each weight, and biases of the last k layers."""
    generator = np.random.default_rng(seed)
    values, levels, own, groups = [], [], [], []
    for layer in range(n_groups):
        worth = generator.gamma(1.0)
        groups.append(tuple(range(len(values), len(values) + 4)))
        for ratio in (1.0, 0.5, 0.25, 0.125):
            values.append(worth * ratio**0.5 * generator.uniform(0.8, 1.1))
            levels.append(layer)
            own.append(generator.integers(100, 2000) * ratio)
    groups.append(tuple(range(len(values), len(values) + n_groups)))
    values += (2 * np.sqrt(1 + np.arange(n_groups))).tolist()
    levels += range(n_groups)
    own += [0.0] * n_groups
    reach = generator.integers(0, 300, n_groups).astype(float)
    cost = Cost("memory", 1000.0, np.array(own), reach, 10_000.0)
    return Problem(np.array(values), tuple(groups), np.array(levels), (cost,))


@pytest.mark.parametrize("seed", range(3))
def test_the_order_holds_on_large_problems(seed):
    problem = _large(seed=seed)
    milp = SOLVERS["milp"](problem)
    evolution = SOLVERS["evolution"](problem, seed=seed, evaluations=32, generations=12)
    drawn = SOLVERS["random"](problem, seed=seed, evaluations=32)
    assert milp.gap is not None and milp.gap < 1e-6
    assert milp.objective >= evolution.objective >= drawn.objective
    assert evolution.objective > drawn.objective  # it does search


@pytest.mark.parametrize("name", ["evolution", "random"])
def test_a_seed_decides(name):
    problem = _large(12)
    options = {"evaluations": 8}
    assert SOLVERS[name](problem, seed=1, **options) == SOLVERS[name](problem, seed=1, **options)
    assert SOLVERS["random"](problem, seed=1, evaluations=1) != SOLVERS["random"](
        problem, seed=2, evaluations=1
    )


def test_forbidden_choices_are_not_made():
    problem = _large(4)
    first = SOLVERS["milp"](problem)
    other = Problem(
        problem.values, problem.groups, problem.levels, problem.costs,
        frozenset([frozenset(first.chosen)]),
    )  # fmt: skip
    second = SOLVERS["milp"](other)
    assert second.chosen != first.chosen and second.objective <= first.objective


def test_solvers_are_known_by_name():
    assert SOLVERS.names() == ("evolution", "greedy", "milp", "random")
    with pytest.raises(ValueError, match=r"no solver is named 'mlip'; there are: milp"):
        SOLVERS["mlip"]
    with pytest.raises(ValueError, match="registered already"):
        SOLVERS.register("milp")(SOLVERS["milp"])


def test_many_tiny_units_beside_one_at_the_limit_end():
    """Every set of them is within the solver's tolerance, and none is within the limit."""
    n = 24
    own = np.array([1.0, *[1e-10] * n])
    problem = Problem(
        values=np.array([1.0, *[1e-3] * n]),
        groups=tuple((u,) for u in range(n + 1)),
        levels=np.zeros(n + 1, int),
        costs=(Cost("memory", 0.0, own, np.zeros(1), 1.0),),
    )
    solution = SOLVERS["milp"](problem)
    assert problem.is_feasible(solution.chosen)
    assert solution.objective == pytest.approx(1.0)
    assert solution.gap is not None and solution.gap < 0.03


def test_milp_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS does by itself, on some problems."""
    for seed in range(40):
        generator = np.random.default_rng(seed)
        own = generator.uniform(1, 100, 40)
        values = generator.uniform(0, 1, 40) * own
        costs = (
            Cost("memory", 0.0, own, np.zeros(1), 0.3 * own.sum()),
            Cost("optimizer", 0.0, np.repeat([1.0, 0.0], 20), np.zeros(1), 5.0),
        )
        groups = tuple((i,) for i in range(40))
        SOLVERS["milp"](Problem(values, groups, np.zeros(40, int), costs, frozenset()))
    assert capfd.readouterr() == ("", "")
