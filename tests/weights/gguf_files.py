"""Writes GGUF files, for tests that read them."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

F32, Q5_K = 0, 13


@dataclass(frozen=True)
class Packed:
    """A tensor as it stands in a file."""

    kind: int
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def float32(cls, value: np.ndarray) -> "Packed":
        return cls(F32, value.shape, np.ascontiguousarray(value, "<f4").tobytes())


def write_gguf(
    path: Path,
    tensors: Mapping[str, Packed],
    metadata: Mapping[str, Any] | None = None,
    *,
    version: int = 3,
) -> Path:
    head = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata or {})))
    for key, value in (metadata or {}).items():
        head += _text(key) + _value(value)
    body = bytearray()
    for name, packed in tensors.items():
        body += bytes(-len(body) % 32)
        axes = packed.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
        head += struct.pack("<IQ", packed.kind, len(body))
        body += packed.data
    path.write_bytes(bytes(head) + bytes(-len(head) % 32) + bytes(body))
    return path


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        parts = [_value(item) for item in value]
        return (
            struct.pack("<I", 9)
            + parts[0][:4]
            + struct.pack("<Q", len(parts))
            + b"".join(part[4:] for part in parts)
        )
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<Ii", 5, value)
        case float():
            return struct.pack("<If", 6, value)
        case _:
            return struct.pack("<I", 8) + _text(value)
