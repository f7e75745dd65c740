"""Products of batches of matrices with the smaller operand first."""

from functools import lru_cache
from math import prod
from typing import Any

import jax
from jax import lax

from pockjax._compat import Jaxpr, JaxprEqn, array_type, is_sharded, new_var, shape_of
from pockjax.autodiff import renamed, spliced


def with_small_transposes(jaxpr: Jaxpr) -> Jaxpr:
    """Products of batches in the order in which the smaller operand has to be transposed.

    The gradient of attention's keys is a product of the transposed scores with the queries. No
    library of XLA's for the CPU takes a first operand that is transposed: another, slower one is
    called, or the operand is copied. The second operand may lie either way.

    Args:
        jaxpr: with its jits inlined. What is inside of other operations is left alone.
    """
    if not any(_is_turned(eqn) for eqn in jaxpr.eqns):
        return jaxpr
    eqns: list[JaxprEqn] = []
    instead: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        eqn = eqn.replace(invars=renamed(eqn.invars, instead))
        if not _is_turned(eqn):
            eqns.append(eqn)
            continue
        [out] = eqn.outvars
        (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
        numbers = ((contract_b, contract_a), (batch_b, batch_a))
        *batch, rows, columns = shape_of(out)
        swapped = new_var(array_type((*batch, columns, rows), out.aval))
        params = {**eqn.params, "dimension_numbers": numbers}
        if isinstance(precision := params["precision"], tuple):
            params["precision"] = precision[::-1]
        eqns.append(eqn.replace(invars=eqn.invars[::-1], outvars=[swapped], params=params))
        [instead[out]] = spliced(_turned(swapped.aval), [swapped], eqns)
    return jaxpr.replace(eqns=eqns, outvars=renamed(jaxpr.outvars, instead))


@lru_cache(maxsize=4096)
def _turned(aval: Any) -> Jaxpr:
    """The exchange of the last two axes of an array of that type."""
    order = [*range(aval.ndim - 2), aval.ndim - 1, aval.ndim - 2]
    # Without the barrier, XLA makes of product and transpose the product that was asked for.
    return jax.make_jaxpr(lambda x: lax.transpose(lax.optimization_barrier(x), order))(aval)


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
