"""Products as XLA's libraries take them: operands in the right order, and of two axes."""

from math import prod

import jax
from jax import lax

from pockjax._compat import Jaxpr, JaxprEqn, is_sharded, shape_of
from pockjax.autodiff import replaced_where


def with_small_transposes(jaxpr: Jaxpr) -> Jaxpr:
    """Products of batches in the order in which the smaller operand has to be transposed.

    The gradient of attention's keys is a product of the transposed scores with the queries. No
    library of XLA's for the CPU takes a first operand that is transposed: another, slower one is
    called, or the operand is copied. The second operand may lie either way. Products without a
    batch stay as they are: to transpose their results would take longer.

    Args:
        jaxpr: with its jits inlined. What is inside of other operations is left alone.
    """
    return replaced_where(jaxpr, _is_turned, _turned)


def _is_turned(eqn: JaxprEqn) -> bool:
    """Whether a product of batches of matrices has its larger operand first, and transposed."""
    if eqn.primitive.name != "dot_general" or is_sharded(eqn):
        return False
    (contract, _), (batch, _) = eqn.params["dimension_numbers"]
    first, second = map(shape_of, eqn.invars)
    rank = len(batch) + 2
    if not batch or len(contract) != 1 or (len(first), len(second)) != (rank, rank):
        return False
    [free] = set(range(len(first))) - {*contract, *batch}
    return contract[0] < free and prod(first) > prod(second)


def _turned(eqn: JaxprEqn, a: jax.Array, b: jax.Array) -> jax.Array:
    (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    params = {
        **eqn.params,
        "dimension_numbers": ((contract_b, contract_a), (batch_b, batch_a)),
    }
    if isinstance(precision := params["precision"], tuple):
        params["precision"] = precision[::-1]
    # Without the barrier, XLA makes of product and transpose the product that was asked for.
    y = lax.optimization_barrier(eqn.primitive.bind(b, a, **params))
    return y.swapaxes(-1, -2)


def with_flat_products(jaxpr: Jaxpr) -> Jaxpr:
    """Sums over several leading axes of two arrays as products of two matrices.

    That is the gradient of a dense layer's weights, a sum over examples and positions. XLA brings
    the axes to an order of its own, for which it copies the larger operand transposed, and then
    reads both against their order: 1.6 times slower (``python -m experiments.rewrites``). Matrices
    it leaves as they are.

    Args:
        jaxpr: what is inside of other operations is left alone.
    """
    return replaced_where(jaxpr, _sums_over_leading_axes, _flat)


def _sums_over_leading_axes(eqn: JaxprEqn) -> bool:
    """Whether a product sums over the same leading axes of two arrays, one no matrix."""
    if eqn.primitive.name != "dot_general" or is_sharded(eqn):
        return False
    (first, second), (batch, _) = eqn.params["dimension_numbers"]
    if batch or first != second or sorted(first) != list(range(len(first))):
        return False
    shapes = [shape_of(a) for a in eqn.invars]
    alone = len(first) and all(len(shape) > len(first) for shape in shapes)
    return bool(alone) and any(len(shape) > 2 for shape in shapes)


def _flat(eqn: JaxprEqn, a: jax.Array, b: jax.Array) -> jax.Array:
    n = len(eqn.params["dimension_numbers"][0][0])
    rows = prod(a.shape[:n])
    params = {**eqn.params, "dimension_numbers": (((0,), (0,)), ((), ()))}
    flat = [x.reshape(rows, prod(x.shape[n:])) for x in (a, b)]
    return eqn.primitive.bind(*flat, **params).reshape(*a.shape[n:], *b.shape[n:])
