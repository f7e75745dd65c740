"""Products of batches of matrices with the smaller operand first."""

from math import prod
from typing import Any

import jax
from jax import lax

from pockjax._compat import Jaxpr, JaxprEqn, is_sharded, shape_of
from pockjax.autodiff import computed, replaced


def with_small_transposes(jaxpr: Jaxpr) -> Jaxpr:
    """Products of batches in the order in which the smaller operand has to be transposed.

    The gradient of attention's keys is a product of the transposed scores with the queries. No
    library of XLA's for the CPU takes a first operand that is transposed: another, slower one is
    called, or the operand is copied. The second operand may lie either way. Products without a
    batch stay as they are: to transpose their results would take longer.

    Args:
        jaxpr: with its jits inlined. What is inside of other operations is left alone.
    """

    def rule(eqn: JaxprEqn) -> Any:
        if not _is_turned(eqn):
            return eqn
        return computed(lambda a, b: _turned(eqn, a, b), *eqn.invars)

    return replaced(jaxpr, rule)


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
