"""What a step reads, replaces and returns."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

PyTree = Any


@dataclass(frozen=True)
class State:
    """Everything a step reads and replaces; donated to each call.

    Attributes:
        params: all parameters, trained and frozen.
        opt_state: the optimizer's state, of the trained parts alone.
        step: number of updates made, an int32 scalar.
        indices: index arrays of the mask that can be exchanged without recompiling.
        key: random key of the run, if the step was compiled with one.
    """

    params: PyTree
    opt_state: PyTree
    step: jax.Array
    indices: tuple[jax.Array, ...] = ()
    key: jax.Array | None = None

    def replace(self, **changes: Any) -> "State":
        """The state with some fields changed."""
        return replace(self, **changes)


def _flatten(state: State) -> tuple[tuple[Any, ...], Any]:
    # Leaves that are no arrays (the functions that Equinox modules hold) are part of the structure,
    # so that the state of any model can go through a compiled step.
    leaves, treedef = jax.tree.flatten(state.params)
    dynamic = [_is_dynamic(leaf) for leaf in leaves]
    if all(dynamic):
        params, static = state.params, None
    else:
        pairs = list(zip(leaves, dynamic, strict=True))
        params = treedef.unflatten([x if yes else None for x, yes in pairs])
        static = (treedef, tuple(None if yes else x for x, yes in pairs))
    children = (params, state.opt_state, state.step, state.indices, state.key)
    return tuple(zip(map(jax.tree_util.GetAttrKey, _FIELDS), children, strict=True)), static


def _unflatten(static: Any, children: Any) -> State:
    params, *others = children
    if static is not None:
        treedef, leaves = static
        dynamic = treedef.flatten_up_to(params)
        pairs = zip(dynamic, leaves, strict=True)
        params = treedef.unflatten([x if leaf is None else leaf for x, leaf in pairs])
    return State(params, *others)


def _is_dynamic(leaf: Any) -> bool:
    return not callable(leaf) and not isinstance(leaf, str | bytes)


_FIELDS = ("params", "opt_state", "step", "indices", "key")
jax.tree_util.register_pytree_with_keys(State, _flatten, _unflatten)


class Metrics(NamedTuple):
    """What a step returns beside the state.

    Attributes:
        loss: the loss; with gradient accumulation its mean over the microbatches.
        aux: what the function returned with it; with accumulation stacked along a new first axis.
    """

    loss: jax.Array
    aux: PyTree = None
