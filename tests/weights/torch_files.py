"""Write the files that `torch.save` writes, without torch: what readers are tested on."""

import io
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_KINDS = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.bool_): "BoolStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}
_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass
class Tensor:
    """A view of a storage, as torch pickles it."""

    storage: np.ndarray
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return cls(array.reshape(-1), array.shape, strides)


def write_zip(file: Path, tree: Any) -> Path:
    """The format of torch since 1.6."""
    with _torch() as torch:
        pickler = _Pickler(torch, legacy=False)
        pickled = pickler.pickled(tree)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, storage in pickler.storages.items():
            archive.writestr(f"archive/data/{key}", storage.tobytes())
        archive.writestr("archive/version", "3\n")
    return file


def write_legacy(file: Path, tree: Any) -> Path:
    """The format before that."""
    with _torch() as torch:
        pickler = _Pickler(torch, legacy=True)
        pickled = pickler.pickled(tree)
    head = [_MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    parts = [pickle.dumps(part, 2) for part in head]
    parts += [pickled, pickle.dumps(list(pickler.storages), 2)]
    for storage in pickler.storages.values():
        parts += [storage.size.to_bytes(8, "little"), storage.tobytes()]
    file.write_bytes(b"".join(parts))
    return file


class _Pickler:
    def __init__(self, torch: types.ModuleType, *, legacy: bool) -> None:
        self.torch, self.legacy = torch, legacy
        self.storages: dict[str, np.ndarray] = {}

    def pickled(self, tree: Any) -> bytes:
        stream = io.BytesIO()
        outer = self

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> Any:
                if not isinstance(obj, _Storage):
                    return None
                kind = getattr(outer.torch, _KINDS[obj.array.dtype])
                key = next((k for k, s in outer.storages.items() if s is obj.array), None)
                if key is None:
                    key = str(len(outer.storages))
                    outer.storages[key] = obj.array
                pid = ("storage", kind, key, "cpu", obj.array.size)
                return (*pid, None) if outer.legacy else pid

            def reducer_override(self, obj: Any) -> Any:
                if not isinstance(obj, Tensor):
                    return NotImplemented
                arguments = (_Storage(obj.storage), obj.offset, obj.shape, obj.strides, False, {})
                return outer.torch._utils._rebuild_tensor_v2, arguments

        Pickler(stream, 2).dump(tree)
        return stream.getvalue()


@dataclass
class _Storage:
    array: np.ndarray


@contextmanager
def _torch() -> Iterator[Any]:
    """Modules with the names that torch's files refer to."""
    torch: Any = types.ModuleType("torch")
    utils: Any = types.ModuleType("torch._utils")
    torch._utils = utils

    def rebuild(*_: Any) -> None: ...

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    for name in _KINDS.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": torch, "torch._utils": utils})
    try:
        yield torch
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
