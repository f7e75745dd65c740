"""What a mask trains, in numbers and as a table."""

import dataclasses
import math
from collections.abc import Iterator

from jaxtyping import PyTree

from pockjax.masks._resolve import resolve
from pockjax.masks._selection import Block


@dataclasses.dataclass(frozen=True)
class Row:
    """What a mask trains of one array.

    Attributes:
        path: path of the array.
        shape: its shape.
        trained_shape: shape of its trained part, or None if it is frozen.
    """

    path: str
    shape: tuple[int, ...]
    trained_shape: tuple[int, ...] | None

    @property
    def size(self) -> int:
        """Number of elements of the array."""
        return math.prod(self.shape)

    @property
    def trained(self) -> int:
        """Number of trained elements."""
        return 0 if self.trained_shape is None else math.prod(self.trained_shape)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a mask trains: one `Row` for each array, and a table as its string."""

    rows: tuple[Row, ...]

    @property
    def size(self) -> int:
        """Number of elements of all arrays."""
        return sum(row.size for row in self.rows)

    @property
    def trained(self) -> int:
        """Number of trained elements."""
        return sum(row.trained for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows."""
        return iter(self.rows)

    def __str__(self) -> str:
        """Write a table with one line for each array, and the sum."""
        share = f"{self.trained / self.size:.1%}" if self.size else "-"
        cells = [
            ("path", "shape", "trained", "elements"),
            *(
                (row.path, _shape(row.shape), _shape(row.trained_shape), f"{row.trained:,}")
                for row in self.rows
            ),
            ("total", f"{self.size:,}", share, f"{self.trained:,}"),
        ]
        first, *middle, last = (max(map(len, column)) for column in zip(*cells, strict=True))
        return "\n".join(
            f"{a:<{first}}  {b:<{middle[0]}}  {c:<{middle[1]}}  {d:>{last}}" for a, b, c, d in cells
        )


def describe(params: PyTree, mask: PyTree) -> Description:
    """Say what a mask trains of each array.

    Args:
        params: pytree of arrays; other leaves are left out.
        mask: True, False or a `Part` for each leaf of `params`, or a prefix of that.

    Returns:
        The rows ``(path, shape, trained_shape)`` with counts; `str` makes a table.

    Raises:
        MaskError: if the mask does not fit the parameters.

    >>> import numpy as np
    >>> from pockjax.masks import part
    >>> params = {"b": np.zeros(4), "w": np.zeros((8, 4))}
    >>> print(describe(params, {"b": False, "w": part[:2]}))
    path   shape  trained  elements
    b      4      -               0
    w      8x4    2x4             8
    total  36     22.2%           8
    """
    entries, treedef, paths = resolve(params, mask)
    rows = []
    for path, entry, leaf in zip(paths, entries, treedef.flatten_up_to(params), strict=True):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            continue
        shape = tuple(leaf.shape)
        trained = entry.packed_shape if isinstance(entry, Block) else shape if entry else None
        rows.append(Row(path, shape, trained))
    return Description(tuple(rows))


def _shape(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "-"
    return "x".join(map(str, shape)) or "scalar"
