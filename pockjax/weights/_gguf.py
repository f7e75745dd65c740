"""GGUF files, as llama.cpp uses them: metadata (the tokenizer among it) and dequantised tensors.

Weights that come out of a quantised file are a slightly damaged start: they are the published ones
rounded to 8 bits (Q8_0, hardly visible) or 4 bits (Q4_0, Q4_1, a few per cent of perplexity). What
is lost is lost: fine-tuning begins from the rounded weights, and results are to be compared with
others that begin there too.

The layout is specified in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pockjax.weights._errors import WeightsError
from pockjax.weights._ggml import FORMATS, OTHER_NAMES, BlockFormat

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Gguf:
    """An open GGUF file.

    Attributes:
        path: Where it is.
        metadata: Its key-value pairs, such as "llama.block_count"; arrays are lists.
        tensors: Its tensors by name. Each is read and dequantised to float32 when it is looked up,
            so that a model larger than memory can be taken over tensor by tensor. The last axis is
            the one that is contiguous in the file: a projection has the shape (out, in).
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: "Tensors"


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file; looking one up reads it."""

    def __init__(self, path: Path, data: memoryview, entries: dict[str, _Entry]) -> None:
        """Wrap what `read_gguf` found."""
        self._path, self._data, self._entries = path, data, entries

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one tensor, as float32."""
        entry = self._entries[name]
        blocks = prod(entry.shape) // entry.format.numbers
        packed = np.frombuffer(
            self._data, np.uint8, count=blocks * entry.format.bytes, offset=entry.offset
        )
        return entry.format.decode(packed.reshape(blocks, -1)).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the file."""
        return iter(self._entries)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._entries[name].shape

    def format(self, name: str) -> str:
        """GGML's name for how a tensor is stored, such as "Q4_1"."""
        return self._entries[name].format.name


def read_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Open a GGUF file of version 2 or 3 (little-endian).

    Tensors may be F32, F16, BF16, Q8_0, Q4_0 or Q4_1; that of an unread type is an error here, and
    not when it is looked up.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: Not a GGUF file, one that was cut short, or one with a tensor of a type that
            is not read.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            file.seek(0)
            raise WeightsError(f"{path} is not a GGUF file: it begins with {file.read(4)!r}")
        # Mapped, not read: only the tensors that are looked up cost memory.
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    cursor = _Cursor(path, data, len(_MAGIC))
    version = cursor.number("<I", "version")
    if version not in _VERSIONS:
        raise WeightsError(
            f"{path} has GGUF version {version}; read are {_VERSIONS}, little-endian"
        )
    tensors = cursor.number("<Q", "number of tensors")
    pairs = cursor.number("<Q", "number of metadata entries")
    metadata = {}
    for _ in range(pairs):
        key = cursor.text("name of a metadata entry")
        metadata[key] = cursor.value(cursor.number("<I", key), key)
    found = [_read_entry(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise WeightsError(f"{path}: its tensors are aligned to {alignment!r} bytes")
    start = -(-cursor.at // alignment) * alignment
    entries = {name: _placed(path, name, entry, start, len(data)) for name, entry in found}
    return Gguf(path, metadata, Tensors(path, data, entries))


def _read_entry(cursor: "_Cursor") -> tuple[str, _Entry]:
    name = cursor.text("name of a tensor")
    axes = cursor.number("<I", name)
    # GGML counts axes from the contiguous one.
    shape = tuple(cursor.number("<Q", name) for _ in range(axes))[::-1]
    kind = cursor.number("<I", name)
    offset = cursor.number("<Q", name)
    if kind not in FORMATS:
        readable = ", ".join(form.name for form in FORMATS.values())
        raise WeightsError(
            f"{cursor.path}: tensor {name!r} of shape {shape} is of type "
            f"{OTHER_NAMES.get(kind, kind)}, which is not read; read are {readable}"
        )
    if not shape or shape[-1] % FORMATS[kind].numbers:
        raise WeightsError(
            f"{cursor.path}: tensor {name!r} of shape {shape} cannot be of type "
            f"{FORMATS[kind].name}, whose blocks hold {FORMATS[kind].numbers} numbers"
        )
    return name, _Entry(shape, FORMATS[kind], offset)


def _placed(path: Path, name: str, entry: _Entry, start: int, size: int) -> _Entry:
    """The entry with its place in the whole file, which has to lie inside it."""
    begin = start + entry.offset
    end = begin + prod(entry.shape) // entry.format.numbers * entry.format.bytes
    if end > size:
        raise WeightsError(
            f"{path} is cut short: tensor {name!r} of shape {entry.shape}, {entry.format.name}, "
            f"ends at byte {end}, the file at {size}"
        )
    return _Entry(entry.shape, entry.format, begin)


@dataclass
class _Cursor:
    """Reads the head of a file from front to back."""

    path: Path
    data: memoryview
    at: int

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        size = self.number("<Q", what)
        # Vocabularies have pieces that are not UTF-8 by themselves.
        return bytes(self._take(size, what)).decode("utf-8", errors="surrogateescape")

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise WeightsError(f"{self.path}: metadata {what!r} is of unknown type {kind}")
        inner = self.number("<I", what)
        count = self.number("<Q", what)
        if inner in _SCALARS:
            packed = self._take(count * struct.calcsize(_SCALARS[inner]), what)
            return np.frombuffer(packed, _SCALARS[inner]).tolist()
        return [self.value(inner, what) for _ in range(count)]

    def _take(self, size: int, what: str) -> memoryview:
        if self.at + size > len(self.data):
            raise WeightsError(
                f"{self.path} is cut short: {what!r} needs {size} bytes at byte {self.at}, the "
                f"file ends at {len(self.data)}"
            )
        self.at += size
        return self.data[self.at - size : self.at]
