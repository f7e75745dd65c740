"""Frozen layers in half precision: products that depend on nothing trained."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from pockjax._compat import (
    Jaxpr,
    JaxprEqn,
    Var,
    dtype_of,
    is_sharded,
    subjaxprs,
    with_subjaxprs,
)
from pockjax.autodiff import computed, inlined, replaced

_PRODUCTS = ("dot_general", "conv_general_dilated")


def lowered(jaxpr: Jaxpr, changing: Sequence[bool], dtype: Any) -> Jaxpr:
    """The function with the operands of its frozen products rounded to another dtype.

    As in automatic mixed precision (Micikevicius et al. 2018, arXiv:1710.03740), matrix products
    and convolutions are computed from rounded operands and summed in float32; norms and softmax
    stay as they are. Whatever a gradient passes through stays as it is too, so gradients are of
    float32 values.

    Args:
        jaxpr: any function.
        changing: which of its inputs are trained.
        dtype: what float32 operands of products are rounded to.
    """
    jaxpr = inlined(jaxpr)
    trained = {v for v, yes in zip(jaxpr.invars, changing, strict=True) if yes}

    def rule(eqn: JaxprEqn) -> Any:
        if any(isinstance(a, Var) and a in trained for a in eqn.invars):
            trained.update(eqn.outvars)
            return eqn
        if _is_product(eqn):
            return computed(lambda *xs: _rounded(eqn, xs, dtype), *eqn.invars)
        if eqn.primitive.name in ("scan", "while", "cond") and (inner := subjaxprs(eqn)):
            bodies = [lowered(body, [False] * len(body.invars), dtype) for body in inner]
            return eqn.replace(params=with_subjaxprs(eqn, bodies))
        return eqn

    return replaced(jaxpr, rule)


def _is_product(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name not in _PRODUCTS or is_sharded(eqn):
        return False
    return all(dtype_of(v) == jnp.float32 for v in (*eqn.invars, *eqn.outvars))


def _rounded(eqn: JaxprEqn, operands: Sequence[Any], dtype: Any) -> Any:
    rounded = [lax.convert_element_type(x, dtype) for x in operands]
    params = {**eqn.params, "preferred_element_type": jnp.dtype(jnp.float32)}
    return eqn.primitive.bind(*rounded, **eqn.primitive.get_bind_params(params))
