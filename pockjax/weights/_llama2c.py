"""The `.bin` files of llama2.c: a header of seven integers, then every weight in float32.

This is the first of its formats ("version 0"), in which the small models trained on TinyStories are
published; see https://github.com/karpathy/llama2.c.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from pockjax.weights._errors import WeightsError

_HEADER = struct.Struct("<7i")
_NEWER_MAGIC = b"24ka"


@dataclass(frozen=True)
class Llama2c:
    """What a file holds.

    Attributes:
        path: Where it is.
        width: Size of a token's vector.
        ffn_width: Width inside the feed-forward block.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        vocabulary: Number of token ids.
        positions: The longest sequence.
        tied: Whether the embedding is also the classifier.
        tensors: The weights under llama2.c's names, float32; those of layers are stacked along the
            first axis, and projections end in (out, in).
    """

    path: Path
    width: int
    ffn_width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    tied: bool
    tensors: Mapping[str, np.ndarray]


def read_llama2c(path: str | os.PathLike[str]) -> Llama2c:
    """Read a llama2.c model.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: The header makes no sense, or the file's length is not what it implies.
    """
    path = Path(path)
    data = path.read_bytes()
    if data[:4] == _NEWER_MAGIC:
        raise WeightsError(
            f"{path} is a newer llama2.c format; version 0 is read (`export.py` makes it)"
        )
    if len(data) < _HEADER.size:
        raise WeightsError(f"{path} is cut short: {len(data)} bytes are less than its header")
    width, ffn_width, layers, heads, kv_heads, signed, positions = _HEADER.unpack_from(data)
    # A negative vocabulary size is how the format says that the classifier has its own weights.
    vocabulary, tied = abs(signed), signed > 0
    header = (width, ffn_width, layers, heads, kv_heads, vocabulary, positions)
    if min(header) < 1 or width % heads or heads % kv_heads:
        raise WeightsError(f"{path} is not a llama2.c model: its header reads {header}")
    head = width // heads
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding": (vocabulary, width),
        "rms_att": (layers, width),
        "wq": (layers, width, width),
        "wk": (layers, kv_heads * head, width),
        "wv": (layers, kv_heads * head, width),
        "wo": (layers, width, width),
        "rms_ffn": (layers, width),
        "w1": (layers, ffn_width, width),
        "w2": (layers, width, ffn_width),
        "w3": (layers, ffn_width, width),
        "rms_final": (width,),
        # Tables of rotary angles, once read from here and since then computed.
        "freq_cis_real": (positions, head // 2),
        "freq_cis_imag": (positions, head // 2),
    }
    if not tied:
        shapes["wcls"] = (vocabulary, width)
    expected = _HEADER.size + 4 * sum(map(prod, shapes.values()))
    if len(data) != expected:
        raise WeightsError(
            f"{path} is cut short or not a llama2.c model: a model of width {width} with {layers} "
            f"layers and {vocabulary} tokens takes {expected} bytes, not {len(data)}"
        )
    tensors, at = {}, _HEADER.size
    for name, shape in shapes.items():
        tensors[name] = np.frombuffer(data, "<f4", prod(shape), at).reshape(shape)
        at += 4 * prod(shape)
    return Llama2c(
        path, width, ffn_width, layers, heads, kv_heads, vocabulary, positions, tied, tensors
    )
