"""Files written by `torch.save`, in the zip format and in the one before it, without torch."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from pockjax.weights._errors import WeightsError
from pockjax.weights._unpickler import Storage, Unpickler, finish

_ZIP_MAGIC = b"PK"
_LONGEST_PICKLE = 2**28
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_torch(path: str | os.PathLike[str]) -> Any:
    """Read a file of `torch.save`'s: a state dict, or any nest of containers of arrays.

    Only arrays, tensors, containers, numbers and text are read; a file that names anything else is
    refused before any of it runs. bfloat16 comes as `ml_dtypes.bfloat16`.

    Args:
        path: The file.

    Returns:
        The object that was saved, with dicts for mappings and NumPy arrays for tensors.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: The file is cut short, is something else, or has code in it.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            # Its first bytes tell the format, its last ones whether all of an archive is there.
            zipped = stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
            return _read_zip(stream) if zipped else _read_legacy(stream)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from None
    except (EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{file} is cut short, or is no file of torch's: {error}") from error
    # What an unpickler raises on bytes that are no pickle, or one made to mislead.
    except (pickle.UnpicklingError, LookupError, AttributeError, TypeError, ValueError,
            OverflowError, ImportError, RuntimeError, MemoryError) as error:  # fmt: skip
        raise WeightsError(f"{file} is damaged, or is no file of torch's: {error}") from error


def _read_zip(stream: IO[bytes]) -> Any:
    with zipfile.ZipFile(stream) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise WeightsError(f"the archive holds {len(names)} files data.pkl instead of one")
        root = names[0].removesuffix("data.pkl")
        if (
            f"{root}byteorder" in archive.namelist()
            and archive.read(f"{root}byteorder") != b"little"
        ):
            raise WeightsError("its numbers are big-endian, which is not read")
        read: dict[str, np.ndarray] = {}

        def data(storage: Storage) -> np.ndarray:
            if storage.key not in read:
                name = f"{root}data/{storage.key}"
                # Before it is read: what is compressed may be of any length.
                found, needed = archive.getinfo(name).file_size, storage.nbytes
                if found != needed:
                    raise EOFError(f"storage {storage.key} has {found} bytes of {needed}")
                read[storage.key] = _numbers(archive.read(name), storage)
            return read[storage.key]

        if archive.getinfo(names[0]).file_size > _LONGEST_PICKLE:
            raise WeightsError(f"its pickle is longer than {_LONGEST_PICKLE} bytes")
        return finish(Unpickler(io.BytesIO(archive.read(names[0]))).load(), data)


def _read_legacy(stream: IO[bytes]) -> Any:
    """Five pickles (magic number, version, machine, object, names of storages), then storages."""
    stream.seek(0)
    if Unpickler(stream).load() != _LEGACY_MAGIC:
        raise WeightsError("it is no file of torch's")
    _, machine = Unpickler(stream).load(), Unpickler(stream).load()
    if not machine["little_endian"]:
        raise WeightsError("its numbers are big-endian, which is not read")
    reader = _Legacy(stream)
    tree = reader.load()
    contents: dict[str, np.ndarray] = {}
    for key in Unpickler(stream).load():
        storage = reader.storages[key]
        size = int.from_bytes(stream.read(8), "little")
        if size != storage.size:
            raise WeightsError(f"storage {key} has {size} numbers instead of {storage.size}")
        contents[key] = _numbers(stream.read(size * storage.dtype.itemsize), storage)
    return finish(tree, lambda storage: contents[storage.key])


class _Legacy(Unpickler):
    """Remembers the storages: the file gives their contents by name alone."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.storages: dict[str, Storage] = {}

    def persistent_load(self, pid: Any) -> Storage:
        storage = super().persistent_load(pid)
        return self.storages.setdefault(storage.key, storage)


def _numbers(content: bytes, storage: Storage) -> np.ndarray:
    needed = storage.nbytes
    if len(content) < needed:
        raise EOFError(f"storage {storage.key} has {len(content)} bytes of {needed}")
    return np.frombuffer(content, storage.dtype, storage.size)
