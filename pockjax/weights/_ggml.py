"""The block formats of GGML: how numbers are packed into a GGUF file, and how to get them back.

A quantised tensor is a sequence of blocks of 32 numbers that follow each other along its last axis.
Each block has a scale d (float16), Q4_1 also an offset m, and one small integer q for each number:

    Q8_0   x = d·q          q in -128…127
    Q4_0   x = d·(q - 8)    q in 0…15
    Q4_1   x = d·q + m      q in 0…15

Four-bit integers share a byte: the low half holds the number i, the high half the number i + 16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

type Blocks = UInt8[np.ndarray, "blocks bytes"]
type Numbers = Float[np.ndarray, "blocks numbers"]


@dataclass(frozen=True)
class BlockFormat:
    """How one GGML type packs numbers.

    Attributes:
        name: GGML's name of the type.
        numbers: How many numbers a block holds.
        bytes: How many bytes a block takes.
        decode: From the bytes of blocks to their numbers, in float32.
    """

    name: str
    numbers: int
    bytes: int
    decode: Callable[[Blocks], Numbers]


def _f32(blocks: Blocks) -> Numbers:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: Blocks) -> Numbers:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Blocks) -> Numbers:
    # bfloat16 is the upper half of a float32.
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: Blocks) -> Numbers:
    return blocks[:, 2:].view(np.int8) * _half(blocks, 0)


def _q4_0(blocks: Blocks) -> Numbers:
    return (_nibbles(blocks[:, 2:]) - np.float32(8)) * _half(blocks, 0)


def _q4_1(blocks: Blocks) -> Numbers:
    return _nibbles(blocks[:, 4:]) * _half(blocks, 0) + _half(blocks, 2)


def _half(blocks: Blocks, start: int) -> Float[np.ndarray, "blocks 1"]:
    """The float16 that begins at a byte of each block."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(pairs: Blocks) -> Numbers:
    return np.concatenate([pairs & 0xF, pairs >> 4], axis=1).astype(np.float32)


FORMATS: dict[int, BlockFormat] = {
    0: BlockFormat("F32", 1, 4, _f32),
    1: BlockFormat("F16", 1, 2, _f16),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    30: BlockFormat("BF16", 1, 2, _bf16),
}
"""The formats that are read, by the number that stands for them in a file."""

OTHER_NAMES = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
}
"""Formats that are not read, so that an error can call them what their users do."""
