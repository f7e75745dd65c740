"""A small problem, at the top of a module, so that it can be sent to other processes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pockjax.selection import Unit, units

PyTree = Any
WIDTH = 8


def loss(params: PyTree, x: Any, y: Any) -> jax.Array:
    """Of three layers with biases."""
    x = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    x = jnp.tanh(x @ params["b"]["kernel"] + params["b"]["bias"])
    return jnp.mean((x @ params["c"]["kernel"] + params["c"]["bias"] - y) ** 2)


def closeness(params: PyTree, x: Any, y: Any) -> jax.Array:
    """Of what is predicted, between 0 and 1."""
    return jnp.exp(-loss(params, x, y))


def params() -> PyTree:
    generator = np.random.default_rng(0)

    def layer(into: int, out: int) -> PyTree:
        kernel = generator.normal(0, into**-0.5, (into, out)).astype(np.float32)
        return {"kernel": kernel, "bias": generator.normal(0, 0.1, out).astype(np.float32)}

    return {"a": layer(6, WIDTH), "b": layer(WIDTH, WIDTH), "c": layer(WIDTH, 3)}


def batches(count: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(1)
    xs = generator.normal(size=(count, 4, 6)).astype(np.float32)
    return [(x, np.sin(x[:, :3] * 2).astype(np.float32)) for x in xs]


def all_units(**options: Any) -> tuple[Unit, ...]:
    return units(loss, params(), *batches()[0], **options)
