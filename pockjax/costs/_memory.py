"""Bytes: of a tree, of an executable, and of a jaxpr that was not compiled."""

from dataclasses import asdict, dataclass
from typing import Any

import jax

from pockjax._compat import Jaxpr
from pockjax.autodiff import size_in_bytes
from pockjax.costs._liveness import peak_bytes

_WORTH_ANOTHER_ORDER = 0.9  # of the usual order's bytes
_PAGE = 4096  # less than which no order saves


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays (or shapes) of a pytree.

    >>> import jax.numpy as jnp
    >>> tree_bytes({"w": jnp.ones((2, 3)), "frozen": None})
    24
    """
    leaves = jax.tree.leaves(tree)
    return sum(size_in_bytes(x) for x in leaves if hasattr(x, "shape") and hasattr(x, "dtype"))


@dataclass(frozen=True)
class CompiledCost:
    """What an executable takes, as XLA says; bytes and operations per call.

    Attributes:
        argument_bytes: of its arguments.
        output_bytes: of its results.
        alias_bytes: of results written into the memory of donated arguments.
        temp_bytes: of everything in between.
        flops: operations, as XLA counts them (a loop's body once).
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    flops: float

    @property
    def total_bytes(self) -> int:
        """Memory that a call needs: arguments, results that share none, and the rest."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    @classmethod
    def of(cls, compiled: Any) -> "CompiledCost":
        """The cost of a `jax.stages.Compiled`."""
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        return cls(
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes,
            flops=float(cost.get("flops", 0.0)),
        )

    def as_dict(self) -> dict[str, float]:
        """The fields and the total, for JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def best_order(jaxpr: Jaxpr) -> tuple[bool, int]:
    """The order of operations to compile a program for on a CPU.

    XLA's default runs first what is ready first, and so computes what the backward pass needs again
    for all layers at its start. Depth first takes half the memory for some programs, and more for
    others.

    Returns:
        Whether depth first is predicted to take clearly less, and the temporary bytes predicted.
    """
    breadth, depth = peak_bytes(jaxpr)
    clearly = depth < min(_WORTH_ANOTHER_ORDER * breadth, breadth - _PAGE)
    return (True, depth) if clearly else (False, breadth)


def predict_temp_bytes(jaxpr: Jaxpr, depth_first: bool = False) -> int:
    """Bytes of intermediate arrays that XLA would set aside for a program on a CPU.

    Follows the rules by which XLA fuses operations, orders them and places their arrays, as far as
    large arrays depend on them. Arguments, and results in the memory of donated arguments, are not
    counted.

    Args:
        jaxpr: of the whole program.
        depth_first: whether it is compiled for the order of operations that takes the least memory,
            instead of XLA's default for a CPU, which runs first what is ready first.

    >>> import jax, jax.numpy as jnp
    >>> two_layers = lambda x, w: jnp.tanh(x @ w) @ w
    >>> x, w = jnp.ones((256, 64)), jnp.ones((64, 64))
    >>> predict_temp_bytes(jax.make_jaxpr(two_layers)(x, w))  # tanh overwrites the product
    65536
    >>> CompiledCost.of(jax.jit(two_layers).lower(x, w).compile()).temp_bytes
    65536
    """
    return peak_bytes(jaxpr)[depth_first]
