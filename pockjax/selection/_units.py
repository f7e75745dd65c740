"""Units: the things that can be chosen to be trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pockjax.masks import Part
from pockjax.masks import mask as make_mask

PyTree = Any


@dataclass(frozen=True)
class Unit:
    """One thing that can be trained; one choice among those of its group.

    Attributes:
        name: unique, and the same from run to run: ``"blocks/3/expand/kernel in 0.5"``.
        group: units of one group exclude each other: one weight at several ratios of its
            channels, or the biases of the last one, two, three, … layers.
        kind: ``"weight"``, ``"bias"`` or ``"adapter"``.
        entries: path and what is trained of it: True or a `Part`.
        depth: position of the first operation that reads any of it, counted from the input: the
            backward pass has to reach that far.
        ratio: which part of its arrays is trained.
    """

    name: str
    group: str
    kind: str
    entries: tuple[tuple[str, bool | Part], ...]
    depth: int
    ratio: float = 1.0


def union(params: PyTree, chosen: Iterable[Unit]) -> PyTree:
    """The mask that trains some units and nothing else.

    Args:
        params: the parameters, or their shapes.
        chosen: units, no two of which train parts of the same array.

    Returns:
        A mask of the structure of ``params``.

    Raises:
        ValueError: two units name the same array.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    >>> union(params, [Unit("b", "biases", "bias", (("b", True),), 0)])
    {'b': True, 'w': False}
    """
    entries: dict[str, bool | Part] = {}
    for unit in chosen:
        for path, entry in unit.entries:
            if path in entries:
                raise ValueError(f"'{path}' is trained by two of the chosen units")
            entries[path] = entry
    return make_mask(params, lambda path, leaf: entries.get(path, False))
