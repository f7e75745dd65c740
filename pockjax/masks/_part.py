"""Parts: the way a user names the block of one array that is to be trained."""

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Final, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pockjax.masks._selection import Block, Selection, canonical

# One axis of a Part: a slice as written, static indices, a static boolean mask, or a
# traced index array. All but the last are hashable, so they can be static pytree data.
type Index = slice | tuple[int, ...] | _Booleans | jax.Array

_REPR_LIMIT = 8


class MaskError(ValueError):
    """A mask, part or scheme does not fit the parameters it is used on."""


def misfit(
    asked: str, problem: str, shape: tuple[int, ...], path: str = "", rule: str = ""
) -> MaskError:
    """Make the error for something that does not fit one array."""
    where = f" of '{path}'" if path else ""
    why = f" (rule {rule})" if rule else ""
    return MaskError(f"{asked}{where}, shape {shape}{why}: {problem}")


@dataclasses.dataclass(frozen=True)
class _Booleans:
    """A static boolean mask: a type of its own, as ``(True, False) == (1, 0)``."""

    values: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Part:
    """A block of an array, as a product of one selection per axis.

    Written with `part`, in NumPy's indexing notation; unlike NumPy's indexing, several
    index arrays form a product (as with `numpy.ix_`), every axis is kept, and bounds
    outside the array are errors.

    As a pytree, a Part's children are its traced index arrays, so a mask may be passed
    through `jax.jit` with its indices as ordinary arguments. A Part without traced
    indices has no children; look for Parts with ``is_leaf=lambda x: isinstance(x, Part)``.

    Attributes:
        indices: one entry per axis written, and at most one ``...``.

    >>> from pockjax.masks import part
    >>> part[:, :64]
    part[:, :64]
    >>> part[..., [0, 3, 8]].resolve((5, 5, 16)).packed_shape
    (5, 5, 3)
    """

    indices: tuple[Any, ...]

    def resolve(self, shape: Sequence[int], path: str = "", rule: str = "") -> Block:
        """Fix this part to an array of a given shape.

        Args:
            shape: shape of the array.
            path: where the array is among the parameters, for error messages.
            rule: the scheme rule that asked for this part, for error messages.

        Returns:
            The block: one normalised selection for each axis of `shape`.

        Raises:
            MaskError: if there are more indices than axes, an index or bound lies
                outside its axis, an index is repeated, or nothing is selected. Of
                traced indices only the length is checked, unless their values are
                known; their author promises that they are distinct and in bounds.

        >>> part[-2:].resolve((8, 3))
        Block(shape=(8, 3), selections=(slice(6, 8, 1), None))
        """
        shape = tuple(shape)

        def fail(problem: str) -> MaskError:
            return misfit(repr(self), problem, shape, path, rule)

        indices = _expand(self.indices, len(shape))
        if len(indices) > len(shape):
            raise fail(f"{len(indices)} indices, but the array has {len(shape)} axes")
        selections = []
        for axis, (index, size) in enumerate(zip(indices, shape, strict=True)):
            try:
                selections.append(_select(index, size))
            except MaskError as error:
                raise fail(f"axis {axis}: {error}") from None
        return Block(shape, tuple(selections))

    @classmethod
    def from_block(cls, block: Block) -> Self:
        """Write a block as a part, with the values that traced indices have.

        Raises:
            MaskError: if those values are not known because they are being traced.

        >>> Part.from_block(part[2:-1, [0, 2]].resolve((8, 3)))
        part[2:7, :3:2]
        """
        indices: list[Any] = []
        for sel in block.selections:
            if not (sel is None or isinstance(sel, slice) or _is_known(sel)):
                raise MaskError(f"the values of traced indices {sel} are not known here")
            if isinstance(sel, slice):
                step = sel.step if sel.step > 1 else None
                indices.append(slice(sel.start or None, sel.stop, step))
            else:
                indices.append(slice(None) if sel is None else tuple(np.asarray(sel).tolist()))
        while indices and indices[-1] == slice(None):
            indices.pop()
        return cls(tuple(indices))

    @property
    def is_static(self) -> bool:
        """Whether no index is traced."""
        return not any(map(_is_traced, self.indices))

    def __eq__(self, other: object) -> bool:
        """Compare indices; traced ones by value where known, else by identity."""
        if not isinstance(other, Part):
            return NotImplemented
        return len(self.indices) == len(other.indices) and all(
            _same(a, b) for a, b in zip(self.indices, other.indices, strict=True)
        )

    def __hash__(self) -> int:
        """Hash what equality compares, leaving out the values of traced indices."""
        return hash(tuple(None if _is_traced(i) else i for i in self.indices))

    def __repr__(self) -> str:
        """Write the part as a user would."""
        return f"part{index_text(self, _REPR_LIMIT)}"

    def __bool__(self) -> bool:
        """Refuse: a Part is neither True nor False."""
        raise TypeError(f"the truth value of {self!r} is undefined: it trains a block of a leaf")


class _PartBuilder:
    """Makes a `Part` from the indices it is given."""

    def __getitem__(self, indices: Any) -> Part:
        indices = indices if isinstance(indices, tuple) else (indices,)
        if sum(index is Ellipsis for index in indices) > 1:
            raise MaskError(f"{_show_raw(indices)}: more than one '...'")
        return Part(tuple(_read(index, _show_raw(indices)) for index in indices))

    def __repr__(self) -> str:
        return "part"


part: Final = _PartBuilder()
"""Writes a `Part` in NumPy's indexing notation.

Slices (with negative bounds and steps), integers (the axis is kept), lists, tuples and
NumPy arrays of integers or booleans, and ``...`` are static: they become part of the
compiled program. A one-dimensional integer `jax.Array` (or tracer) is traced: only its
length is fixed, and other indices can be selected without recompiling.

>>> part[:64], part[:, -8:], part[..., ::2], part[[5, 1]], part[3]
(part[:64], part[:, -8:], part[..., ::2], part[[5, 1]], part[[3]])
>>> part[:, jnp.array([4, 0])]
part[:, int32[2]]
"""


_PLACEHOLDER = "traced"


def _flatten(p: Part) -> tuple[list[Any], tuple[Any, ...]]:
    traced = [i for i in p.indices if _is_traced(i)]
    return traced, tuple(_PLACEHOLDER if _is_traced(i) else i for i in p.indices)


def _flatten_with_keys(p: Part) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    keys = [i for i, index in enumerate(p.indices) if _is_traced(index)]
    children, aux = _flatten(p)
    return [(jax.tree_util.SequenceKey(k), c) for k, c in zip(keys, children, strict=True)], aux


def _unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Part:
    left = iter(children)
    return Part(tuple(next(left) if i is _PLACEHOLDER else i for i in aux))


jax.tree_util.register_pytree_with_keys(Part, _flatten_with_keys, _unflatten, _flatten)


def _is_traced(index: Any) -> bool:
    # Whatever a tree map may have put in the place of an index array counts too.
    return not (index is Ellipsis or isinstance(index, slice | tuple | _Booleans))


def _read(index: Any, written: str) -> Any:
    """Check the type of one index as written and bring it into stored form."""

    def fail(problem: str) -> MaskError:
        return MaskError(f"{written}: {problem}")

    if index is Ellipsis:
        return index
    if isinstance(index, slice):
        try:
            bounds = [
                None if b is None else int(operator.index(b))
                for b in (index.start, index.stop, index.step)
            ]
        except TypeError:
            raise fail(f"slice bounds must be integers, got {index}") from None
        if bounds[2] == 0:
            raise fail("slice step must not be zero")
        return slice(*bounds)
    if isinstance(index, jax.Array):
        if index.ndim > 1 or not jnp.issubdtype(index.dtype, jnp.integer):
            raise fail(
                "a traced index must be a one-dimensional integer array, got "
                f"{index.dtype}{list(index.shape)} (a boolean mask has no fixed "
                "length: use jnp.nonzero(mask, size=...)[0])"
            )
        return index if index.ndim else index.reshape(1)
    try:
        array = np.asarray(index)
    except ValueError:  # a ragged list
        array = np.empty((), object)
    if array.size == 0 and isinstance(index, list | tuple):
        array = array.astype(int)
    if array.ndim > 1 or not (array.dtype == bool or np.issubdtype(array.dtype, np.integer)):
        raise fail(
            "an index must be an integer, a slice, '...' or a one-dimensional array "
            f"of integers or booleans, got {index!r}"
        )
    if array.ndim == 0 and array.dtype == bool:
        raise fail("a single boolean is not an index")
    values = tuple(np.atleast_1d(array).tolist())
    return _Booleans(values) if array.dtype == bool else values


def _expand(indices: tuple[Any, ...], ndim: int) -> tuple[Any, ...]:
    """Replace ``...`` and missing trailing axes by whole axes."""
    whole = slice(None)
    if Ellipsis not in [i for i in indices if not _is_traced(i)]:
        return indices + (whole,) * (ndim - len(indices))
    at = next(i for i, index in enumerate(indices) if index is Ellipsis)
    fill = (whole,) * (ndim - len(indices) + 1)
    return indices[:at] + fill + indices[at + 1 :]


def _select(index: Index, size: int) -> Selection:
    """Turn one index into a normalised selection of an axis, or say what is wrong."""
    if isinstance(index, slice):
        if index == slice(None):
            return None
        for bound in (index.start, index.stop):
            if bound is not None and not -size <= bound <= size:
                raise MaskError(f"bound {bound} exceeds the axis, which has size {size}")
        picked = range(*index.indices(size))
        if not picked:
            raise MaskError(f"selects nothing of an axis of size {size}")
        if picked.step < 0:
            return canonical(np.array(picked), size)
        return canonical(slice(picked.start, picked.stop, picked.step), size)
    if isinstance(index, _Booleans):
        if len(index.values) != size:
            raise MaskError(f"{len(index.values)} booleans for an axis of size {size}")
        index = tuple(np.flatnonzero(index.values).tolist())
    if isinstance(index, tuple):
        array = np.array(index, dtype=int)
        _check(array, size, lowest=-size)
        return canonical(np.where(array < 0, array + size, array), size)
    if _is_known(index):
        _check(np.asarray(index), size, lowest=0)
    else:
        _check_length(index.shape[0], size)
    return index


def _is_known(index: Any) -> bool:
    """Whether a traced index has values, being neither a tracer nor a shape."""
    return isinstance(index, np.ndarray | jax.Array) and not isinstance(index, Tracer)


def _check_length(count: int, size: int) -> None:
    if count == 0:
        raise MaskError(f"selects nothing of an axis of size {size}")
    if count > size:
        raise MaskError(f"{count} indices, some repeated, for an axis of size {size}")


def _check(array: np.ndarray, size: int, lowest: int) -> None:
    """Check values of indices: in bounds, distinct, at least one."""
    outside = array[(array < lowest) | (array >= size)]
    if outside.size:
        bad = int(outside[0])
        if -size <= bad < 0:
            raise MaskError(f"traced index {bad} is negative")
        raise MaskError(f"index {bad} exceeds the axis, which has size {size}")
    values, counts = np.unique(array % size if size else array, return_counts=True)
    if np.any(counts > 1):
        raise MaskError(f"index {int(values[counts > 1][0])} is repeated")
    _check_length(array.size, size)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not (_is_traced(a) and _is_traced(b)):
        return not (_is_traced(a) or _is_traced(b)) and a == b
    return _is_known(a) and _is_known(b) and np.array_equal(a, b)


def index_text(part: Part, limit: int | None = None) -> str:
    """Write the indices of a part, the longest lists cut to `limit`.

    >>> index_text(part[:, 2:6])
    '[:, 2:6]'
    """
    return f"[{', '.join(_show(i, limit) for i in part.indices) or '...'}]"


def _show(index: Any, limit: int | None = _REPR_LIMIT) -> str:
    if index is Ellipsis:
        return "..."
    if isinstance(index, slice):
        start, stop, step = (
            "" if b is None else str(b) for b in (index.start, index.stop, index.step)
        )
        return f"{start}:{stop}" + (f":{step}" if step else "")
    if isinstance(index, _Booleans):
        index = index.values
    if isinstance(index, tuple):
        if limit is None or len(index) <= limit:
            return str(list(index))
        head = ", ".join(map(str, index[: limit - 2]))
        return f"[{head}, ... {len(index)} in all]"
    if hasattr(index, "dtype") and hasattr(index, "shape"):
        return f"{index.dtype}[{index.shape[0] if index.shape else ''}]"
    return repr(index)


def _show_raw(indices: tuple[Any, ...]) -> str:
    return f"part[{', '.join(_show(i) for i in indices)}]"
