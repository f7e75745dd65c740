"""Evolutionary search, as PockEngine does it."""

import numpy as np

from pockjax.selection.solvers import _greedy, _random
from pockjax.selection.solvers._problem import Partial, Problem, Solution
from pockjax.selection.solvers._registry import SOLVERS


@SOLVERS.register("evolution")
def solve(
    problem: Problem,
    *,
    seed: int = 0,
    evaluations: int = 256,
    generations: int = 40,
    population: int = 32,
    mutation: float = 0.1,
) -> Solution:
    """Crosses and mutates the best choices of each generation, and keeps the best of all.

    The first generation is what ``random`` and ``greedy`` find, so that the result is never worth
    less than theirs. PockEngine (arXiv:2310.17752) searches like this; its settings were not
    published.

    Args:
        problem: what to choose from.
        seed: decides what is drawn.
        evaluations: number of random choices to begin with.
        generations: number of generations.
        population: number of parents, and of children, of each.
        mutation: probability that a group of a child is chosen anew.

    Raises:
        InfeasibleError: nothing fits.
    """
    first = [
        _greedy.solve(problem).chosen,
        _random.solve(problem, seed=seed, evaluations=evaluations).chosen,
        *_random.draws(problem, seed, evaluations),
    ]
    parents = _fittest(problem, first, population)
    generator = np.random.default_rng([seed, 1])
    for _ in range(generations):
        children = []
        for _ in range(population):
            mother, father = (parents[i] for i in generator.integers(len(parents), size=2))
            children.append(_child(problem, mother, father, mutation, generator))
        children = [child for child in children if problem.is_feasible(child)]
        parents = _fittest(problem, [*parents, *children], population)
    return Solution.of(problem, parents[0])


def _fittest(problem: Problem, choices: list[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    distinct = dict.fromkeys(choices)
    return sorted(distinct, key=lambda chosen: (-problem.value(chosen), chosen))[:count]


def _child(
    problem: Problem,
    mother: tuple[int, ...],
    father: tuple[int, ...],
    mutation: float,
    generator: np.random.Generator,
) -> tuple[int, ...]:
    """A choice with each group from one parent or, seldom, drawn anew; what exceeds is dropped."""
    group_of = problem.group_of
    from_mother = {int(group_of[u]): u for u in mother}
    from_father = {int(group_of[u]): u for u in father}
    wanted = []
    for group, members in enumerate(problem.groups):
        if generator.random() < mutation:
            pick = int(generator.integers(len(members) + 1))
            unit = members[pick] if pick < len(members) else None
        else:
            unit = (from_mother if generator.random() < 0.5 else from_father).get(group)
        if unit is not None:
            wanted.append(unit)
    partial = Partial(problem)
    partial.fill([wanted[i] for i in generator.permutation(len(wanted))])
    # Room that is left is filled where it reaches no deeper.
    deepest = max((int(problem.levels[u]) for u in partial.chosen), default=-1)
    rest = [u for u in range(len(problem.values)) if problem.levels[u] <= deepest]
    partial.fill([rest[i] for i in generator.permutation(len(rest))])
    return partial.chosen
