"""Costs as solvers need them: linear in the units, fitted to predictions of a cost model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pockjax.autodiff import Plan
from pockjax.costs import Prediction
from pockjax.selection._units import Unit
from pockjax.selection.solvers import Cost

type Predict = Callable[[Sequence[int], Plan], Prediction]

QUANTITIES = ("memory", "extra_memory", "latency", "flops", "optimizer")


def feature(name: str, p: Prediction) -> float:
    """What stands for a quantity among solvers: near it up to a constant, and nearly additive.

    The peak of memory is not additive, but what makes it up is: what is kept for the backward pass,
    gradients and optimizer state.
    """
    match name:
        case "memory" | "extra_memory":
            return float(p.residual_bytes + p.gradient_bytes + p.optimizer_bytes)
        case "latency":
            return float(p.flops if p.seconds is None else p.seconds)
        case "flops":
            return float(p.flops)
        case _:
            return float(p.optimizer_bytes)


def _own_bytes(name: str, p: Prediction) -> float:
    """The part of a feature that is a unit's own for certain: its gradient and optimizer state."""
    match name:
        case "memory" | "extra_memory":
            return float(p.gradient_bytes + p.optimizer_bytes)
        case "optimizer":
            return float(p.optimizer_bytes)
        case _:
            return 0.0


@dataclass(frozen=True, eq=False)
class Linear:
    """A feature, linear in what is chosen and in how far the backward pass reaches.

    Attributes:
        base: of training nothing.
        own: (units,): what each unit adds.
        reach: (levels,): what reaching each level adds.
    """

    base: float
    own: np.ndarray
    reach: np.ndarray

    def cost(self, name: str, limit: float) -> Cost:
        """The same with a limit."""
        return Cost(name, self.base, self.own, self.reach, limit)


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Every feature for one plan of what to compute again.

    Attributes:
        plan: the plan.
        features: by name of the quantity.
    """

    plan: Plan
    features: dict[str, Linear]


def levels_of(units: Sequence[Unit]) -> np.ndarray:
    """(units,): 0 for the units nearest to the output, one more for each depth below."""
    depths = sorted({unit.depth for unit in units}, reverse=True)
    return np.array([depths.index(unit.depth) for unit in units])


def fit(
    levels: np.ndarray,
    predict_each: Callable[[Callable[[int], Any]], list[Prediction]],
    predict: Predict,
    names: Sequence[str],
    plans: Sequence[Plan],
    progress: Callable[[int, int], Any],
) -> list[Surrogate]:
    """Fits a surrogate for each plan to predictions of single units.

    Without a plan every unit is predicted alone. What the cheapest unit of a level costs, its
    gradient and optimizer state aside, is the cost of reaching that level; the rest is each unit's
    own. With a plan, what a unit reads is computed again and not kept, so that only the cheapest
    unit of each level has to be predicted anew.

    Args:
        levels: (units,): how far the backward pass has to reach for each unit.
        predict_each: cost of each unit alone; is given what to tell the number of units done.
        predict: cost of some units, by position, under a plan.
        names: the quantities.
        plans: the plans; the first must be empty.
        progress: called with how many predictions are done, and of how many.
    """
    n_units, n_levels = len(levels), int(levels.max()) + 1
    total = n_units + (len(plans) - 1) * n_levels
    alone = predict_each(lambda done: progress(done, total))
    # What every mask has, however little it trains: a counter of steps, or what is trained beside.
    nothing = predict([], ())

    def own_bytes(name: str, p: Prediction) -> float:
        return max(0.0, _own_bytes(name, p) - _own_bytes(name, nothing))

    without = {
        name: np.array([feature(name, p) - own_bytes(name, p) for p in alone]) for name in names
    }
    cheapest = [
        min(np.flatnonzero(levels == level).tolist(), key=lambda u: (without[names[0]][u], u))
        for level in range(n_levels)
    ]
    reached = {
        name: np.maximum.accumulate(
            [without[name][levels == level].min() for level in range(n_levels)]
        )
        for name in names
    }
    own = {
        name: np.maximum(
            0.0, [feature(name, p) - reached[name][levels[u]] for u, p in enumerate(alone)]
        )
        for name in names
    }
    found = [Surrogate((), {name: _linear(reached[name], own[name]) for name in names})]
    for number, plan in enumerate(plans[1:]):
        again = []
        for level, u in enumerate(cheapest):
            again.append(predict([u], plan))
            progress(n_units + number * n_levels + level + 1, total)
        features = {}
        for name in names:
            reach = np.maximum.accumulate([feature(name, p) - own_bytes(name, p) for p in again])
            kept = name in ("memory", "extra_memory")
            mine = np.array([own_bytes(name, p) for p in alone]) if kept else own[name]
            features[name] = _linear(reach, mine)
        found.append(Surrogate(plan, features))
    return found


def _linear(reached: np.ndarray, own: np.ndarray) -> Linear:
    return Linear(float(reached[0]), own, np.diff(reached, prepend=reached[0]))
