"""What choices of units take: predicted, compiled, and predicted better for what was compiled."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax

from pockjax._compat import eval_jaxpr
from pockjax.autodiff import Plan, trace
from pockjax.costs import CompiledCost, Prediction
from pockjax.masks import Part, named_entries
from pockjax.masks import mask as make_mask
from pockjax.selection._sensitivity import Sensitivity
from pockjax.selection._surrogate import feature
from pockjax.selection._units import Unit, union
from pockjax.training import CostModel, Step
from pockjax.training import compile as compile_step

PyTree = Any
type Chosen = tuple[int, ...]

_PREDICTED = 4  # single units that may be the cheapest, predicted in full


class Choices:
    """The units that may be chosen, and what choices of them take.

    Choices are positions of units. What was predicted or compiled once is remembered.

    Attributes:
        units: the units, without what is trained in any case.
        values: (units,): what each is worth.
        groups: positions of the units of each group.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        params: PyTree,
        data: Any,
        sens: Sensitivity,
        tx: optax.GradientTransformation,
        beside: Any,
        options: dict[str, Any],
    ):
        """The arguments are those of `search`."""
        self.params, self._fun, self._tx, self._options = params, fun, tx, options
        self._batch = _batch_of(data)
        self._beside = _entries(params, beside)
        self.units, self.values = self._valued(sens)
        if not self.units:
            raise ValueError("there are no units to choose from")
        members: dict[str, list[int]] = {}
        # One mask trains one block of an array: layers of a stack that are offered with different
        # channels exclude each other.
        cut = {path for unit in self.units if unit.stacked and unit.ratio < 1
               for path, _ in unit.entries}  # fmt: skip
        for u, unit in enumerate(self.units):
            stack = next((path for path, _ in unit.entries if unit.stacked and path in cut), None)
            members.setdefault(stack or unit.group, []).append(u)
        self.groups = tuple(map(tuple, members.values()))
        self._costs = CostModel(fun, tx, params, *self._batch, **options)
        self._predictions: dict[tuple[Chosen, Plan], Prediction] = {}
        self._alone: dict[int, Prediction] = {}
        self._compiled: dict[tuple[Chosen, Plan], tuple[Step, dict[str, float]]] = {}

    def _valued(self, sens: Sensitivity) -> tuple[tuple[Unit, ...], np.ndarray]:
        units = _without(sens.units, self._beside)
        pairs = [(u, float(x)) for u, x in zip(units, sens.mean, strict=True) if u.entries]
        for unit, worth in pairs:
            if not np.isfinite(worth):
                raise ValueError(f"what '{unit.name}' is worth is {worth}, which no search can use")
        return tuple(unit for unit, _ in pairs), np.array([worth for _, worth in pairs])

    def worth(self, sens: Sensitivity) -> "Choices":
        """The same choices by other sensitivities, with all that is known of their costs."""
        units, values = self._valued(sens)
        # Indices of channels may differ, for each criterion has channels of its own.
        if units != self.units:
            raise ValueError(
                "sensitivities of other units than those of the search (the criterion may have "
                "chosen other channels): begin another search"
            )
        other = copy(self)
        other.values = values
        return other

    def mask(self, chosen: Sequence[int]) -> PyTree:
        """The mask of a choice and of what is trained in any case."""
        beside = [replace(self.units[0], entries=self._beside)] if self._beside else []
        units = [*beside, *(self.units[u] for u in chosen)]
        return union(self.params, units) if units else False

    def best_plan(self) -> Plan:
        """The blocks to compute again if anything might be trained."""
        paths = {path for unit in self.units for path, _ in unit.entries}
        return self._costs.best_plan(make_mask(self.params, lambda path, leaf: path in paths))

    def predict(self, chosen: Sequence[int], plan: Plan) -> Prediction:
        """What a choice takes by the cost model."""
        key = (tuple(chosen), plan)
        if key not in self._predictions:
            self._predictions[key] = self._costs.predict(self.mask(chosen), plan)
        return self._predictions[key]

    def predict_each(self, progress: Callable[[int], Any]) -> list[Prediction]:
        """What each unit takes alone, apart from how the peak of memory grows."""
        between = self._between()
        ends = [u for u in range(len(self.units)) if u not in between]
        masks = [self.mask((u,)) for u in ends]
        made = self._costs.predict_each(masks, [0] * len(masks), progress)
        self._alone.update(zip(ends, made, strict=True))
        for u, (low, high) in between.items():
            ratio, least, most = (self.units[i].ratio for i in (u, low, high))
            share = (ratio - least) / (most - least)
            self._alone[u] = self._alone[low].towards(self._alone[high], share)
        return [self._alone[u] for u in range(len(self.units))]

    def _between(self) -> dict[int, tuple[int, int]]:
        """Parts of a weight, and the smallest part and the whole.

        What a part takes grows with its channels; to differentiate the loss for each takes longer.
        """
        found: dict[int, tuple[int, int]] = {}
        for members in self.groups:
            by_axis: dict[tuple[str, int | None], list[int]] = {}
            for u in members:
                if self.units[u].kind == "weight":
                    by_axis.setdefault((self.units[u].group, self.units[u].axis), []).append(u)
            for (group, axis), parts in by_axis.items():
                whole = by_axis.get((group, None), [])
                if axis is not None and whole:
                    low = min(parts, key=lambda u: self.units[u].ratio)
                    found |= {u: (low, whole[0]) for u in parts if u != low}
        return found

    def cheapest(self, plan: Plan, limits: Mapping[str, float]) -> int:
        """The unit that comes nearest to limits, alone.

        Only those are predicted in full that come nearest by what was counted of each.
        """

        def excess(found: Mapping[str, float]) -> float:
            return max((found[name] / limits[name] for name in found), default=0.0)

        def roughly(u: int) -> float:
            return excess(self._named(self._alone[u], limits))

        nearest = sorted(range(len(self.units)), key=roughly)[:_PREDICTED]
        return min(nearest, key=lambda u: (excess(self.expected((u,), plan, limits)), u))

    def predicted(
        self, chosen: Sequence[int], plan: Plan, names: Iterable[str]
    ) -> dict[str, float]:
        """The same by name, without latency where the cost model knows no times."""
        return self._named(self.predict(chosen, plan), names)

    def _named(self, prediction: Prediction, names: Iterable[str]) -> dict[str, float]:
        return {
            name: self._quantity(name, prediction)
            for name in names
            if name != "latency" or prediction.seconds is not None
        }

    def _quantity(self, name: str, p: Prediction) -> float:
        """A prediction as an amount; latency that is not calibrated is known up to a factor."""
        match name:
            case "memory":
                return float(p.memory_bytes)
            case "extra_memory":
                return float(p.memory_bytes - self._inference_bytes)
            case _:
                return feature(name, p)

    def expected(
        self, chosen: Sequence[int], plan: Plan, names: Iterable[str], *, hopeful: bool = False
    ) -> dict[str, float]:
        """What a choice is expected to take, by the cost model and what was compiled like it.

        Args:
            chosen: positions of units.
            plan: what is computed again.
            names: of the quantities; latency is left out while nothing is known of times.
            hopeful: correct by the most favourable error that was found instead of by the nearest.
        """
        prediction, found = self.predict(chosen, plan), {}
        known = self._compiled.get((tuple(chosen), plan), (None, {}))[1]
        for name in names:
            value = self._quantity(name, prediction)
            pairs = [
                (self._quantity(name, self.predict(*key)), costs[name])
                for key, (_, costs) in self._compiled.items()
                if bool(key[1]) == bool(plan) and name in costs
            ]
            if name in known:
                found[name] = known[name]
            elif name == "latency":
                if pairs or prediction.seconds is not None:
                    found[name] = value * _error(pairs, value, np.divide, 1.0, hopeful)
            else:
                found[name] = value + _error(pairs, value, np.subtract, 0.0, hopeful)
        return found

    def compiled(
        self, chosen: Chosen, plan: Plan, names: Iterable[str]
    ) -> tuple[Step, dict[str, float]]:
        """The compiled step of a choice, and what it takes."""
        names = tuple(names)
        step, costs = self._compiled.get((chosen, plan), (None, {}))
        if step is None:
            step = compile_step(
                self._fun, self.mask(chosen), self._tx, self.params, *self._batch,
                remat=plan, **self._options,
            )  # fmt: skip
        costs = costs | self._measured(step, [name for name in names if name not in costs])
        self._compiled[chosen, plan] = step, costs
        return step, {name: costs[name] for name in names}

    def full(self, names: Iterable[str]) -> dict[str, float]:
        """What full backpropagation takes, compiled."""
        return self._measured(self._full_step, names)

    @cached_property
    def _full_step(self) -> Step:
        return compile_step(self._fun, True, self._tx, self.params, *self._batch, **self._options)

    @cached_property
    def _inference_bytes(self) -> int:
        """Memory of the forward pass alone."""
        key = self._options.get("key")
        args = (*self._batch, *([] if key is None else [key]))
        primal = trace(self._fun, self.params, args, has_aux=self._options.get("has_aux", False))
        forward = jax.jit(lambda *arrays: eval_jaxpr(primal.jaxpr, primal.jaxpr.consts, *arrays))
        return CompiledCost.of(forward.lower(*primal.jaxpr.in_avals).compile()).total_bytes

    def _measured(self, step: Step, names: Iterable[str]) -> dict[str, float]:
        found = {}
        for name in names:
            match name:
                case "memory":
                    found[name] = float(step.report.compiled.total_bytes)
                case "extra_memory":
                    memory = step.report.compiled.total_bytes
                    found[name] = float(memory - self._inference_bytes)
                case "latency":
                    found[name] = self._seconds(step)
                case "flops":
                    found[name] = float(step.report.flops)
                case _:
                    found[name] = float(step.report.optimizer_bytes)
        return found

    def _seconds(self, step: Step) -> float:
        leaves = jax.tree.leaves((self.params, self._batch))
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            raise ValueError("a budget of latency needs arrays to time steps, not their shapes")
        return step.measure(step.init(self.params), *self._batch, steps=15, limit=20.0).seconds


def _error(
    pairs: Sequence[tuple[float, float]],
    value: float,
    compare: Callable[[float, float], Any],
    default: float,
    hopeful: bool,
) -> float:
    """By how much predictions were wrong: near a value, or at best."""
    if not pairs:
        return default
    errors = [float(compare(actual, predicted)) for predicted, actual in pairs]
    # Errors differ from one end of the network to the other.
    nearest = min(range(len(pairs)), key=lambda i: abs(pairs[i][0] - value))
    return min(errors) if hopeful else errors[nearest]


def _batch_of(data: Any) -> tuple[Any, ...]:
    """The first batch of data that may be a batch itself."""
    if isinstance(data, tuple) and not (data and isinstance(data[0], tuple)):
        return tuple(data)
    first = next(iter(data))
    return tuple(first) if isinstance(first, tuple | list) else (first,)


def _entries(params: PyTree, beside: Any) -> tuple[tuple[str, bool | Part], ...]:
    """Path and what is trained of it, for all that a mask trains."""
    if beside is None:
        return ()
    named = named_entries(make_mask(params, beside))
    return tuple((path, entry) for path, entry in named if entry is not False)


def _without(units: Sequence[Unit], beside: Sequence[tuple[str, Any]]) -> list[Unit]:
    """Units without the arrays that are trained in any case."""
    taken = {path for path, _ in beside}
    return [
        replace(unit, entries=tuple(e for e in unit.entries if e[0] not in taken)) for unit in units
    ]
