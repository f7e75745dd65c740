"""Llama-shaped language models (Llama 2, SmolLM2, TinyStories), as a Flax NNX module.

Written to be read and to be masked: no dropout, no biases, every projection a plain 2-D kernel.
The parameters' paths, which schemes match, are

    embed/embedding
    layers/K/attention_norm/scale       layers/K/attention/{query,key,value,output}/kernel
    layers/K/ffn_norm/scale             layers/K/ffn/{gate,up,down}/kernel
    norm/scale                          head/kernel (absent where the embedding is the head)

With `LlamaConfig.scanned` the layers are one loop over stacked parameters: the same function, under
`layers/attention/query/kernel` and so on with the layers along the first axis. It compiles in the
time of one layer; `to_scanned` and `to_unrolled` convert.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a language model.

    Attributes:
        vocabulary: Number of token ids.
        width: Size of a token's vector.
        layers: Number of decoder layers.
        heads: Query heads; divides `width`.
        kv_heads: Key and value heads, each shared by `heads / kv_heads` query heads.
        ffn_width: Width inside the feed-forward block.
        positions: The longest sequence it was trained on, in tokens.
        rope_base: Base of the rotary frequencies.
        rope: Which numbers of a head rotate together: "halves" pairs i with i + head/2, as Hugging
            Face's files want it, "interleaved" 2i with 2i + 1, as GGUF's and llama2.c's do. Weights
            are good for one of them.
        tied: Whether the embedding is also the head.
        norm_epsilon: Added to the mean square in every norm.
        scanned: Whether the layers are stacked and looped over.
        dtype: Of parameters and activations. Norms and attention weights are float32 inside.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn_width: int
    positions: int
    rope_base: float = 10_000.0
    rope: Literal["halves", "interleaved"] = "halves"
    tied: bool = False
    norm_epsilon: float = 1e-5
    scanned: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        """Reject a shape whose heads do not come out even."""
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} over {self.heads} heads is not an even number for each"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.rope not in ("halves", "interleaved"):
            raise ValueError(f"rope is 'halves' or 'interleaved', not {self.rope!r}")

    @property
    def head(self) -> int:
        """Size of a head."""
        return self.width // self.heads


LLAMA_2_7B = LlamaConfig(
    vocabulary=32_000,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    ffn_width=11_008,
    positions=4096,
)
SMOLLM2_135M = LlamaConfig(
    vocabulary=49_152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    ffn_width=1536,
    positions=8192,
    rope_base=100_000.0,
    tied=True,
)
STORIES_260K = LlamaConfig(
    vocabulary=512,
    width=64,
    layers=5,
    heads=8,
    kv_heads=4,
    ffn_width=172,
    positions=512,
    rope="interleaved",
    tied=True,
)


class Cache(NamedTuple):
    """Keys and values of the tokens so far, of one layer or (scanned) stacked for all of them."""

    keys: Float[Array, "*layers batch length kv_heads head"]
    values: Float[Array, "*layers batch length kv_heads head"]


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles."""

    cos: Float[Array, "*batch length pairs"]
    sin: Float[Array, "*batch length pairs"]


def rotation(config: LlamaConfig, positions: Int[Array, "*batch length"]) -> Rotation:
    """The rotary embedding's angles: position · base^(-i/pairs) for the i-th pair of a head."""
    pairs = config.head // 2
    frequencies = config.rope_base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(
    x: Float[Array, "batch length heads head"], by: Rotation, *, interleaved: bool
) -> Float[Array, "batch length heads head"]:
    """Turn each pair of numbers by its angle.

    Example:
        >>> quarter = Rotation(jnp.zeros((1, 1)), jnp.ones((1, 1)))
        >>> rotate(jnp.array([[[[1.0, 2.0]]]]), quarter, interleaved=False)
        Array([[[[-2.,  1.]]]], dtype=float32)
    """
    cos, sin = by.cos[..., None, :], by.sin[..., None, :]
    pairs = x.astype(jnp.float32)
    if interleaved:
        first, second = pairs[..., 0::2], pairs[..., 1::2]
    else:
        first, second = jnp.split(pairs, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _linear(config: LlamaConfig, into: int, out: int, rngs: nnx.Rngs) -> nnx.Linear:
    dtype = jnp.dtype(config.dtype)
    return nnx.Linear(into, out, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    dtype = jnp.dtype(config.dtype)
    return nnx.RMSNorm(
        config.width, epsilon=config.norm_epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs
    )


class Attention(nnx.Module):
    """Causal self-attention, in which a group of query heads shares a key and a value head."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        """Make the four projections; the heads are split after them, by a reshape."""
        self.head = config.head
        self.interleaved = config.rope == "interleaved"
        shared = config.kv_heads * config.head
        self.query = _linear(config, config.width, config.width, rngs)
        self.key = _linear(config, config.width, shared, rngs)
        self.value = _linear(config, config.width, shared, rngs)
        self.output = _linear(config, config.width, config.width, rngs)

    def __call__(
        self, x: Float[Array, "batch length width"], by: Rotation
    ) -> Float[Array, "batch length width"]:
        """Let each token read those up to itself."""
        query, key, value = self._project(x, by)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.reshape(x.shape))

    def extend(
        self,
        x: Float[Array, "batch length width"],
        by: Rotation,
        cache: Cache,
        start: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch length width"], Cache]:
        """Let new tokens, the first of them at `start`, read the cached ones and each other."""
        query, key, value = self._project(x, by)
        cache = Cache(_write(cache.keys, key, start), _write(cache.values, value, start))
        mask = _readable(start, x.shape[1], cache.keys.shape[1])
        mixed = jax.nn.dot_product_attention(query, cache.keys, cache.values, mask=mask)
        return self.output(mixed.reshape(x.shape)), cache

    def _project(
        self, x: Float[Array, "batch length width"], by: Rotation
    ) -> tuple[Float[Array, "batch length heads head"], ...]:
        def split(y: Float[Array, "batch length width"]) -> Float[Array, "batch length heads head"]:
            return y.reshape(*y.shape[:-1], -1, self.head)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        return (
            rotate(query, by, interleaved=self.interleaved),
            rotate(key, by, interleaved=self.interleaved),
            value,
        )


def _write(
    old: Float[Array, "batch length kv_heads head"],
    new: Float[Array, "batch added kv_heads head"],
    start: Int[Array, " batch"],
) -> Float[Array, "batch length kv_heads head"]:
    return jax.vmap(lambda x, y, at: jax.lax.dynamic_update_slice(x, y, (at, 0, 0)))(
        old, new, start
    )


def _readable(
    start: Int[Array, " batch"], added: int, length: int
) -> Bool[Array, "batch 1 added length"]:
    """Which cached tokens each new one may read; what lies beyond it is stale or empty."""
    last = start[:, None] + jnp.arange(added)
    return (jnp.arange(length) <= last[..., None])[:, None]


class FeedForward(nnx.Module):
    """A gated pair of projections, and one back."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        """Make the three projections."""
        self.gate = _linear(config, config.width, config.ffn_width, rngs)
        self.up = _linear(config, config.width, config.ffn_width, rngs)
        self.down = _linear(config, config.ffn_width, config.width, rngs)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """Transform each token on its own."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One decoder layer: both blocks read a normalised input and add to it."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        """Make attention and feed-forward block."""
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = _norm(config, rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch length width"], by: Rotation
    ) -> Float[Array, "batch length width"]:
        """Attention, then feed-forward."""
        x = x + self.attention(self.attention_norm(x), by)
        return x + self.ffn(self.ffn_norm(x))

    def extend(
        self,
        x: Float[Array, "batch length width"],
        by: Rotation,
        cache: Cache,
        start: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch length width"], Cache]:
        """The same for new tokens after cached ones."""
        mixed, cache = self.attention.extend(self.attention_norm(x), by, cache, start)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x)), cache


class Llama(nnx.Module):
    """A causal language model.

    Example:
        >>> config = LlamaConfig(30, 8, layers=2, heads=4, kv_heads=2, ffn_width=16, positions=64)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> model(jnp.ones((4, 5), jnp.int32)).shape
        (4, 5, 30)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        """Make a model with random weights; `load_llama` has trained ones."""
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.embed = nnx.Embed(
            config.vocabulary, config.width, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        layers = [Layer(config, rngs=rngs) for _ in range(config.layers)]
        self.layers = _stack(layers) if config.scanned else nnx.List(layers)
        self.norm = _norm(config, rngs)
        if not config.tied:
            self.head = _linear(config, config.width, config.vocabulary, rngs)

    def __call__(
        self, tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch length vocabulary"]:
        """For each token, the logits of the one that follows it."""
        x = self.embed(tokens)
        by = rotation(self.config, jnp.arange(tokens.shape[1]))
        if isinstance(self.layers, Layer):
            graph, state = nnx.split(self.layers)
            x, _ = jax.lax.scan(lambda x, one: (nnx.merge(graph, one)(x, by), None), x, state)
        else:
            for layer in self.layers:
                x = layer(x, by)
        return self.predict(self.norm(x))

    def predict(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """From the last layer's normalised output to logits."""
        return self.embed.attend(x) if self.config.tied else self.head(x)

    def new_cache(self, batch: int, length: int) -> Cache | list[Cache]:
        """An empty cache for sequences of up to `length` tokens."""
        config = self.config
        shape = (batch, length, config.kv_heads, config.head)
        if config.scanned:
            shape = (config.layers, *shape)
            return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
        return [
            Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
            for _ in range(config.layers)
        ]

    def extend(
        self,
        tokens: Int[Array, "batch length"],
        cache: Cache | list[Cache],
        start: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch length width"], Cache | list[Cache]]:
        """Read tokens that follow those in a cache.

        Args:
            tokens: The new tokens.
            cache: Made by `new_cache`, or returned from here; it has to have room for them.
            start: The position of each sequence's first new token. What the cache holds from there
                on is overwritten.

        Returns:
            The normalised output for each new token, which `predict` takes, and the new cache.
        """
        x = self.embed(tokens)
        by = rotation(self.config, start[:, None] + jnp.arange(tokens.shape[1]))
        if isinstance(self.layers, Layer):
            graph, state = nnx.split(self.layers)

            def extend_one(x: Array, one: Any) -> tuple[Array, Cache]:
                state, before = one
                return nnx.merge(graph, state).extend(x, by, before, start)

            x, cache = jax.lax.scan(extend_one, x, (state, cache))
            return self.norm(x), cache
        assert isinstance(cache, list)
        extended = []
        for layer, before in zip(self.layers, cache, strict=True):
            x, after = layer.extend(x, by, before, start)
            extended.append(after)
        return self.norm(x), extended


def _stack(layers: list[Layer]) -> Layer:
    graph, first = nnx.split(layers[0])
    others = [nnx.state(layer) for layer in layers[1:]]
    return nnx.merge(graph, jax.tree.map(lambda *xs: jnp.stack(xs), first, *others))


def to_scanned(model: Llama) -> Llama:
    """The same function with its layers stacked; the given model stays as it is."""
    if isinstance(model.layers, Layer):
        return model
    return _with_layers(model, _stack(list(model.layers)), scanned=True)


def to_unrolled(model: Llama) -> Llama:
    """The same function with each layer on its own; the given model stays as it is."""
    if not isinstance(model.layers, Layer):
        return model
    graph, state = nnx.split(model.layers)
    layers = [
        nnx.merge(graph, jax.tree.map(lambda x, k=k: x[k], state))
        for k in range(model.config.layers)
    ]
    return _with_layers(model, nnx.List(layers), scanned=False)


def _with_layers(model: Llama, layers: Layer | nnx.List, *, scanned: bool) -> Llama:
    converted = nnx.clone(model)
    converted.config = replace(model.config, scanned=scanned)
    converted.layers = layers
    return converted
