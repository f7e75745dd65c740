"""Matrix products, of any contraction and batch layout, with a trained weight on either side."""

import jax

from pockjax._compat import JaxprEqn, bind, primal_of
from pockjax.autodiff._exposed import Context, Term, Value, rule, written_out
from pockjax.masks._selection import Selection, take, whole_along


@rule("dot_general")
def _dot_general(ctx: Context, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    if lhs.terms and rhs.terms:
        small, _ = sorted((lhs, rhs), key=lambda v: v.base.size)
        ctx.note(small.terms, eqn, "product of two trained weights")
        lhs, rhs = (v.collapsed() if v is small else v for v in (lhs, rhs))
    [out] = bind(eqn, [lhs.base, rhs.base])
    side, masked, other = (0, lhs, rhs) if lhs.terms else (1, rhs, lhs)
    terms = [_term(eqn, side, term, other.base, out.shape) for term in masked.terms]
    return written_out(out, terms, [lhs, rhs])


def _term(
    eqn: JaxprEqn, side: int, term: Term, other: jax.Array, out_shape: tuple[int, ...]
) -> Term:
    """The product of a weight's block with the part of ``other`` that meets it."""
    contract, batch = eqn.params["dimension_numbers"]
    ndims = [0, 0]
    ndims[side], ndims[1 - side] = term.delta.ndim, other.ndim
    free = [
        [d for d in range(n) if d not in contract[i] and d not in batch[i]]
        for i, n in enumerate(ndims)
    ]
    other = primal_of(other)
    # Axes shared with the other operand restrict it; the free ones restrict the output.
    for mine, theirs in zip(
        (*contract[side], *batch[side]), (*contract[1 - side], *batch[1 - side]), strict=True
    ):
        other = take(other, term.selections[mine], theirs)
    selections: list[Selection] = [None] * len(out_shape)
    for position, axis in enumerate(batch[side]):
        selections[position] = term.selections[axis]
    offset = len(batch[side]) + (len(free[0]) if side == 1 else 0)
    for position, axis in enumerate(free[side]):
        selections[offset + position] = term.selections[axis]
    params = dict(eqn.params)
    if params["out_sharding"] is not None:
        cut = [axis for axis, selection in enumerate(selections) if selection is not None]
        params["out_sharding"] = whole_along(params["out_sharding"], cut)
    operands = (term.delta, other) if side == 0 else (other, term.delta)
    [product] = bind(eqn, operands, params)
    return term.moved(product, out_shape, selections)
