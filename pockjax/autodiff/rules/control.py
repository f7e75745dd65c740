"""Functions inside functions: entered, and rebuilt through the public call that made them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from pockjax._compat import Jaxpr, JaxprEqn
from pockjax.autodiff._expose import expose
from pockjax.autodiff._exposed import (
    Context,
    Term,
    Value,
    derived,
    rule,
)
from pockjax.masks._selection import Block, resharded, whole_along


class Signature:
    """Values as a flat list of arrays (all the bases, then all the deltas), and back."""

    def __init__(self, values: Sequence[Value]):
        """Remembers what is not an array: liveness and blocks."""
        self.values = list(values)

    def arrays(self) -> list[Any]:
        """The arrays of the values."""
        return [v.base for v in self.values] + [t.delta for v in self.values for t in v.terms]

    def rebuilt(self, arrays: Sequence[Any]) -> list[Value]:
        """The values with other arrays of the same meaning."""
        bases, deltas = arrays[: len(self.values)], iter(arrays[len(self.values) :])
        return [
            Value(
                base,
                tuple(Term(next(deltas), t.block, t.path) for t in v.terms),
                v.live,
                v.weight,
            )
            for v, base in zip(self.values, bases, strict=True)
        ]


def _dense_call(ctx: Context, jaxpr: Jaxpr, signature: Signature) -> Callable[..., list[Any]]:
    """The exposed jaxpr as a function from flat arrays to plain arrays."""

    def call(*arrays: Any) -> list[Any]:
        outs = expose(ctx, jaxpr, signature.rebuilt(arrays))
        return [out.dense() for out in outs]

    return call


@rule("jit")
def _jit(ctx: Context, eqn: JaxprEqn, *values: Value) -> list[Value]:
    # A nested jit means nothing but its shardings, and those are kept as constraints.
    def constrained(value: Value, sharding: Any) -> Value:
        if not isinstance(sharding, jax.sharding.Sharding):
            return value
        base = lax.with_sharding_constraint(value.base, sharding)
        return Value(base, value.terms, value.live, value.weight)

    values = tuple(map(constrained, values, eqn.params["in_shardings"]))
    outs = expose(ctx, eqn.params["jaxpr"], values)
    return list(map(constrained, outs, eqn.params["out_shardings"]))


@rule("remat2", "checkpoint")
def _remat(ctx: Context, eqn: JaxprEqn, *values: Value) -> list[Value]:
    signature = Signature(values)
    call = jax.checkpoint(
        _dense_call(ctx, eqn.params["jaxpr"], signature),
        policy=eqn.params["policy"],
        prevent_cse=eqn.params["prevent_cse"],
    )
    return derived(values, call(*signature.arrays()))


@rule("cond")
def _cond(ctx: Context, eqn: JaxprEqn, index: Value, *values: Value) -> list[Value]:
    signature = Signature(values)
    branches = [_dense_call(ctx, branch, signature) for branch in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        outs = lax.switch(index.base, branches, *signature.arrays())
    else:
        # A branch need not even compile for the platforms that it is not for.
        pairs = list(zip(platforms, branches, strict=True))
        default = next((branch for names, branch in pairs if names is None), None)
        named = {name: branch for names, branch in pairs for name in names or ()}
        outs = lax.platform_dependent(*signature.arrays(), default=default, **named)
    return derived((index, *values), outs)


@rule("shard_map")
def _shard_map(ctx: Context, eqn: JaxprEqn, *values: Value) -> list[Value]:
    params = eqn.params
    specs, mesh, jaxpr = params["in_specs"], params["mesh"], params["jaxpr"]
    kept, deltas, delta_specs = [], [], []
    for value, spec in zip(values, specs, strict=True):
        # Indices are positions in the whole array: an axis cut across devices cannot keep them.
        split = {axis for axis, names in enumerate(spec) if names is not None}
        crossing = [t for t in value.terms if any(t.selections[a] is not None for a in split)]
        if crossing:
            ctx.note(crossing, eqn, "a part along an axis that is sharded")
            value = value.collapsed()
        kept.append(value)
        deltas += [_laid_out(term, value.base) for term in value.terms]
        delta_specs += [spec] * len(value.terms)
    inner = Signature([_local(v, s, mesh) for v, s in zip(kept, specs, strict=True)])
    call = jax.shard_map(
        _dense_call(ctx, jaxpr, inner),
        mesh=mesh,
        in_specs=(*specs, *delta_specs),
        out_specs=list(params["out_specs"]),
        axis_names=frozenset(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return derived(values, call(*(v.base for v in kept), *deltas))


def _laid_out(term: Term, base: Any) -> Any:
    """A block with the sharding type of its array, which is the one that the map asks for."""
    cut = [axis for axis, selection in enumerate(term.selections) if selection is not None]
    return resharded(term.delta, whole_along(jax.typeof(base).sharding, cut))


def _local(value: Value, spec: Any, mesh: Any) -> Value:
    """The value as one device sees it: blocks of the local shape."""

    def local(term: Term) -> Term:
        shape = list(term.block.shape)
        for axis, names in enumerate(spec):
            if names is not None:
                names = names if isinstance(names, tuple) else (names,)
                shape[axis] //= int(np.prod([mesh.shape[n] for n in names]))
        return Term(term.delta, Block(tuple(shape), term.selections), term.path)

    return Value(value.base, tuple(map(local, value.terms)), value.live, value.weight)
