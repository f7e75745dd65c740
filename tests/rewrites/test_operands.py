"""Sums over several leading axes are products of matrices; others are left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import pockjax as pj
from pockjax._compat import shape_of
from pockjax.rewrites._operands import with_flat_products


def ranks(fun, *args):
    """Ranks of the operands of all products."""
    jaxpr = with_flat_products(jax.make_jaxpr(fun)(*args))
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    return [tuple(len(shape_of(a)) for a in e.invars) for e in products]


def product(first, second, batch=()):
    return lambda a, b: lax.dot_general(a, b, ((first, second), (batch, batch)))


A, B = jnp.ones((2, 3, 4, 5)), jnp.ones((2, 3, 7))


@pytest.mark.parametrize(
    ("fun", "args", "expected"),
    [
        (product((0, 1), (0, 1)), (A, B), (2, 2)),
        (product((1, 0), (1, 0)), (A, B), (2, 2)),
        (product((0,), (0,)), (A, B), (2, 2)),
        (product((0, 1), (0, 1)), (A[:, :, 0], B), (2, 2)),
        (product((0,), (0,)), (A[0, 0], A[0, 0]), (2, 2)),  # as it was
        (product((0, 1), (1, 0)), (A, B.swapaxes(0, 1)), (4, 3)),  # in different orders
        (product((1,), (1,), (0,)), (A, B), (4, 3)),  # of batches
        (product((3,), (0,)), (A, A[0, 0].T), (4, 2)),  # of last axes
        (product((0, 1, 2), (0, 1, 2)), (B, B), (3, 3)),  # no axis is left
    ],
)
def test_what_is_a_product_of_matrices(fun, args, expected):
    assert ranks(fun, *args) == [expected]
    np.testing.assert_allclose(pj.rewrite(fun, "cpu", measure=False)(*args), fun(*args))


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=1, max_size=2),
    st.lists(st.integers(1, 3), min_size=1, max_size=2),
    st.randoms(),
)
def test_values_and_gradients_are_equal(leading, left, right, random):
    rng = np.random.default_rng(random.randrange(2**32))
    a = jnp.asarray(rng.normal(size=(*leading, *left)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(*leading, *right)), jnp.float32)
    axes = random.sample(range(len(leading)), len(leading))
    fun = product(tuple(axes), tuple(axes))

    def loss(a, b):
        return jnp.sum(jnp.sin(fun(a, b)))

    for original in (fun, jax.grad(loss, (0, 1))):
        found = pj.rewrite(original, "cpu", measure=False)(a, b)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
            found,
            original(a, b),
        )


def test_the_gradient_of_a_dense_layer_copies_nothing():
    x, ct = jnp.ones((4, 32, 96)), jnp.ones((4, 32, 384))

    def of_weights(x, ct):
        [weights] = jax.vjp(lambda w: x @ w, jnp.zeros((96, 384)))[1](ct)
        return weights

    compiled = jax.jit(pj.rewrite(of_weights, "cpu", measure=False)).lower(x, ct).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < 1024
