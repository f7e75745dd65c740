"""Embedding look-ups: trained rows and trained features of a table."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pockjax._compat import JaxprEqn, bind
from pockjax.autodiff._exposed import Context, DenseError, Term, Value, rule, written_out
from pockjax.masks._selection import Selection, length


@rule("gather")
def _gather(ctx: Context, eqn: JaxprEqn, table: Value, indices: Value) -> Value:
    if indices.terms:
        raise DenseError("trained indices")
    numbers = eqn.params["dimension_numbers"]
    if numbers.operand_batching_dims:
        raise DenseError("a gather with batch axes")
    [out] = bind(eqn, [table.base, indices.base])
    terms = [_term(ctx, eqn, term, indices.base, out.shape) for term in table.terms]
    return written_out(out, terms, [table, indices])


def _term(
    ctx: Context, eqn: JaxprEqn, term: Term, indices: Any, out_shape: tuple[int, ...]
) -> Term:
    """Look up the trained rows: positions in the block, or out of bounds for frozen rows."""
    numbers, sizes = eqn.params["dimension_numbers"], list(eqn.params["slice_sizes"])
    kept = [d for d in range(len(sizes)) if d not in numbers.collapsed_slice_dims]
    selections: list[Selection] = [None] * len(out_shape)
    mode = lax.GatherScatterMode.from_any(eqn.params["mode"])
    columns = [indices[..., i].astype(_index_dtype(indices)) for i in range(indices.shape[-1])]
    if mode == lax.GatherScatterMode.CLIP:
        limits = [term.block.shape[d] - sizes[d] for d in numbers.start_index_map]
        columns = [jnp.clip(c, 0, limit) for c, limit in zip(columns, limits, strict=True)]
    for axis, size in enumerate(term.block.shape):
        selection = term.selections[axis]
        if selection is None:
            continue
        if axis in kept and sizes[axis] == size:
            selections[numbers.offset_dims[kept.index(axis)]] = selection
            sizes[axis] = term.delta.shape[axis]
            # A window over the whole axis can only start at 0, or be filled as out of bounds.
        elif axis in numbers.start_index_map and sizes[axis] == 1:
            column = numbers.start_index_map.index(axis)
            columns[column] = _rows(columns[column], selection, size)
        else:
            ctx.note([term], eqn, "a window across a trained part")
            term = term.widened(axis)
            sizes[axis] = eqn.params["slice_sizes"][axis]
    params = {
        **eqn.params,
        "slice_sizes": tuple(sizes),
        "mode": lax.GatherScatterMode.FILL_OR_DROP,
        "fill_value": 0,
        "indices_are_sorted": False,
        # All frozen rows are looked up at the one place that stands for them.
        "unique_indices": False,
    }
    [rows] = bind(eqn, [term.delta, jnp.stack(columns, axis=-1)], params)
    return term.moved(rows, out_shape, selections)


def _index_dtype(indices: Any) -> Any:
    # A narrow or unsigned dtype could not hold the row that stands for "not trained".
    return indices.dtype if indices.dtype in (jnp.int32, jnp.int64) else jnp.int32


def _rows(ids: Any, selection: Selection, size: int) -> Any:
    """Where each id stands among the selected rows; the number of rows where it does not."""
    if isinstance(selection, slice):
        count = len(range(selection.start, selection.stop, selection.step))
        offset = ids - selection.start
        place = offset // selection.step
        inside = (offset % selection.step == 0) & (place >= 0) & (place < count)
        return jnp.where(inside, place, count)
    count = length(selection, size)
    if isinstance(selection, np.ndarray):
        table = np.full((size,), count, ids.dtype)
        table[selection] = np.arange(count)
        places = jnp.asarray(table)
    else:
        places = jnp.full((size,), count, ids.dtype)
        places = places.at[selection].set(jnp.arange(count, dtype=ids.dtype), unique_indices=True)
    # Negative ids are out of bounds here, not counted from the end.
    ids = jnp.where(ids < 0, size, ids)
    return places.at[ids].get(mode="fill", fill_value=count)
