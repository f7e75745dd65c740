"""Every form of a convolution equals the convolution."""

from math import prod

import jax
import jax.numpy as jnp
from hypothesis import HealthCheck, given, settings

from pockjax.rewrites._candidates import ORIGINAL, candidates
from tests.rewrites.convolutions import assert_close, convolutions, forward, normal


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(forward())
def test_forms_of_a_convolution_and_of_its_gradients(drawn):
    fun, x, w = drawn
    with jax.enable_x64(x.dtype == jnp.float64):

        def loss(x, w):
            return jnp.sum(jnp.sin(fun(x, w)))

        found = convolutions(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w))
        assert len(found) == 3
        for conv in found:
            lhs, rhs = (normal(shape, seed) for seed, shape in enumerate(conv.arguments()))
            forms = candidates(conv)
            # All in one program: compiling takes most of the time.
            values = jax.jit(lambda a, b, forms=forms: {k: f(a, b) for k, f in forms.items()})(
                lhs, rhs
            )
            terms = prod(conv.window) * rhs.shape[conv.rhs_spec[1]]
            for value in values.values():
                assert_close(value, values[ORIGINAL], terms)


def test_every_form_is_met():
    """Kinds of convolution and of gradients that each form is for."""
    met = set()
    for shape, kernel, strides, groups in [
        ((1, 8, 8, 6), (3, 3, 1, 6), (1, 1), 6),
        ((1, 8, 8, 6), (3, 3, 1, 6), (2, 2), 6),
        ((1, 8, 8, 6), (3, 3, 3, 4), (2, 2), 2),
        ((1, 8, 8, 6), (1, 1, 6, 4), (2, 2), 1),
        ((1, 8, 8, 6), (3, 3, 6, 4), (2, 2), 1),
        ((1, 8, 8, 6), (3, 3, 6, 4), (1, 1), 1),
    ]:

        def loss(x, w, strides=strides, groups=groups):
            y = jax.lax.conv_general_dilated(
                x, w, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )  # fmt: skip
            return jnp.sum(y**2)

        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones(shape), jnp.ones(kernel))
        for conv in convolutions(jaxpr):
            met |= candidates(conv).keys()
    assert met == {
        ORIGINAL, "multiply-adds", "phases of multiply-adds", "row blocks", "products of groups",
        "phases of products", "product", "columns", "products of taps", "phases",
    }  # fmt: skip
