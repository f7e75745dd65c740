"""An unpickler that builds arrays, tensors and containers, and refuses everything else.

A pickle is a program. This one's `find_class` answers with inert stand-ins instead of the classes
that a file names, so nothing of NumPy or torch runs while the file is read, and a name that is not
in the short table below ends the reading.
"""

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import ml_dtypes
import numpy as np

from pockjax.weights._errors import WeightsError

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_NUMBERS = re.compile(r"[<>=|]?(b1|\?|[iuf][1248])")


@dataclass(frozen=True)
class Storage:
    """What a tensor of torch's is a view of; its bytes stand elsewhere in the file.

    Attributes:
        key: Its name in the file.
        dtype: NumPy's dtype for it.
        size: Number of elements.
    """

    key: str
    dtype: np.dtype
    size: int

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize


class _Tensor:
    """A strided view of a storage."""

    def __init__(
        self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self, data: np.ndarray) -> np.ndarray:
        if len(self.shape) != len(self.strides) or min((*self.shape, *self.strides, 0)) < 0:
            raise WeightsError(f"a tensor has shape {self.shape} with strides {self.strides}")
        reach = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        empty = math.prod(self.shape) == 0
        if self.offset < 0 or (not empty and self.offset + reach >= data.size):
            raise WeightsError(f"a tensor of shape {self.shape} reaches beyond its storage")
        if math.prod(self.shape) > data.size:
            # Strides of zero repeat numbers: a few bytes could ask for any amount of memory.
            raise WeightsError(f"a tensor of shape {self.shape} is larger than its storage")
        steps = tuple(stride * data.itemsize for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(data[self.offset :], self.shape, steps)
        return np.ascontiguousarray(view).reshape(self.shape)


class _Dtype:
    """A dtype of plain numbers."""

    def __init__(self, code: str) -> None:
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise WeightsError(f"an array has dtype {code!r}; only numbers are read")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """An array whose numbers stand in the pickle itself."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def array(self) -> np.ndarray:
        dtype = self.dtype.dtype
        flat = np.frombuffer(self.data, dtype).astype(dtype.newbyteorder("="))
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


class Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Reads one pickle; `finish` then turns what it read into arrays.

    It is Python's own in Python: the one in C makes a table as long as the largest number that a
    pickle gives to an object, so that a few bytes could ask for any amount of memory.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        """Read from a stream, as `pickle.Unpickler` does."""
        super().__init__(stream, encoding="latin1")
        self._known: Mapping[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("_codecs", "encode"): self._encode,
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): self._dtype,
            ("numpy.core.multiarray", "_reconstruct"): self._array,
            ("numpy._core.multiarray", "_reconstruct"): self._array,
            ("numpy.core.multiarray", "scalar"): self._scalar,
            ("numpy._core.multiarray", "scalar"): self._scalar,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            **{("torch", name): name for name in _STORAGES},
        }

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what the file names."""
        if (module, name) not in self._known:
            raise WeightsError(
                f"refused: it names the global {module}.{name}, and so may run code when it is "
                "unpickled; only arrays, tensors and containers of them are read"
            )
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """A storage; the only thing that torch's files refer to this way."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise WeightsError(f"refused: it refers to {pid!r}, which is not a tensor's storage")
        _, kind, key, _, size = pid[:5]
        if int(size) < 0:
            raise WeightsError(f"storage {key!r} has a size of {size}")
        return Storage(str(key), np.dtype(_STORAGES[kind]), int(size))

    @staticmethod
    def _encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise WeightsError(f"text is encoded as {encoding!r} instead of 'latin1'")
        return text.encode("latin1")

    def _dtype(self, code: str, *_: Any) -> _Dtype:
        return _Dtype(code)

    def _array(self, *_: Any) -> _Array:
        return _Array()

    def _scalar(self, dtype: _Dtype, data: bytes) -> Any:
        return np.frombuffer(data, dtype.dtype)[0].item()

    def _tensor(self, storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def _parameter(self, tensor: _Tensor, *_: Any) -> _Tensor:
        return tensor


def finish(
    tree: Any, read: Callable[[Storage], np.ndarray], done: dict[int, Any] | None = None
) -> Any:
    """Replace the stand-ins in what an `Unpickler` has read by arrays.

    Args:
        tree: Dicts, lists and tuples of stand-ins, numbers and strings.
        read: The flat array of a storage.
        done: What has been replaced, by identity: an object that stands in many places is one.
    """
    done = {} if done is None else done
    if id(tree) in done:
        return done[id(tree)]
    if isinstance(tree, _Tensor):
        found = tree.array(read(tree.storage))
    elif isinstance(tree, _Array):
        found = tree.array()
    elif isinstance(tree, Mapping):
        found = {key: finish(value, read, done) for key, value in tree.items()}
    elif isinstance(tree, list | tuple):
        found = type(tree)(finish(value, read, done) for value in tree)
    else:
        return _plain(tree)
    done[id(tree)] = found
    return found


def _plain(tree: Any) -> Any:
    if tree is None or isinstance(tree, bool | int | float | str | bytes):
        return tree
    raise WeightsError(f"it holds {type(tree).__name__!r}, which is no array, number or text")
