"""Views of a weight on its way to a product carry its trained blocks along."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pockjax._compat import JaxprEqn, bind
from pockjax.autodiff._exposed import Context, DenseError, Term, Value, carrying, rule
from pockjax.masks._selection import Selection, length, take


def _carried(eqn: JaxprEqn, value: Value, terms: Sequence[Term]) -> Value:
    [base] = bind(eqn, [value.base])
    return carrying(base, terms, [value])


def _bind_one(eqn: JaxprEqn, *args: Any) -> Any:
    [out] = bind(eqn, args)
    return out


def _bind_part(eqn: JaxprEqn, delta: Any) -> Any:
    """The operation on a block, for which the sharding of the whole array means nothing."""
    params = {k: None if k in ("sharding", "out_sharding") else v for k, v in eqn.params.items()}
    [out] = bind(eqn, [delta], params)
    return out


@rule("neg", "copy", "copy_p", "reduce_precision", "pvary", "real", "name")
def _elementwise_linear(ctx: Context, eqn: JaxprEqn, x: Value) -> Value:
    terms = [t.moved(_bind_part(eqn, t.delta), x.shape, t.selections) for t in x.terms]
    return _carried(eqn, x, terms)


@rule("convert_element_type")
def _cast(ctx: Context, eqn: JaxprEqn, x: Value) -> list[Value] | Value:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
        raise DenseError("cast to a dtype that has no gradient")
    return _elementwise_linear(ctx, eqn, x)


@rule("sharding_constraint", "reshard")
def _constrained(ctx: Context, eqn: JaxprEqn, x: Value) -> Value:
    # What is laid out is the whole array; a block of it need not divide over the devices.
    return _carried(eqn, x, x.terms)


@rule("transpose")
def _transpose(ctx: Context, eqn: JaxprEqn, x: Value) -> Value:
    order = eqn.params["permutation"]
    shape = [x.shape[i] for i in order]
    terms = [
        t.moved(lax.transpose(t.delta, order), shape, [t.selections[i] for i in order])
        for t in x.terms
    ]
    return _carried(eqn, x, terms)


@rule("broadcast_in_dim")
def _broadcast(ctx: Context, eqn: JaxprEqn, x: Value, *dynamic: Value) -> Value:
    if dynamic:
        raise DenseError("broadcast to a dynamic shape")
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]

    def move(term: Term) -> Term:
        selections: list[Selection] = [None] * len(shape)
        packed = list(shape)
        for axis, dim in enumerate(dims):
            # Of an axis of size 1 a part is all there is, and so of all its copies.
            if x.shape[axis] == shape[dim]:
                selections[dim] = term.selections[axis]
                packed[dim] = term.delta.shape[axis]
        return term.moved(lax.broadcast_in_dim(term.delta, packed, dims), shape, selections)

    return _carried(eqn, x, [move(t) for t in x.terms])


@rule("reduce_sum")
def _reduce_sum(ctx: Context, eqn: JaxprEqn, x: Value) -> Value:
    axes = eqn.params["axes"]
    kept = [i for i in range(x.ndim) if i not in axes]
    shape = [x.shape[i] for i in kept]
    terms = [
        t.moved(_bind_part(eqn, t.delta), shape, [t.selections[i] for i in kept]) for t in x.terms
    ]
    return _carried(eqn, x, terms)


@rule("rev")
def _rev(ctx: Context, eqn: JaxprEqn, x: Value) -> Value:
    dims = eqn.params["dimensions"]

    def mirrored(selection: Selection, size: int) -> Selection:
        if selection is None:
            return None
        positions = _positions(selection, size)
        return size - 1 - positions[::-1]

    def move(term: Term) -> Term:
        selections = [
            mirrored(s, n) if i in dims else s
            for i, (s, n) in enumerate(zip(term.selections, x.shape, strict=True))
        ]
        return term.moved(lax.rev(term.delta, dims), x.shape, selections)

    return _carried(eqn, x, [move(t) for t in x.terms])


@rule("slice")
def _slice(ctx: Context, eqn: JaxprEqn, x: Value) -> Value:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * x.ndim
    windows = [range(a, b, s) for a, b, s in zip(starts, limits, strides, strict=True)]
    terms = [_windowed(ctx, eqn, term, windows) for term in x.terms]
    return _carried(eqn, x, [t for t in terms if t is not None])


@rule("split")
def _split(ctx: Context, eqn: JaxprEqn, x: Value) -> list[Value]:
    axis, outs, start = eqn.params["axis"], [], 0
    bases = bind(eqn, [x.base])
    for base, size in zip(bases, eqn.params["sizes"], strict=True):
        windows = [range(n) for n in x.shape]
        windows[axis] = range(start, start + size)
        terms = [_windowed(ctx, eqn, term, windows) for term in x.terms]
        kept = tuple(t for t in terms if t is not None)
        outs.append(carrying(base, kept, [x]))
        start += size
    return outs


def _windowed(ctx: Context, eqn: JaxprEqn, term: Term, windows: Sequence[range]) -> Term | None:
    """The term inside a window of its array; None where they do not meet."""
    for axis, window in enumerate(windows):
        size, selection = term.block.shape[axis], term.selections[axis]
        if window == range(size):
            continue
        if not window:
            return None
        if selection is not None and not isinstance(selection, slice | np.ndarray):
            ctx.note([term], eqn, "a slice across traced indices")
            term, selection = term.widened(axis), None
        positions = _positions(selection, size)
        inside = np.array([p in window for p in positions.tolist()], bool)
        if not inside.any():
            return None
        # Positions inside the window are picked from delta by where they stand in it.
        picked = _as_slice(np.flatnonzero(inside))
        moved = (positions[inside] - window.start) // window.step
        shape = list(term.block.shape)
        shape[axis] = len(window)
        selections = list(term.selections)
        selections[axis] = moved
        term = term.moved(take(term.delta, picked, axis), shape, selections)
    return term


@rule("dynamic_slice")
def _dynamic_slice(ctx: Context, eqn: JaxprEqn, x: Value, *starts: Value) -> Value:
    if any(v.terms for v in starts):
        raise DenseError("trained indices")
    sizes = eqn.params["slice_sizes"]

    def move(term: Term) -> Term:
        for axis, size in enumerate(sizes):
            if size != x.shape[axis] and term.selections[axis] is not None:
                ctx.note([term], eqn, "a slice at a traced position across a trained part")
                term = term.widened(axis)
        # A whole axis is sliced from 0 whatever start was asked for: starts are clamped.
        begins = [
            v.base if size != x.shape[i] else jnp.zeros_like(v.base)
            for i, (v, size) in enumerate(zip(starts, sizes, strict=True))
        ]
        packed = [
            size if size != x.shape[i] else term.delta.shape[i] for i, size in enumerate(sizes)
        ]
        return term.moved(lax.dynamic_slice(term.delta, begins, packed), sizes, term.selections)

    terms = [move(t) for t in x.terms]
    return carrying(_bind_one(eqn, x.base, *(v.base for v in starts)), terms, [x, *starts])


@rule("concatenate")
def _concatenate(ctx: Context, eqn: JaxprEqn, *operands: Value) -> Value:
    axis, offset, terms = eqn.params["dimension"], 0, []
    total = sum(v.shape[axis] for v in operands)
    for operand in operands:
        shape = list(operand.shape)
        shape[axis] = total
        for term in operand.terms:
            selections = list(term.selections)
            selections[axis] = _shifted(selections[axis], offset, operand.shape[axis])
            terms.append(term.moved(term.delta, shape, selections))
        offset += operand.shape[axis]
    return carrying(_bind_one(eqn, *(v.base for v in operands)), terms, operands)


def _shifted(selection: Selection, offset: int, size: int) -> Selection:
    if selection is None:
        return slice(offset, offset + size, 1)
    if isinstance(selection, slice):
        return slice(selection.start + offset, selection.stop + offset, selection.step)
    return _positions(selection, size) + offset


@rule("reshape", "squeeze", "expand_dims")
def _reshape(ctx: Context, eqn: JaxprEqn, x: Value) -> Value:
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        raise DenseError("reshape that permutes")
    out = _bind_one(eqn, x.base)
    return carrying(out, [_reshaped(ctx, eqn, term, out.shape) for term in x.terms], [x])


def _reshaped(ctx: Context, eqn: JaxprEqn, term: Term, shape: tuple[int, ...]) -> Term:
    selections: list[Selection] = [None] * len(shape)
    for ins, outs in reshape_groups(term.block.shape, shape):
        chosen = [term.selections[i] for i in ins]
        if all(s is None for s in chosen):
            continue
        merged = _merge(chosen, [term.block.shape[i] for i in ins])
        parts = _unmerge(merged, [shape[o] for o in outs])
        if parts is None:
            ctx.note([term], eqn, "a reshape that mixes trained and frozen positions")
            for axis in ins:
                term = term.widened(axis)
            continue
        for axis, part in zip(outs, parts, strict=True):
            selections[axis] = part
    packed = [length(s, n) for s, n in zip(selections, shape, strict=True)]
    return term.moved(lax.reshape(term.delta, packed), shape, selections)


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of axes that a reshape maps onto each other, without axes of size 1."""
    groups: list[tuple[list[int], list[int]]] = []
    olds = [i for i, n in enumerate(old) if n != 1]
    news = [i for i, n in enumerate(new) if n != 1]
    while olds and news:
        ins, outs = [olds.pop(0)], [news.pop(0)]
        left, right = old[ins[0]], new[outs[0]]
        while left != right:
            if left < right:
                ins.append(olds.pop(0))
                left *= old[ins[-1]]
            else:
                outs.append(news.pop(0))
                right *= new[outs[-1]]
        groups.append((ins, outs))
    return groups


def _merge(selections: Sequence[Selection], sizes: Sequence[int]) -> Selection:
    """The selection of the product of axes, in row-major order."""
    flat = _positions(selections[0], sizes[0])
    for selection, size in zip(selections[1:], sizes[1:], strict=True):
        flat = (flat[:, None] * size + _positions(selection, size)[None, :]).reshape(-1)
    return flat


def _unmerge(flat: Any, sizes: Sequence[int]) -> list[Selection] | None:
    """Splits the selection of a product of axes into one each; None if it is not a product."""
    if len(sizes) == 1:
        return [flat]
    if not isinstance(flat, np.ndarray):
        return None
    digits = np.unravel_index(flat, sizes)
    # Positions in order of first appearance, so that an unsorted selection keeps its order.
    parts = [d[np.sort(np.unique(d, return_index=True)[1])] for d in digits]
    if np.prod([len(p) for p in parts]) != len(flat):
        return None
    grid = np.ravel_multi_index(np.meshgrid(*parts, indexing="ij"), sizes).reshape(-1)
    return list(parts) if np.array_equal(grid, flat) else None


def _positions(selection: Selection, size: int) -> Any:
    """The selected positions as an index array: numpy if static, JAX if traced."""
    if selection is None:
        return np.arange(size)
    if isinstance(selection, slice):
        return np.arange(selection.start, selection.stop, selection.step)
    # Positions grow where axes are merged or joined, so a narrow dtype could overflow.
    return selection.astype(np.int32)


def _as_slice(positions: np.ndarray) -> Selection:
    steps = np.diff(positions)
    if steps.size and np.any(steps != steps[0]):
        return positions
    step = int(steps[0]) if steps.size else 1
    return slice(int(positions[0]), int(positions[-1]) + 1, step)
