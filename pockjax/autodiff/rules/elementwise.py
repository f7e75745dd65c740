"""Scales and biases: sums and products, element by element, with a trained weight."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pockjax._compat import JaxprEqn, bind, primal_of
from pockjax.autodiff._exposed import Context, DenseError, Term, Value, carrying, rule
from pockjax.masks._selection import Selection, take


def _spread(term: Term, shape: Sequence[int]) -> tuple[list[Selection], list[int]]:
    """Selections and packed shape of a term whose size-1 axes are broadcast to ``shape``."""
    if not term.block.shape:
        return [None] * len(shape), list(shape)
    selections, packed = list(term.selections), list(term.delta.shape)
    for axis, size in enumerate(shape):
        if term.block.shape[axis] != size:
            selections[axis], packed[axis] = None, size
    return selections, packed


def _restricted(x: jax.Array, selections: Sequence[Selection]) -> jax.Array:
    """The part of ``x`` that meets a term; axes of size 1 are broadcast and stay."""
    x = primal_of(x)
    if x.ndim:
        for axis, selection in enumerate(selections):
            if x.shape[axis] != 1:
                x = take(x, selection, axis)
    return x


def _added(out: jax.Array, values: Sequence[Value], terms: Sequence[Term]) -> Value:
    value = carrying(out, terms, values)
    # Among weights the block is carried on to the product; activations take the term in.
    return value if value.weight else value.collapsed()


@rule("add", "add_any", "sub")
def _sum(ctx: Context, eqn: JaxprEqn, x: Value, y: Value) -> Value:
    [out] = bind(eqn, [x.base, y.base])
    terms = []
    for value, negated in ((x, False), (y, eqn.primitive.name == "sub")):
        for term in value.terms:
            selections, packed = _spread(term, out.shape)
            delta = lax.neg(term.delta) if negated else term.delta
            delta = lax.broadcast_in_dim(delta, packed, range(delta.ndim))
            terms.append(term.moved(delta, out.shape, selections))
    return _added(out, (x, y), terms)


@rule("mul")
def _product(ctx: Context, eqn: JaxprEqn, x: Value, y: Value) -> Value:
    if x.terms and y.terms:
        # One block is kept; the smaller operand is read with its own terms added.
        small, large = sorted((x, y), key=lambda v: v.base.size)
        ctx.note(small.terms, eqn, "product of two trained weights")
        small = small.collapsed()
        x, y = large, small
    masked, other = (x, y) if x.terms else (y, x)
    [out] = bind(eqn, [x.base, y.base])
    terms = []
    for term in masked.terms:
        selections, _ = _spread(term, out.shape)
        factor = _restricted(jnp.asarray(other.base), selections)
        terms.append(term.moved(lax.mul(term.delta, factor), out.shape, selections))
    return _added(out, (x, y), terms)


@rule("div")
def _quotient(ctx: Context, eqn: JaxprEqn, x: Value, y: Value) -> Value:
    if y.terms:
        raise DenseError("division by a trained weight")
    [out] = bind(eqn, [x.base, y.base])
    terms = []
    for term in x.terms:
        selections, _ = _spread(term, out.shape)
        divisor = _restricted(jnp.asarray(y.base), selections)
        terms.append(term.moved(lax.div(term.delta, divisor), out.shape, selections))
    return _added(out, (x, y), terms)
