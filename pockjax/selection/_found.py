"""What a search hands back."""

from dataclasses import dataclass
from typing import Any

from pockjax.autodiff import Plan
from pockjax.masks import Scheme
from pockjax.selection._units import Unit
from pockjax.selection.solvers import Solution
from pockjax.training import Step

PyTree = Any


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
