"""Random convolutions, and those of their gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from pockjax._compat import subjaxprs
from pockjax.rewrites._convolution import Convolution

LAYOUTS = {
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "NCHW")],
    1: [("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW")],
}


@st.composite
def forward(draw: st.DrawFn) -> tuple[Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """A convolution as a function of its input and kernel, and their shapes."""
    rank = draw(st.sampled_from([1, 2, 2, 2]))
    layout = draw(st.sampled_from(LAYOUTS[rank]))
    window = draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))
    strides = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    dilation = draw(st.sampled_from([(1,) * rank, (1,) * rank, (2,) * rank]))
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    pixels = [draw(st.integers(n, n + 9)) for n in reach]
    any_padding = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * rank)
    padding = draw(st.one_of(st.sampled_from(["SAME", "VALID"]), any_padding.map(list)))
    groups, per_group = draw(st.sampled_from([(1, 1), (1, 3), (4, 1), (5, 1), (2, 2), (3, 2)]))
    outs = groups * draw(st.integers(1, 3))
    sizes = {"N": draw(st.integers(1, 3)), "C": groups * per_group, "I": per_group, "O": outs}
    spatial = iter(pixels)
    x = [sizes[a] if a in sizes else next(spatial) for a in layout[0]]
    taps = iter(window)
    w = [sizes[a] if a in sizes else next(taps) for a in layout[1]]
    dtype = draw(st.sampled_from([jnp.float32, jnp.float32, jnp.float64, jnp.bfloat16]))

    def fun(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=layout,
            feature_group_count=groups,
        )  # fmt: skip

    return fun, jax.ShapeDtypeStruct(tuple(x), dtype), jax.ShapeDtypeStruct(tuple(w), dtype)


def convolutions(jaxpr: Any) -> list[Convolution]:
    """Those in a jaxpr, at any depth."""
    found = [conv for eqn in jaxpr.eqns if (conv := Convolution.of(eqn)) is not None]
    for eqn in jaxpr.eqns:
        for inner in subjaxprs(eqn):
            found += convolutions(inner)
    return found


def normal(shape: Any, seed: int) -> jax.Array:
    """Random numbers."""
    numbers = np.random.default_rng(seed).standard_normal(shape.shape)
    return jnp.asarray(numbers, shape.dtype)


def assert_close(found: Any, expected: Any, terms: int) -> None:
    """Equal to the rounding of sums of so many terms."""
    found, expected = jnp.asarray(found), jnp.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    scale = max(1.0, float(jnp.max(jnp.abs(expected.astype(jnp.float32)), initial=0)))
    tolerance = 8 * float(jnp.finfo(found.dtype).eps) * terms**0.5 * scale
    np.testing.assert_allclose(
        np.asarray(found, np.float64), np.asarray(expected, np.float64), rtol=0, atol=tolerance
    )
