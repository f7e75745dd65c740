"""Packed trees: the trained parts alone, and how they get back into the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from pockjax._paths import flatten_with_paths
from pockjax.masks._part import MaskError
from pockjax.masks._resolve import Entry, listing, resolve
from pockjax.masks._selection import Block


def pack(params: PyTree, mask: PyTree) -> PyTree:
    """Cut the trained parts out of the parameters.

    The result is an ordinary pytree of arrays, so that any optax transformation works
    on it unmodified and spends memory on trained parts alone.

    Args:
        params: pytree of arrays; other leaves are frozen.
        mask: True, False or a `Part` for each leaf of `params`, or a prefix of that.

    Returns:
        A tree of the structure of `params` that holds ``None`` where frozen, the leaf
        where the mask is True, and the block of the leaf where it is a Part.

    Raises:
        MaskError: if the mask does not fit the parameters.

    >>> from pockjax.masks import part
    >>> params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(3)}
    >>> pack(params, {"w": part[:, :2], "b": False})
    {'b': None, 'w': Array([[0., 1.],
           [3., 4.]], dtype=float32)}
    """
    entries, treedef, _ = resolve(params, mask)
    leaves = treedef.flatten_up_to(params)
    return treedef.unflatten(
        None if entry is False else _block(entry, leaf).take(leaf)
        for entry, leaf in zip(entries, leaves, strict=True)
    )


def unpack(params: PyTree, packed: PyTree, mask: PyTree) -> PyTree:
    """Replace the trained parts of the parameters.

    Args:
        params: pytree of arrays; frozen leaves are passed through untouched.
        packed: the new values of the trained parts, structured as `pack` returns them.
            They are cast to the dtype of their leaves.
        mask: the mask that `packed` was made with.

    Returns:
        Parameters of the structure, shapes and dtypes of `params`.

    Raises:
        MaskError: if the mask does not fit `params`, or `packed` does not fit the mask.

    >>> from pockjax.masks import part
    >>> params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
    >>> mask = {"w": part[:, :2], "b": False}
    >>> unpack(params, {"w": jnp.ones((2, 2)), "b": None}, mask)["w"]
    Array([[1., 1., 0.],
           [1., 1., 0.]], dtype=float32)
    """
    return _update(params, packed, mask, _set)


def apply_updates(params: PyTree, updates: PyTree, mask: PyTree) -> PyTree:
    """Add updates to the trained parts of the parameters.

    What `optax.apply_updates` is for whole trees, with the same dtypes: the sum is
    taken in the wider of both and cast to the dtype of the leaf. Where `params` is
    donated to a compiled step, only the trained parts are read and written.

    Args:
        params: pytree of arrays; frozen leaves are passed through untouched.
        updates: what to add to the trained parts, structured as `pack` returns them.
        mask: the mask that `updates` was made with.

    Returns:
        Parameters of the structure, shapes and dtypes of `params`.

    Raises:
        MaskError: if the mask does not fit `params`, or `updates` does not fit the mask.

    >>> from pockjax.masks import part
    >>> apply_updates({"b": jnp.ones(3)}, {"b": jnp.ones(1)}, {"b": part[-1:]})
    {'b': Array([1., 1., 2.], dtype=float32)}
    """
    return _update(params, updates, mask, _add)


def _update(
    params: PyTree,
    packed: PyTree,
    mask: PyTree,
    write: Callable[[Block, Any, jax.Array], jax.Array],
) -> PyTree:
    entries, treedef, paths = resolve(params, mask)
    leaves = treedef.flatten_up_to(params)
    values = iter(_trained_leaves(packed, entries, paths))
    new = []
    for path, entry, leaf in zip(paths, entries, leaves, strict=True):
        if entry is False:
            new.append(leaf)
            continue
        block, value = _block(entry, leaf), jnp.asarray(next(values))
        if value.shape != block.packed_shape:
            raise MaskError(
                f"packed value of '{path}' has shape {value.shape}, but the mask trains "
                f"{block.packed_shape} of its {block.shape}"
            )
        new.append(write(block, leaf, value))
    return treedef.unflatten(new)


def _trained_leaves(packed: PyTree, entries: list[Entry], paths: list[str]) -> list[Any]:
    """List the values in a packed tree, in the order of the trained entries."""
    named, _ = flatten_with_paths(packed)
    found = [path for path, _ in named]
    trained = [p for p, entry in zip(paths, entries, strict=True) if entry is not False]
    if found == trained:
        return [value for _, value in named]
    missing = [path for path in trained if path not in found]
    extra = [path for path in found if path not in trained]
    raise MaskError(
        "packed tree and mask differ: "
        + listing({"trained but not packed": missing, "packed but not trained": extra})
    )


def _block(entry: Entry, leaf: Any) -> Block:
    if isinstance(entry, Block):
        return entry
    return Block(tuple(leaf.shape), (None,) * len(leaf.shape))


def _set(block: Block, leaf: Any, value: jax.Array) -> jax.Array:
    return block.set(leaf, value.astype(leaf.dtype))


def _add(block: Block, leaf: Any, update: jax.Array) -> jax.Array:
    if update.dtype == leaf.dtype:
        return block.add(leaf, update)
    # Mixing dtypes is meant here, also for users who forbid implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        total = block.take(leaf) + update
    return block.set(leaf, total.astype(leaf.dtype))
