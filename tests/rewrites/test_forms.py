"""Every form of a convolution equals the convolution."""

from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pockjax.rewrites._candidates import ORIGINAL, candidates
from tests.rewrites.convolutions import assert_close, convolutions, forward, normal


def check_forms(conv):
    """Each form gives what `jax.lax` does for random arguments."""
    lhs, rhs = (normal(shape, seed) for seed, shape in enumerate(conv.arguments()))
    forms = candidates(conv)
    # All in one program: compiling takes most of the time.
    values = jax.jit(lambda a, b: {k: f(a, b) for k, f in forms.items()})(lhs, rhs)
    read = jnp.flip(rhs, conv.rhs_spatial) if conv.backwards else rhs
    expected = replace(conv, backwards=False).apply(lhs, read)
    terms = prod(conv.window) * rhs.shape[conv.rhs_spec[1]]
    for name, value in values.items():
        # The sums of Winograd's form are larger than the result.
        assert_close(value, expected, 8 * terms if "Winograd" in name else terms)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(forward(), st.booleans())
def test_forms_of_a_convolution_and_of_its_gradients(drawn, backwards):
    fun, x, w = drawn
    with jax.enable_x64(x.dtype == jnp.float64):

        def loss(x, w):
            return jnp.sum(jnp.sin(fun(x, w)))

        found = convolutions(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w))
        assert len(found) == 3
        for conv in found:
            check_forms(replace(conv, backwards=backwards))


@pytest.mark.parametrize(
    ("layout", "pixels", "padding", "dtype"),
    [
        (("NHWC", "HWIO", "NHWC"), (8, 8), "SAME", jnp.float32),
        (("NCHW", "OIHW", "NCHW"), (7, 4), "SAME", jnp.float32),
        (("NHWC", "HWIO", "NCHW"), (4, 3), "VALID", jnp.float32),
        (("CHWN", "IHWO", "NCHW"), (9, 5), [(-1, 3), (0, 2)], jnp.float64),
        (("NHWC", "OHWI", "CHWN"), (1, 2), "SAME", jnp.float32),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_winograd(layout, pixels, padding, dtype, backwards):
    """Layouts, odd sizes, more pixels than there are, and kernels read from their end."""
    sizes = {"N": 2, "C": 5, "I": 5, "O": 4}
    across, down = dict(zip("HW", pixels, strict=True)), {"H": 3, "W": 3}
    with jax.enable_x64(dtype == jnp.float64):
        x = jax.ShapeDtypeStruct([(sizes | across)[a] for a in layout[0]], dtype)
        w = jax.ShapeDtypeStruct([(sizes | down)[a] for a in layout[1]], dtype)

        def fun(x, w):
            return jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=layout)

        [conv] = convolutions(jax.make_jaxpr(fun)(x, w))
        conv = replace(conv, backwards=backwards)
        assert {"Winograd", "Winograd, one product"} <= candidates(conv).keys()
        check_forms(conv)


def test_winograd_is_not_for_narrow_numbers():
    """What it adds up is larger than the result, and half precision has no digits to spare."""
    for dtype in (jnp.bfloat16, jnp.float16):
        x, w = jnp.ones((1, 4, 8, 8), dtype), jnp.ones((4, 4, 3, 3), dtype)
        [conv] = convolutions(jax.make_jaxpr(lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"))(x, w))
        assert not any("Winograd" in name for name in candidates(conv))


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
        "phases of products", "product", "columns", "products of taps", "products of positions",
        "Winograd", "Winograd, one product", "phases",
    }  # fmt: skip
