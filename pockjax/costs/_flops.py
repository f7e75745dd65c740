"""Floating-point operations of a jaxpr, loops counted as often as they run.

XLA's own count takes the body of a loop once, so a scanned model looks cheaper than the same model
unrolled. Operations are counted as XLA counts them elsewhere: two for each multiply-add that meets
no padding, one for each element of an elementwise function or of a reduction's operand.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pockjax._compat import Jaxpr, JaxprEqn, shape_of, subjaxprs

_FREE = frozenset(
    """
    broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice concatenate pad rev
    copy copy_p iota gather dynamic_update_slice split convert_element_type stop_gradient name
    optimization_barrier sharding_constraint reshard pvary pcast bitcast_convert_type empty2 full
    random_wrap random_unwrap random_seed axis_index stack
    """.split()
)
_TRANSCENDENTAL = frozenset(
    "exp exp2 expm1 log log1p tanh logistic erf erf_inv sin cos tan pow rsqrt sqrt cbrt".split()
)


def count_flops(jaxpr: Jaxpr) -> int:
    """Floating-point operations of a jaxpr.

    Returns:
        The number of operations; transcendental functions are not among them (as in XLA).

    >>> import jax, jax.numpy as jnp
    >>> count_flops(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 5))))
    60
    """
    return sum(map(_eqn_flops, jaxpr.eqns))


def flops_of(fun: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of ``fun(*args)``, traced on arrays or shapes.

    >>> import jax.numpy as jnp
    >>> flops_of(lambda x: (x + 1) * 2, jnp.ones(8))
    16
    """
    return count_flops(jax.make_jaxpr(fun)(*args))


def _eqn_flops(eqn: JaxprEqn) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot_flops(eqn)
    if name == "conv_general_dilated":
        return _conv_flops(eqn)
    if name == "scan":
        return eqn.params["length"] * sum(map(count_flops, subjaxprs(eqn)))
    inner = subjaxprs(eqn)
    if name == "cond":
        return max(map(count_flops, inner))
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return count_flops(inner[0])
    if name.startswith("scatter"):
        return math.prod(shape_of(eqn.invars[2]))
    if inner and not name.startswith(("reduce", "cum", "sort")):
        return sum(map(count_flops, inner))
    if name in _FREE or name in _TRANSCENDENTAL or not eqn.outvars:
        return 0
    if name.startswith(("reduce", "arg", "cum")):
        return math.prod(shape_of(eqn.invars[0]))
    return math.prod(getattr(eqn.outvars[0].aval, "shape", ()))


def _dot_flops(eqn: JaxprEqn) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    lhs, out = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return 2 * math.prod(out) * math.prod(lhs[d] for d in contract)


def _conv_flops(eqn: JaxprEqn) -> int:
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    lhs, rhs, out = map(shape_of, (*eqn.invars, *eqn.outvars))
    outputs = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    products = outputs * rhs[numbers.rhs_spec[1]]
    for i, (stride, padding, lhs_dilation, rhs_dilation) in enumerate(
        zip(
            params["window_strides"], params["padding"], params["lhs_dilation"],
            params["rhs_dilation"], strict=True,
        )
    ):  # fmt: skip
        products *= _meetings(
            lhs[numbers.lhs_spec[2 + i]],
            rhs[numbers.rhs_spec[2 + i]],
            out[numbers.out_spec[2 + i]],
            (stride, padding[0], lhs_dilation, rhs_dilation),
        )
    return 2 * products


def _meetings(size: int, taps: int, outputs: int, window: Sequence[int]) -> int:
    """Pairs of an output and a tap, along one axis, that meet an element and not padding."""
    stride, before, lhs_dilation, rhs_dilation = window
    positions = (
        np.arange(outputs)[:, None] * stride - before + np.arange(taps)[None, :] * rhs_dilation
    )
    inside = (positions >= 0) & (positions <= (size - 1) * lhs_dilation)
    return int(np.sum(inside & (positions % lhs_dilation == 0)))
