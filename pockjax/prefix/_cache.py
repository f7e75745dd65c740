"""Features of examples that were seen before: kept in memory and on disk, found by content."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pockjax._digest import Digest
from pockjax._files import replacing
from pockjax.prefix._split import Features, Front, Plan
from pockjax.rewrites import rewrite

PyTree = Any
Rows = tuple[np.ndarray, ...]

_CHECKSUM = 16  # bytes
_TOLERANCE = 1e-3  # of the largest value, between one batch and another with the same example


class FeatureCache:
    """Computes a frozen front once for each example, and then looks its output up.

    An example is known by its content, and so is the front: a changed example, another order,
    another epoch, a run that goes on where another ended, or other frozen weights never give what
    was kept for something else. The front has to treat examples one by one, along the first axis of
    its arguments and features; that is checked on the first batch.

    Example:
        >>> import pockjax as pj
        >>> params = {"front": jnp.ones((3, 2)), "head": jnp.ones((2, 1))}
        >>> def loss(params, x, y):
        ...     return jnp.sum((jnp.tanh(x @ params["front"]) @ params["head"] - y) ** 2)
        >>> prefix, suffix = pj.split(loss, {"front": False, "head": True})
        >>> cache = FeatureCache(prefix, params)
        >>> x, y = jnp.arange(12.0).reshape(4, 3), jnp.ones((4, 1))
        >>> features = cache(x, y)
        >>> float(suffix(params, features)) == float(loss(params, x, y))
        True
        >>> _ = cache(x[::-1], y)
        >>> cache.hits, cache.misses
        (4, 4)
    """

    def __init__(
        self,
        prefix: Front,
        params: PyTree,
        *,
        memory: int | None = 2**30,
        folder: str | Path | None = None,
        disk: int | None = None,
        dtype: Any = None,
    ):
        """Begin with what is in the folder, if there is one.

        Args:
            prefix: what `split` returned.
            params: the parameters; the frozen ones must stay as they are.
            memory: bytes to keep in memory at most; the longest unused are dropped. None for all.
            folder: where to keep features on disk too; they are found again by a later run.
            disk: bytes to keep there at most: what comes later is not written. None for all.
            dtype: a smaller dtype to keep floating point features in, such as ``"bfloat16"``.
        """
        self._prefix, self._params = prefix, params
        self._compiled: dict[Plan, Callable[..., Any]] = {}
        self._memory, self._disk = memory, disk
        self._folder = None if folder is None else Path(folder)
        self._dtype = None if dtype is None else jnp.dtype(dtype)
        if self._dtype is not None and not jnp.issubdtype(self._dtype, jnp.floating):
            raise ValueError(f"features are kept in a floating point dtype, not {self._dtype}")
        self._rows: OrderedDict[bytes, Rows] = OrderedDict()
        self._bytes = 0
        self._written: dict[str, int] = {}
        self._fronts: dict[Plan, str] = {}
        self._checked: set[Plan] = set()
        self.hits = 0
        self.misses = 0

    def __call__(self, *args: Any) -> Features:
        """The features of a batch; the front is run only if one of its examples is new.

        Args:
            *args: what ``prefix`` takes after the params.

        Raises:
            ValueError: nothing is frozen before the first trained layer; an argument or a feature
                has no axis of examples; or the front mixes the examples of a batch, as batch
                normalisation in training mode does.
        """
        plan = self._prefix.plan(self._params, args)
        shapes = plan.features
        arrays = plan.args.arrays_of(args)
        consumed = [np.asarray(arrays[i]) for i in plan.consumed]
        if not shapes:
            raise ValueError("there is no frozen front whose output could be kept")
        size = _batch_size([*consumed, *shapes])
        if not size:
            raise ValueError("a batch of no examples has no features")
        if plan not in self._checked and self._check_separate(args, plan):
            self._checked.add(plan)
        if plan not in self._fronts:
            self._fronts[plan] = self._fingerprint(self._for_one_example(args, plan))
        front = self._fronts[plan]
        keys = [self._key(front, [x[i] for x in consumed]) for i in range(size)]
        rows = [self._look_up(front, key, shapes) for key in keys]
        self.misses += sum(row is None for row in rows)
        self.hits += sum(row is not None for row in rows)
        if any(row is None for row in rows):
            fresh = [self._small(np.asarray(x)) for x in self._run(plan, arrays)]
            for i, key in enumerate(keys):
                if rows[i] is None:
                    rows[i] = row = tuple(x[i].copy() for x in fresh)
                    self._keep(front, key, row)
        computed = tuple(
            jnp.asarray(np.stack(column), shape.dtype)
            for column, shape in zip(zip(*rows, strict=True), shapes, strict=True)
        )
        return Features(computed, tuple(arrays[i] for i in plan.passed), plan)

    def _run(self, plan: Plan, arrays: list[Any]) -> list[Any]:
        """The front's output."""
        if plan not in self._compiled:
            self._compiled[plan] = jax.jit(rewrite(plan.run))
        weights = plan.primal.params.arrays_of(self._params)
        return self._compiled[plan]([weights[i] for i in plan.frozen], arrays)

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        self._rows.clear()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._bytes

    def _small(self, x: np.ndarray) -> np.ndarray:
        if self._dtype is None or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x.astype(self._dtype)

    def _row_types(self, shapes: Any) -> list[tuple[tuple[int, ...], np.dtype]]:
        empty = [self._small(np.empty((0, *x.shape[1:]), x.dtype)) for x in shapes]
        return [(x.shape[1:], x.dtype) for x in empty]

    def _for_one_example(self, args: tuple[Any, ...], plan: Plan) -> Plan:
        """The plan for a batch of one, so that batches of any size share what is kept."""
        arrays = plan.args.arrays_of(args)
        size = arrays[plan.consumed[0]].shape[0]
        ones = [
            jax.ShapeDtypeStruct((1, *x.shape[1:]) if x.shape[:1] == (size,) else x.shape, x.dtype)
            for x in arrays
        ]
        try:
            small = plan.args.tree(ones, like=args)
            return self._prefix.plan(self._params, small)
        except Exception:  # a function for batches of a fixed size may fail in any way it likes
            return plan

    def _fingerprint(self, plan: Plan) -> str:
        """Of the front's program and of the weights that it reads."""
        digest = Digest().text(f"{plan.prefix} {self._dtype}")
        weights = plan.primal.params.arrays_of(self._params)
        for x in [*plan.prefix.consts, *(weights[i] for i in plan.frozen)]:
            digest.array(x)
        return digest.hex

    def _key(self, front: str, row: list[np.ndarray]) -> bytes:
        digest = Digest().text(front)
        for x in row:
            digest.array(x)
        return digest.bytes

    def _look_up(self, front: str, key: bytes, shapes: Any) -> Rows | None:
        if key in self._rows:
            self._rows.move_to_end(key)
            return self._rows[key]
        if self._folder is None:
            return None
        row = _read(self._folder / front / key.hex(), self._row_types(shapes))
        if row is not None:
            self._remember(key, row)
        return row

    def _keep(self, front: str, key: bytes, row: Rows) -> None:
        if key in self._rows:  # the same example twice in a batch
            return
        self._remember(key, row)
        if self._folder is None:
            return
        folder = self._folder / front
        if front not in self._written:
            folder.mkdir(parents=True, exist_ok=True)
            self._written[front] = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
        content = b"".join(np.ascontiguousarray(x).tobytes() for x in row)
        if self._disk is None or self._written[front] + len(content) + _CHECKSUM <= self._disk:
            with replacing(folder / key.hex()) as path:
                path.write_bytes(content + _checksum(content))
            self._written[front] += len(content) + _CHECKSUM

    def _remember(self, key: bytes, row: Rows) -> None:
        self._rows[key] = row
        self._bytes += sum(x.nbytes for x in row)
        while self._memory is not None and self._bytes > self._memory and self._rows:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= sum(x.nbytes for x in oldest)

    def _check_separate(self, args: tuple[Any, ...], plan: Plan) -> bool:
        """Whether an example has the same features beside others, and in another place.

        Returns:
            False if all examples are alike, so that nothing can be told from them.

        Raises:
            ValueError: they are not the same.
        """
        arrays = plan.args.arrays_of(args)
        consumed = {i: np.asarray(arrays[i]) for i in plan.consumed}
        size = min((len(x) for x in consumed.values()), default=0)
        if all((x == x[:1]).all() for x in consumed.values()):
            return False
        # Turned around, each example has another place; with copies of the first one in the second
        # half, other neighbours.
        half = np.arange(size)
        half[size - size // 2 :] = 0
        expected = self._run(plan, arrays)
        for order in (np.arange(size)[::-1], half):
            other = [consumed[i][order] if i in consumed else x for i, x in enumerate(arrays)]
            changed = self._run(plan, other)
            for a, b in zip(expected, changed, strict=True):
                a, b = np.asarray(a, np.float64)[order], np.asarray(b, np.float64)
                scale = np.abs(a[np.isfinite(a)]).max(initial=1e-30)
                if not np.allclose(a, b, rtol=0, atol=_TOLERANCE * scale, equal_nan=True):
                    raise ValueError(
                        "what the frozen front gives for an example depends on the batch: it "
                        "computes batch statistics, say, or draws a number for each place; so it "
                        "cannot be kept by example"
                    )
        return True


def _batch_size(arrays: list[Any]) -> int:
    """The length of the first axis, which all must have."""
    sizes = {x.shape[0] if x.ndim else None for x in arrays}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "to keep features by example, all that the frozen front reads and computes needs a "
            f"first axis of examples; the shapes are {[x.shape for x in arrays]}"
        )
    [size] = sizes
    return size  # type: ignore[return-value]


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM).digest()


def _read(file: Path, types: list[tuple[tuple[int, ...], np.dtype]]) -> Rows | None:
    """A row from disk; None if there is none, or it is damaged."""
    try:
        raw = file.read_bytes()
    except OSError:
        return None
    content, checksum = raw[:-_CHECKSUM], raw[-_CHECKSUM:]
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in types]
    if sum(sizes) != len(content) or _checksum(content) != checksum:
        return None
    row, start = [], 0
    for (shape, dtype), size in zip(types, sizes, strict=True):
        row.append(np.frombuffer(content, np.uint8, size, start).view(dtype).reshape(shape))
        start += size
    return tuple(row)
