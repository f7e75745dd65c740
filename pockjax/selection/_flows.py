"""How parameters, and the channels that they make, move through a jaxpr's operations.

A value is made of parameters alone, or it is an activation. Views, casts and arithmetic among
parameters keep track of which axes of the parameter an axis of the value is made of.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pockjax._compat import JaxprEqn, shape_of
from pockjax.autodiff import reshape_groups

Axes = tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Trail:
    """A parameter inside a value that is made of parameters alone.

    ``axes`` says for each axis of the value which axes of the parameter it is made of; None if that
    is not known any more.
    """

    leaf: int
    axes: Axes | None
    rows: tuple[tuple[int, int], ...] = ()
    grain: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Flow:
    """What is known of a value: made of parameters alone (``trails``), or an activation.

    Of an activation, ``channels`` says for each axis which products have made it, and ``merged``
    into how many heads it was cut before.
    """

    activation: bool
    trails: tuple[Trail, ...] = ()
    channels: tuple[frozenset[int], ...] = ()
    merged: tuple[int, ...] = ()


CONSTANT = Flow(False)
_ALIKE = frozenset("neg copy copy_p reduce_precision convert_element_type name pvary".split())


def owned(trail: Trail, dims: Iterable[int]) -> tuple[int, ...]:
    """The axes of the parameter that some axes of the value are made of."""
    assert trail.axes is not None
    return tuple(dict.fromkeys(a for d in dims for a in sorted(trail.axes[d])))


def axis_size(trail: Trail, shape: Sequence[int], axis: int) -> int:
    assert trail.axes is not None
    return math.prod(n for n, owners in zip(shape, trail.axes, strict=True) if axis in owners)


def opaque(flow: Flow) -> Flow:
    """The same value with parameters in it of which no part can be followed."""
    return replace(flow, trails=tuple(replace(t, axes=None) for t in flow.trails))


def joined(flows: Sequence[Flow]) -> Flow:
    """Either of several values."""
    first = flows[0]
    if all(flow == first for flow in flows):
        return first
    trails = {(t.leaf, t.rows): replace(t, axes=None) for flow in flows for t in flow.trails}
    return Flow(any(f.activation for f in flows), tuple(trails.values()))


def layer_of(flow: Flow, layer: int = 0) -> Flow:
    """What one turn of a loop sees of a stacked value."""

    def cut(trail: Trail) -> Trail:
        if trail.axes is None or len(trail.axes[0]) != 1:
            return replace(trail, axes=None)
        [axis] = trail.axes[0]
        return replace(trail, axes=trail.axes[1:], rows=(*trail.rows, (axis, layer)))

    return Flow(flow.activation, tuple(map(cut, flow.trails)), flow.channels[1:], flow.merged[1:])


def among_weights(eqn: JaxprEqn, ins: list[Flow]) -> list[Flow]:
    """What an operation makes of parameters that have met no activation yet."""
    name = eqn.primitive.name
    if not any(flow.trails for flow in ins):
        return [CONSTANT] * len(eqn.outvars)
    shapes, out = [shape_of(a) for a in eqn.invars], shape_of(eqn.outvars[0])
    if name == "split":
        return [ins[0]] * len(eqn.outvars)
    moved: list[Trail] = []
    for operand, flow in enumerate(ins):
        for trail in flow.trails:
            if trail.axes is not None:
                trail = _moved(eqn, operand, trail, shapes, out)
            moved.append(trail)
    by_key = {(t.leaf, t.rows): t for t in moved}
    if len(by_key) < len(moved):  # one parameter met itself
        by_key = {key: replace(t, axes=None) for key, t in by_key.items()}
    return [Flow(False, tuple(by_key.values()))] * len(eqn.outvars)


def _moved(
    eqn: JaxprEqn, operand: int, trail: Trail, shapes: list[tuple[int, ...]], out: tuple[int, ...]
) -> Trail:
    name, params, shape = eqn.primitive.name, eqn.params, shapes[operand]
    axes = trail.axes
    assert axes is not None
    lost = replace(trail, axes=None)
    none: frozenset[int] = frozenset()
    if name in _ALIKE or name in ("sharding_constraint", "reshard"):
        return trail
    if name in ("add", "sub", "add_any", "mul") or (name == "div" and operand == 0):
        if len(shape) != len(out):
            return replace(trail, axes=(none,) * len(out)) if not shape else lost
        return trail
    if name == "transpose":
        return replace(trail, axes=tuple(axes[d] for d in params["permutation"]))
    if name == "broadcast_in_dim":
        spread = [none] * len(out)
        for d, target in enumerate(params["broadcast_dimensions"]):
            spread[target] = axes[d] if shape[d] == out[target] else none
        return replace(trail, axes=tuple(spread))
    if name == "reduce_sum":
        if any(axes[d] for d in params["axes"] if shape[d] > 1):
            return lost
        return replace(trail, axes=tuple(a for d, a in enumerate(axes) if d not in params["axes"]))
    if name == "slice":
        return _sliced(trail, shape, params)
    if name in ("rev", "dynamic_slice", "concatenate") and operand == 0:
        changed = [d for d, n in enumerate(shape) if n != out[d]]
        if name == "concatenate" or not any(axes[d] for d in changed):
            return trail
        return lost
    if name == "concatenate":
        return trail
    if name in ("reshape", "squeeze", "expand_dims") and (
        name != "reshape" or params.get("dimensions") is None
    ):
        return _reshaped(trail, shape, out)
    return lost


def _sliced(trail: Trail, shape: tuple[int, ...], params: dict[str, Any]) -> Trail:
    """A slice of a stack is one of its layers; any other keeps the parameter's axes."""
    axes, rows = list(trail.axes or ()), list(trail.rows)
    starts, stops = params["start_indices"], params["limit_indices"]
    for d, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if stop - start == 1 < shape[d] and len(axes[d]) == 1:
            rows.append((min(axes[d]), start))
            axes[d] = frozenset()
        elif stop - start < shape[d] and dict(trail.grain).keys() & axes[d]:
            return replace(trail, axes=None)
    return replace(trail, axes=tuple(axes), rows=tuple(rows))


def _reshaped(trail: Trail, shape: tuple[int, ...], out: tuple[int, ...]) -> Trail:
    axes: list[frozenset[int]] = [frozenset()] * len(out)
    grain = dict(trail.grain)
    for ins, outs in reshape_groups(shape, out):
        owners = frozenset[int]().union(*(trail.axes[i] for i in ins if trail.axes))
        for o in outs:
            axes[o] = owners
        if len(outs) > 1 and owners:
            if len(ins) > 1 or len(owners) > 1:
                return replace(trail, axes=None)
            [axis] = owners
            grain[axis] = grain.get(axis, 1) * math.prod(out[o] for o in outs[1:])
    return replace(trail, axes=tuple(axes), grain=tuple(sorted(grain.items())))


def activation_of(eqn: JaxprEqn, var: Any, ins: list[Flow], ids: list[int]) -> Flow:
    """The channels of an activation, as far as views and elementwise functions keep them."""
    shape, name = shape_of(var), eqn.primitive.name
    channels: list[frozenset[int]] = [frozenset()] * len(shape)
    merged = [1] * len(shape)
    if name == "dot_general" and ids:
        (contract, batch), side = eqn.params["dimension_numbers"], int(ins[0].activation)
        taken = {*contract[side], *batch[side]}
        free = len(shape_of(eqn.invars[side])) - len(taken)
        for d in range(len(shape) - free, len(shape)) if side else range(len(batch[0]), free):
            channels[d] = frozenset(ids)
    elif name == "transpose":
        order = eqn.params["permutation"]
        channels = [ins[0].channels[d] for d in order] if ins[0].channels else channels
    elif name == "reshape":
        return _reshaped_activation(ins[0], shape_of(eqn.invars[0]), shape)
    else:
        for flow, atom in zip(ins, eqn.invars, strict=True):
            if flow.channels and shape_of(atom) == shape:
                channels = [a | b for a, b in zip(channels, flow.channels, strict=True)]
                merged = [max(a, b) for a, b in zip(merged, flow.merged, strict=True)]
    return Flow(True, (), tuple(channels), tuple(merged))


def _reshaped_activation(flow: Flow, shape: tuple[int, ...], out: tuple[int, ...]) -> Flow:
    channels: list[frozenset[int]] = [frozenset()] * len(out)
    merged = [1] * len(out)
    for ins, outs in reshape_groups(shape, out):
        if len(outs) == 1:
            merged[outs[0]] = shape[ins[0]] if len(ins) > 1 else flow.merged[ins[0]]
        if len(ins) == 1 and flow.channels:
            for o in outs:
                channels[o] = flow.channels[ins[0]]
    return Flow(True, (), tuple(channels), tuple(merged))
