"""What a mask trains along one axis, and the block that several of them make.

A *selection* along an axis of known size is one of

- ``None``: the whole axis;
- a static `slice` with ``0 <= start < stop <= size`` and ``step >= 1``;
- a static one-dimensional `numpy.ndarray` of distinct integers, order meaningful;
- a traced one-dimensional `jax.Array` of distinct integers. Its length is fixed,
  its values are not, so they may change between calls without recompiling.

Everything here assumes selections in that form, which `Part.resolve` produces, and
is written with single `jax.lax` operations whose transposes are each other:
`take` is the transpose of `embed`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

type Selection = None | slice | np.ndarray | jax.Array

# Indices are checked when a Part is resolved (or, if traced, promised by its author),
# so neither clamping nor the NaN fill that jnp indexing defaults to is wanted.
_IN_BOUNDS = lax.GatherScatterMode.PROMISE_IN_BOUNDS


def whole_along(sharding: NamedSharding, axes: Iterable[int]) -> NamedSharding:
    """Leave `axes` of an array uncut by its sharding.

    Sharding as a type knows no block of an axis that is cut across devices: every device
    needs all of the axis first. Where sharding is left to the compiler its type cuts nothing.
    """
    axes = [axis for axis in axes if sharding.spec[axis] is not None]
    if not axes:
        return sharding
    spec = [None if i in axes else names for i, names in enumerate(sharding.spec)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def resharded(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Give `x` another sharding type, if it has not got it."""
    if jax.typeof(x).sharding.spec == sharding.spec:
        return x
    return jax.sharding.reshard(x, sharding)


def length(sel: Selection, size: int) -> int:
    """Count the positions that a selection picks from an axis of `size`.

    >>> length(None, 8), length(slice(0, 5, 2), 8), length(np.array([7, 0]), 8)
    (8, 3, 2)
    """
    if sel is None:
        return size
    if isinstance(sel, slice):
        return len(range(sel.start, sel.stop, sel.step))
    return sel.shape[0]


def canonical(sel: Selection, size: int) -> Selection:
    """Give a static selection its one normal form; return a traced one as it is.

    Regularly spaced ascending indices become a slice and a selection of every
    position in order becomes ``None``, so that the cheapest operation is used and
    equal selections compare equal.

    >>> canonical(np.array([1, 3, 5]), 8)
    slice(1, 6, 2)
    >>> canonical(np.array([0, 1, 2]), 3) is None
    True
    """
    if isinstance(sel, np.ndarray):
        steps = np.diff(sel)
        if steps.size and (steps[0] < 1 or np.any(steps != steps[0])):
            return sel
        step = int(steps[0]) if steps.size else 1
        sel = slice(int(sel[0]), int(sel[-1]) + 1, step)
    if isinstance(sel, slice):
        picked = range(sel.start, sel.stop, sel.step)
        if len(picked) == size:
            return None
        step = sel.step if len(picked) > 1 else 1
        return slice(picked[0], picked[-1] + 1, step)
    return sel


def take(x: ArrayLike, sel: Selection, axis: int) -> jax.Array:
    """Restrict `x` to a selection along `axis`.

    Args:
        x: array of shape ``(..., size, ...)``.
        sel: the selection, valid for ``size``.
        axis: non-negative axis of `x`.

    Returns:
        Array of shape ``(..., length(sel, size), ...)`` and the dtype of `x`.

    >>> take(jnp.arange(6), np.array([4, 0]), axis=0)
    Array([4, 0], dtype=int32)
    """
    x = jnp.asarray(x)
    if sel is None:
        return x
    x = resharded(x, whole_along(jax.typeof(x).sharding, [axis]))
    if isinstance(sel, slice):
        return _slice_in_dim(x, sel.start, sel.stop, sel.step, axis)
    others = tuple(i for i in range(x.ndim) if i != axis)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=others, collapsed_slice_dims=(axis,), start_index_map=(axis,)
    )
    return lax.gather(
        x,
        _index_vectors([sel]),
        numbers,
        slice_sizes=tuple(1 if i == axis else n for i, n in enumerate(x.shape)),
        unique_indices=True,
        indices_are_sorted=_is_sorted(sel),
        mode=_IN_BOUNDS,
    )


# Both are inlined into what is traced, but linearized once for all layers of the same shape.
_slice_in_dim = jax.jit(lax.slice_in_dim, static_argnums=(1, 2, 3, 4), inline=True)


@partial(jax.jit, static_argnums=1, inline=True)
def _pad_with_zeros(x: jax.Array, config: tuple[tuple[int, int, int], ...]) -> jax.Array:
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def embed(x: ArrayLike, sel: Selection, axis: int, size: int) -> jax.Array:
    """Put `x` at the selected positions of an axis of zeros: the transpose of `take`.

    Args:
        x: array of shape ``(..., length(sel, size), ...)``.
        sel: the selection, valid for `size`.
        axis: non-negative axis of `x`.
        size: extent of `axis` in the result.

    Returns:
        Array of shape ``(..., size, ...)`` and the dtype of `x`.

    >>> embed(jnp.array([1, 2]), slice(1, 4, 2), axis=0, size=5)
    Array([0, 1, 0, 2, 0], dtype=int32)
    """
    x = jnp.asarray(x)
    shape = tuple(size if i == axis else n for i, n in enumerate(x.shape))
    selections = tuple(sel if i == axis else None for i in range(x.ndim))
    return Block(shape, selections).embed(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """The part of one array that is trained: a selection for each of its axes.

    Blocks are made by `Part.resolve`. Two are equal if they select the same
    positions statically; traced indices are equal only to themselves.

    Attributes:
        shape: shape of the whole array.
        selections: one normalised selection per axis.

    >>> block = Block((2, 4), (None, slice(0, 3, 1)))
    >>> block.packed_shape
    (2, 3)
    >>> block.embed(jnp.ones((2, 3)))
    Array([[1., 1., 1., 0.],
           [1., 1., 1., 0.]], dtype=float32)
    """

    shape: tuple[int, ...]
    selections: tuple[Selection, ...]

    def __post_init__(self) -> None:
        """Check that there is one selection per axis."""
        if len(self.shape) != len(self.selections):
            raise ValueError(
                f"{len(self.selections)} selections for an array of shape {self.shape}"
            )

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the trained part."""
        pairs = zip(self.selections, self.shape, strict=True)
        return tuple(length(sel, n) for sel, n in pairs)

    @property
    def packed_size(self) -> int:
        """Number of elements in the trained part."""
        return math.prod(self.packed_shape)

    @property
    def is_full(self) -> bool:
        """Whether the block is the whole array, in order."""
        return all(sel is None for sel in self.selections)

    @property
    def is_static(self) -> bool:
        """Whether no selection is traced."""
        return not any(_is_traced(sel) for sel in self.selections)

    def take(self, x: ArrayLike) -> jax.Array:
        """Cut the block out of `x`: shape `shape` -> `packed_shape`."""
        x = self._whole(jnp.asarray(x))
        ranges = self._slices()
        if any(isinstance(sel, slice) for sel in self.selections):
            starts, stops, steps = zip(*((r.start, r.stop, r.step) for r in ranges), strict=True)
            x = lax.slice(x, starts, stops, steps)
        for axis, sel in enumerate(self.selections):
            if not isinstance(sel, slice):
                x = take(x, sel, axis)
        return x

    def embed(self, packed: ArrayLike) -> jax.Array:
        """Put `packed` into zeros: the transpose of `take`."""
        packed = jnp.asarray(packed)
        if self.is_full:
            return packed
        if all(sel is None or isinstance(sel, slice) for sel in self.selections):
            config = tuple(
                (r.start, n - 1 - range(r.start, r.stop, r.step)[-1], r.step - 1)
                for r, n in zip(self._slices(), self.shape, strict=True)
            )
            return _pad_with_zeros(packed, config)
        return self._scatter(lax.scatter_add, self._zeros_like(packed), packed)

    def set(self, x: ArrayLike, packed: ArrayLike) -> jax.Array:
        """Replace the block in `x`, leaving the rest untouched.

        Writes `packed_size` elements; in place where `x` is donated.
        """
        x, packed = jnp.asarray(x), jnp.asarray(packed)
        if self.is_full:
            return resharded(packed, jax.typeof(x).sharding)
        if self._is_contiguous():
            # Start indices are int32 scalars even where x64 is enabled.
            starts = [np.int32(r.start) for r in self._slices()]
            whole = self._whole(x)
            packed = resharded(packed, jax.typeof(whole).sharding)
            out = lax.dynamic_update_slice(whole, packed, starts)
            return resharded(out, jax.typeof(x).sharding)
        return self._scatter(lax.scatter, x, packed)

    def add(self, x: ArrayLike, packed: ArrayLike) -> jax.Array:
        """Add to the block in `x`, leaving the rest untouched.

        Reads and writes `packed_size` elements; in place where `x` is donated.
        """
        x, packed = jnp.asarray(x), jnp.asarray(packed)
        if self._is_contiguous():
            return self.set(x, lax.add(self.take(x), packed))
        return self._scatter(lax.scatter_add, x, packed)

    def __eq__(self, other: object) -> bool:
        """Compare shapes and selections."""
        if not isinstance(other, Block):
            return NotImplemented
        return self.shape == other.shape and all(
            _same(a, b) for a, b in zip(self.selections, other.selections, strict=True)
        )

    def __hash__(self) -> int:
        """Hash what equality compares, leaving out the values of index arrays."""
        return hash((self.shape, self.packed_shape))

    def _zeros_like(self, packed: jax.Array) -> jax.Array:
        """Zeros of the whole array's shape, laid out over an explicit mesh as `packed` is."""
        sharding = jax.typeof(packed).sharding
        laid_out = not sharding.mesh.empty and sharding.mesh.are_all_axes_explicit
        return lax.full(self.shape, 0, packed.dtype, sharding=sharding if laid_out else None)

    def _is_contiguous(self) -> bool:
        return all(map(_is_window, self.selections))

    def _slices(self) -> list[slice]:
        """Each selection as a slice, with index arrays as the whole of their axis."""
        return [
            sel if isinstance(sel, slice) else slice(0, n, 1)
            for sel, n in zip(self.selections, self.shape, strict=True)
        ]

    def _scatter(self, op: Callable[..., jax.Array], x: jax.Array, packed: jax.Array) -> jax.Array:
        """Apply one scatter whose windows are the contiguous axes of the block."""
        windows = [i for i, sel in enumerate(self.selections) if _is_window(sel)]
        points = [i for i, sel in enumerate(self.selections) if not _is_window(sel)]
        offsets = [i for i in windows if self.selections[i] is not None]
        whole = self._whole(x)
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=tuple(windows),
            inserted_window_dims=tuple(points),
            scatter_dims_to_operand_dims=(*points, *offsets),
        )
        out = op(
            whole,
            _index_vectors(
                [self.selections[i] for i in points],
                [self._slices()[i].start for i in offsets],
            ),
            resharded(packed, jax.typeof(whole).sharding),
            numbers,
            indices_are_sorted=all(_is_sorted(self.selections[i]) for i in points),
            unique_indices=True,
            mode=_IN_BOUNDS,
        )
        return resharded(out, jax.typeof(x).sharding)

    def _whole(self, x: jax.Array) -> jax.Array:
        axes = [i for i, sel in enumerate(self.selections) if sel is not None]
        return resharded(x, whole_along(jax.typeof(x).sharding, axes))


def _is_traced(sel: Selection) -> bool:
    return not (sel is None or isinstance(sel, slice | np.ndarray))


def _is_window(sel: Selection) -> bool:
    return sel is None or (isinstance(sel, slice) and sel.step == 1)


def _is_sorted(sel: Selection) -> bool:
    if isinstance(sel, np.ndarray):
        return bool(np.all(np.diff(sel) > 0))
    return not _is_traced(sel)


def _same(a: Selection, b: Selection) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, slice) and isinstance(b, slice):
        return a == b
    return a is b


def _index_vectors(
    points: Sequence[Selection], offsets: Sequence[int] = ()
) -> np.ndarray | jax.Array:
    """Index vectors of the outer product of `points`, followed by fixed `offsets`.

    Returns an int32 array of shape ``(len(p) for p in points, len(points + offsets))``;
    a NumPy one, which becomes a literal constant, where nothing is traced.
    """
    arrays: list[Any] = [
        np.arange(p.start, p.stop, p.step) if isinstance(p, slice) else p for p in points
    ]
    xp = jnp if any(map(_is_traced, arrays)) else np
    columns = list(xp.meshgrid(*(a.astype(np.int32) for a in arrays), indexing="ij"))
    columns += [xp.full_like(columns[0], offset) for offset in offsets]
    return xp.stack(columns, axis=-1)
