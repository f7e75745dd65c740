"""Search: the units that are worth most under a budget that the compiled step keeps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax

from pockjax.autodiff import Plan
from pockjax.costs import CompiledCost, Prediction
from pockjax.masks import Scheme
from pockjax.selection._budget import Budget, BudgetError, amount
from pockjax.selection._sensitivity import Sensitivity
from pockjax.selection._surrogate import Surrogate, feature, fit, levels_of
from pockjax.selection._timing import step_seconds
from pockjax.selection._units import Unit, union
from pockjax.selection.solvers import InfeasibleError, Problem, Solution, solver
from pockjax.training import CostModel, Step
from pockjax.training import compile as compile_step

PyTree = Any
type Progress = Callable[[str, int, int], Any]

_PROPOSALS = 12  # how often a limit is moved before a mask is compiled


@dataclass(frozen=True, eq=False)
class Attempt:
    """A choice that was compiled.

    Attributes:
        solution: the choice.
        plan: what its backward pass computes again.
        predicted: what the cost model predicts, by name.
        compiled: what it takes.
        keeps: whether that is within the budget.
        step: the compiled step.
    """

    solution: Solution
    plan: Plan
    predicted: dict[str, float]
    compiled: dict[str, float]
    keeps: bool
    step: Step


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        scheme: the choice as text, with its budget, its costs and how it was found.
        mask: the choice as a mask.
        units: the chosen units.
        remat: what the backward pass computes again; the option of `compile`.
        step: the compiled step.
        objective: the summed sensitivity.
        gap: by which fraction of it another choice might be worth more, under the linear costs that
            the solver saw; None if the solver cannot tell.
        attempts: every choice that was compiled on the way, in order.
    """

    scheme: Scheme
    mask: PyTree
    units: tuple[Unit, ...]
    remat: Plan
    step: Step
    objective: float
    gap: float | None
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True)
class Point:
    """A point of the curve of what a budget buys.

    Attributes:
        cost: what the choice is predicted to take, corrected by what was compiled so far.
        objective: its summed sensitivity.
        units: names of the chosen units.
        remat: whether blocks are computed again.
    """

    cost: float
    objective: float
    units: tuple[str, ...]
    remat: bool


def search(
    fun: Callable[..., Any],
    params: PyTree,
    data: Any,
    sens: Sensitivity,
    *,
    budget: Budget,
    solver: str = "milp",
    tx: optax.GradientTransformation | None = None,
    remat: bool = True,
    seed: int = 0,
    name: str = "",
    model: str = "",
    progress: Progress | None = None,
    **options: Any,
) -> Scheme:
    """Finds what to train: the most sensitivity under a budget that the compiled step keeps.

    The summed sensitivity of the chosen units, at most one of each group, is maximised under linear
    costs; the winner is compiled, and what it really takes is compared with the budget. Where it
    takes too much, the costs are corrected and the search goes on until a compiled step keeps the
    budget. See `Search` for the step itself, other budgets at little cost, and the curve of what a
    budget buys.

    Args:
        fun: the loss, as for `compile`.
        params: the parameters; shapes are enough unless latency is bounded.
        data: a batch, the tuple of the loss's other arguments; or batches, of which the first is
            taken.
        sens: what each unit is worth.
        budget: what a step may take.
        solver: ``"milp"`` (proven optimal), ``"evolution"`` (the paper's), ``"greedy"`` or
            ``"random"``; see `pockjax.selection.solvers`.
        tx: the optimizer, whose state counts; Adam unless given.
        remat: whether the backward pass may compute blocks again instead of keeping them.
        seed: for solvers that draw. The same seed gives the same scheme, to the bit; where latency
            is bounded, as far as the machine gives the same times.
        name: what the scheme is called.
        model: the model whose parameters the scheme is for.
        progress: called with what is being done, how much of it is done, and of how much.
        **options: of `compile`; and ``solver_options``, a mapping.

    Returns:
        The scheme. Its ``notes`` say how it was found and what the compiled step takes;
        ``notes["remat"]``, if there, is the ``remat`` that `compile` needs to take no more.

    Raises:
        BudgetError: nothing keeps the budget; the message has the smallest that can be kept.

    >>> import jax.numpy as jnp
    >>> import pockjax as pj
    >>> from pockjax.selection import Sensitivity, Unit
    >>> params = {"w": jnp.ones((64, 64)), "b": jnp.zeros(64)}
    >>> loss = lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2)
    >>> units = (
    ...     Unit("w", "w", "weight", (("w", True),), depth=0),
    ...     Unit("b", "biases", "bias", (("b", True),), depth=1),
    ... )
    >>> sens = Sensitivity(units, np.array([[2.0, 1.0]]), "magnitude")
    >>> batch = (jnp.ones((8, 64)),)
    >>> scheme = pj.search(loss, params, batch, sens, budget=pj.Budget(optimizer="1KiB"))
    >>> scheme.rules
    (Rule(path='b', train='all', note=''),)
    """
    whole = Search(fun, params, data, sens, tx=tx, remat=remat, progress=progress, **options)
    return whole.find(budget, solver=solver, seed=seed, name=name, model=model).scheme


class Search:
    """A search whose model of the costs serves several budgets and solvers."""

    def __init__(
        self,
        fun: Callable[..., Any],
        params: PyTree,
        data: Any,
        sens: Sensitivity,
        *,
        tx: optax.GradientTransformation | None = None,
        remat: bool = True,
        progress: Progress | None = None,
        solver_options: Mapping[str, Any] | None = None,
        rounds: int = 8,
        slack: float = 0.03,
        **options: Any,
    ):
        """Takes what `search` takes, but for the budget.

        Args:
            fun: the loss.
            params: the parameters.
            data: a batch, or batches.
            sens: what each unit is worth.
            tx: the optimizer; Adam unless given.
            remat: whether blocks may be computed again.
            progress: called with what is being done, how much of it is done, and of how much.
            solver_options: options of the solver.
            rounds: how many choices to compile at most in search of a better one.
            slack: a compiled step that leaves less than this fraction of its budget is good enough.
            **options: of `compile`.
        """
        self._fun, self._params, self._batch = fun, params, _batch_of(data)
        self._tx = optax.adam(1e-3) if tx is None else tx
        self._sens, self._options = sens, options
        self._units, self._values = sens.units, np.asarray(sens.mean, float)
        if not self._units:
            raise ValueError("there are no units to choose from")
        self._remat = remat
        self._progress = progress or (lambda what, done, total: None)
        self._solver_options = dict(solver_options or {})
        self._rounds, self._slack = rounds, slack
        self._costs = CostModel(fun, self._tx, params, *self._batch, **options)
        self._predictions: dict[tuple[tuple[int, ...], Plan], Prediction] = {}
        self._compiled: dict[tuple[tuple[int, ...], Plan], tuple[Step, dict[str, float]]] = {}
        self._surrogates: dict[tuple[str, ...], list[Surrogate]] = {}
        self._levels = levels_of(self._units)
        members: dict[str, list[int]] = {}
        for u, unit in enumerate(self._units):
            members.setdefault(unit.group, []).append(u)
        self._groups = tuple(map(tuple, members.values()))

    def find(
        self,
        budget: Budget,
        *,
        solver: str = "milp",
        seed: int = 0,
        name: str = "",
        model: str = "",
    ) -> Found:
        """The best choice whose compiled step keeps a budget.

        Args:
            budget: what a step may take.
            solver: name of the solver.
            seed: for solvers that draw.
            name: what the scheme is called.
            model: the model whose parameters it is for.

        Raises:
            BudgetError: nothing keeps the budget; the message has the smallest that can be kept.
        """
        limits = self._limits(budget)
        attempts: list[Attempt] = []
        best: Attempt | None = None
        for number in range(self._rounds):
            self._progress("compiling the best choices", number, self._rounds)
            worth = -np.inf if best is None else best.solution.objective
            proposals = self._proposals(limits, attempts, solver, seed, worth, hopeful=False)
            if not proposals:
                proposals = self._proposals(limits, attempts, solver, seed, worth, hopeful=True)
            if not proposals:
                break
            # Of equals the one that computes nothing again, which comes first.
            solution, plan = max(proposals, key=lambda p: p[0].objective)
            attempt = self._attempt(solution, plan, limits)
            attempts.append(attempt)
            if attempt.keeps:
                best = attempt
                left = min(1 - attempt.compiled[k] / limits[k] for k in limits)
                if left < self._slack:
                    break
        if best is None:
            best = self._smallest(limits, attempts)
        return self._result(best, attempts, budget, limits, solver, seed, name, model)

    def pareto(self, quantity: str = "memory", points: int = 12, **solving: Any) -> list[Point]:
        """What a budget buys: choices from the cheapest to everything, by predicted cost.

        Args:
            quantity: what is bounded.
            points: number of budgets tried.
            **solving: ``solver`` and ``seed``, as for `find`.

        Returns:
            The choices that are worth more than all cheaper ones, by ascending cost.
        """
        solve = _solver(solving.get("solver", "milp"), solving.get("seed", 0), self._solver_options)
        found: list[Point] = []
        for surrogate in self._fitted({quantity: 0.0}):
            linear = surrogate.features[quantity]
            least = linear.base + min(
                linear.own[u] + linear.reach[: self._levels[u] + 1].sum()
                for u in range(len(self._units))
            )
            most = linear.base + linear.reach.sum() + sum(
                max(linear.own[list(members)]) for members in self._groups
            )  # fmt: skip
            for number, limit in enumerate(np.geomspace(least, most, points)):
                self._progress("drawing the curve", number + 1, points)
                costs = (linear.cost(quantity, float(limit) * (1 + 1e-9)),)
                solution = solve(Problem(self._values, self._groups, self._levels, costs))
                cost = self._expected(solution.chosen, surrogate.plan, (quantity,))[quantity]
                names = tuple(self._units[u].name for u in solution.chosen)
                found.append(Point(cost, solution.objective, names, bool(surrogate.plan)))
        front: list[Point] = []
        for point in sorted(found, key=lambda p: (p.cost, -p.objective)):
            if not front or point.objective > front[-1].objective:
                front.append(point)
        return front

    # What things cost.

    def _limits(self, budget: Budget) -> dict[str, float]:
        relative = [name for name, limit in budget.limits.items() if limit.of_full]
        full = {}
        if relative:
            self._progress("compiling full backpropagation", 0, 1)
            full = self._measured(self._full_step, tuple(relative))
        return budget.absolute(full)

    @cached_property
    def _full_step(self) -> Step:
        return compile_step(self._fun, True, self._tx, self._params, *self._batch, **self._options)

    @cached_property
    def _inference_bytes(self) -> int:
        """Memory of the forward pass alone."""
        args = jax.tree.map(jax.typeof, (self._params, *self._batch))
        return CompiledCost.of(jax.jit(self._fun).lower(*args).compile()).total_bytes

    def _measured(self, step: Step, names: Iterable[str]) -> dict[str, float]:
        """What a compiled step takes."""
        found = {}
        for name in names:
            match name:
                case "memory":
                    found[name] = float(step.report.compiled.total_bytes)
                case "extra_memory":
                    memory = step.report.compiled.total_bytes
                    found[name] = float(memory - self._inference_bytes)
                case "latency":
                    found[name] = step_seconds(step, self._params, self._batch)
                case "flops":
                    found[name] = float(step.report.flops)
                case _:
                    found[name] = float(step.report.optimizer_bytes)
        return found

    def _mask(self, chosen: Sequence[int]) -> PyTree:
        return union(self._params, [self._units[u] for u in chosen])

    def _predict(self, chosen: Sequence[int], plan: Plan) -> Prediction:
        key = (tuple(chosen), plan)
        if key not in self._predictions:
            self._predictions[key] = self._costs.predict(self._mask(chosen), plan)
        return self._predictions[key]

    def _quantity(self, name: str, p: Prediction) -> float:
        """A prediction as an amount; latency that is not calibrated is known up to a factor."""
        match name:
            case "memory":
                return float(p.memory_bytes)
            case "extra_memory":
                return float(p.memory_bytes - self._inference_bytes)
            case _:
                return feature(name, p)

    def _expected(
        self, chosen: Sequence[int], plan: Plan, names: Iterable[str], *, hopeful: bool = False
    ) -> dict[str, float]:
        """What a choice is expected to take, corrected by what was compiled with such a plan.

        Args:
            chosen: positions of units.
            plan: what is computed again.
            names: of the quantities.
            hopeful: correct by the most favourable error that was found instead of the nearest.
        """
        prediction = self._predict(chosen, plan)
        key_of, found = (tuple(chosen), plan), {}
        for name in names:
            value = self._quantity(name, prediction)
            pairs = [
                (self._quantity(name, self._predict(*key)), costs[name])
                for key, (_, costs) in self._compiled.items()
                if bool(key[1]) == bool(plan) and name in costs
            ]
            if name == "latency" and not pairs and prediction.seconds is None:
                continue  # known only up to a factor
            is_time = name == "latency"

            def error(pair: tuple[float, float], is_time: bool = is_time) -> float:
                return pair[1] / pair[0] if is_time else pair[1] - pair[0]

            def distance(pair: tuple[float, float], value: float = value) -> float:
                return abs(pair[0] - value)

            exact = key_of in self._compiled and name in self._compiled[key_of][1]
            rank = error if hopeful and not exact else distance
            near = min(pairs, key=rank, default=(value, value))
            found[name] = value * near[1] / near[0] if is_time else value + near[1] - near[0]
        return found

    def _fitted(self, limits: Iterable[str]) -> list[Surrogate]:
        names = tuple(limits)
        if names not in self._surrogates:
            plans: list[Plan] = [()]
            if self._remat and {"memory", "extra_memory"} & set(names):
                everything = _anything(self._params, self._units)
                plan = self._costs.best_plan(everything)
                plans += [plan] if plan else []
            self._surrogates[names] = fit(
                self._units, self._predict, names, plans,
                lambda done, total: self._progress("predicting costs", done, total),
            )  # fmt: skip
        return self._surrogates[names]

    # The loop.

    def _proposals(
        self,
        limits: Mapping[str, float],
        attempts: Sequence[Attempt],
        solver: str,
        seed: int,
        worth: float,
        *,
        hopeful: bool,
    ) -> list[tuple[Solution, Plan]]:
        """The best choice of each plan, if it is worth more than ``worth`` and was not compiled."""
        solve = _solver(solver, seed, self._solver_options)
        found = []
        for surrogate in self._fitted(limits):
            plan = surrogate.plan
            known = {a.solution.chosen for a in attempts if a.plan == plan}
            forbidden = frozenset(
                frozenset(a.solution.chosen) for a in attempts if a.plan == plan and not a.keeps
            )
            best = self._proposal(surrogate, limits, forbidden, solve, hopeful=hopeful)
            if best is not None and best.objective > worth and best.chosen not in known:
                found.append((best, plan))
        return found

    def _proposal(
        self,
        surrogate: Surrogate,
        limits: Mapping[str, float],
        forbidden: frozenset[frozenset[int]],
        solve: Callable[[Problem], Solution],
        *,
        hopeful: bool,
    ) -> Solution | None:
        """The best choice that is expected to keep the limits; None if none is.

        The linear costs are moved until what the solver chooses is expected to keep the limits, and
        to leave nothing of them.
        """
        plan = surrogate.plan
        bounds = {name: limit for name, limit in limits.items()}
        lowest_bad = dict.fromkeys(limits, np.inf)
        best: Solution | None = None
        tried: set[tuple[int, ...]] = set()
        for _ in range(_PROPOSALS):
            costs = tuple(
                linear.cost(name, bounds[name])
                for name, linear in surrogate.features.items()
                if np.isfinite(bounds[name])
            )
            problem = Problem(self._values, self._groups, self._levels, costs, forbidden)
            try:
                solution = solve(problem)
            except InfeasibleError:
                if best is not None or all(np.isinf(b) for b in bounds.values()):
                    break
                # The linear costs may be too high: begin with the cheapest choice.
                cheapest = self._cheapest(surrogate, limits)
                solution = Solution.of(problem, cheapest)
            if solution.chosen in tried:
                break
            tried.add(solution.chosen)
            expected = self._expected(solution.chosen, plan, limits, hopeful=hopeful)
            over = {k: v - limits[k] for k, v in expected.items()}
            features = {c.name: problem.cost(c, solution.chosen) for c in costs}
            for name, excess in over.items():
                linear = surrogate.features[name]
                at = features.get(name, problem.cost(linear.cost(name, 0), solution.chosen))
                if excess > 0:
                    lowest_bad[name] = min(lowest_bad[name], at)
                rate = at / expected[name] if name == "latency" and expected[name] else 1.0
                bounds[name] = min(at - excess * rate, np.nextafter(lowest_bad[name], 0))
            if all(excess <= 0 for excess in over.values()):
                if best is None or solution.objective > best.objective:
                    best = solution
                if "latency" in limits and "latency" not in expected:
                    break  # compile it: that gives the factor
        return best

    def _cheapest(self, surrogate: Surrogate, limits: Mapping[str, float]) -> tuple[int, ...]:
        """The unit that comes nearest to the limits, alone."""

        def excess(u: int) -> tuple[float, int]:
            expected = self._expected((u,), surrogate.plan, limits)
            return max((expected[k] / limits[k] for k in expected), default=0.0), u

        return (min(range(len(self._units)), key=excess),)

    def _attempt(self, solution: Solution, plan: Plan, limits: Mapping[str, float]) -> Attempt:
        prediction = self._predict(solution.chosen, plan)
        predicted = {
            name: self._quantity(name, prediction)
            for name in limits
            if name != "latency" or prediction.seconds is not None
        }
        key = (solution.chosen, plan)
        known = self._compiled.get(key)
        if known is None or not set(limits) <= set(known[1]):
            step = known[0] if known else compile_step(
                self._fun, self._mask(solution.chosen), self._tx, self._params, *self._batch,
                remat=plan, **self._options,
            )  # fmt: skip
            costs = known[1] if known else {}
            missing = [name for name in limits if name not in costs]
            self._compiled[key] = (step, costs | self._measured(step, missing))
        step, costs = self._compiled[key]
        compiled = {name: costs[name] for name in limits}
        keeps = all(compiled[name] <= limits[name] for name in limits)
        return Attempt(solution, plan, predicted, compiled, keeps, step)

    def _smallest(self, limits: Mapping[str, float], attempts: list[Attempt]) -> Attempt:
        """The cheapest choice, compiled.

        Raises:
            BudgetError: even that exceeds the limits.
        """
        problem = Problem(self._values, self._groups, self._levels, ())
        compiled = []
        for surrogate in self._fitted(limits):
            chosen = self._cheapest(surrogate, limits)
            attempt = self._attempt(Solution.of(problem, chosen), surrogate.plan, limits)
            attempts.append(attempt)
            if attempt.keeps:
                return attempt
            compiled.append(attempt)
        nearest = min(
            [*compiled, *attempts],
            key=lambda a: max(a.compiled[name] / limits[name] for name in limits),
        )
        needs = ", ".join(
            f"{name} {amount(name, nearest.compiled[name])} (asked for {amount(name, limit)})"
            for name, limit in limits.items()
        )
        names = ", ".join(self._units[u].name for u in nearest.solution.chosen)
        raise BudgetError(
            f"nothing keeps the budget; the smallest that can be kept is {needs}, which is what a "
            f"compiled step takes that trains '{names}' alone"
        )

    def _result(
        self,
        best: Attempt,
        attempts: Sequence[Attempt],
        budget: Budget,
        limits: Mapping[str, float],
        solver: str,
        seed: int,
        name: str,
        model: str,
    ) -> Found:
        units = tuple(self._units[u] for u in best.solution.chosen)
        mask = self._mask(best.solution.chosen)
        notes: dict[str, Any] = {
            "criterion": self._sens.criterion,
            "solver": solver,
            "seed": seed,
            "objective": best.solution.objective,
            "gap": best.solution.gap,
            "limits": dict(limits),
            "compiled": best.compiled,
            "steps_compiled": len(attempts),
            "units": [unit.name for unit in units],
        }
        if best.plan:
            notes["remat"] = [list(span) for span in best.plan]
        scheme = Scheme.from_mask(
            self._params, mask, name=name, model=model,
            source=f"found by pockjax search, {solver} over {self._sens.criterion}",
            budget=budget.as_dict(), predicted=best.predicted, notes=notes,
        )  # fmt: skip
        return Found(
            scheme, mask, units, best.plan, best.step, best.solution.objective,
            best.solution.gap, tuple(attempts),
        )  # fmt: skip


def _solver(name: str, seed: int, options: Mapping[str, Any]) -> Callable[[Problem], Solution]:
    chosen = solver(name)
    return lambda problem: chosen(problem, seed=seed, **options)


def _batch_of(data: Any) -> tuple[Any, ...]:
    """The first batch of data that may be a batch itself."""
    if isinstance(data, tuple) and not (data and isinstance(data[0], tuple)):
        return tuple(data)
    first = next(iter(data))
    return tuple(first) if isinstance(first, tuple) else (first,)


def _anything(params: PyTree, units: Sequence[Unit]) -> PyTree:
    """The mask of all arrays that any unit trains something of."""
    paths = {path for unit in units for path, _ in unit.entries}
    return union(params, [replace(units[0], entries=tuple((path, True) for path in sorted(paths)))])
