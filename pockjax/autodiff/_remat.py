"""Rematerialisation: blocks of a function that the backward pass computes again.

A plan is a tuple of spans ``(start, stop)`` of the equations of a function. Inside a span *every*
operation may be computed again, not only the cheap ones, from what is alive where the span begins;
the minimum cut of `_residuals` then finds the fewest bytes to keep, as it does without a plan. The
best places to begin a span are those where few bytes are alive, such as the residual stream between
two blocks (Chen et al. 2016, arXiv:1604.06174).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import jax
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pockjax._compat import Jaxpr, JaxprEqn, Literal, Var, dtype_of, scan_arity, shape_of
from pockjax.autodiff._cheap import is_cheap
from pockjax.autodiff._jaxprs import Atom, inlined, renamed, size_in_bytes, spliced

type Plan = tuple[tuple[int, int], ...]

_MARK = "pockjax.remat"
_TIGHTNESS = 24  # how many bounds on the largest block are tried


def best_plan(jaxpr: Jaxpr, trained: Sequence[bool]) -> Plan:
    """The spans that keep the fewest bytes: those alive between them and those of the largest.

    Args:
        jaxpr: a function with its jits inlined.
        trained: for each input, whether anything of it is trained. What depends on nothing trained
            has no backward pass, hence nothing to compute again.

    Returns:
        Spans that follow one another, up to the last equation; none where nothing is gained.
    """
    alive = _alive_bytes(jaxpr)
    first = _first_trained(jaxpr, trained)
    n = len(jaxpr.eqns)
    total = np.concatenate([[0], np.cumsum([_made(eqn, again=True) for eqn in jaxpr.eqns])])
    inside = [
        p for p in range(first + 1, n)
        if alive[p] <= alive[p - 1] and (p + 1 == n or alive[p] < alive[p + 1])
    ]  # fmt: skip
    places = [first, *inside, n]
    inner = np.array([[total[b] - total[a] for b in places] for a in places])
    cost = np.array([alive[p] for p in places[:-1]])
    bounds = np.unique(inner[np.triu_indices(len(places), 1)])
    if len(bounds) > _TIGHTNESS:
        bounds = np.quantile(bounds, np.linspace(0, 1, _TIGHTNESS), method="nearest")
    best, chosen = sum(_made(eqn, again=False) for eqn in jaxpr.eqns[first:]), []
    for bound in bounds:
        # kept[i]: the fewest bytes alive at the begins of spans that cover everything up to i.
        kept, come_from = np.full(len(places), np.inf), np.zeros(len(places), int)
        kept[0] = 0
        for i in range(1, len(places)):
            options = np.where(inner[:i, i] <= bound, kept[:i] + cost[:i], np.inf)
            come_from[i] = int(options.argmin())
            kept[i] = options[come_from[i]]
        if kept[-1] + bound < best:
            best, chosen, i = kept[-1] + bound, [len(places) - 1], len(places) - 1
            while i:
                i = int(come_from[i])
                chosen.append(i)
    return tuple(pairwise(places[i] for i in reversed(chosen)))


def _made(eqn: JaxprEqn, *, again: bool) -> int:
    """Bytes that an equation makes and that are not cheap to make again.

    Args:
        eqn: the equation.
        again: whether a loop is computed again, one iteration at a time: all it keeps is its carry.
    """
    if is_cheap(eqn):
        return 0
    if eqn.primitive.name != "scan":
        return sum(size_in_bytes(v.aval) for v in eqn.outvars)
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    once = sum(_made(inner, again=again) for inner in inlined(body).eqns)
    n_consts, n_carry = scan_arity(eqn)
    carry = sum(size_in_bytes(v.aval) for v in body.invars[n_consts : n_consts + n_carry])
    return length * carry + once if again else length * once


def _alive_bytes(jaxpr: Jaxpr) -> list[int]:
    """Bytes alive before each equation, without what is cheap to get from the inputs alone."""
    given = _given(jaxpr)
    last = _last_reads(jaxpr)
    change = np.zeros(len(jaxpr.eqns) + 1, np.int64)
    for i, eqn in enumerate(jaxpr.eqns):
        for var in eqn.outvars:
            if var not in given and last.get(var, i) > i:
                change[i + 1] += size_in_bytes(var.aval)
                if last[var] < len(jaxpr.eqns):
                    change[last[var] + 1] -= size_in_bytes(var.aval)
    return np.cumsum(change).tolist()


def _given(jaxpr: Jaxpr) -> set[Var]:
    """Inputs, and what is cheap to compute from them alone, such as masks and casts."""
    given = {*jaxpr.invars, *jaxpr.constvars}
    for eqn in jaxpr.eqns:
        if is_cheap(eqn) and all(isinstance(a, Literal) or a in given for a in eqn.invars):
            given.update(eqn.outvars)
    return given


def _last_reads(jaxpr: Jaxpr) -> dict[Var, int]:
    last = {a: i for i, eqn in enumerate(jaxpr.eqns) for a in eqn.invars if isinstance(a, Var)}
    return last | {a: len(jaxpr.eqns) for a in jaxpr.outvars if isinstance(a, Var)}


def _first_trained(jaxpr: Jaxpr, trained: Sequence[bool]) -> int:
    """Position of the first equation that computes with an argument and depends on what is trained.

    Views of a trained weight do not count: a weight is at hand anyway.
    """
    live = {v for v, yes in zip(jaxpr.invars, trained, strict=True) if yes}
    given = _given(jaxpr)
    for i, eqn in enumerate(jaxpr.eqns):
        if any(isinstance(a, Var) and a in live for a in eqn.invars):
            if not all(v in given for v in eqn.outvars):
                return i
            live.update(eqn.outvars)
    return len(jaxpr.eqns)


def marked(jaxpr: Jaxpr, plan: Plan) -> Jaxpr:
    """The same function with the values named that enter or leave a span of the plan.

    Names stay where they are through tracing and differentiation, unlike positions.

    Args:
        jaxpr: a function with its jits inlined.
        plan: the spans.

    Raises:
        ValueError: the spans are not those of this function.
    """
    check_plan(plan, len(jaxpr.eqns))
    given, last = _given(jaxpr), _last_reads(jaxpr)
    entering: dict[int, list[Var]] = {}
    made: list[Var] = []
    places = sorted({p for span in plan for p in span})
    for i in range(len(jaxpr.eqns) + 1):
        if i in places:
            entering[i] = [v for v in made if last.get(v, -1) >= i]
            made = []
        if i < len(jaxpr.eqns):
            made += [v for v in jaxpr.eqns[i].outvars if v not in given]
    # Nothing lives on from between two places if no value enters at the second; so what follows
    # that one might as well begin at the first.
    labels, before, after = {}, False, False
    latest = -1
    for i in places:
        if entering[i]:
            latest, before = i, after
        after = any(start <= i < stop for start, stop in plan)
        labels[latest] = f"{_MARK} {before:d}{after:d}"
    names: dict[Var, Atom] = {}
    eqns: list[JaxprEqn] = []
    for i in range(len(jaxpr.eqns) + 1):
        for var in entering.get(i, ()):
            named_value = _named(shape_of(var), dtype_of(var), labels[i])
            [names[var]] = spliced(named_value, [var], eqns)
        if i < len(jaxpr.eqns):
            eqn = jaxpr.eqns[i]
            eqns.append(eqn.replace(invars=renamed(eqn.invars, names)))
    return jaxpr.replace(
        eqns=eqns,
        outvars=renamed(jaxpr.outvars, names),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )


def check_plan(plan: Plan, n: int) -> None:
    """Raises ValueError unless a plan is spans of ``n`` equations, in order and apart."""
    flat = [p for span in plan for p in span]
    good = all(len(span) == 2 and span[0] < span[1] for span in plan) and flat == sorted(flat)
    if not good or (flat and not 0 <= flat[0] <= flat[-1] <= n):
        raise ValueError(
            f"a plan is spans (start, stop) of this function's {n} equations, in order and apart, "
            f"got {plan}"
        )


@cache
def _named(shape: tuple[int, ...], dtype: np.dtype, label: str) -> Jaxpr:
    shaped = jax.ShapeDtypeStruct(shape, dtype)
    return jax.make_jaxpr(lambda x: checkpoint_name(x, label))(shaped)


def _mark_of(eqn: JaxprEqn) -> tuple[bool, bool] | None:
    """Whether a mark has a span before it and after it; None if this is no mark."""
    label = str(eqn.params.get("name", "")) if eqn.primitive.name == "name" else ""
    return (label[-2] == "1", label[-1] == "1") if label.startswith(_MARK) else None


@dataclass(frozen=True)
class Recomputable:
    """Which equations of a forward pass may be computed again.

    Attributes:
        eqns: their ids: cheap ones, and all of the spans.
        loops: ids of the loops that a span holds: these are computed again one iteration at a time.
    """

    eqns: frozenset[int]
    loops: frozenset[int]

    @classmethod
    def of(cls, eqns: Sequence[JaxprEqn]) -> "Recomputable":
        """Finds them by the marks."""
        marks = [_mark_of(eqn) for eqn in eqns]
        inside = next((mark[0] for mark in marks if mark is not None), False)
        found, loops = set(), set()
        for eqn, mark in zip(eqns, marks, strict=True):
            if mark is not None:
                inside = mark[1]
            elif inside and eqn.primitive.name == "scan":
                loops.add(id(eqn))
            elif is_cheap(eqn) or (inside and not eqn.effects):
                found.add(id(eqn))
        return cls(frozenset(found), frozenset(loops))


def interleaved(
    recomputed: Sequence[JaxprEqn],
    after: Sequence[JaxprEqn],
    held: set[Var],
    late: set[Var],
    outs: Sequence[Atom],
) -> tuple[list[JaxprEqn], list[Atom]]:
    """The backward pass with each span computed again right before it is read.

    Were a span computed at the start of the backward pass, nothing would be saved. So what it is
    computed from is tied, by an optimization barrier, to the cotangent that it is read together
    with.

    Args:
        recomputed: equations to compute again, in order.
        after: the equations of the backward pass, in order.
        held: what is kept for the backward pass.
        late: what depends on the cotangents.
        outs: what the backward pass returns.

    Returns:
        The equations, and the outputs by their new names.
    """
    makers = {v: i for i, eqn in enumerate(recomputed) for v in eqn.outvars}
    done: set[int] = set()
    names: dict[Var, Atom] = {}
    eqns: list[JaxprEqn] = []
    if all(map(is_cheap, recomputed)):
        return [*recomputed, *after], list(outs)

    def compute_again(atoms: Sequence[Atom]) -> None:
        wanted: set[int] = set()
        pending = [a for a in atoms if isinstance(a, Var)]
        while pending:
            place = makers.get(pending.pop())
            if place is not None and place not in done and place not in wanted:
                wanted.add(place)
                pending += [a for a in recomputed[place].invars if isinstance(a, Var)]
        done.update(wanted)
        again = [recomputed[i] for i in sorted(wanted)]
        cotangents = list(dict.fromkeys(a for a in atoms if isinstance(a, Var) and a in late))
        if cotangents and not all(map(is_cheap, again)):
            read = list(dict.fromkeys(
                a for eqn in again for a in eqn.invars if isinstance(a, Var) and a in held
            ))  # fmt: skip
            tied = _tied([*read, *renamed(cotangents, names)], eqns)
            local = dict(zip(read, tied, strict=False))
            names.update(zip(cotangents, tied[len(read) :], strict=True))
            again = [eqn.replace(invars=renamed(eqn.invars, local)) for eqn in again]
        eqns.extend(again)

    for eqn in after:
        compute_again(eqn.invars)
        eqns.append(eqn.replace(invars=renamed(eqn.invars, names)))
    compute_again(outs)
    return eqns, renamed(outs, names)


def _tied(atoms: Sequence[Atom], eqns: list[JaxprEqn]) -> list[Atom]:
    """The same values, none of which is there before all of them are."""
    shapes = [jax.ShapeDtypeStruct(shape_of(a), dtype_of(a)) for a in atoms]
    barrier = jax.make_jaxpr(lambda *xs: lax.optimization_barrier(xs))(*shapes)
    return spliced(barrier, atoms, eqns)
