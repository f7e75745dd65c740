"""The problem that solvers solve: choose units, at most one of a group, under linear costs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


class InfeasibleError(ValueError):
    """Nothing at all fits under the limits."""


@dataclass(frozen=True, eq=False)
class Cost:
    """A cost that is linear in what is chosen and in how far the backward pass reaches.

    Attributes:
        name: what is bounded.
        base: what training nothing costs.
        own: (units,): what each unit adds by itself; not negative.
        reach: (levels,): what reaching each level adds to reaching the level before it; not
            negative.
        limit: the upper bound.
    """

    name: str
    base: float
    own: np.ndarray
    reach: np.ndarray
    limit: float


@dataclass(frozen=True, eq=False)
class Problem:
    """Maximise the value of the chosen units, at least one, at most one of a group.

    For a reach of the backward pass that is given it is a grouped knapsack; the reach is chosen,
    too: all levels from 0, at the output, to that of the deepest chosen unit.

    Attributes:
        values: (units,): what each unit is worth.
        groups: positions of the units of each group; each unit is in one.
        levels: (units,): how far the backward pass has to reach for each unit.
        costs: what is bounded.
        forbidden: choices that are ruled out, as sets of positions.
    """

    values: np.ndarray
    groups: tuple[tuple[int, ...], ...]
    levels: np.ndarray
    costs: tuple[Cost, ...]
    forbidden: frozenset[frozenset[int]] = field(default=frozenset())

    @cached_property
    def group_of(self) -> np.ndarray:
        """(units,): the group of each unit."""
        group_of = np.zeros(len(self.values), int)
        for number, members in enumerate(self.groups):
            group_of[list(members)] = number
        return group_of

    def value(self, chosen: Iterable[int]) -> float:
        """What some units are worth together; the order does not matter, not even to rounding."""
        return float(sum(sorted(float(self.values[u]) for u in chosen)))

    def cost(self, cost: Cost, chosen: Iterable[int]) -> float:
        """What some units cost together."""
        chosen = sorted(chosen)
        if not chosen:
            return cost.base
        deepest = int(self.levels[chosen].max())
        return float(cost.base + cost.own[chosen].sum() + cost.reach[: deepest + 1].sum())

    def is_feasible(self, chosen: Sequence[int]) -> bool:
        """Whether a choice is allowed."""
        groups = self.group_of[list(chosen)]
        return (
            len(chosen) > 0
            and len(set(groups.tolist())) == len(groups)
            and frozenset(chosen) not in self.forbidden
            and all(self.cost(cost, chosen) <= cost.limit for cost in self.costs)
        )

    def singles(self) -> list[int]:
        """The units that are allowed alone.

        Raises:
            InfeasibleError: there are none.
        """
        alone = [u for u in range(len(self.values)) if self.is_feasible((u,))]
        if not alone:
            raise InfeasibleError("not one unit keeps the limits, even alone")
        return alone


@dataclass(frozen=True)
class Solution:
    """What a solver chose.

    Attributes:
        chosen: positions of units, ascending.
        objective: their value together.
        gap: by which fraction of it another choice might be worth more; None if that is not known.
    """

    chosen: tuple[int, ...]
    objective: float
    gap: float | None = None

    @classmethod
    def of(cls, problem: Problem, chosen: Iterable[int], gap: float | None = None) -> "Solution":
        """A choice and its value."""
        chosen = tuple(sorted(int(u) for u in chosen))
        return cls(chosen, problem.value(chosen), gap)


class Partial:
    """A choice under construction, with its costs kept up to date."""

    def __init__(self, problem: Problem):
        """Nothing is chosen yet."""
        self.problem = problem
        self.by_group: dict[int, int] = {}
        self._group_of = problem.group_of
        self._reached = [np.concatenate([[0.0], np.cumsum(c.reach)]) for c in problem.costs]

    @property
    def chosen(self) -> tuple[int, ...]:
        """Positions of the chosen units, ascending."""
        return tuple(sorted(self.by_group.values()))

    def with_unit(self, unit: int) -> tuple[int, ...]:
        """The choice with a unit in place of the one of its group."""
        group = int(self._group_of[unit])
        return tuple(sorted([unit, *(u for g, u in self.by_group.items() if g != group)]))

    def costs(self, chosen: Sequence[int]) -> list[float]:
        """Every cost of a choice."""
        index = list(chosen)
        deepest = int(self.problem.levels[index].max()) + 1 if index else 0
        return [
            float(cost.base + cost.own[index].sum() + reached[deepest])
            for cost, reached in zip(self.problem.costs, self._reached, strict=True)
        ]

    def fits(self, chosen: Sequence[int]) -> bool:
        """Whether a choice, with at most one unit of a group, keeps the limits."""
        pairs = zip(self.costs(chosen), self.problem.costs, strict=True)
        return all(found <= cost.limit for found, cost in pairs)

    def put(self, unit: int) -> None:
        """Chooses a unit, in place of the one of its group."""
        self.by_group[int(self._group_of[unit])] = unit

    def fill(self, order: Iterable[int]) -> None:
        """Adds units in order: those that are worth something, where their group is free."""
        for unit in order:
            group = int(self._group_of[unit])
            if group not in self.by_group and self.problem.values[unit] > 0:
                if self.fits(self.with_unit(unit)):
                    self.by_group[group] = unit


def best_single(problem: Problem) -> tuple[int, ...]:
    """The unit that is worth most among those that are allowed alone."""
    return (max(problem.singles(), key=lambda u: (float(problem.values[u]), -u)),)


def better(problem: Problem, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The choice that is worth more; the first if they are equal."""
    return b if problem.value(b) > problem.value(a) else a
