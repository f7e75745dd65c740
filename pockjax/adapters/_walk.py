"""Evaluating a function with adapters beside its products."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    scan_arity,
    shape_of,
    subjaxprs,
)
from pockjax.adapters._sites import Made, Site, made_of
from pockjax.autodiff import inlined

type Pairs = Mapping[int, tuple[Any, Any]]
type Note = Callable[[int, JaxprEqn, Site | None], Any]

_CONSTANT = Made()


@dataclass(frozen=True)
class Walk:
    """One evaluation.

    Attributes:
        sizes: numbers of elements of the parameters.
        scale: what adapters are multiplied by.
        note: told of each operation that reads a parameter and activations: the parameter, the
            operation, and the site if an adapter can stand beside it.
    """

    sizes: Sequence[int]
    scale: float
    note: Note = lambda leaf, eqn, site: None

    def run(
        self, jaxpr: Jaxpr, args: Sequence[Any], made: Sequence[Made | None], pairs: Pairs
    ) -> tuple[list[Any], list[Made | None]]:
        """Evaluates a jaxpr.

        Args:
            jaxpr: what to evaluate.
            args: its inputs.
            made: of what parameters each is made; None if it depends on the arguments.
            pairs: the factors of the adapter of each parameter.

        Returns:
            The outputs, and of what they are made.
        """
        jaxpr = inlined(jaxpr)
        env: dict[Var, Any] = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        origin: dict[Var, Made | None] = dict.fromkeys(jaxpr.constvars, _CONSTANT)
        origin.update(zip(jaxpr.invars, made, strict=True))

        def value(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        def source(atom: Any) -> Made | None:
            return _CONSTANT if isinstance(atom, Literal) else origin[atom]

        for eqn in jaxpr.eqns:
            with eqn_context(eqn):
                outs, of = self._equation(
                    eqn, [value(a) for a in eqn.invars], [source(a) for a in eqn.invars], pairs
                )
            env.update(zip(eqn.outvars, outs, strict=True))
            origin.update(zip(eqn.outvars, of, strict=True))
        return [value(a) for a in jaxpr.outvars], [source(a) for a in jaxpr.outvars]

    def _equation(
        self, eqn: JaxprEqn, args: list[Any], made: list[Made | None], pairs: Pairs
    ) -> tuple[list[Any], list[Made | None]]:
        inner = subjaxprs(eqn)
        match eqn.primitive.name:
            case "scan":
                return self._scan(eqn, args, made, pairs)
            case "cond":
                return self._cond(eqn, args, made, pairs)
            case "remat2" | "checkpoint" if len(inner) == 1:
                return self._checkpoint(eqn, args, made, pairs)
        outs = bind(eqn, args)
        known = [m for m in made if m is not None]
        if len(known) == len(made):
            return outs, [made_of(eqn, known, list(map(self._size, known)))] * len(outs)
        for operand, of in enumerate(made):
            if of is None or of.leaf is None:
                continue
            site = Site.of(eqn, operand, of)
            self.note(of.leaf, eqn, site)
            if site is not None and of.leaf in pairs:
                x = args[1 - operand]
                low = site.product(eqn, operand, x, *pairs[of.leaf])
                outs = [outs[0] + (self.scale * low).astype(outs[0].dtype)]
        return outs, [None] * len(outs)

    def _size(self, made: Made) -> int:
        return -1 if made.leaf is None else self.sizes[made.leaf]

    def _scan(
        self, eqn: JaxprEqn, args: list[Any], made: list[Made | None], pairs: Pairs
    ) -> tuple[list[Any], list[Made | None]]:
        [body], (n_consts, n_carry) = subjaxprs(eqn), scan_arity(eqn)
        length, first = eqn.params["length"], n_consts + n_carry
        consts, carry, xs = args[:n_consts], args[n_consts:first], args[first:]
        of_xs = [None if m is None else m.layer(length) for m in made[first:]]
        # What a loop carries is its own after the first turn.
        inside = [*made[:n_consts], *[None] * n_carry, *of_xs]
        for m in made[n_consts:first]:
            if m is not None and m.leaf is not None:
                self.note(m.leaf, eqn, None)
        stacked = {m.leaf for m in of_xs if m is not None and m.leaf is not None}

        def turn(carry: list[Any], each: Any) -> tuple[list[Any], list[Any]]:
            xs, own = each
            outs, _ = self.run(body, [*consts, *carry, *xs], inside, {**pairs, **own})
            return outs[:n_carry], outs[n_carry:]

        own = {leaf: pairs[leaf] for leaf in stacked if leaf in pairs}
        carry, ys = lax.scan(
            turn, carry, (xs, own), length=length, reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )  # fmt: skip
        outs = [*carry, *ys]
        return outs, [None] * len(outs)

    def _cond(
        self, eqn: JaxprEqn, args: list[Any], made: list[Made | None], pairs: Pairs
    ) -> tuple[list[Any], list[Made | None]]:
        def branch(jaxpr: Jaxpr) -> Callable[..., list[Any]]:
            return lambda *args: self.run(jaxpr, args, made[1:], pairs)[0]

        outs = lax.switch(args[0], list(map(branch, subjaxprs(eqn))), *args[1:])
        return outs, [None] * len(outs)

    def _checkpoint(
        self, eqn: JaxprEqn, args: list[Any], made: list[Made | None], pairs: Pairs
    ) -> tuple[list[Any], list[Made | None]]:
        [body] = subjaxprs(eqn)
        found: list[Made | None] = []

        def again(args: list[Any], pairs: Pairs) -> list[Any]:
            outs, found[:] = self.run(body, args, made, pairs)
            return outs

        options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
        outs = jax.checkpoint(again, **options)(args, dict(pairs))
        return outs, found


def made_of_inputs(n_params: int, jaxpr: Jaxpr) -> list[Made | None]:
    """Of what the inputs are made of a function of its parameters and other arguments."""
    others: list[Made | None] = [None] * (len(jaxpr.invars) - n_params)
    return [*(Made(i) for i in range(n_params)), *others]


def sizes_of(n_params: int, jaxpr: Jaxpr) -> list[int]:
    """Numbers of elements of the parameters."""
    return [math.prod(shape_of(v)) for v in jaxpr.invars[:n_params]]
