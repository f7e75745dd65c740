"""Names for the leaves of a pytree, the same for every library that makes them."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, GetAttrKey


def path_string(key_path: Sequence[Any]) -> str:
    """Name a leaf by its keys, joined with "/".

    Flax NNX keeps each array in the attribute ``value`` of a Variable, which is no
    part of its name. From keys alone such an attribute is recognised where it follows a
    dictionary key, as in any `nnx.State`; `flatten_with_paths` looks at the tree.

    Args:
        key_path: keys from the root to the leaf, as `jax.tree_util` gives them.

    >>> [(key_path, _)] = jax.tree_util.tree_leaves_with_path({"layers": [3.0]})
    >>> path_string(key_path)
    'layers/0'
    """
    boxed = (
        len(key_path) > 1
        and isinstance(key_path[-2], DictKey)
        and key_path[-1] == GetAttrKey("value")
    )
    return "/".join(map(key_name, key_path[:-1] if boxed else key_path))


def key_name(key: Any) -> str:
    """Name one step of a path: a dictionary key, attribute or position.

    >>> key_name(GetAttrKey("weight")), key_name(jax.tree_util.SequenceKey(2))
    ('weight', '2')
    """
    return jax.tree_util.keystr((key,), simple=True)


def flatten_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """Flatten a pytree into leaves named by "/"-joined paths.

    The same parameter has the same name as a linen variable, in an `nnx.State`, in an
    Equinox module or in plain containers.

    Args:
        tree: any pytree.
        is_leaf: as for `jax.tree.flatten`.

    Returns:
        The pairs ``(path, leaf)`` in flattening order, and the tree's structure.

    >>> flatten_with_paths({"layers": [{"bias": 0.0}, {"bias": 1.0}]})[0]
    [('layers/0/bias', 0.0), ('layers/1/bias', 1.0)]
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    boxes = {
        key_path
        for key_path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box)
        if _is_box(node)
    }

    def name(key_path: tuple[Any, ...]) -> str:
        return "/".join(
            key_name(key) for depth, key in enumerate(key_path) if key_path[:depth] not in boxes
        )

    return [(name(key_path), leaf) for key_path, leaf in leaves], treedef


def _is_box(node: Any) -> bool:
    """Whether a node is Flax's wrapper of one array."""
    # Nothing can be one unless its library has been imported.
    nnx = sys.modules.get("flax.nnx")
    meta = sys.modules.get("flax.core.meta")
    return (nnx is not None and isinstance(node, nnx.Variable)) or (
        meta is not None and isinstance(node, meta.AxisMetadata)
    )
