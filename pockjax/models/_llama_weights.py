"""Trained Llama weights, from each of the formats that they are published in."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from pockjax.models._registry import register
from pockjax.models.llama import LLAMA_2_7B, SMOLLM2_135M, STORIES_260K, Llama, LlamaConfig
from pockjax.weights import WeightsError, fill, read_gguf, read_llama2c, read_safetensors


@dataclass(frozen=True)
class _Published:
    """Weights somewhere: the shape they have, and what they are called.

    Attributes:
        path: The file or folder.
        config: The model they are for.
        names: From a parameter's path, without its layer's number, to the published name, with {}
            for that number.
        tensors: By published name, with kernels (out, in).
    """

    path: Path
    config: LlamaConfig
    names: Mapping[str, str]
    tensors: Mapping[str, np.ndarray]


class _Arranged(Mapping[str, np.ndarray]):
    """Published tensors as the model wants them: kernels (in, out), and layers stacked if asked.

    A tensor is read when it is looked up, so that only one is held twice at a time. The stack of
    all layers is looked up by the name that still has {} in it.
    """

    def __init__(self, published: _Published) -> None:
        self._tensors, self._layers = published.tensors, published.config.layers
        kernels = [name for path, name in published.names.items() if path.endswith("kernel")]
        self._kernels = {name.format(k) for name in kernels for k in range(self._layers)}

    def _parts(self, name: str) -> list[str]:
        return [name.format(k) for k in range(self._layers)] if "{}" in name else [name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and all(part in self._tensors for part in self._parts(name))

    def __getitem__(self, name: str) -> np.ndarray:
        parts = [self._one(part) for part in self._parts(name)]
        return np.stack(parts) if "{}" in name else parts[0]

    def _one(self, name: str) -> np.ndarray:
        return self._tensors[name].T if name in self._kernels else self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_llama(
    path: str | os.PathLike[str],
    *,
    scanned: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Llama:
    """Build a language model from published weights.

    Args:
        path: A GGUF file, whose 4- or 8-bit weights are dequantised (see
            `pockjax.weights.read_gguf`: that start is slightly damaged); a llama2.c `.bin`; or a
            folder that holds either one `.gguf`, or `config.json` with `*.safetensors`, as Hugging
            Face publishes them.
        scanned: Whether to stack the layers.
        dtype: What to cast the weights to.

    Raises:
        FileNotFoundError: There are no weights.
        WeightsError: Another architecture, a missing tensor, or one of another shape.
    """
    published = _find(Path(path))
    config = replace(published.config, scanned=scanned, dtype=dtype)
    names = {}
    for ours, theirs in published.names.items():
        if not ours.startswith("layers/") or scanned:
            names[ours] = theirs
            continue
        inside = ours.removeprefix("layers/")
        names |= {f"layers/{k}/{inside}": theirs.format(k) for k in range(config.layers)}
    return fill(
        lambda: Llama(config, rngs=nnx.Rngs(0)),
        names,
        _Arranged(published),
        file=published.path,
        layout=np.asarray,
    )


def _find(path: Path) -> _Published:
    if path.is_dir():
        if (path / "config.json").is_file():
            return _from_folder(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{path} holds neither config.json nor exactly one .gguf (it has {len(files)})"
            )
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.suffix == ".bin":
        return _from_llama2c(path)
    raise WeightsError(f"{path}: weights of a Llama are a .gguf, a llama2.c .bin or a folder")


_GGUF = {
    "embed/embedding": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/attention/query/kernel": "blk.{}.attn_q.weight",
    "layers/attention/key/kernel": "blk.{}.attn_k.weight",
    "layers/attention/value/kernel": "blk.{}.attn_v.weight",
    "layers/attention/output/kernel": "blk.{}.attn_output.weight",
    "layers/ffn_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/ffn/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/ffn/up/kernel": "blk.{}.ffn_up.weight",
    "layers/ffn/down/kernel": "blk.{}.ffn_down.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}


def _from_gguf(path: Path) -> _Published:
    file = read_gguf(path)
    given = file.metadata
    architecture = given.get("general.architecture")
    scaling = given.get("llama.rope.scaling.type", "none")
    if architecture != "llama" or scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise WeightsError(
            f"{path}: architecture {architecture!r} with rotary scaling {scaling!r}; this model is "
            "'llama' without scaling (and without 'rope_freqs.weight')"
        )
    try:
        heads = given["llama.attention.head_count"]
        config = LlamaConfig(
            vocabulary=file.tensors.shape(_GGUF["embed/embedding"])[0],
            width=given["llama.embedding_length"],
            layers=given["llama.block_count"],
            heads=heads,
            kv_heads=given.get("llama.attention.head_count_kv", heads),
            ffn_width=given["llama.feed_forward_length"],
            positions=given["llama.context_length"],
            rope_base=_decimal(given.get("llama.rope.freq_base", 10_000.0)),
            # Converters to GGUF reorder queries and keys, so that neighbours rotate together.
            rope="interleaved",
            tied=_GGUF["head/kernel"] not in file.tensors,
            norm_epsilon=_decimal(given["llama.attention.layer_norm_rms_epsilon"]),
        )
    except KeyError as error:
        raise WeightsError(f"{path} says nothing about {error}") from None
    return _Published(path, config, _GGUF, file.tensors)


def _decimal(value: float) -> float:
    """The number that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


_LLAMA2C = {
    "embed/embedding": "token_embedding",
    "layers/attention_norm/scale": "rms_att[{}]",
    "layers/attention/query/kernel": "wq[{}]",
    "layers/attention/key/kernel": "wk[{}]",
    "layers/attention/value/kernel": "wv[{}]",
    "layers/attention/output/kernel": "wo[{}]",
    "layers/ffn_norm/scale": "rms_ffn[{}]",
    "layers/ffn/gate/kernel": "w1[{}]",
    "layers/ffn/up/kernel": "w3[{}]",
    "layers/ffn/down/kernel": "w2[{}]",
    "norm/scale": "rms_final",
    "head/kernel": "wcls",
}


def _from_llama2c(path: Path) -> _Published:
    file = read_llama2c(path)
    config = LlamaConfig(
        vocabulary=file.vocabulary,
        width=file.width,
        layers=file.layers,
        heads=file.heads,
        kv_heads=file.kv_heads,
        ffn_width=file.ffn_width,
        positions=file.positions,
        rope="interleaved",
        tied=file.tied,
    )
    tensors = dict(file.tensors)
    for ours, name in _LLAMA2C.items():
        if ours.startswith("layers/"):
            stacked = file.tensors[name.removesuffix("[{}]")]
            tensors |= {name.format(k): stacked[k] for k in range(file.layers)}
    return _Published(path, config, _LLAMA2C, tensors)


_HUGGING_FACE = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/query/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/key/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/value/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/output/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/ffn_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/ffn/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/ffn/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/ffn/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}


def llama_names(config: LlamaConfig) -> dict[str, str]:
    """Map each parameter's path in the unrolled form to its name in Hugging Face's files."""
    names = {}
    for path, name in _HUGGING_FACE.items():
        if path.startswith("layers/"):
            for k in range(config.layers):
                names[path.replace("layers", f"layers/{k}", 1)] = name.format(k)
        else:
            names[path] = name
    return names


def _from_folder(folder: Path) -> _Published:
    config = config_from_json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has a config.json, but no .safetensors")
    tensors = {name: value for file in files for name, value in read_safetensors(file).items()}
    return _Published(folder, config, _HUGGING_FACE, tensors)


def config_from_json(path: str | os.PathLike[str]) -> LlamaConfig:
    """Read the `config.json` beside weights in Hugging Face's format.

    Raises:
        WeightsError: The file describes another architecture, biases or scaled rotations.
    """
    given: dict[str, Any] = json.loads(Path(path).read_text())
    rotary = given.get("rope_parameters") or given.get("rope_scaling") or {}
    scaling = rotary.get("rope_type", rotary.get("type", "default"))
    kind, activation = given.get("model_type"), given.get("hidden_act", "silu")
    biases = given.get("attention_bias", False) or given.get("mlp_bias", False)
    if kind != "llama" or activation != "silu" or biases or scaling != "default":
        raise WeightsError(
            f"{path}: model_type {kind!r} with activation {activation!r}, rotary scaling "
            f"{scaling!r} and biases {biases}; this model is 'llama' with 'silu', 'default' and "
            "none"
        )
    heads = given["num_attention_heads"]
    return LlamaConfig(
        vocabulary=given["vocab_size"],
        width=given["hidden_size"],
        layers=given["num_hidden_layers"],
        heads=heads,
        kv_heads=given.get("num_key_value_heads", heads),
        ffn_width=given["intermediate_size"],
        positions=given["max_position_embeddings"],
        rope_base=rotary.get("rope_theta", given.get("rope_theta", 10_000.0)),
        rope="halves",
        tied=given.get("tie_word_embeddings", False),
        norm_epsilon=given["rms_norm_eps"],
    )


def _register(name: str, config: LlamaConfig, about: str, **where: Any) -> None:
    @register(
        name, about=about, inputs=(jax.ShapeDtypeStruct((128,), np.dtype(np.int32)),), **where
    )
    def build(weights: Path | None, classes: int | None, rngs: nnx.Rngs) -> Llama:
        if classes is not None:
            raise ValueError(f"{name} is a language model; it has no classes to set to {classes}")
        if weights is None:
            return Llama(config, rngs=rngs)
        model = load_llama(weights)
        # Where the numbers rotate, and how finely norms divide, is the file's affair.
        free = {"rope": config.rope, "norm_epsilon": config.norm_epsilon}
        free |= {"positions": config.positions, "rope_base": config.rope_base}
        if (found := replace(model.config, **free)) != config:
            raise WeightsError(f"{weights} is no {name}:\n  expected {config}\n  found    {found}")
        return model


_register(
    "llama-2-7b",
    LLAMA_2_7B,
    "language model: Llama 2, 32 layers of width 4096, 6.7 G parameters",
    origin="https://huggingface.co/meta-llama/Llama-2-7b-hf",
)
_register(
    "smollm2-135m",
    SMOLLM2_135M,
    "language model: SmolLM2-135M-Instruct, 30 layers of width 576, from 4-bit weights",
    source="smollm2-135m-instruct",
)
_register(
    "stories260k",
    STORIES_260K,
    "language model: TinyStories, 5 layers of width 64, 260 k parameters; tells stories",
    origin="https://huggingface.co/karpathy/tinyllamas, stories260K",
)
