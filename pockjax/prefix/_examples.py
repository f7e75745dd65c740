"""Which axis of each array in a program goes through the examples of a batch.

An array has an axis of examples if, cut along it into as many equal blocks as there are examples,
each block depends on its own example alone. The rules below keep that true; what no rule is known
for counts as mixing examples.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from pockjax._compat import Jaxpr, JaxprEqn, Var, shape_of
from pockjax.autodiff import ELEMENTWISE

type Axes = dict[Var, int]
"""Of arrays with an axis of examples: which."""

_KEPT_IN_ROWS = frozenset("copy copy_p stop_gradient name reduce_precision".split()) | ELEMENTWISE
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax "
    "argmin".split()
)
_SCANS = frozenset("cumsum cummax cummin cumprod cumlogsumexp".split())
_WINDOWS = frozenset("reduce_window_sum reduce_window_max reduce_window_min".split())


class MixedExamples(ValueError):
    """An operation whose result for one example may depend on the others."""


class UnequalPieces(MixedExamples):
    """A batch that cannot be cut into so many equal pieces."""


def axes_of(jaxpr: Jaxpr, batch: Sequence[Var], size: int) -> Axes:
    """The axis of examples of every array that has one.

    Args:
        jaxpr: a program without nested calls.
        batch: inputs whose first axis is that of examples.
        size: number of examples.

    Raises:
        MixedExamples: if an operation mixes examples, as far as is known.
    """
    axes: Axes = dict.fromkeys(batch, 0)
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    for eqn in jaxpr.eqns:
        _follow(eqn, axes, makers, size)
    # Arrays that are the same for all examples may have got their axis after they were read.
    found = dict(axes)
    for eqn in jaxpr.eqns:
        _follow(eqn, axes, makers, size)
    if axes != found:
        raise MixedExamples("an array is read both for each example and for all of them")
    return axes


def _follow(eqn: JaxprEqn, axes: Axes, makers: Mapping[Var, JaxprEqn], size: int) -> None:
    read = [(a, axes[a]) for a in eqn.invars if isinstance(a, Var) and a in axes]
    if not read:
        return
    axis = _axis_after(eqn, axes, size)
    if axis is None:
        raise MixedExamples(f"{eqn.primitive.name} may mix the examples of a batch")
    if eqn.primitive.name in _KEPT_IN_ROWS | {"concatenate"}:
        for atom in eqn.invars:
            if isinstance(atom, Var) and atom not in axes and _reaches(atom, axis):
                _spread(atom, axis, axes, makers)
    for v in eqn.outvars:
        if shape_of(v)[axis] % size:
            raise MixedExamples(f"{eqn.primitive.name} changes the axis of examples")
        if axes.setdefault(v, axis) != axis:
            raise MixedExamples(f"{eqn.primitive.name} has two axes of examples")


def _reaches(atom: Any, axis: int) -> bool:
    """Whether an operand has an entry of its own for each position along an axis."""
    shape = shape_of(atom)
    return len(shape) > axis and shape[axis] != 1


def _spread(var: Any, axis: int, axes: Axes, makers: Mapping[Var, JaxprEqn]) -> None:
    """Gives an array that is the same for all examples an axis of them, and what it is made of."""
    eqn = makers.get(var) if isinstance(var, Var) else None
    if eqn is None or axes.get(var, axis) != axis or len(eqn.outvars) != 1:
        raise MixedExamples("a constant differs from example to example")
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        [operand, *_], dims = eqn.invars, eqn.params["broadcast_dimensions"]
        if axis in dims and _reaches(operand, dims.index(axis)):
            _spread(operand, dims.index(axis), axes, makers)
    elif name in _KEPT_IN_ROWS:
        for atom in eqn.invars:
            if _reaches(atom, axis):
                _spread(atom, axis, axes, makers)
    else:
        raise MixedExamples("a constant differs from example to example")
    axes[var] = axis


def _axis_after(eqn: JaxprEqn, axes: Axes, size: int) -> int | None:
    """The axis of examples of a result; None if it has none, or no rule is known."""
    name, params = eqn.primitive.name, eqn.params
    known = [axes.get(a) if isinstance(a, Var) else None for a in eqn.invars]
    first, given = known[0], {axis for axis in known if axis is not None}
    if name in _KEPT_IN_ROWS:
        return given.pop() if len(given) == 1 else None
    if name == "concatenate":
        return given.pop() if len(given) == 1 and params["dimension"] not in given else None
    if name == "dot_general":
        return _after_product(eqn, known)
    if name == "conv_general_dilated":
        spec = params["dimension_numbers"]
        alone = known[1] is None and params["batch_group_count"] == 1
        return spec.out_spec[0] if alone and first == spec.lhs_spec[0] else None
    if name == "gather":
        offsets = params["dimension_numbers"].offset_dims
        batching = params["dimension_numbers"].operand_batching_dims
        if known[0] is not None or known[1] is None or batching:
            return None
        rows = [i for i in range(len(shape_of(eqn.outvars[0]))) if i not in offsets]
        return rows[known[1]] if known[1] < len(rows) else None
    if first is None or any(shape_of(other) for other in eqn.invars[1:]):
        return None
    return _after_view(eqn, first, size)


def _after_view(eqn: JaxprEqn, axis: int, size: int) -> int | None:
    """The axis of examples of what is made of one array."""
    name, params, shape = eqn.primitive.name, eqn.params, shape_of(eqn.invars[0])
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    if name == "squeeze":
        return axis - sum(d < axis for d in params["dimensions"])
    if name == "expand_dims":
        return [i for i in range(len(shape_of(eqn.outvars[0]))) if i not in params["dimensions"]][
            axis
        ]
    if name == "reshape":
        before, new = prod(shape[:axis]), shape_of(eqn.outvars[0])
        # Axes further in may be joined with it, or split off: an example stays one block.
        places = [i for i in range(len(new)) if prod(new[:i]) == before and new[i] % size == 0]
        return places[0] if params["dimensions"] is None and places else None
    if name in _REDUCTIONS:
        gone = params["axes"]
        return None if axis in gone else axis - sum(d < axis for d in gone)
    if name in _SCANS:
        return None if params["axis"] == axis else axis
    if name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        start, limit = params["start_indices"][axis], params["limit_indices"][axis]
        return axis if (start, limit, strides[axis]) == (0, shape[axis], 1) else None
    if name == "split":
        return None if params["axis"] == axis else axis
    if name == "sort":
        return None if params["dimension"] == axis else axis
    if name == "rev":
        return None if axis in params["dimensions"] else axis
    if name == "pad":
        return axis if tuple(params["padding_config"][axis]) == (0, 0, 0) else None
    if name in _WINDOWS:
        own = [params[k][axis] for k in ("window_dimensions", "window_strides", "padding")]
        dilations = [params[k][axis] for k in ("base_dilation", "window_dilation")]
        return axis if own == [1, 1, (0, 0)] and dilations == [1, 1] else None
    return None


def _after_product(eqn: JaxprEqn, known: Sequence[int | None]) -> int | None:
    (contracted, batched), shapes = eqn.params["dimension_numbers"], list(map(shape_of, eqn.invars))
    if None not in known:
        pairs = list(zip(*batched, strict=True))
        return pairs.index(tuple(known)) if tuple(known) in pairs else None
    side = 0 if known[0] is not None else 1
    axis = known[side]
    assert axis is not None
    if axis in contracted[side] or axis in batched[side]:
        return None
    free = [
        [i for i in range(len(shapes[k])) if i not in (*contracted[k], *batched[k])] for k in (0, 1)
    ]
    return len(batched[0]) + side * len(free[0]) + free[side].index(axis)


def for_a_piece(eqn: JaxprEqn, axes: Axes, pieces: int) -> dict[str, Any]:
    """The parameters of an operation on one of several equal pieces of the examples."""
    name, params = eqn.primitive.name, dict(eqn.params)
    key = {"broadcast_in_dim": "shape", "reshape": "new_sizes", "slice": "limit_indices"}.get(name)
    if key is not None:
        out, axis = eqn.outvars[0], axes[eqn.outvars[0]]
        sizes = list(params[key])
        sizes[axis] = shape_of(out)[axis] // pieces
        params[key] = tuple(sizes)
    return params
