"""Random shapes, and parts of them beside what NumPy says they select."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pockjax.masks import Part, part

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def indices(draw: st.DrawFn, size: int) -> tuple[Any, np.ndarray]:
    """An index of one axis, and the positions it selects."""
    positions = np.arange(size)
    kind = draw(st.sampled_from(["whole", "slice", "int", "list", "bools", "traced"]))
    if kind == "whole":
        return slice(None), positions
    if kind == "slice":
        index = draw(st.slices(size).filter(lambda s: len(positions[s]) > 0))
        return index, positions[index]
    if kind == "int":
        index = draw(st.integers(-size, size - 1))
        return index, positions[[index]]
    if kind == "bools":
        index = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
        return np.array(index), positions[np.array(index)]
    chosen = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    if kind == "traced":
        return jnp.array(chosen), positions[chosen]
    signed = [i - size if draw(st.booleans()) else i for i in chosen]
    return signed, positions[signed]


@st.composite
def parts(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Part, tuple[np.ndarray, ...]]:
    """A part of an array, and the index with which NumPy selects the same block."""
    pairs = [draw(indices(size)) for size in shape]
    written: list[Any] = [index for index, _ in pairs]
    whole = [i for i, index in enumerate(written) if isinstance(index, slice)]
    if whole and draw(st.booleans()):
        at = draw(st.sampled_from(whole))
        pairs[at] = (..., np.arange(shape[at]))
        written[at] = ...
    return part[tuple(written)], np.ix_(*(positions for _, positions in pairs))


@st.composite
def arrays_with_parts(draw: st.DrawFn) -> tuple[np.ndarray, Part, tuple[np.ndarray, ...]]:
    """An array of distinct values, a part of it and NumPy's index for that part."""
    shape = draw(shapes)
    chosen, oracle = draw(parts(shape))
    values = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    return values, chosen, oracle
