"""Jaxprs as data: sizes, splicing, inlining."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pockjax._compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    dce_jaxpr,
    dtype_of,
    eval_jaxpr,
    new_var,
)

Atom = Var | Literal
Replacement = tuple[Jaxpr, Sequence[Atom]]
"""A function without constants, and what it is applied to."""


def size_in_bytes(aval: Any) -> int:
    """Bytes of an array, or of an array of type ``aval``."""
    itemsize = getattr(aval.dtype, "itemsize", 8)
    return math.prod(aval.shape) * itemsize


def evaluated(jaxpr: Jaxpr, consts: Sequence[Any], *args: Any) -> list[jax.Array]:
    """What a jaxpr computes, as arrays of JAX even where it is a literal."""
    outs = zip(eval_jaxpr(jaxpr, consts, *args), jaxpr.outvars, strict=True)
    return [x if isinstance(x, jax.Array) else jnp.asarray(x, dtype_of(v)) for x, v in outs]


CALLS = frozenset("jit remat2 checkpoint custom_jvp_call custom_vjp_call closed_call".split())
"""Operations that evaluate the first of their jaxprs, once."""


def inlined(jaxpr: Jaxpr) -> Jaxpr:
    """``jaxpr`` with its nested jits written in place, so that all its operations can be seen.

    All its variables are new. JAX caches jaxprs, so that two loops may have bodies of the very same
    variables; equations of one can be moved into the other only if these differ.
    """
    eqns: list[JaxprEqn] = []
    constvars: list[Var] = []
    consts: list[Any] = []

    def visit(inner: Jaxpr, env: dict[Var, Any]) -> list[Any]:
        def read(atom: Atom) -> Any:
            return atom if isinstance(atom, Literal) else env[atom]

        for var, const in zip(inner.constvars, inner.consts, strict=True):
            env[var] = new_var(var.aval)
            constvars.append(env[var])
            consts.append(const)
        for eqn in inner.eqns:
            ins = [read(atom) for atom in eqn.invars]
            if _is_transparent(eqn):
                callee = eqn.params["jaxpr"]
                outs = visit(callee, dict(zip(callee.invars, ins, strict=True)))
                env.update(zip(eqn.outvars, outs, strict=True))
                continue
            fresh = [new_var(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, fresh, strict=True))
            eqns.append(eqn.replace(invars=ins, outvars=fresh))
        return [read(atom) for atom in inner.outvars]

    invars = [new_var(v.aval) for v in jaxpr.invars]
    outvars = visit(jaxpr, dict(zip(jaxpr.invars, invars, strict=True)))
    return jaxpr.replace(
        constvars=constvars, consts=consts, invars=invars, eqns=eqns, outvars=outvars
    )


def _is_transparent(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "jit":
        return False
    shardings = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return all(type(s).__name__ == "UnspecifiedValue" for s in shardings)


def spliced(jaxpr: Jaxpr, args: Sequence[Atom], eqns: list[JaxprEqn]) -> list[Atom]:
    """Appends a jaxpr's equations to ``eqns``, applied to ``args``.

    Args:
        jaxpr: a jaxpr without constants.
        args: what its inputs stand for.
        eqns: the list to append to.

    Returns:
        What its outputs are; some may be ``args``.
    """
    env: dict[Var, Atom] = dict(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        ins = [a if isinstance(a, Literal) else env[a] for a in eqn.invars]
        outs = [new_var(v.aval) for v in eqn.outvars]
        env.update(zip(eqn.outvars, outs, strict=True))
        eqns.append(eqn.replace(invars=ins, outvars=outs))
    return [a if isinstance(a, Literal) else env[a] for a in jaxpr.outvars]


def replaced(jaxpr: Jaxpr, rule: Callable[[JaxprEqn], JaxprEqn | Replacement]) -> Jaxpr:
    """``jaxpr`` with some of its equations computed in another way.

    Args:
        jaxpr: any jaxpr.
        rule: called with each equation in order, its operands those that now stand for the former
            ones. It returns an equation with the same results, or, instead of one with one result,
            a function and what that is applied to, by old names or new; see `computed`.
    """
    eqns: list[JaxprEqn] = []
    instead: dict[Var, Atom] = {}
    for eqn in jaxpr.eqns:
        now = rule(eqn.replace(invars=renamed(eqn.invars, instead)))
        if isinstance(now, JaxprEqn):
            eqns.append(now)
        else:
            fun, operands = now
            [instead[eqn.outvars[0]]] = spliced(fun, renamed(operands, instead), eqns)
    return jaxpr.replace(eqns=eqns, outvars=renamed(jaxpr.outvars, instead))


def computed(fun: Callable[..., Any], *operands: Atom) -> Replacement:
    """What a rule of `replaced` returns for ``fun(*operands)``."""
    return jax.make_jaxpr(fun)(*(a.aval for a in operands)), operands


def replaced_where(
    jaxpr: Jaxpr, condition: Callable[[JaxprEqn], bool], fun: Callable[..., Any]
) -> Jaxpr:
    """``jaxpr`` with ``fun(eqn, *operands)`` instead of each equation that meets a condition."""
    return replaced(
        jaxpr,
        lambda eqn: computed(partial(fun, eqn), *eqn.invars) if condition(eqn) else eqn,
    )


def renamed(atoms: Sequence[Atom], names: dict[Var, Atom]) -> list[Atom]:
    """``atoms`` with those that have another name replaced."""
    return [a if isinstance(a, Literal) else names.get(a, a) for a in atoms]


def tidied(jaxpr: Jaxpr) -> Jaxpr:
    """Without dead code and without the constants that nothing reads any more."""
    jaxpr = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    read = {a for eqn in jaxpr.eqns for a in eqn.invars if isinstance(a, Var)}
    read.update(a for a in jaxpr.outvars if isinstance(a, Var))
    pairs = [p for p in zip(jaxpr.constvars, jaxpr.consts, strict=True) if p[0] in read]
    return jaxpr.replace(constvars=[v for v, _ in pairs], consts=[c for _, c in pairs])


def consts_as_inputs(jaxpr: Jaxpr) -> Jaxpr:
    """The function of its constants and then its inputs."""
    return jaxpr.replace(
        constvars=[],
        consts=[],
        invars=[*jaxpr.constvars, *jaxpr.invars],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
