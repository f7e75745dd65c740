"""Counted operations against XLA's own count, where XLA counts them right."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pockjax.costs import flops_of


def xla_flops(fun: Any, *args: Any) -> float:
    analysis = jax.jit(fun).lower(*args).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


SIZES = st.integers(1, 6)


@given(st.tuples(SIZES, SIZES, SIZES, SIZES))
@settings(max_examples=10)
def test_batched_products(sizes: tuple[int, int, int, int]) -> None:
    b, m, k, n = sizes
    fun = lambda x, y: jnp.einsum("bmk,bkn->bmn", x, y)  # noqa: E731
    assert flops_of(fun, jnp.ones((b, m, k)), jnp.ones((b, k, n))) == 2 * b * m * k * n


@given(
    size=st.integers(5, 9),
    taps=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    groups=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=15)
def test_convolutions_count_no_padding(
    size: int, taps: int, stride: int, dilation: int, padding: tuple[int, int], groups: int
) -> None:
    def fun(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x, w, (stride,), [padding], rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups,
        )  # fmt: skip

    shapes = jnp.ones((2, size, 4)), jnp.ones((taps, 4 // groups, 8))
    ours = flops_of(fun, *shapes)
    # An independent count: each output sums as many ones as there are products that meet it.
    assert ours == 2 * float(fun(*shapes).sum())


def test_convolution_as_xla_counts_it() -> None:
    def fun(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = jnp.ones((2, 9, 8, 3)), jnp.ones((3, 3, 3, 16))
    assert flops_of(fun, *shapes) == pytest.approx(xla_flops(fun, *shapes), rel=1e-3)


def test_a_loop_counts_as_often_as_it_runs() -> None:
    w = jnp.ones((7, 4, 4))
    fun = lambda x, w: lax.scan(lambda x, w: (x @ w, None), x, w)[0]  # noqa: E731
    assert flops_of(fun, jnp.ones((3, 4)), w) == 7 * 2 * 3 * 4 * 4


def test_nested_functions_and_branches() -> None:
    x = jnp.ones((4, 4))
    product = 2 * 4**3
    assert flops_of(jax.jit(lambda x: x @ x), x) == product
    assert flops_of(jax.checkpoint(lambda x: x @ x), x) == product
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
    # The index is clamped, which is one operation.
    assert flops_of(lambda i, x: lax.switch(i, branches, x), 1, x) == 2 * product + 1
    assert flops_of(lambda x: jnp.sum(x * 2), x) == 32
    assert flops_of(lambda x: jnp.exp(x).T.reshape(-1), x) == 0
