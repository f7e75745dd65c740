"""Entries of masks as the positions that they train along each axis."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from pockjax.masks import Block, Part, part

Positions = list[np.ndarray]


def joined(path: str, shape: tuple[int, ...], given: Sequence[bool | Part]) -> bool | Part:
    """What several entries train of one array together.

    Raises:
        ValueError: they overlap, or together are no block.
    """
    if len(given) == 1:
        return given[0]
    blocks = [positions(entry, shape, path) for entry in given]
    for i, a in enumerate(blocks):
        for b in blocks[:i]:
            if all(np.intersect1d(x, y).size for x, y in zip(a, b, strict=True)):
                raise ValueError(f"'{path}' is trained by two of the chosen units")
    both = [np.unique(np.concatenate(axis)) for axis in zip(*blocks, strict=True)]
    if math.prod(map(len, both)) != sum(math.prod(map(len, b)) for b in blocks):
        raise ValueError(
            f"what the chosen units train of '{path}' is no block of it, which one mask could say: "
            "layers that are stacked along an axis must all have the same channels"
        )
    return as_entry(both, shape)


def positions(entry: bool | Part, shape: tuple[int, ...], path: str = "") -> list[np.ndarray]:
    """Which positions along each axis an entry that is not False trains."""
    selections = (
        [None] * len(shape) if isinstance(entry, bool) else entry.resolve(shape, path).selections
    )
    return [
        np.arange(n)[sel if isinstance(sel, slice | np.ndarray) else slice(None)]
        for sel, n in zip(selections, shape, strict=True)
    ]


def as_entry(chosen: Sequence[np.ndarray], shape: tuple[int, ...]) -> bool | Part:
    """The entry that trains some positions along each axis."""
    block: Block | bool = part[tuple(p.tolist() for p in chosen)].resolve(shape) if shape else True
    if isinstance(block, bool) or block.is_full:
        return True
    return Part.from_block(block)


def within(shape: Sequence[int], rows: Iterable[tuple[int, int]]) -> Positions:
    """All positions, but along some axes only one."""
    fixed = dict(rows)
    return [np.array([fixed[d]]) if d in fixed else np.arange(n) for d, n in enumerate(shape)]
