"""Fewer residuals between a loop's forward and backward pass.

What `jax.lax.scan` keeps for its backward pass is stacked over the iterations and chosen iteration
by iteration; XLA cannot change it. Here the same minimum cut that chooses the residuals of straight
code (`_residuals`) chooses them inside the loop: the backward loop computes cheap values again from
fewer kept ones, and reads stacked weights where they stand instead of from a second copy.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from pockjax._compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    dtype_of,
    eval_jaxpr,
    scan_arity,
    shape_of,
)
from pockjax.autodiff._cheap import is_cheap
from pockjax.autodiff._jaxprs import Atom, inlined, renamed, size_in_bytes, spliced, tidied
from pockjax.autodiff._residuals import cheapest_cut


@dataclass
class _Loop:
    """A scan equation, taken apart."""

    eqn: JaxprEqn
    body: Jaxpr

    def __init__(self, eqn: JaxprEqn):
        self.eqn = eqn
        self.body = inlined(eqn.params["jaxpr"])
        self.n_consts, self.n_carry = scan_arity(eqn)

    @property
    def consts(self) -> list[Any]:
        return self.eqn.invars[: self.n_consts]

    @property
    def inits(self) -> list[Any]:
        return self.eqn.invars[self.n_consts : self.n_consts + self.n_carry]

    @property
    def xs(self) -> list[Any]:
        return self.eqn.invars[self.n_consts + self.n_carry :]

    @property
    def ys(self) -> list[Var]:
        return self.eqn.outvars[self.n_carry :]

    def body_inputs(self) -> tuple[list[Var], list[Var], list[Var]]:
        """The body's variables for constants, carry and stacked inputs."""
        a, b = self.n_consts, self.n_consts + self.n_carry
        invars = self.body.invars
        return invars[:a], invars[a:b], invars[b:]


def thin_scans(jaxpr: Jaxpr, again: Set[int] = frozenset()) -> Jaxpr:
    """Replaces each pair of a forward and a backward scan by one that keeps fewer bytes.

    Args:
        jaxpr: a joint jaxpr of value and gradient, with its jits inlined.
        again: ids of the scans that may be computed again wholly, one iteration at a time.

    Returns:
        The same function; as it was where nothing is gained.
    """
    # One slot an equation, so that positions stay while a slot's equations are replaced.
    slots = [[eqn] for eqn in jaxpr.eqns]
    scans = [i for i, eqn in enumerate(jaxpr.eqns) if _is_local_scan(eqn)]
    wholly = {i for i in scans if id(jaxpr.eqns[i]) in again}
    outvars = list(jaxpr.outvars)
    free = {*jaxpr.invars, *jaxpr.constvars}
    for i, later in enumerate(scans):
        for earlier in scans[:i]:
            flat = [eqn for slot in slots for eqn in slot]
            first, second = _scan_in(slots[earlier]), _scan_in(slots[later])
            pair = _thinned(first, second, free, _readers(flat, outvars), earlier in wholly)
            if pair is None:
                continue
            slots[earlier], slots[later], names = pair
            for slot in slots[earlier + 1 :]:
                slot[:] = [eqn.replace(invars=renamed(eqn.invars, names)) for eqn in slot]
            outvars = renamed(outvars, names)
    return jaxpr.replace(
        eqns=[eqn for slot in slots for eqn in slot],
        outvars=outvars,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )


def _is_local_scan(eqn: JaxprEqn) -> bool:
    # Types that carry a sharding would be lost by tracing the loop again.
    return eqn.primitive.name == "scan" and eqn.ctx.cur_abstract_mesh.empty


def _scan_in(slot: Sequence[JaxprEqn]) -> JaxprEqn:
    [scan] = [eqn for eqn in slot if eqn.primitive.name == "scan"]
    return scan


def _readers(eqns: Sequence[JaxprEqn], outvars: Sequence[Atom]) -> dict[Var, int]:
    """How often each variable is read."""
    counts: dict[Var, int] = {}
    for atom in [a for eqn in eqns for a in eqn.invars] + list(outvars):
        if isinstance(atom, Var):
            counts[atom] = counts.get(atom, 0) + 1
    return counts


# Two loops, and what their old outputs are now.
type _Pair = tuple[list[JaxprEqn], list[JaxprEqn], dict[Var, Atom]]


def _thinned(
    first: JaxprEqn, second: JaxprEqn, free: set[Var], readers: dict[Var, int], wholly: bool
) -> _Pair | None:
    """The two loops with residuals moved from the first to the second: cheap ones, or any."""
    if first.params["length"] != second.params["length"]:
        return None
    if not set(first.outvars) & {a for a in second.invars if isinstance(a, Var)}:
        return None
    forward, backward = _Loop(first), _Loop(second)
    private = [y for y in forward.ys if y in backward.xs and readers[y] == 1]
    if not private:
        return None
    f_consts, f_carry, f_xs = forward.body_inputs()
    f_ys = forward.body.outvars[forward.n_carry :]
    wanted = {y: f_ys[forward.ys.index(y)] for y in private}
    required = [atom for atom in wanted.values() if isinstance(atom, Var)]
    outer = dict(zip([*f_consts, *f_xs], [*forward.consts, *forward.xs], strict=True))
    length = first.params["length"]

    def cost(var: Var) -> int:
        if var in outer and (isinstance(outer[var], Literal) or outer[var] in free):
            return 0
        return size_in_bytes(var.aval) // (length if var in f_consts else 1)

    before = sum(size_in_bytes(v.aval) for v in dict.fromkeys(required))
    body_free = set(forward.body.constvars)
    cut = cheapest_cut(
        forward.body.eqns,
        required,
        lambda v: 0 if v in body_free else cost(v),
        (lambda eqn: not eqn.effects) if wholly else is_cheap,
    )
    kept_consts = [v for v in cut.kept if v in f_consts]
    kept_xs = [v for v in cut.kept if v in f_xs]
    stacked = [v for v in cut.kept if v not in {*kept_consts, *kept_xs, *body_free}]
    if sum(map(cost, [v for v in cut.kept if v not in body_free])) >= before:
        return None
    return _rebuilt(forward, backward, wanted, cut.recomputed, kept_consts, kept_xs, stacked)


def _rebuilt(
    forward: _Loop,
    backward: _Loop,
    wanted: dict[Var, Any],
    recomputed: Sequence[JaxprEqn],
    kept_consts: Sequence[Var],
    kept_xs: Sequence[Var],
    stacked: Sequence[Var],
) -> _Pair:
    """The loops after residuals ``wanted`` gave way to ``stacked`` and what the inputs hold."""
    f_consts, _, f_xs = forward.body_inputs()
    n = forward.n_carry
    ys = list(zip(forward.ys, forward.body.outvars[n:], strict=True))
    staying = [(outer, inner) for outer, inner in ys if outer not in wanted]
    body = forward.body.replace(
        outvars=[*forward.body.outvars[:n], *(inner for _, inner in staying), *stacked],
        debug_info=forward.body.debug_info.with_unknown_names(),
    )
    first, outs = _scan_eqns(forward, body, forward.consts, forward.inits, forward.xs)
    old = [*forward.eqn.outvars[:n], *(outer for outer, _ in staying)]
    names, new_ys = dict(zip(old, outs[: len(old)], strict=True)), outs[len(old) :]

    # In the backward body the residuals are no inputs any more, but values computed at its start.
    b_consts, b_carry, b_xs = backward.body_inputs()
    inside: dict[Var, Atom] = {}
    xs_kept = []
    for inner, outer in zip(b_xs, backward.xs, strict=True):
        if outer in wanted:
            inside[inner] = wanted[outer]
        else:
            xs_kept.append((inner, outer))
    sources = dict(zip([*f_consts, *f_xs], [*forward.consts, *forward.xs], strict=True))
    eqns = [
        *recomputed,
        *(eqn.replace(invars=renamed(eqn.invars, inside)) for eqn in backward.body.eqns),
    ]
    consts = dict(zip(
        [*forward.body.constvars, *backward.body.constvars],
        [*forward.body.consts, *backward.body.consts], strict=True,
    ))  # fmt: skip
    body = backward.body.replace(
        constvars=list(consts),
        consts=list(consts.values()),
        invars=[
            *b_consts, *kept_consts, *b_carry,
            *(inner for inner, _ in xs_kept), *kept_xs, *stacked,
        ],
        outvars=renamed(backward.body.outvars, inside),
        eqns=eqns,
        debug_info=backward.body.debug_info.with_unknown_names(),
    )  # fmt: skip
    second, outs = _scan_eqns(
        backward, body,
        renamed([*backward.consts, *(sources[v] for v in kept_consts)], names),
        renamed(backward.inits, names),
        [
            *renamed([*(outer for _, outer in xs_kept), *(sources[v] for v in kept_xs)], names),
            *new_ys,
        ],
    )  # fmt: skip
    names.update(zip(backward.eqn.outvars, outs, strict=True))
    return first, second, names


def _scan_eqns(
    like: _Loop, body: Jaxpr, consts: Sequence[Atom], inits: Sequence[Atom], xs: Sequence[Atom]
) -> tuple[list[JaxprEqn], list[Atom]]:
    """The equations of a scan over another body, traced through the public call, and its outputs.

    An output may be an input: JAX hands on what a body passes through unchanged.
    """
    params = like.eqn.params
    n_consts, n_carry = len(consts), like.n_carry
    body = tidied(body)

    def call(*flat: Any) -> Any:
        held, inits, stacks = (
            flat[:n_consts], flat[n_consts : n_consts + n_carry], flat[n_consts + n_carry :],
        )  # fmt: skip

        def step(carry: Any, x: Any) -> Any:
            outs = eval_jaxpr(body, body.consts, *held, *carry, *x)
            return tuple(outs[:n_carry]), tuple(outs[n_carry:])

        carry, ys = lax.scan(
            step, tuple(inits), tuple(stacks),
            length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
        )  # fmt: skip
        return [*carry, *ys]

    atoms = [*consts, *inits, *xs]
    shapes = [jax.ShapeDtypeStruct(shape_of(a), dtype_of(a)) for a in atoms]
    eqns: list[JaxprEqn] = []
    outs = spliced(jax.make_jaxpr(call)(*shapes), atoms, eqns)
    return eqns, outs
