"""A backward pass that computes, at run time, only the gradients that are asked for.

Which of them are asked for is an input of the program, so that one program serves all masks: the
pass ends at the earliest gradient that is wanted, and the product of one that is not is skipped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from pockjax._compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    dtype_of,
    eval_jaxpr,
    shape_of,
    subjaxprs,
)

_STAGES = 16  # at which the pass may end; each is a branch of the program inside the one before
# What is worth a branch of its own: the rest costs no more than a branch.
_DEAR = ("dot_general", "conv_general_dilated", "reduce_", "scatter", "scan", "while", "cumsum")


def on_demand(jaxpr: Jaxpr, stages: int = _STAGES) -> Callable[[Any, Sequence[Any]], list[Any]]:
    """Evaluates the outputs of a jaxpr that are wanted.

    Args:
        jaxpr: a backward pass, whose outputs are gradients.
        stages: how many places there are at which it may end.

    Returns:
        ``(wanted, inputs) -> outputs``, with ``wanted`` a boolean array, one for each output. An
        output that is not wanted is zero, or right, where it costs next to nothing.

    >>> import jax
    >>> both = jax.make_jaxpr(lambda x: [x @ x, 2 * x @ x])(jnp.ones(2))
    >>> on_demand(both)(jnp.array([False, True]), [jnp.ones(2)])
    [Array(0., dtype=float32), Array(4., dtype=float32)]
    """
    outputs = list(jaxpr.outvars)
    made = {v: k for k, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    place = [made.get(v, -1) if isinstance(v, Var) else -1 for v in outputs]
    order = sorted(range(len(outputs)), key=lambda i: place[i])
    needed = _needed(jaxpr, [outputs[i] for i in order])
    size = -(-len(order) // stages)
    groups = [order[k : k + size] for k in range(0, len(order), size)]
    shared: list[list[JaxprEqn]] = [[] for _ in groups]
    alone: dict[int, list[JaxprEqn]] = {i: [] for i in order}
    for eqn, ranks in zip(jaxpr.eqns, needed, strict=True):
        if not ranks:
            continue
        first = (ranks & -ranks).bit_length() - 1
        if ranks == 1 << first:
            alone[order[first]].append(eqn)
        else:
            shared[first // size].append(eqn)
    zeros = [(shape_of(v), dtype_of(v)) for v in outputs]

    def evaluate(wanted: Any, inputs: Sequence[Any]) -> list[Any]:
        def output(i: int, known: dict[Var, Any]) -> Any:
            def compute() -> Any:
                return _run(jaxpr, alone[i], [outputs[i]], known)[0]

            if not any(map(_is_dear, alone[i])):
                return compute()
            return lax.cond(wanted[i], compute, lambda: jnp.zeros(*zeros[i]))

        def stage(s: int, known: dict[Var, Any]) -> list[Any]:
            if s == len(groups):
                return []
            later = [i for group in groups[s:] for i in group]

            def compute() -> list[Any]:
                made = _made(shared[s])
                values = _run(jaxpr, shared[s], made, known)
                here = known | dict(zip(made, values, strict=True))
                return [*(output(i, here) for i in groups[s]), *stage(s + 1, here)]

            asked = jnp.any(wanted[jnp.array(later)])
            return lax.cond(asked, compute, lambda: [jnp.zeros(*zeros[i]) for i in later])

        known = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
        known |= dict(zip(jaxpr.invars, inputs, strict=True))
        values = stage(0, known)
        return [values[order.index(i)] for i in range(len(outputs))]

    return evaluate


def _needed(jaxpr: Jaxpr, outputs: Sequence[Any]) -> list[int]:
    """For each equation, which of the outputs need it, as bits."""
    needs: dict[Var, int] = {}
    for rank, var in enumerate(outputs):
        if isinstance(var, Var):
            needs[var] = needs.get(var, 0) | 1 << rank
    found = [0] * len(jaxpr.eqns)
    for k in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[k]
        for var in eqn.outvars:
            found[k] |= needs.get(var, 0)
        for atom in eqn.invars:
            if isinstance(atom, Var):
                needs[atom] = needs.get(atom, 0) | found[k]
    return found


def _made(eqns: Sequence[JaxprEqn]) -> list[Var]:
    return [v for eqn in eqns for v in eqn.outvars]


def _run(
    jaxpr: Jaxpr, eqns: Sequence[JaxprEqn], wanted: Sequence[Any], known: dict[Var, Any]
) -> list[Any]:
    """Evaluates some equations of a jaxpr, given what was evaluated before."""
    own = set(_made(eqns))
    reads = [a for eqn in eqns for a in eqn.invars] + list(wanted)
    free = list(dict.fromkeys(a for a in reads if not isinstance(a, Literal) and a not in own))
    part = jaxpr.replace(
        constvars=[],
        consts=[],
        invars=free,
        outvars=list(wanted),
        eqns=list(eqns),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return eval_jaxpr(part, [], *(known[v] for v in free))


def _is_dear(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name.startswith(_DEAR):
        return True
    return any(_is_dear(inner) for body in subjaxprs(eqn) for inner in body.eqns)
