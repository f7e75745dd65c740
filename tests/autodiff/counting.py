"""Counting work: from the executable, and (where that counts loop bodies once) from the jaxpr."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax


@dataclass(frozen=True)
class Cost:
    """What an executable does and holds."""

    flops: float
    temp_bytes: int


def compiled_cost(fun: Callable[..., Any], *args: Any) -> Cost:
    """Cost of a function as XLA compiles it. The body of a loop counts once."""
    compiled = jax.jit(fun).lower(*args).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None and cost is not None
    return Cost(cost["flops"], memory.temp_size_in_bytes)


def traced_flops(fun: Callable[..., Any], *args: Any) -> int:
    """Multiplications and additions of the products in a function, loops times their length."""
    return _flops(jax.make_jaxpr(fun)(*args).jaxpr)


def _flops(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * prod(eqn.outvars[0].aval.shape) * prod(shape[a] for a in contract)
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = [j for j in jax.tree.leaves(list(eqn.params.values())) if hasattr(j, "eqns")]
        total += times * sum(map(_flops, inner))
    return total
