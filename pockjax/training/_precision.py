"""Frozen layers in half precision: products that depend on nothing trained."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pockjax._compat import Jaxpr, JaxprEqn, Literal, Var, subjaxprs, with_subjaxprs
from pockjax.autodiff import inlined, spliced

_PRODUCTS = ("dot_general", "conv_general_dilated")


def lowered(jaxpr: Jaxpr, changing: Sequence[bool], dtype: Any) -> Jaxpr:
    """The function with the operands of its frozen products rounded to another dtype.

    As in automatic mixed precision (Micikevicius et al. 2018, arXiv:1710.03740), matrix products
    and convolutions are computed from rounded operands and
    summed in float32; norms and softmax stay as they are.
    Whatever a gradient passes through stays as it is too, so gradients are of float32 values.

    Args:
        jaxpr: any function.
        changing: which of its inputs are trained.
        dtype: what float32 operands of products are rounded to.
    """
    jaxpr = inlined(jaxpr)
    trained = {v for v, yes in zip(jaxpr.invars, changing, strict=True) if yes}
    eqns: list[JaxprEqn] = []
    instead: dict[Var, Any] = {}
    for eqn in jaxpr.eqns:
        if any(isinstance(a, Var) and a in trained for a in eqn.invars):
            trained.update(eqn.outvars)
        now = [a if isinstance(a, Literal) else instead.get(a, a) for a in eqn.invars]
        eqn = eqn.replace(invars=now)
        if not trained.isdisjoint(eqn.outvars):
            eqns.append(eqn)
        elif _is_product(eqn):
            made = jax.make_jaxpr(lambda *xs, eqn=eqn: _rounded(eqn, xs, dtype))(
                *(a.aval for a in now)
            )
            [instead[eqn.outvars[0]]] = spliced(made, now, eqns)
        elif eqn.primitive.name in ("scan", "while", "cond") and (inner := subjaxprs(eqn)):
            bodies = [lowered(body, [False] * len(body.invars), dtype) for body in inner]
            eqns.append(eqn.replace(params=with_subjaxprs(eqn, bodies)))
        else:
            eqns.append(eqn)
    outs = [a if isinstance(a, Literal) else instead.get(a, a) for a in jaxpr.outvars]
    return jaxpr.replace(eqns=eqns, outvars=outs)


def _is_product(eqn: JaxprEqn) -> bool:
    avals: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    return (
        eqn.primitive.name in _PRODUCTS
        and all(aval.dtype == jnp.float32 for aval in avals)
        and all(aval.sharding.mesh.empty for aval in avals)
    )


def _rounded(eqn: JaxprEqn, operands: Sequence[Any], dtype: Any) -> Any:
    rounded = [lax.convert_element_type(x, dtype) for x in operands]
    params = {**eqn.params, "preferred_element_type": jnp.dtype(jnp.float32)}
    return eqn.primitive.bind(*rounded, **eqn.primitive.get_bind_params(params))
