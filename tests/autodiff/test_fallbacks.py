"""What has no sparse rule is computed densely: exact all the same."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pockjax as pj
from tests.autodiff.oracle import compare, dense

Function = Callable[[jax.Array, jax.Array], jax.Array]
MASK = pj.part[:, 1:3]


def _while(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[:, :3]), x)


def _empty_scan(w: jax.Array, x: jax.Array) -> jax.Array:
    carry, ys = lax.scan(lambda c, _: (c + x @ w, jnp.sum(w)), x @ w, None, length=0)
    return carry * jnp.sum(ys) + carry


def _empty_stack(w: jax.Array, x: jax.Array) -> jax.Array:
    carry, ys = lax.scan(lambda c, row: (c + row, jnp.sum(row)), w[0], w[3:])
    return carry + jnp.sum(ys)


def _conjugate_gradients(w: jax.Array, x: jax.Array) -> jax.Array:
    matrix = w @ w.T + jnp.eye(3)
    return jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, x[0], maxiter=5)[0]


def _implicit(w: jax.Array, x: jax.Array) -> jax.Array:
    def solve(f: Any, guess: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 10, lambda i, v: v - f(v), guess)

    def residual(v: jax.Array) -> jax.Array:
        return v - jnp.tanh(v * w[0, 1]) - x[1, 1]

    return lax.custom_root(residual, jnp.float32(0.3), solve, lambda g, y: y / g(1.0))


def _straight_through(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ (w + lax.stop_gradient(jnp.round(w * 4) / 4 - w))


FUNCTIONS: dict[str, Function] = {
    "fori_loop": _while,
    "scan of nothing": _empty_scan,
    "scan over nothing": _empty_stack,
    "custom_linear_solve": _conjugate_gradients,
    "custom_root": _implicit,
    "straight-through": _straight_through,
    "sort": lambda w, x: jnp.sort(w, 0) * jnp.arange(4.0),
    "cumsum": lambda w, x: jnp.cumsum(w, 0),
    "max": lambda w, x: jnp.max(x @ w) + jnp.max(w),
    "norm": lambda w, x: jnp.linalg.norm(w) * (x @ w),
    "inverse": lambda w, x: jnp.linalg.inv(w[:, :3] + 3 * jnp.eye(3)) @ w,
    "set": lambda w, x: x @ w.at[1, 2].set(5.0),
    "added to zeros": lambda w, x: x @ jnp.zeros((3, 6)).at[:, 1:5].add(w),
    "top_k": lambda w, x: lax.top_k(w, 2)[0],
    "fft": lambda w, x: jnp.abs(jnp.fft.fft(w)),
    "kron": lambda w, x: jnp.kron(w, w),
    "argmax": lambda w, x: w[jnp.argmax(x @ w, axis=-1)],
    "associative_scan": lambda w, x: lax.associative_scan(jnp.multiply, w),
    "map": lambda w, x: lax.map(lambda row: row @ w, x),
    "linearize": lambda w, x: jax.linearize(lambda x: jnp.sin(x @ w), x)[1](x),
    "linear_transpose": lambda w, x: jax.linear_transpose(lambda x: x @ w, x)(x @ w)[0],
    "weight as input": lambda w, x: jnp.convolve(w[:, 1], x[0], mode="full"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact(name: str) -> None:
    def fun(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(FUNCTIONS[name](w, x)))

    w, x = jnp.linspace(-1, 1, 12).reshape(3, 4), jnp.linspace(0, 1, 6).reshape(2, 3)
    compare(pj.value_and_grad(fun, MASK), dense(fun, MASK), w, x)


def test_effects_happen_once() -> None:
    seen: list[float] = []

    def fun(w: jax.Array, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda corner: seen.append(float(corner)), w[0, 1])
        return jnp.sum(x @ w)

    jax.block_until_ready(pj.grad(fun, MASK)(jnp.ones((3, 4)), jnp.ones((2, 3))))
    jax.effects_barrier()
    assert seen == [1.0]


def test_callbacks_are_constants() -> None:
    def fun(w: jax.Array, x: jax.Array) -> jax.Array:
        two = jax.pure_callback(lambda: np.float32(2), jax.ShapeDtypeStruct((), jnp.float32))
        return jnp.sum(x @ w) * two

    grads = pj.grad(fun, MASK)(jnp.ones((3, 4)), jnp.ones((2, 3)))
    np.testing.assert_array_equal(grads, np.full((3, 2), 4.0))
