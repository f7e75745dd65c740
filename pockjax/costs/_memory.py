"""Bytes: of a tree, of an executable, and of a jaxpr that was not compiled."""

from dataclasses import asdict, dataclass
from typing import Any

import jax

from pockjax._compat import Jaxpr, JaxprEqn, Var, subjaxprs
from pockjax.autodiff import size_in_bytes


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


_VIEWS = frozenset(
    "reshape squeeze expand_dims copy_p stop_gradient name sharding_constraint".split()
)
_FUSED = frozenset(
    """
    abs add add_any and broadcast_in_dim ceil clamp concatenate convert_element_type cos div eq erf
    erf_inv exp exp2 expm1 floor ge gt integer_pow iota is_finite le log log1p logistic lt max min
    mul ne neg not one_minus_square or pad pow rem rev round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin slice dynamic_slice split sqrt square sub
    tan tanh xor transpose empty2 full real imag custom_jvp_call
    """.split()
)


def predict_temp_bytes(jaxpr: Jaxpr) -> int:
    """Peak bytes of intermediate arrays when a jaxpr runs in order.

    A model of XLA's buffers, not a copy of them: elementwise functions and views are fused into
    their readers unless several read them or one is a product, and an array is held from where it
    is made to its last reader. Arguments and results are not counted.

    Args:
        jaxpr: with its nested jits inlined.
    """
    materialized = _materialized(jaxpr)
    outputs = {v for v in jaxpr.outvars if isinstance(v, Var)}
    last: dict[Var, int] = {}
    roots: dict[Var, set[Var]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        read = set().union(*(roots.get(a, {a}) for a in eqn.invars if isinstance(a, Var)), set())
        for var in read:
            last[var] = i
        for j, var in enumerate(eqn.outvars):
            # A fused value holds what it reads until it is itself read.
            if eqn.primitive.name == "optimization_barrier":
                atom = eqn.invars[j]
                roots[var] = roots.get(atom, {atom}) if isinstance(atom, Var) else set()
            else:
                roots[var] = {var} if var in materialized else read
    live, peak = 0, 0
    made: dict[int, list[Var]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        fresh = [v for v in eqn.outvars if v in materialized and v not in outputs]
        live += sum(size_in_bytes(v.aval) for v in fresh)
        peak = max(peak, live + _inner_peak(eqn))
        for var in fresh:
            made.setdefault(last.get(var, i), []).append(var)
        live -= sum(size_in_bytes(v.aval) for v in made.pop(i, []))
    return peak


def _materialized(jaxpr: Jaxpr) -> set[Var]:
    readers: dict[Var, list[JaxprEqn]] = {}
    for eqn in jaxpr.eqns:
        for atom in {a for a in eqn.invars if isinstance(a, Var)}:
            readers.setdefault(atom, []).append(eqn)
    found: set[Var] = set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _VIEWS or name == "optimization_barrier":
            continue
        for var in eqn.outvars:
            fusible = name in _FUSED and all(
                r.primitive.name in _FUSED | _VIEWS or r.primitive.name.startswith("reduce")
                for r in readers.get(var, [])
            )
            cheap_again = len(readers.get(var, [])) <= 1 or name in ("broadcast_in_dim", "iota")
            if not (fusible and cheap_again):
                found.add(var)
    return found


def _inner_peak(eqn: JaxprEqn) -> int:
    if eqn.primitive.name == "custom_jvp_call":
        return 0
    return max(map(predict_temp_bytes, subjaxprs(eqn)), default=0)
