"""From a mask as written to what is trained of each leaf."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pockjax._paths import flatten_with_paths
from pockjax.masks._part import MaskError, Part
from pockjax.masks._selection import Block

type Entry = bool | Block
"""What is trained of one leaf: all of it (True), nothing (False) or a block."""


def resolve(params: PyTree, mask: PyTree) -> tuple[list[Entry], Any, list[str]]:
    """Fix a mask to the shapes of the parameters: what every transform starts from.

    Args:
        params: pytree of arrays, tracers or `jax.ShapeDtypeStruct`; other leaves, such
            as the activation functions of Equinox modules, are allowed and frozen.
        mask: pytree of True, False and `Part` with the structure of `params`, or a
            prefix of it. Containers are matched by path, so nested dictionaries may
            stand for an `nnx.State` or an Equinox module.

    Returns:
        For each leaf of `params`, True, False or its trained `Block` (never one that is
        the whole leaf); the structure of `params`; and the leaves' paths.

    Raises:
        MaskError: if mask and params do not name the same leaves, a mask leaf is not
            True, False or a Part, or a Part does not fit its leaf.

    >>> from pockjax.masks import part
    >>> params = {"w": jnp.zeros((2, 8)), "b": jnp.zeros(8), "step": 3}
    >>> entries, _, paths = resolve(params, {"w": part[:, :4], "b": True, "step": False})
    >>> dict(zip(paths, entries, strict=True))["w"].packed_shape
    (2, 4)
    """
    named, treedef = flatten_with_paths(params)
    paths = [path for path, _ in named]
    given = spread(mask, paths, treedef)
    entries = [
        resolve_leaf(leaf, entry, path) for (path, leaf), entry in zip(named, given, strict=True)
    ]
    return entries, treedef, paths


def spread(mask: PyTree, paths: list[str], treedef: Any) -> list[bool | Part]:
    """Give every leaf of the parameters its entry in a mask or prefix of a mask.

    Raises:
        MaskError: if a leaf has no entry or an entry no leaf, or an entry is not one.
    """
    named, mask_treedef = flatten_with_paths(mask, is_leaf=_is_part)
    entries = [_check_entry(entry, path) for path, entry in named]
    if mask_treedef == treedef:
        return entries
    at = dict(zip((path for path, _ in named), entries, strict=True))
    owners = [next((p for p in _prefixes(path) if p in at), None) for path in paths]
    missing = [p for p, owner in zip(paths, owners, strict=True) if owner is None]
    extra = sorted(set(at) - set(owners))
    if missing or extra:
        raise MaskError(
            "mask and params differ: "
            + listing({"not in the mask": missing, "only in the mask": extra})
        )
    return [at[owner] for owner in owners if owner is not None]


def resolve_leaf(leaf: Any, entry: bool | Part, path: str, rule: str = "") -> Entry:
    """Fix one mask entry to its leaf.

    True on a leaf that cannot be trained means False, so that True may stand for a
    whole subtree; a Part was meant for that very leaf, so there it is an error.

    Raises:
        MaskError: if a Part does not fit the leaf or the leaf cannot be trained.
    """
    if isinstance(entry, bool):
        return entry and is_trainable(leaf)
    if not is_trainable(leaf):
        raise untrainable(leaf, path, f"{entry!r}", rule)
    block = entry.resolve(leaf.shape, path, rule)
    return block.is_full or block


def is_trainable(leaf: Any) -> bool:
    """Whether a leaf is an array of a dtype that has gradients."""
    return (
        hasattr(leaf, "shape")
        and hasattr(leaf, "dtype")
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
    )


def untrainable(leaf: Any, path: str, asked: str, rule: str = "") -> MaskError:
    """Make the error for a leaf that was singled out but has no gradient."""
    kind = (
        f"an array of dtype {leaf.dtype} and shape {tuple(leaf.shape)}"
        if hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        else f"of type {type(leaf).__name__}"
    )
    why = f" (rule {rule})" if rule else ""
    return MaskError(
        f"{asked} for '{path}'{why}: the leaf is {kind}, and gradients need an array of "
        "floating dtype"
    )


def listing(groups: Mapping[str, Sequence[str]], limit: int = 8) -> str:
    """Write out groups of names for an error, with a count beyond the first few of each.

    >>> listing({"missing": ["a", "b", "c"], "extra": []}, limit=2)
    "missing: 'a', 'b' and 1 more"
    """
    lines = []
    for group, names in groups.items():
        shown = ", ".join(f"'{name}'" for name in names[:limit])
        rest = f" and {len(names) - limit} more" if len(names) > limit else ""
        if names:
            lines.append(f"{group}: {shown}{rest}")
    return "; ".join(lines)


def _is_part(node: Any) -> bool:
    return isinstance(node, Part)


def named_entries(mask: PyTree) -> list[tuple[str, bool | Part]]:
    """The entries of a mask that names every leaf, by path."""
    return flatten_with_paths(mask, is_leaf=_is_part)[0]


def _check_entry(entry: Any, path: str) -> bool | Part:
    if isinstance(entry, Part):
        return entry
    if isinstance(entry, bool | np.bool_):
        return bool(entry)
    problem = f"mask entry at '{path}' must be True, False or a Part, got {entry!r}"
    if isinstance(entry, jax.Array):
        problem += (
            ". What is trained must be known before tracing: close over the mask "
            "instead of passing it through jit, and write elementwise masks as Parts"
        )
    elif not isinstance(entry, bool | int | float | complex | np.ndarray | np.generic):
        problem += ". pj.mask(params, scheme) makes a mask of rules, schemes and predicates"
    raise MaskError(problem)


def _prefixes(path: str) -> list[str]:
    """All paths that a leaf lies under, from itself to the root ("")."""
    cuts = [i for i, char in enumerate(path) if char == "/"]
    return [path, *(path[:i] for i in reversed(cuts)), *([""] if path else [])]
