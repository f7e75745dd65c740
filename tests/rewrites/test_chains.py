"""Chains of scales and shifts are equal when they are made shorter, and left alone elsewhere."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pockjax as pj
from pockjax._compat import shape_of
from pockjax.autodiff import inlined
from pockjax.rewrites._chains import with_short_chains

ROWS, COLUMNS = 32, 24
X = jnp.linspace(-1, 1, ROWS * 5).reshape(ROWS, 5)
W = jnp.cos(jnp.arange(5 * COLUMNS)).reshape(5, COLUMNS)
C = 1 + jnp.arange(COLUMNS) / COLUMNS
ROW = 1 + jnp.arange(ROWS)[:, None] / ROWS


def norm(x, mean, deviation, scale, bias):
    return (x - mean) / deviation * scale + bias


def steps(jaxpr):
    """How many scales and shifts of whole arrays there are."""
    names = ("add", "add_any", "sub", "mul", "div")
    whole = [e for e in jaxpr.eqns if math.prod(shape_of(e.outvars[0])) == ROWS * COLUMNS]
    return sum(e.primitive.name in names for e in whole)


@pytest.mark.parametrize(
    ("fun", "before", "after"),
    [
        (lambda x, w: norm(x @ w, C, C, C, C), 4, 2),
        (lambda x, w: norm(x @ w, C, C, 2.0, C), 4, 2),
        (lambda x, w: (x @ w) * C * C, 2, 1),
        (lambda x, w: (x @ w) + C - C, 2, 1),
        (lambda x, w: C * ((x @ w) + C), 2, 2),  # as short as it can be
        (lambda x, w: (x @ w) * 2.0 * 3.0 + 1.0, 3, 3),  # single numbers are no loads
        (lambda x, w: norm(jnp.tanh(x @ w), C, C, C, C), 4, 3),  # x may be far from zero
        (lambda x, w: norm(x @ w, ROW, ROW, C, C), 4, 4),  # a layer norm's
        (lambda x, w: norm(x @ w, ROW, ROW, ROW, C), 4, 3),
        (lambda x, w: norm(x @ w, x @ w, C, C, C), 4, 3),
        (lambda x, w: norm(y := x @ w, y.mean(0), C, C, C), 4, 3),  # of this batch
        (lambda x, w: (x @ w) * 2.0 * C * C, 3, 2),
        (lambda x, w: (x @ w) * C * 1e30 * C, 3, 3),
        (lambda x, w: ((y := (x @ w) * C), y * C), 2, 2),  # both are results
        (lambda x, w: C / ((x @ w) * C), 2, 2),
        (lambda x, w: norm((x @ w).astype(jnp.bfloat16), *[C.astype(jnp.bfloat16)] * 4), 4, 4),
        (lambda x, w: norm(x.sum(1), *[ROW[:, 0]] * 4), 0, 0),  # nothing is larger
    ],
)
def test_chains_become_as_short_as_they_can(fun, before, after):
    jaxpr = inlined(jax.make_jaxpr(fun)(X, W))
    assert steps(jaxpr) == before
    assert steps(with_short_chains(jaxpr)) == after


OPERATIONS = {
    "add": jnp.add,
    "subtract": jnp.subtract,
    "take from": lambda x, c: c - x,
    "multiply": jnp.multiply,
    "multiply to": lambda x, c: c * x,
    "divide": jnp.divide,
    "divide it": lambda x, c: c / (2 + jnp.abs(x)),
}
OPERANDS = {"column": C, "row": ROW, "number": 1.5, "array": ROW * C}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([*OPERATIONS]), st.sampled_from([*OPERANDS]), st.booleans()),
        min_size=2,
        max_size=7,
    ),
    st.booleans(),
)
def test_any_chain_equals_what_it_was(chain, is_product):
    def fun(x, w, operands):
        y = x @ w if is_product else jnp.tanh(x @ w)
        read = []
        for name, operand, is_read in chain:
            y = OPERATIONS[name](y, operands[operand])
            read += [y] if is_read else []
        return y, read

    def loss(*args):
        return sum(jnp.sin(y).sum() for y in jax.tree.leaves(fun(*args)))

    with jax.enable_x64(True):
        args = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (X, W, OPERANDS))
        for original in (fun, jax.grad(loss, (0, 1, 2))):
            rewritten = jax.jit(pj.rewrite(original, "cpu", measure=False))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
                rewritten(*args),
                original(*args),
            )


def test_several_chains_after_another():
    def fun(x, w):
        y = jax.nn.relu(norm(x @ w, C, C, C, C))
        return norm(y @ w.T @ w, C, C, C, y.sum(0))

    found, expected = pj.rewrite(fun, "cpu", measure=False)(X, W), fun(X, W)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_shifts_of_what_is_far_from_zero_keep_their_digits():
    x, far, small = jnp.full((64, 4), 2.0**24), jnp.full(4, 2.0**24), jnp.full(4, 0.5)
    shifted = pj.rewrite(lambda x, m, b: (x - m) + b, "cpu", measure=False)
    np.testing.assert_array_equal(shifted(x, far, small), 0.5)

    def log_softmax(x):
        most = x.max(-1, keepdims=True)
        return (x - most) - jnp.log(jnp.exp(x - most).sum(-1, keepdims=True))

    x = jnp.full((8, 32), 1e8)
    np.testing.assert_allclose(
        pj.rewrite(log_softmax, "cpu", measure=False)(x), log_softmax(x), rtol=1e-6
    )
