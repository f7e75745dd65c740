"""What a mask is expected to cost, before anything is compiled for it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

QUANTITIES = ("memory_bytes", "flops", "seconds", "optimizer_bytes")


@dataclass(frozen=True)
class Prediction:
    """What a training step of one mask is expected to cost; bytes and operations per step.

    Attributes:
        memory_bytes: the memory a step needs: its arguments, results that share none of their
            memory, and everything in between; to stand beside `CompiledCost.total_bytes`.
        argument_bytes: parameters, optimizer state and batch.
        temp_bytes: everything in between; to stand beside ``CompiledCost.temp_bytes``.
        residual_bytes: of that, what the backward pass keeps from the forward pass.
        optimizer_bytes: of the arguments, the optimizer's state.
        gradient_bytes: the packed gradient.
        flops: floating-point operations, loops counted as often as they run.
        seconds: time of a step; None until a model was calibrated on this machine.
    """

    memory_bytes: int
    argument_bytes: int
    temp_bytes: int
    residual_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    flops: int
    seconds: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """The fields, for JSON."""
        return asdict(self)

    def towards(self, other: "Prediction", share: float) -> "Prediction":
        """A prediction between two: this for a ``share`` of 0, the other for 1."""

        def mixed(a: Any, b: Any) -> Any:
            if a is None or b is None:
                return None
            value = a + share * (b - a)
            return round(value) if isinstance(a, int) else value

        names = [field.name for field in fields(self)]
        return Prediction(**{n: mixed(getattr(self, n), getattr(other, n)) for n in names})


@dataclass(frozen=True, eq=False)
class Separable:
    """What units cost, as sums that a linear solver can take.

    A set of units costs ``base``, plus ``own`` of each of them, plus ``reach`` of each depth from
    the output down to the lowest of them.

    Attributes:
        base: of the forward pass alone, by quantity (see `QUANTITIES`).
        own: (units,) each: of a unit, beside the backward pass that reaches it.
        reach: (depths,) each: of passing the backward pass through a depth.
        depths: (depths,): the depths, ascending.
        unit_depths: (units,): the depth of each unit.
    """

    base: dict[str, float]
    own: dict[str, np.ndarray]
    reach: dict[str, np.ndarray]
    depths: np.ndarray
    unit_depths: np.ndarray

    def cost(self, chosen: Sequence[int], quantity: str) -> float:
        """What a set of units costs.

        Args:
            chosen: positions of the units.
            quantity: one of `QUANTITIES`.
        """
        if not len(chosen):
            return self.base[quantity]
        chosen = list(chosen)
        lowest = self.unit_depths[chosen].min()
        reached = self.reach[quantity][self.depths >= lowest].sum()
        return float(self.base[quantity] + self.own[quantity][chosen].sum() + reached)

    @classmethod
    def fitted(
        cls, base: dict[str, float], alone: Sequence[Prediction], depths: Sequence[int]
    ) -> "Separable":
        """From what each unit costs alone.

        At each depth, what the cheapest unit costs beyond its own arrays is taken for the way
        there, no more than for any greater depth's way onwards.

        Args:
            base: what the forward pass costs alone.
            alone: the cost of each unit alone.
            depths: the depth of each unit.
        """
        at = np.array(depths)
        levels = np.unique(at)
        own, reach = {}, {}
        for name in base:
            values = np.array([float(getattr(p, name) or 0.0) for p in alone]) - base[name]
            arrays = _own_bytes(name, alone)
            way = np.array([np.min((values - arrays)[at == d]) for d in levels])
            # Going further down never costs less, seen from any unit above.
            way = np.minimum.accumulate(np.maximum(way, 0.0))
            own[name] = np.maximum(values - way[np.searchsorted(levels, at)], 0.0)
            reach[name] = way - np.append(way[1:], 0.0)
        return cls(base, own, reach, levels, at)


def _own_bytes(name: str, alone: Sequence[Prediction]) -> np.ndarray:
    """What of a unit's cost is surely its own."""
    if name in ("optimizer_bytes", "memory_bytes"):
        return np.array([float(p.optimizer_bytes) for p in alone])
    return np.zeros(len(alone))
