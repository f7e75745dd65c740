"""Text from a language model: one compiled loop that reads the prompt once and keeps a cache."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pockjax.models.llama import Llama


def generate(
    model: Llama,
    prompt: Int[Array | np.ndarray, "batch length"],
    *,
    count: int,
    lengths: Int[Array | np.ndarray, " batch"] | None = None,
    stop: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
) -> Int[Array, "batch count"]:
    """Continue prompts, token by token.

    Compiled once for a shape of prompts and a `count`; pad prompts to a few lengths.

    Args:
        model: A `pockjax.models.Llama`, unrolled or scanned.
        prompt: Token ids, padded at the end where a prompt is shorter.
        count: How many tokens to add to each.
        lengths: How many tokens of each prompt count; all of them by default.
        stop: A token that ends a text. It fills up the rest of a row; once every row has ended, no
            more is computed.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn with
            probabilities softmax(logits / temperature).
        top_k: Draw from the k likeliest tokens only.
        key: Random key; needed to draw.

    Returns:
        The new tokens, without the prompt.

    Raises:
        ValueError: The text would be longer than the model's `positions`, a prompt is empty, or a
            setting makes no sense.

    Example:
        >>> from pockjax.models import LlamaConfig
        >>> config = LlamaConfig(30, 8, layers=2, heads=4, kv_heads=2, ffn_width=16, positions=64)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> generate(model, np.ones((2, 3), np.int32), count=5).shape
        (2, 5)
    """
    prompt = jnp.asarray(prompt, jnp.int32)
    batch, width = prompt.shape
    total, positions = width + count, model.config.positions
    if count < 1:
        raise ValueError(f"count is 1 or more, not {count}")
    if total > positions:
        raise ValueError(
            f"{width} tokens and {count} more are {total}; the model has {positions} positions"
        )
    if lengths is None:
        lengths = np.full(batch, width)
    if np.shape(lengths) != (batch,) or np.min(lengths) < 1 or np.max(lengths) > width:
        raise ValueError(f"lengths are {batch} numbers from 1 to {width}, not {lengths}")
    if temperature < 0:
        raise ValueError(f"temperature is 0 or above, not {temperature}")
    if temperature and key is None:
        raise ValueError("drawing tokens (temperature above 0) needs a key")
    if top_k is not None and not 1 <= top_k <= model.config.vocabulary:
        raise ValueError(f"top_k is from 1 to {model.config.vocabulary}, not {top_k}")
    graph, state = nnx.split(model)
    return _generate(
        graph,
        state,
        prompt,
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(-1 if stop is None else stop, jnp.int32),
        jnp.asarray(temperature, jnp.float32),
        jax.random.key(0) if key is None else key,
        count=count,
        greedy=temperature == 0,
        top_k=top_k,
    )


@partial(jax.jit, static_argnums=0, static_argnames=("count", "greedy", "top_k"))
def _generate(
    graph: Any,
    state: Any,
    prompt: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    stop: Int[Array, ""],
    temperature: Float[Array, ""],
    key: jax.Array,
    *,
    count: int,
    greedy: bool,
    top_k: int | None,
) -> Int[Array, "batch count"]:
    model: Llama = nnx.merge(graph, state)

    def choose(
        x: Float[Array, "batch width"], k: Int[Array, ""], done: Bool[Array, " batch"]
    ) -> Int[Array, " batch"]:
        logits = model.predict(x).astype(jnp.float32)
        if greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            token = _draw(logits / temperature, jax.random.fold_in(key, k), top_k)
        return jnp.where(done, stop, token.astype(jnp.int32))

    def unfinished(progress: tuple) -> Bool[Array, ""]:
        k, done, *_ = progress
        return (k < count) & ~jnp.all(done)

    def add(progress: tuple) -> tuple:
        k, done, token, text, cache = progress
        x, cache = model.extend(token[:, None], cache, lengths + k - 1)
        token = choose(x[:, 0], k, done)
        return k + 1, done | (token == stop), token, text.at[:, k].set(token), cache

    batch, width = prompt.shape
    cache = model.new_cache(batch, width + count)
    # What follows a short prompt in the cache is never read: the new tokens overwrite it in time.
    x, cache = model.extend(prompt, cache, jnp.zeros_like(lengths))
    last = x[jnp.arange(batch), lengths - 1]
    token = choose(last, jnp.zeros((), jnp.int32), jnp.zeros(batch, bool))
    text = jnp.full((batch, count), stop).at[:, 0].set(token)
    first = (jnp.ones((), jnp.int32), token == stop, token, text, cache)
    return jax.lax.while_loop(unfinished, add, first)[3]


def _draw(
    logits: Float[Array, "batch vocabulary"], key: jax.Array, top_k: int | None
) -> Int[Array, " batch"]:
    if top_k is None:
        return jax.random.categorical(key, logits)
    best, tokens = jax.lax.top_k(logits, top_k)
    drawn = jax.random.categorical(key, best)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]
