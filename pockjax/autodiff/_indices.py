"""Masks whose traced index arrays have been taken out, so that they can be inputs of a program."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

PyTree = Any


@dataclass(frozen=True)
class IndexedMask:
    """A mask taken apart: everything static, and its traced index arrays.

    Attributes:
        treedef: structure, with one leaf for each boolean and each index array.
        static: the boolean leaves; None where an index array belongs.
        indices: the index arrays, in order.
    """

    treedef: Any
    static: tuple[Any, ...]
    indices: tuple[Any, ...]

    @classmethod
    def of(cls, mask: PyTree) -> "IndexedMask":
        """Takes a mask apart. Index arrays inside a Part are its only pytree leaves."""
        leaves, treedef = jax.tree.flatten(mask)
        traced = [isinstance(leaf, jax.Array) for leaf in leaves]
        return cls(
            treedef,
            tuple(None if yes else x for x, yes in zip(leaves, traced, strict=True)),
            tuple(x for x, yes in zip(leaves, traced, strict=True) if yes),
        )

    def tree(self, indices: Sequence[Any]) -> PyTree:
        """The mask with other index arrays."""
        remaining = iter(indices)
        return self.treedef.unflatten([next(remaining) if x is None else x for x in self.static])

    def matches(self, other: "IndexedMask") -> bool:
        """Whether two masks differ in nothing but the values of their index arrays."""
        return (
            self.treedef == other.treedef
            and self.static == other.static
            and [(i.shape, i.dtype) for i in self.indices]
            == [(i.shape, i.dtype) for i in other.indices]
        )
