"""BERT-shaped text encoders (BERT, DistilBERT, MiniLM) with a classifier, as a Flax NNX module.

Written to be read and to be masked: no dropout, no options, every projection a plain 2-D kernel.
The parameters' paths, which schemes match, are

    embeddings/{word,position,token_type}/embedding     embeddings/norm/{scale,bias}
    layers/K/attention/{query,key,value,output}/{kernel,bias}
    layers/K/attention/norm/{scale,bias}
    layers/K/ffn/{up,down}/{kernel,bias}                layers/K/ffn/norm/{scale,bias}
    classifier/{kernel,bias}
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pockjax.models._registry import register
from pockjax.weights import WeightsError, fill, read_safetensors


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder, and of the classifier on top.

    Attributes:
        vocabulary: Number of token ids.
        width: Size of a token's vector.
        layers: Number of encoder layers.
        heads: Attention heads; divides `width`.
        ffn_width: Width inside the feed-forward block.
        positions: The longest sequence, in tokens.
        token_types: Number of segment ids; 0 for DistilBERT, which has none.
        classes: Outputs of the classifier.
        norm_epsilon: Added to the variance in every layer norm.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    ffn_width: int
    positions: int = 512
    token_types: int = 2
    classes: int = 2
    norm_epsilon: float = 1e-12

    def __post_init__(self) -> None:
        """Reject a width that the heads cannot share."""
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], *, classes: int) -> Self:
        """Read the `config.json` beside published weights.

        Raises:
            WeightsError: The file describes another architecture or activation.
        """
        given: dict[str, Any] = json.loads(Path(path).read_text())
        kind = given.get("model_type")
        activation = given.get("hidden_act", given.get("activation"))
        if kind not in ("bert", "distilbert") or activation != "gelu":
            raise WeightsError(
                f"{path}: model_type {kind!r} with activation {activation!r}; this encoder is "
                "'bert' or 'distilbert' with 'gelu'"
            )
        if kind == "distilbert":
            return cls(
                vocabulary=given["vocab_size"],
                width=given["dim"],
                layers=given["n_layers"],
                heads=given["n_heads"],
                ffn_width=given["hidden_dim"],
                positions=given["max_position_embeddings"],
                token_types=0,
                classes=classes,
            )
        return cls(
            vocabulary=given["vocab_size"],
            width=given["hidden_size"],
            layers=given["num_hidden_layers"],
            heads=given["num_attention_heads"],
            ffn_width=given["intermediate_size"],
            positions=given["max_position_embeddings"],
            token_types=given["type_vocab_size"],
            classes=classes,
            norm_epsilon=given["layer_norm_eps"],
        )


BERT_BASE = BertConfig(vocabulary=30_522, width=768, layers=12, heads=12, ffn_width=3072)
DISTILBERT = replace(BERT_BASE, layers=6, token_types=0)
MINILM = BertConfig(vocabulary=30_522, width=384, layers=6, heads=12, ffn_width=1536)


class Embeddings(nnx.Module):
    """The sum of what a token is and where it stands, normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Make the tables."""
        self.word = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.position = nnx.Embed(config.positions, config.width, rngs=rngs)
        if config.token_types:
            self.token_type = nnx.Embed(config.token_types, config.width, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """Embed token ids that all belong to the first segment."""
        x = self.word(tokens) + self.position(jnp.arange(tokens.shape[1]))
        if hasattr(self, "token_type"):
            x = x + self.token_type(jnp.zeros((), tokens.dtype))
        return self.norm(x)


class Attention(nnx.Module):
    """Self-attention, the residual sum, and its norm."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Make the four projections; the heads are split after them, by a reshape."""
        width = config.width
        self.heads = config.heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.output = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=config.norm_epsilon, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        bias: Float[Array, "batch 1 1 length"],
    ) -> Float[Array, "batch length width"]:
        """Mix tokens; `bias` is added to the scores, very negative where nothing may be read."""

        def split(y: Float[Array, "batch length width"]) -> Float[Array, "batch length heads head"]:
            return y.reshape(*y.shape[:-1], self.heads, -1)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        mixed = jax.nn.dot_product_attention(query, key, value, bias=bias)
        return self.norm(x + self.output(mixed.reshape(x.shape)))


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by erf, as it was published and as PyTorch computes it.

    `jax.nn.gelu` computes erfc, twice as slow on a CPU: its results far below zero, less than 1e-4,
    have all their digits, while these are off by up to 1e-6.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide / 2**0.5))).astype(x.dtype)


class FeedForward(nnx.Module):
    """Two projections with a GELU between, the residual sum, and its norm."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Make the two projections."""
        self.up = nnx.Linear(config.width, config.ffn_width, rngs=rngs)
        self.down = nnx.Linear(config.ffn_width, config.width, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """Transform each token on its own."""
        return self.norm(x + self.down(_gelu(self.up(x))))


class Layer(nnx.Module):
    """One encoder layer."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Make attention and feed-forward block."""
        self.attention = Attention(config, rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        bias: Float[Array, "batch 1 1 length"],
    ) -> Float[Array, "batch length width"]:
        """Attention, then feed-forward."""
        return self.ffn(self.attention(x, bias))


class Bert(nnx.Module):
    """A text encoder, mean pooling over the tokens, and a linear classifier.

    Example:
        >>> config = BertConfig(vocabulary=30, width=8, layers=2, heads=2, ffn_width=16, classes=3)
        >>> model = Bert(config, rngs=nnx.Rngs(0))
        >>> tokens = jnp.ones((4, 5), jnp.int32)
        >>> model(tokens, tokens > 0).shape
        (4, 3)
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        """Make an encoder with random weights; `load_bert` has trained ones."""
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.layers)])
        self.classifier = nnx.Linear(config.width, config.classes, rngs=rngs)

    def encode(
        self, tokens: Int[Array, "batch length"], valid: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        """A vector for each token, in view of all the valid ones."""
        x = self.embeddings(tokens)
        lowest = jnp.finfo(x.dtype).min
        bias = jnp.where(valid, 0, lowest).astype(x.dtype)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, bias)
        return x

    def embed(
        self, tokens: Int[Array, "batch length"], valid: Bool[Array, "batch length"]
    ) -> Float[Array, "batch width"]:
        """A vector for each text: the mean over its valid tokens."""
        x = self.encode(tokens, valid)
        weights = valid.astype(x.dtype)[..., None]
        return (x * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)

    def __call__(
        self, tokens: Int[Array, "batch length"], valid: Bool[Array, "batch length"]
    ) -> Float[Array, "batch classes"]:
        """The classifier's logits for each text."""
        return self.classifier(self.embed(tokens, valid))


def load_bert(folder: str | os.PathLike[str], *, classes: int, rngs: nnx.Rngs) -> Bert:
    """Build an encoder from published weights, with a new classifier on top.

    A published pooler or classifier is left out: this model takes the mean over the tokens.

    Args:
        folder: Holds `config.json` and `model.safetensors`, as Hugging Face publishes them; that of
            `pockjax.hub.fetch("all-minilm-l6-v2")`, for instance.
        classes: Outputs of the new classifier.
        rngs: For the classifier's weights.

    Raises:
        FileNotFoundError: One of the two files is missing.
        WeightsError: Another architecture, a missing tensor, or one of another shape.
    """
    config = BertConfig.from_json(Path(folder) / "config.json", classes=classes)
    file = Path(folder) / "model.safetensors"
    tensors = read_safetensors(file)
    names = published_names(config, tensors)
    for path, name in names.items():
        if path.endswith("kernel") and name in tensors:
            tensors[name] = tensors[name].T
    model = fill(
        lambda: Bert(config, rngs=nnx.Rngs(0)),
        names,
        tensors,
        file=file,
        layout=np.asarray,
        fresh=("classifier",),
    )
    model.classifier = nnx.Linear(config.width, classes, rngs=rngs)
    return model


def published_names(config: BertConfig, tensors: Iterable[str]) -> dict[str, str]:
    """Map each parameter's path to its tensor in Hugging Face's files.

    Kernels are stored transposed there. The classifier is not among them.

    Args:
        config: Says how many layers there are, and that it is DistilBERT by `token_types` 0.
        tensors: The names in the file, which may all begin with "bert." or "distilbert.".
    """
    if config.token_types:
        root, layer, layer_names = "bert.", "encoder.layer", _BERT_LAYER
    else:
        root, layer, layer_names = "distilbert.", "transformer.layer", _DISTILBERT_LAYER
    root = root if any(name.startswith(root) for name in tensors) else ""
    names = {
        "embeddings/word/embedding": "embeddings.word_embeddings.weight",
        "embeddings/position/embedding": "embeddings.position_embeddings.weight",
        "embeddings/norm/scale": "embeddings.LayerNorm.weight",
        "embeddings/norm/bias": "embeddings.LayerNorm.bias",
    }
    if config.token_types:
        names["embeddings/token_type/embedding"] = "embeddings.token_type_embeddings.weight"
    for k in range(config.layers):
        for ours, theirs in layer_names.items():
            first = "scale" if ours.endswith("norm") else "kernel"
            names[f"layers/{k}/{ours}/{first}"] = f"{layer}.{k}.{theirs}.weight"
            names[f"layers/{k}/{ours}/bias"] = f"{layer}.{k}.{theirs}.bias"
    return {path: root + name for path, name in names.items()}


_BERT_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention/norm": "attention.output.LayerNorm",
    "ffn/up": "intermediate.dense",
    "ffn/down": "output.dense",
    "ffn/norm": "output.LayerNorm",
}
_DISTILBERT_LAYER = {
    "attention/query": "attention.q_lin",
    "attention/key": "attention.k_lin",
    "attention/value": "attention.v_lin",
    "attention/output": "attention.out_lin",
    "attention/norm": "sa_layer_norm",
    "ffn/up": "ffn.lin1",
    "ffn/down": "ffn.lin2",
    "ffn/norm": "output_layer_norm",
}


def _register(name: str, config: BertConfig, about: str, **where: Any) -> None:
    length = (128,)
    inputs = jax.ShapeDtypeStruct(length, np.int32), jax.ShapeDtypeStruct(length, np.bool_)

    @register(name, about=about, inputs=inputs, **where)
    def build(weights: Path | None, classes: int | None, rngs: nnx.Rngs) -> Bert:
        # What is published has no classifier of this model's kind, so one is made in any case.
        wanted = replace(config, classes=config.classes if classes is None else classes)
        if weights is None:
            return Bert(wanted, rngs=rngs)
        found = BertConfig.from_json(weights / "config.json", classes=wanted.classes)
        # Cased and multilingual checkpoints differ in their vocabularies alone.
        if replace(found, vocabulary=wanted.vocabulary) != wanted:
            raise WeightsError(f"{weights} is no {name}:\n  expected {wanted}\n  found    {found}")
        return load_bert(weights, classes=wanted.classes, rngs=rngs)


_register(
    "all-minilm-l6-v2",
    MINILM,
    "sentence encoder: BERT with 6 layers of width 384, 22.7 M parameters",
    source="all-minilm-l6-v2",
)
_register(
    "bert-base",
    BERT_BASE,
    "text encoder: BERT with 12 layers of width 768, 109 M parameters",
    origin="https://huggingface.co/google-bert/bert-base-uncased",
)
_register(
    "distilbert",
    DISTILBERT,
    "text encoder: DistilBERT, 6 layers of width 768, 66 M parameters",
    origin="https://huggingface.co/distilbert/distilbert-base-uncased",
)
