"""A function taken apart: where its parameters meet activations; and evaluated with adapters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax import lax

from pockjax._compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    bind,
    eqn_context,
    is_reference,
    scan_arity,
    subjaxprs,
)
from pockjax.adapters._sites import Made, Site, made_of
from pockjax.autodiff import inlined

type Pairs = Mapping[int, tuple[Any, Any]]
type Origin = Made | None
"""Of what a value is made; None if it depends on the arguments."""


@dataclass(frozen=True, eq=False)
class Body:
    """A jaxpr, its operations with what is known of them.

    Attributes:
        jaxpr: its jits inlined.
        sites: of each operation, the operands beside which an adapter can stand.
        inner: the bodies of loops, branches and checkpointed blocks, by operation.
        made: of what its results are made.
        leaves: parameters with a site in it.
        layers: of these, the ones of which a loop hands it a layer at a time.
    """

    jaxpr: Jaxpr
    sites: list[list[tuple[int, Site]]]
    inner: dict[int, list["Body"]]
    made: list[Origin]
    leaves: frozenset[int]
    layers: frozenset[int]


@dataclass(frozen=True)
class Analysis:
    """Follows parameters through a function to where they meet activations.

    Attributes:
        sizes: numbers of elements of the parameters.
        uses: by parameter, what reads it together with activations: in words, and the site if an
            adapter can stand beside it.
    """

    sizes: Sequence[int]
    uses: dict[int, list[tuple[str, Site | None]]] = field(default_factory=dict)

    def whole(self, jaxpr: Jaxpr) -> Body:
        """A function of its parameters, then of its other arguments."""
        others: list[Origin] = [None] * (len(jaxpr.invars) - len(self.sizes))
        part = self.part(jaxpr, [*map(Made.of_param, range(len(self.sizes))), *others])
        self._leave(part.made, "it is in a result that the arguments do not decide")
        return part

    def part(self, jaxpr: Jaxpr, made: Sequence[Origin], n_layers: int = 0) -> Body:
        """A jaxpr whose inputs are made of these, the last ones a layer at a time."""
        jaxpr = inlined(jaxpr)
        origin: dict[Var, Origin] = dict.fromkeys(jaxpr.constvars, Made())
        origin.update(zip(jaxpr.invars, made, strict=True))

        def read(atom: Any) -> Origin:
            return Made() if isinstance(atom, Literal) else origin[atom]

        sites: list[list[tuple[int, Site]]] = []
        inner: dict[int, list[Body]] = {}
        for k, eqn in enumerate(jaxpr.eqns):
            ins = [read(atom) for atom in eqn.invars]
            sites.append([])
            entered = self._entered(eqn, ins)
            if entered is not None:
                inner[k], outs = entered
            else:
                outs = self._equation(sites[k], eqn, ins)
            origin.update(zip(eqn.outvars, outs, strict=True))
        own = [site.made.leaf for found in sites for _, site in found]
        leaves = frozenset(leaf for leaf in own if leaf is not None)
        leaves = leaves.union(*(body.leaves for bodies in inner.values() for body in bodies))
        taken = {m.leaf for m in made[len(made) - n_layers :] if m is not None}
        layers = frozenset(leaf for leaf in leaves if leaf in taken)
        return Body(jaxpr, sites, inner, list(map(read, jaxpr.outvars)), leaves, layers)

    def _entered(self, eqn: JaxprEqn, ins: list[Origin]) -> tuple[list[Body], list[Origin]] | None:
        """Follows an operation into what it evaluates; None if it is none of those."""
        bodies, n_layers = subjaxprs(eqn), 0
        match eqn.primitive.name:
            case "scan":
                n_consts, n_carry = scan_arity(eqn)
                first, length = n_consts + n_carry, eqn.params["length"]
                # What a loop carries is its own after the first turn.
                self._leave(ins[n_consts:first], "it is carried by a loop")
                layers = [m and m.layer(length) for m in ins[first:]]
                inside, n_layers = [[*ins[:n_consts], *[None] * n_carry, *layers]], len(layers)
            case "cond":
                self._leave(ins[:1], "it decides about a branch")
                inside = [ins[1:]] * len(bodies)
            case "remat2" | "checkpoint" if len(bodies) == 1:
                inside = [ins]
            case _:
                return None
        parts = [self.part(body, made, n_layers) for body, made in zip(bodies, inside, strict=True)]
        if eqn.primitive.name not in ("scan", "cond"):
            return parts, parts[0].made
        for part in parts:
            self._leave(part.made, f"it leaves a {eqn.primitive.name} without activations")
        return parts, [None] * len(eqn.outvars)

    def _equation(
        self, sites: list[tuple[int, Site]], eqn: JaxprEqn, ins: list[Origin]
    ) -> list[Origin]:
        if eqn.primitive.name == "optimization_barrier":
            return ins
        known = [m for m in ins if m is not None]
        if len(known) == len(ins) and not any(is_reference(v) for v in eqn.outvars):
            return [made_of(eqn, known, self.sizes)] * len(eqn.outvars)
        for operand, made in enumerate(ins):
            if made is None:
                continue
            why = f"it is read by {eqn.primitive.name}"
            if made.leaf is None and len(made.leaves) > 1:
                why += " together with parameters that are as large"
            site = None if made.leaf is None else Site.of(eqn, operand, made)
            self._leave([made], why, but=None if site is None else made.leaf)
            if site is not None and made.leaf is not None:
                self.uses.setdefault(made.leaf, []).append((why, site))
                sites.append((operand, site))
        return [None] * len(eqn.outvars)

    def _leave(self, found: Sequence[Origin], why: str, but: int | None = None) -> None:
        """Notes parameters that are used where no adapter can stand."""
        for leaf in {leaf for made in found if made is not None for leaf in made.leaves} - {but}:
            self.uses.setdefault(leaf, []).append((why, None))


def evaluate(body: Body, args: Sequence[Any], pairs: Pairs, scale: float) -> list[Any]:
    """Evaluates a function with adapters beside its products.

    Args:
        body: what to evaluate.
        args: its inputs.
        pairs: the factors of the adapter of each parameter that has one.
        scale: what adapters are multiplied by.
    """
    jaxpr = body.jaxpr
    env: dict[Var, Any] = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for k, (eqn, sites) in enumerate(zip(jaxpr.eqns, body.sites, strict=True)):
        ins = [value(atom) for atom in eqn.invars]
        with eqn_context(eqn):
            if k in body.inner:
                outs = _EVALUATED[eqn.primitive.name](eqn, body.inner[k], ins, pairs, scale)
            else:
                outs = bind(eqn, ins)
            for operand, site in sites:
                if site.made.leaf in pairs:
                    low = site.product(eqn, operand, ins[1 - operand], *pairs[site.made.leaf])
                    outs = [outs[0] + (scale * low).astype(outs[0].dtype)]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _scan(
    eqn: JaxprEqn, inner: list[Body], ins: list[Any], pairs: Pairs, scale: float
) -> list[Any]:
    [body], (n_consts, n_carry) = inner, scan_arity(eqn)
    first = n_consts + n_carry
    consts, carry, xs = ins[:n_consts], ins[n_consts:first], ins[first:]

    def turn(carry: list[Any], each: Any) -> tuple[list[Any], list[Any]]:
        xs, own = each
        outs = evaluate(body, [*consts, *carry, *xs], {**pairs, **own}, scale)
        return outs[:n_carry], outs[n_carry:]

    own = {leaf: pairs[leaf] for leaf in body.layers if leaf in pairs}
    names = ("length", "reverse", "unroll")
    carry, ys = lax.scan(turn, carry, (xs, own), **{name: eqn.params[name] for name in names})
    return [*carry, *ys]


def _cond(
    eqn: JaxprEqn, inner: list[Body], ins: list[Any], pairs: Pairs, scale: float
) -> list[Any]:
    def branch(part: Body) -> Callable[..., list[Any]]:
        return lambda *args: evaluate(part, args, pairs, scale)

    return lax.switch(ins[0], list(map(branch, inner)), *ins[1:])


def _checkpoint(
    eqn: JaxprEqn, inner: list[Body], ins: list[Any], pairs: Pairs, scale: float
) -> list[Any]:
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    again = jax.checkpoint(lambda ins, pairs: evaluate(inner[0], ins, pairs, scale), **options)
    return again(ins, dict(pairs))


_EVALUATED = {"scan": _scan, "cond": _cond, "remat2": _checkpoint, "checkpoint": _checkpoint}
