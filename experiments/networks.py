"""Small networks to measure on: dense, convolutional, and a transformer, unrolled and scanned."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any
Activation = Callable[[jax.Array], jax.Array]


def normal(key: jax.Array, shape: Sequence[int], scale: float) -> jax.Array:
    """Normal weights."""
    return scale * jax.random.normal(key, tuple(shape), jnp.float32)


def dense_params(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """A dense layer's kernel of shape (inputs, outputs) and its bias."""
    k, b = jax.random.split(key)
    return {
        "kernel": normal(k, (inputs, outputs), inputs**-0.5),
        "bias": normal(b, (outputs,), 0.1),
    }


def dense(layer: PyTree, x: jax.Array) -> jax.Array:
    """``x @ kernel + bias``."""
    return x @ layer["kernel"] + layer["bias"]


def mlp_params(key: jax.Array, widths: Sequence[int]) -> list[PyTree]:
    """Dense layers between the given widths."""
    keys = jax.random.split(key, len(widths) - 1)
    return [dense_params(k, *sizes) for k, *sizes in zip(keys, widths, widths[1:], strict=False)]


def mlp(params: Sequence[PyTree], x: jax.Array, activation: Activation = jax.nn.relu) -> jax.Array:
    """Dense layers with an activation function between them: (batch, in) -> (batch, out)."""
    for layer in params[:-1]:
        x = activation(dense(layer, x))
    return dense(params[-1], x)


def conv_params(key: jax.Array, channels: Sequence[int], taps: int = 3) -> list[PyTree]:
    """Convolutions between the given numbers of channels; square kernels of ``taps`` a side."""
    keys = jax.random.split(key, len(channels) - 1)
    return [
        {"kernel": normal(k, (taps, taps, *sizes), sizes[0] ** -0.5 / taps),
         "bias": jnp.zeros(sizes[1])}
        for k, *sizes in zip(keys, channels, channels[1:], strict=False)
    ]  # fmt: skip


def conv_net(
    params: Sequence[PyTree], x: jax.Array, activation: Activation = jax.nn.relu
) -> jax.Array:
    """Convolutions with an activation function between them: (batch, height, width, channels)."""
    for i, layer in enumerate(params):
        x = activation(x) if i else x
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        x = x + layer["bias"]
    return x


def block_params(key: jax.Array, width: int, ffn: int) -> PyTree:
    """A transformer block."""
    keys = iter(jax.random.split(key, 6))
    return {
        "norm1": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        "query": dense_params(next(keys), width, width),
        "key": dense_params(next(keys), width, width),
        "value": dense_params(next(keys), width, width),
        "output": dense_params(next(keys), width, width),
        "norm2": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        "up": dense_params(next(keys), width, ffn),
        "down": dense_params(next(keys), ffn, width),
    }


def block(params: PyTree, x: jax.Array, heads: int) -> jax.Array:
    """A pre-norm transformer block: (batch, tokens, width) -> the same."""

    def split(y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], heads, -1)

    h = layer_norm(params["norm1"], x)
    query, key, value = (split(dense(params[name], h)) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    x = x + dense(params["output"], mixed.reshape(x.shape))
    h = layer_norm(params["norm2"], x)
    return x + dense(params["down"], jax.nn.gelu(dense(params["up"], h)))


def layer_norm(params: PyTree, x: jax.Array) -> jax.Array:
    """Normalizes the last axis, then scales and shifts it."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-6) * params["scale"] + params["bias"]


def transformer_params(
    key: jax.Array, layers: int, width: int, ffn: int, *, scanned: bool = False
) -> PyTree:
    """Blocks: a list of them, or with ``scanned`` one whose arrays are stacked along axis 0."""
    keys = jax.random.split(key, layers)
    if scanned:
        return jax.vmap(lambda k: block_params(k, width, ffn))(keys)
    return [block_params(k, width, ffn) for k in keys]


def transformer(params: PyTree, x: jax.Array, heads: int) -> jax.Array:
    """The blocks one after the other, as a loop if they are stacked."""
    if isinstance(params, list):
        for layer in params:
            x = block(layer, x, heads)
        return x
    return lax.scan(lambda x, layer: (block(layer, x, heads), None), x, params)[0]
