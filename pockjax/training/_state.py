"""What a step reads, replaces and returns."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax

from pockjax.autodiff import is_array

PyTree = Any

_UNKNOWN: Any = object()


@dataclass(frozen=True)
class State:
    """Everything a step reads and replaces; donated to each call.

    As a pytree its leaves are arrays alone: what else the parameters hold (the functions and flags
    of Equinox modules) is part of its structure, so that the state of any model can go through a
    compiled step.

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
    # Which leaves of params are no arrays, once that has been found out: mapped over, a tree of
    # arrays may become one of numbers or functions.
    _static: Any = field(default=_UNKNOWN, repr=False, compare=False)

    def replace(self, **changes: Any) -> "State":
        """The state with some fields changed."""
        if "params" in changes:
            changes = {"_static": _UNKNOWN, **changes}
        return replace(self, **changes)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy: what was found out about the leaves is found out again."""
        return State, (self.params, self.opt_state, self.step, self.indices, self.key)


def _flatten(state: State) -> tuple[tuple[Any, ...], Any]:
    static, params = state._static, state.params
    if static is _UNKNOWN:
        leaves, treedef = jax.tree.flatten(params)
        dynamic = tuple(map(is_array, leaves))
        pairs = zip(leaves, dynamic, strict=True)
        values = tuple(None if yes else x for x, yes in pairs)
        static = None if all(dynamic) else (treedef, dynamic, values)
    if static is not None:
        treedef, dynamic, _ = static
        pairs = zip(treedef.flatten_up_to(params), dynamic, strict=True)
        params = treedef.unflatten([x if yes else None for x, yes in pairs])
    children = (params, state.opt_state, state.step, state.indices, state.key)
    return tuple(zip(map(jax.tree_util.GetAttrKey, _FIELDS), children, strict=True)), static


def _unflatten(static: Any, children: Any) -> State:
    params, *others = children
    if static is not None:
        treedef, dynamic, values = static
        triples = zip(treedef.flatten_up_to(params), dynamic, values, strict=True)
        params = treedef.unflatten([x if yes else value for x, yes, value in triples])
    return State(params, *others, _static=static)


_FIELDS = ("params", "opt_state", "step", "indices", "key")
jax.tree_util.register_pytree_with_keys(State, _flatten, _unflatten)


class Metrics(NamedTuple):
    """What a step returns beside the state.

    Attributes:
        loss: the loss; with gradient accumulation its mean over the microbatches.
        aux: what the function returned with it; with gradient accumulation those of the
            microbatches, stacked along a new first axis.
    """

    loss: jax.Array
    aux: PyTree = None
