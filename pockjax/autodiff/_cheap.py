"""Which operations are nearly free to compute again."""

from pockjax._compat import JaxprEqn, subjaxprs

ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type
    cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite
    le lgamma log log1p logistic lt max min mul ne neg nextafter not one_minus_square or pow real
    reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square sub tan tanh xor
    """.split()
)
"""Operations of which each element of the result depends on the same element of each operand."""

# Computing them costs about as much as reading their operands.
_CHEAP = (ELEMENTWISE - {"digamma", "lgamma"}) | frozenset(
    """
    broadcast_in_dim concatenate copy copy_p dynamic_slice empty2 expand_dims full gather iota name
    pad polynomial reshape rev slice split squeeze stack stop_gradient transpose
    """.split()
)


def is_elementwise(eqn: JaxprEqn) -> bool:
    """Whether each element of the result depends on the same elements of the operands alone."""
    if eqn.primitive.name in ("custom_jvp_call", "jit"):
        bodies = subjaxprs(eqn)
        known = any(body.consts for body in bodies)  # arrays of whatever shape
        return not known and all(is_elementwise(inner) for body in bodies for inner in body.eqns)
    return eqn.primitive.name in ELEMENTWISE


def is_cheap(eqn: JaxprEqn) -> bool:
    """Whether computing an equation again costs no more than reading its operands."""
    if eqn.effects:
        return False
    if eqn.primitive.name in ("custom_jvp_call", "jit"):
        return all(is_cheap(inner) for jaxpr in subjaxprs(eqn) for inner in jaxpr.eqns)
    return eqn.primitive.name in _CHEAP
