"""Which operations are nearly free to compute again."""

from pockjax._compat import JaxprEqn, subjaxprs

# Elementwise functions and views: computing them costs about as much as reading their operands.
_CHEAP = frozenset(
    """
    abs add add_any and asin atan atan2 broadcast_in_dim cbrt ceil clamp concatenate
    convert_element_type copy copy_p cos div dynamic_slice empty2 eq erf erf_inv erfc exp exp2
    expand_dims expm1 floor full gather ge gt imag integer_pow iota is_finite le log log1p logistic
    lt max min mul name ne neg nextafter not one_minus_square or pad polynomial pow real
    reduce_precision rem reshape rev round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh slice split sqrt square squeeze stack stop_gradient sub tan
    tanh transpose xor
    """.split()
)


def is_cheap(eqn: JaxprEqn) -> bool:
    """Whether computing an equation again costs no more than reading its operands."""
    if eqn.effects:
        return False
    if eqn.primitive.name in ("custom_jvp_call", "jit"):
        return all(is_cheap(inner) for jaxpr in subjaxprs(eqn) for inner in jaxpr.eqns)
    return eqn.primitive.name in _CHEAP
