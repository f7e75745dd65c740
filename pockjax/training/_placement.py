"""Where the arrays of a state live: beside the parameters that they belong to."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from pockjax.masks import Block, resolve
from pockjax.training._state import State

PyTree = Any


def home_of(*trees: PyTree) -> Any:
    """Where to put what has no place of its own: on all devices of the first mesh among ``trees``.

    Args:
        *trees: shapes with the shardings that were chosen for them.

    Returns:
        A sharding; None if nothing was put anywhere, and all is where JAX puts things.
    """
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(trees)]
    for sharding in shardings:
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return next((s for s in shardings if isinstance(s, SingleDeviceSharding)), None)


def shardings_of(state: State, mask: PyTree, home: Any) -> State:
    """A place for every array of a state.

    Args:
        state: its shapes, the parameters with their shardings.
        mask: what is trained.
        home: where to put what belongs to no parameter.
    """
    trained = _packed_shardings(state.params, mask, home)

    def beside(key_path: tuple[Any, ...], x: Any) -> Any:
        # Optimizers keep trees like the params: the end of a path says to which one it belongs.
        for start in range(len(key_path) + 1):
            shape, sharding = trained.get(key_path[start:], (None, None))
            if shape == x.shape:
                return sharding
        return home

    placed = jax.tree.map(lambda x: x.sharding or home, state)
    return placed.replace(opt_state=jax.tree_util.tree_map_with_path(beside, state.opt_state))


def _packed_shardings(
    params: PyTree, mask: PyTree, home: Any
) -> dict[tuple[Any, ...], tuple[tuple[int, ...], Any]]:
    """Shape and sharding of each trained part, by its path; an axis that is cut is not sharded."""
    entries, _, _ = resolve(params, mask)
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    found = {}
    for entry, (key_path, leaf) in zip(entries, named, strict=True):
        if entry is False:
            continue
        shape, sharding = leaf.shape, leaf.sharding or home
        if isinstance(entry, Block):
            shape = entry.packed_shape
            if isinstance(sharding, NamedSharding):
                spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
                pairs = zip(entry.selections, spec, strict=True)
                kept = [names if selection is None else None for selection, names in pairs]
                sharding = NamedSharding(sharding.mesh, PartitionSpec(*kept))
        found[key_path] = (tuple(shape), sharding)
    return found
