"""The safetensors format: a JSON header, then the arrays one after another."""

import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pockjax.weights._errors import WeightsError

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_LONGEST_HEADER = 100_000_000  # the format's own limit, in bytes


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a safetensors file; the arrays are views of the file, which is mapped, not copied.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It is cut short, is something else, or holds a dtype that NumPy lacks.
    """
    file = Path(path)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise WeightsError(f"{file} is cut short, or is no safetensors file")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            raise WeightsError(f"{file} is no safetensors file: its header is not JSON") from error
    start = 8 + length
    data = np.memmap(file, np.uint8, "r", offset=start) if size > start else np.empty(0, np.uint8)
    try:
        return {
            name: _view(data, name, entry, file)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise WeightsError(f"{file} is damaged: its header lacks {error}") from error


def _view(data: np.ndarray, name: str, entry: dict[str, Any], file: Path) -> np.ndarray:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _DTYPES:
        raise WeightsError(f"{file}: {name!r} has dtype {dtype}, which cannot be read")
    if not 0 <= begin <= end <= data.size:
        raise WeightsError(f"{file} is cut short: {name!r} ends at byte {end} of {data.size}")
    if math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize != end - begin:
        raise WeightsError(f"{file}: {name!r} has {end - begin} bytes, not those of {shape}")
    return np.asarray(data[begin:end]).view(_DTYPES[dtype]).reshape(shape)
