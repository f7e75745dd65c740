"""A small Llama with random weights: published in three formats, and computed in numpy."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from pockjax.models import LlamaConfig
from tests.weights.gguf_files import Packed, write_gguf

CONFIG = LlamaConfig(
    vocabulary=48, width=32, layers=3, heads=4, kv_heads=2, ffn_width=40, positions=64
)
type Tensors = dict[str, np.ndarray]

_LAYER = "model.layers.{}."
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_tensors(*, tied: bool = False) -> Tensors:
    """Weights under Hugging Face's names, which rotate halves."""
    generator = np.random.default_rng(0)
    width, kv, ffn = CONFIG.width, CONFIG.kv_heads * CONFIG.head, CONFIG.ffn_width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG.vocabulary, width)}
    for k in range(CONFIG.layers):
        inside = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (ffn, width),
            "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn),
        }
        shapes |= {f"{_LAYER.format(k)}{name}.weight": shape for name, shape in inside.items()}
    shapes["model.norm.weight"] = (width,)
    if not tied:
        shapes["lm_head.weight"] = (CONFIG.vocabulary, width)
    return {
        name: generator.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def numpy_logits(tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Logits in float64, one sequence and one head at a time."""
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * tensors[f"{name}.weight"]

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T

    def rotate(x):
        half = CONFIG.head // 2
        angles = np.outer(np.arange(len(x)), 10_000.0 ** (-np.arange(half) / half))
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=1)

    def attend(query, key, value):
        scores = rotate(query) @ rotate(key).T / np.sqrt(CONFIG.head)
        scores[np.triu_indices(len(scores), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ value

    logits = []
    for sequence in tokens:
        x = tensors["model.embed_tokens.weight"][sequence]
        for k in range(CONFIG.layers):
            layer = _LAYER.format(k)
            normal = norm(x, f"{layer}input_layernorm")
            query, key, value = (linear(normal, f"{layer}self_attn.{n}_proj") for n in "qkv")
            heads = []
            for head in range(CONFIG.heads):
                shared = head // (CONFIG.heads // CONFIG.kv_heads)
                one, other = (slice(h * CONFIG.head, (h + 1) * CONFIG.head) for h in (head, shared))
                heads.append(attend(query[:, one], key[:, other], value[:, other]))
            x = x + linear(np.concatenate(heads, axis=1), f"{layer}self_attn.o_proj")
            normal = norm(x, f"{layer}post_attention_layernorm")
            gate = linear(normal, f"{layer}mlp.gate_proj")
            up = linear(normal, f"{layer}mlp.up_proj")
            x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{layer}mlp.down_proj")
        head = "lm_head" if "lm_head.weight" in tensors else "model.embed_tokens"
        logits.append(linear(norm(x, "model.norm"), head))
    return np.stack(logits)


def write_folder(folder: Path, tensors: Tensors, **changes) -> Path:
    """As Hugging Face publishes a model: its config and, in two files, its weights in bfloat16."""
    folder.mkdir()
    given = {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": CONFIG.vocabulary,
        "hidden_size": CONFIG.width,
        "num_hidden_layers": CONFIG.layers,
        "num_attention_heads": CONFIG.heads,
        "num_key_value_heads": CONFIG.kv_heads,
        "intermediate_size": CONFIG.ffn_width,
        "max_position_embeddings": CONFIG.positions,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    (folder / "config.json").write_text(json.dumps(given | changes))
    names = sorted(tensors)
    for k, part in enumerate((names[:10], names[10:]), 1):
        half = {name: tensors[name].astype(ml_dtypes.bfloat16) for name in part}
        save_file(half, folder / f"model-0000{k}-of-00002.safetensors")
    return folder


def write_llama_gguf(path: Path, tensors: Tensors, **changes) -> Path:
    """As llama.cpp's converter does: queries and keys reordered to rotate neighbours."""
    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": CONFIG.width,
        "llama.block_count": CONFIG.layers,
        "llama.attention.head_count": CONFIG.heads,
        "llama.attention.head_count_kv": CONFIG.kv_heads,
        "llama.feed_forward_length": CONFIG.ffn_width,
        "llama.context_length": CONFIG.positions,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for k in range(CONFIG.layers):
        for theirs, ours in _GGUF_LAYER.items():
            names[f"{_LAYER.format(k)}{theirs}.weight"] = f"blk.{k}.{ours}.weight"
    packed = {
        names[name]: Packed.float32(_neighbours(name, value)) for name, value in tensors.items()
    }
    return write_gguf(path, packed, metadata | changes)


def write_llama2c(path: Path, tensors: Tensors) -> Path:
    """As llama2.c's first exporter does."""
    tied = "lm_head.weight" not in tensors
    head = (CONFIG.width, CONFIG.ffn_width, CONFIG.layers, CONFIG.heads, CONFIG.kv_heads)
    head = (*head, CONFIG.vocabulary if tied else -CONFIG.vocabulary, CONFIG.positions)
    order = [name for name in _GGUF_LAYER if not name.startswith("mlp")]
    order += ["mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]
    values = [tensors["model.embed_tokens.weight"]]
    for name in order:
        for k in range(CONFIG.layers):
            full = f"{_LAYER.format(k)}{name}.weight"
            values.append(_neighbours(full, tensors[full]))
    values.append(tensors["model.norm.weight"])
    values.append(np.zeros((CONFIG.positions, CONFIG.head)))  # unused tables
    values += [] if tied else [tensors["lm_head.weight"]]
    data = b"".join(np.ascontiguousarray(value, "<f4").tobytes() for value in values)
    path.write_bytes(struct.pack("<7i", *head) + data)
    return path


def _neighbours(name: str, value: np.ndarray) -> np.ndarray:
    """From rows that rotate halves to rows that rotate neighbours."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    return value.reshape(-1, 2, CONFIG.head // 2, CONFIG.width).swapaxes(1, 2).reshape(value.shape)
