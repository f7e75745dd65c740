"""Search: the units that are worth most under a budget that the compiled step keeps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import optax

from pockjax.autodiff import Plan
from pockjax.masks import Scheme
from pockjax.selection._budget import Budget, BudgetError, amount
from pockjax.selection._choices import Choices
from pockjax.selection._found import Attempt, Found, Point
from pockjax.selection._sensitivity import Sensitivity
from pockjax.selection._surrogate import Surrogate, fit, levels_of
from pockjax.selection.solvers import SOLVERS, Cost, InfeasibleError, Problem, Solution

PyTree = Any
type Progress = Callable[[str, int, int], Any]

_PROPOSALS = 12  # how often a limit is moved before a mask is compiled


def search(
    fun: Callable[..., Any],
    params: PyTree,
    data: Any,
    sens: Sensitivity,
    *,
    budget: Budget,
    solver: str = "milp",
    tx: optax.GradientTransformation | None = None,
    beside: Any = None,
    remat: bool = False,
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
        beside: what is trained in any case, such as a new classifier, in any form that
            `pockjax.mask` takes; units lose what they have of it.
        remat: whether the backward pass may compute blocks again instead of keeping them. The
            scheme then keeps the budget only with the ``remat`` in its notes.
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
    whole = Search(
        fun, params, data, sens, tx=tx, beside=beside, remat=remat, progress=progress, **options
    )
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
        beside: Any = None,
        remat: bool = False,
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
            beside: what is trained in any case.
            remat: whether blocks may be computed again.
            progress: called with what is being done, how much of it is done, and of how much.
            solver_options: options of the solver.
            rounds: how many choices to compile at most in search of a better one.
            slack: a compiled step that leaves less than this fraction of its budget is good enough.
            **options: of `compile`.
        """
        if remat and options.get("frozen_dtype") is not None:
            # What is rounded depends on the mask, and so do the equations that a plan counts.
            raise ValueError("remat and frozen_dtype cannot be searched for together")
        tx = optax.adam(1e-3) if tx is None else tx
        self._choices = Choices(fun, params, data, sens, tx, beside, options)
        self._criterion, self._remat = sens.criterion, remat
        self._progress = progress or (lambda what, done, total: None)
        self._solver_options = dict(solver_options or {})
        self._rounds, self._slack = rounds, slack
        self._surrogates: dict[tuple[str, ...], list[Surrogate]] = {}
        self._levels = levels_of(self._choices.units)

    def by(self, sens: Sensitivity) -> "Search":
        """The same search by other sensitivities of the same units.

        What has been predicted and compiled serves both.

        Args:
            sens: what each unit is worth.

        Raises:
            ValueError: they are of other units.
        """
        other = copy(self)
        other._choices, other._criterion = self._choices.worth(sens), sens.criterion
        return other

    def find(
        self,
        budget: Budget,
        *,
        solver: str = "milp",
        seed: int = 0,
        name: str = "",
        model: str = "",
        solver_options: Mapping[str, Any] | None = None,
    ) -> Found:
        """The best choice whose compiled step keeps a budget.

        Args:
            budget: what a step may take.
            solver: name of the solver.
            seed: for solvers that draw.
            name: what the scheme is called.
            model: the model whose parameters it is for.
            solver_options: options of the solver; default those given before.

        Raises:
            BudgetError: nothing keeps the budget; the message has the smallest that can be kept.
        """
        limits = self._limits(budget)
        options = self._solver_options if solver_options is None else solver_options
        solve = _solver(solver, seed, options)
        attempts: list[Attempt] = []
        best: Attempt | None = None
        for number in range(self._rounds):
            self._progress("compiling the best choices", number, self._rounds)
            worth = -np.inf if best is None else best.solution.objective
            proposals = self._proposals(limits, attempts, solve, worth, hopeful=False)
            if not proposals:
                proposals = self._proposals(limits, attempts, solve, worth, hopeful=True)
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
                for u in range(len(self._choices.units))
            )
            most = linear.base + linear.reach.sum() + sum(
                max(linear.own[list(members)]) for members in self._choices.groups
            )  # fmt: skip
            for number, limit in enumerate(np.geomspace(least, most, points)):
                self._progress("drawing the curve", number + 1, points)
                costs = (linear.cost(quantity, float(limit) * (1 + 1e-9)),)
                solution = solve(self._problem(costs))
                cost = self._choices.expected(solution.chosen, surrogate.plan, (quantity,))[
                    quantity
                ]
                names = tuple(self._choices.units[u].name for u in solution.chosen)
                found.append(Point(cost, solution.objective, names, bool(surrogate.plan)))
        front: list[Point] = []
        for point in sorted(found, key=lambda p: (p.cost, -p.objective)):
            if not front or point.objective > front[-1].objective:
                front.append(point)
        return front

    def _limits(self, budget: Budget) -> dict[str, float]:
        relative = [name for name, limit in budget.limits.items() if limit.of_full]
        if relative:
            self._progress("compiling full backpropagation", 0, 1)
        return budget.absolute(self._choices.full(relative) if relative else {})

    def _fitted(self, limits: Iterable[str]) -> list[Surrogate]:
        names = tuple(limits)
        if names not in self._surrogates:
            plans: list[Plan] = [()]
            if self._remat and {"memory", "extra_memory"} & set(names):
                plan = self._choices.best_plan()
                plans += [plan] if plan else []
            self._surrogates[names] = fit(
                self._levels, self._choices.predict_each, self._choices.predict, names, plans,
                lambda done, total: self._progress("predicting costs", done, total),
            )  # fmt: skip
        return self._surrogates[names]

    def _proposals(
        self,
        limits: Mapping[str, float],
        attempts: Sequence[Attempt],
        solve: Callable[[Problem], Solution],
        worth: float,
        *,
        hopeful: bool,
    ) -> list[tuple[Solution, Plan]]:
        """The best choice of each plan, if it is worth more than ``worth`` and was not compiled."""
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
            problem = self._problem(costs, forbidden)
            try:
                solution = solve(problem)
            except InfeasibleError:
                if best is not None or all(np.isinf(b) for b in bounds.values()):
                    break
                # The linear costs may be too high: begin with the cheapest choice.
                cheapest = self._choices.cheapest(plan, limits)
                solution = Solution.of(problem, (cheapest,))
            if solution.chosen in tried:
                break
            tried.add(solution.chosen)
            expected = self._choices.expected(solution.chosen, plan, limits, hopeful=hopeful)
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

    def _attempt(self, solution: Solution, plan: Plan, limits: Mapping[str, float]) -> Attempt:
        predicted = self._choices.predicted(solution.chosen, plan, limits)
        step, compiled = self._choices.compiled(solution.chosen, plan, limits)
        keeps = all(compiled[name] <= limits[name] for name in limits)
        return Attempt(solution, plan, predicted, compiled, keeps, step)

    def _problem(
        self, costs: Iterable[Cost], forbidden: frozenset[frozenset[int]] = frozenset()
    ) -> Problem:
        choices = self._choices
        return Problem(choices.values, choices.groups, self._levels, tuple(costs), forbidden)

    def _smallest(self, limits: Mapping[str, float], attempts: list[Attempt]) -> Attempt:
        """The cheapest choice, compiled.

        Raises:
            BudgetError: even that exceeds the limits.
        """
        problem = self._problem(())
        compiled = []
        for surrogate in self._fitted(limits):
            cheapest = Solution.of(problem, (self._choices.cheapest(surrogate.plan, limits),))
            attempt = self._attempt(cheapest, surrogate.plan, limits)
            attempts.append(attempt)
            if attempt.keeps:
                return attempt
            compiled.append(attempt)
        nearest = min(
            [*compiled, *attempts],
            key=lambda a: max(a.compiled[name] / limits[name] for name in limits),
        )
        needs = ", ".join(
            f"{name} {amount(name, nearest.compiled[name], up=True)} "
            f"(asked for {amount(name, limit)})"
            for name, limit in limits.items()
        )
        names = ", ".join(self._choices.units[u].name for u in nearest.solution.chosen)
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
        units = tuple(self._choices.units[u] for u in best.solution.chosen)
        mask = self._choices.mask(best.solution.chosen)
        notes: dict[str, Any] = {
            "criterion": self._criterion,
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
            self._choices.params, mask, name=name, model=model,
            source=f"found by pockjax search, {solver} over {self._criterion}",
            budget=budget.as_dict(), predicted=best.predicted, notes=notes,
        )  # fmt: skip
        return Found(
            scheme, mask, units, best.plan, best.step, best.solution.objective,
            best.solution.gap, tuple(attempts),
        )  # fmt: skip


def _solver(name: str, seed: int, options: Mapping[str, Any]) -> Callable[[Problem], Solution]:
    chosen = SOLVERS[name]
    return lambda problem: chosen(problem, seed=seed, **options)
