"""Make ../data/llama.npz: logits of transformers, and blocks as the gguf package dequantises them.

Run with Python 3.11, torch 2.13.0, transformers 5.23.0 and gguf 0.19.0:

    python tests/models/oracles/llama.py SmolLM2-135M-Instruct.Q4_1.gguf stories260K.bin

The first file is in the wheel of the hub's source "smollm2-135m-instruct".
"""

import hashlib
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Two sequences each, in the model's own vocabulary.
SMOLLM2 = np.random.default_rng(0).integers(0, 49_152, (2, 12))
STORIES = np.random.default_rng(1).integers(0, 512, (2, 24))

IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """From rows that rotate with their neighbour to rows that rotate with the other half."""
    out, into = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, into)
    return pairs.swapaxes(1, 2).reshape(out, into)


def logits(config: LlamaConfig, tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    model = LlamaForCausalLM(config).eval()
    state = {name: torch.tensor(np.array(value)) for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def smollm2(path: str) -> dict[str, np.ndarray]:
    tensors, hashes = {}, {}
    for tensor in gguf.GGUFReader(path).tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        hashes[tensor.name] = hashlib.sha256(np.ascontiguousarray(value, "<f4")).hexdigest()
        block, _, rest = tensor.name.removeprefix("blk.").partition(".")
        kind = rest.removesuffix(".weight")
        if tensor.name == "token_embd.weight":
            tensors["model.embed_tokens.weight"] = value
        elif tensor.name == "output_norm.weight":
            tensors["model.norm.weight"] = value
        else:
            if kind in ("attn_q", "attn_k"):
                value = halves(value, {"attn_q": 9, "attn_k": 3}[kind])
            tensors[f"model.layers.{block}.{IN_LAYER[kind]}.weight"] = value
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    some = ["token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight"]
    return {
        "smollm2_tokens": SMOLLM2.astype(np.int32),
        "smollm2_logits": logits(config, tensors, SMOLLM2)[..., ::512],
        "smollm2_names": np.array(some),
        "smollm2_sha256": np.array([hashes[name] for name in some]),
    }


def stories(path: str) -> dict[str, np.ndarray]:
    data = Path(path).read_bytes()
    width, ffn, layers, heads, kv_heads, vocabulary, positions = struct.unpack_from("<7i", data)
    numbers = np.frombuffer(data, "<f4", offset=28)
    kv_width = width // heads * kv_heads

    def take(*shape: int) -> np.ndarray:
        nonlocal numbers
        size = int(np.prod(shape))
        taken, numbers = numbers[:size], numbers[size:]
        return taken.reshape(shape)

    tensors = {"model.embed_tokens.weight": take(vocabulary, width)}
    stacked = {
        "attn_norm": take(layers, width),
        "attn_q": take(layers, width, width),
        "attn_k": take(layers, kv_width, width),
        "attn_v": take(layers, kv_width, width),
        "attn_output": take(layers, width, width),
        "ffn_norm": take(layers, width),
        "ffn_gate": take(layers, ffn, width),
        "ffn_down": take(layers, width, ffn),
        "ffn_up": take(layers, ffn, width),
    }
    tensors["model.norm.weight"] = take(width)
    for kind, weights in stacked.items():
        for k, weight in enumerate(weights):
            if kind in ("attn_q", "attn_k"):
                weight = halves(weight, {"attn_q": heads, "attn_k": kv_heads}[kind])
            tensors[f"model.layers.{k}.{IN_LAYER[kind]}.weight"] = weight
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    return {
        "stories_tokens": STORIES.astype(np.int32),
        "stories_logits": logits(config, tensors, STORIES)[..., ::16],
    }


def blocks() -> dict[str, np.ndarray]:
    """Random numbers, packed and unpacked again by the gguf package."""
    made = {}
    numbers = np.random.default_rng(2).normal(size=(2, 64)).astype(np.float32)
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"):
        kind = gguf.GGMLQuantizationType[name]
        packed = gguf.quantize(numbers, kind)
        made[f"{name}_packed"] = packed.view(np.uint8).reshape(2, -1)
        made[f"{name}_numbers"] = gguf.dequantize(packed, kind).astype(np.float32)
    return made


if __name__ == "__main__":
    torch.manual_seed(0)
    target = Path(__file__).parents[1] / "data" / "llama.npz"
    np.savez_compressed(target, **smollm2(sys.argv[1]), **stories(sys.argv[2]), **blocks())
    print(target, target.stat().st_size, "bytes")
