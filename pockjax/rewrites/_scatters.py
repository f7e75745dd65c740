"""Scatters of one number into each row, as comparisons."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pockjax._compat import Jaxpr, JaxprEqn, Literal, is_sharded, shape_of
from pockjax.autodiff import computed, replaced

_MODES = (lax.GatherScatterMode.FILL_OR_DROP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def without_row_scatters(jaxpr: Jaxpr) -> Jaxpr:
    """Gradients of `jnp.take_along_axis` that add one number to each row of zeros.

    That of a cross entropy with integer labels is one: zeros of the size of all logits are written,
    and then read again. ``where(index == iota, number, 0)`` is fused into what reads it.

    Args:
        jaxpr: with its jits inlined. What is inside of other operations is left alone.
    """
    zeros: set[Any] = set()

    def rule(eqn: JaxprEqn) -> Any:
        if _makes_zeros(eqn):
            zeros.update(eqn.outvars)
        if eqn.primitive.name != "scatter-add" or not (eqn.invars[0] in zeros and _is_by_row(eqn)):
            return eqn
        return computed(lambda index, updates: _selected(eqn, index, updates), *eqn.invars[1:])

    return replaced(jaxpr, rule)


def _makes_zeros(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "broadcast_in_dim":
        return False
    [x, *_] = eqn.invars
    return isinstance(x, Literal) and not shape_of(x) and x.val == 0


def _is_by_row(eqn: JaxprEqn) -> bool:
    """Whether there is one index along one axis for each row, and no two for the same."""
    numbers, (_, index, updates) = eqn.params["dimension_numbers"], eqn.invars
    if is_sharded(eqn) or any(isinstance(a, Literal) for a in eqn.invars):
        return False
    axes, out = numbers.scatter_dims_to_operand_dims, shape_of(eqn.outvars[0])
    if len(axes) != 1 or axes != numbers.inserted_window_dims or eqn.params["mode"] not in _MODES:
        return False
    shape = shape_of(index)[:-1]
    alone = all(n == 1 or i in numbers.scatter_indices_batching_dims for i, n in enumerate(shape))
    window = [n for i, n in enumerate(out) if i not in (*axes, *numbers.operand_batching_dims)]
    whole = window == [shape_of(updates)[i] for i in numbers.update_window_dims]
    return alone and whole and not eqn.params["update_consts"]


def _selected(eqn: JaxprEqn, index: jax.Array, updates: jax.Array) -> jax.Array:
    """The updates where the index is, and zeros elsewhere."""
    numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn.outvars[0])
    [axis] = numbers.scatter_dims_to_operand_dims
    rows = dict(
        zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    window = [i for i in range(len(shape)) if i not in (axis, *numbers.operand_batching_dims)]
    inside = dict(zip(numbers.update_window_dims, window, strict=True))
    outside = [i for i in range(updates.ndim) if i not in inside]
    # The axes of the updates that are no window's are those of the indices, in order.
    where = inside | {i: rows[k] for k, i in enumerate(outside) if k in rows}
    if jnp.iinfo(index.dtype).max < shape[axis]:
        index = index.astype(jnp.int32)
    here = lax.broadcasted_iota(index.dtype, shape, axis) == _placed(index, rows, shape)
    return jnp.where(here, _placed(updates, where, shape), jnp.zeros((), updates.dtype))


def _placed(x: jax.Array, where: dict[int, int], shape: tuple[int, ...]) -> jax.Array:
    """``x`` with its axes where they are said to be; the others are of size one."""
    kept = sorted(where, key=where.__getitem__)
    x = jnp.transpose(x, [*kept, *(i for i in range(x.ndim) if i not in where)])
    x = x.reshape([x.shape[k] for k in range(len(kept))])
    return lax.broadcast_in_dim(x, shape, [where[i] for i in kept])
