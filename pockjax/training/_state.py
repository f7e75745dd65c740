"""What a step reads, replaces and returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

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

    A step takes and returns its arrays in a row. The trees are built when they are looked at, for
    building those of Flax takes longer than the steps of small models.

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
    # The arrays of the whole state while its trees are not built, and their order. Trees can be
    # changed in place, so it is one or the other.
    _row: "_Row | None" = field(default=None, init=False, repr=False, compare=False)
    # Which leaves of params are no arrays, once that has been found out: mapped over, a tree of
    # arrays may become one of numbers or functions.
    _static: Any = field(default=_UNKNOWN, repr=False, compare=False)

    def replace(self, **changes: Any) -> "State":
        """The state with some fields changed."""
        if "params" in changes:
            changes = {"_static": _UNKNOWN, **changes}
        return replace(self, **changes)

    if not TYPE_CHECKING:  # which would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Builds the trees."""
            row = self._row
            if name not in ("params", "opt_state"):
                raise AttributeError(f"a state has no {name!r}")
            if row is not None:
                built = row.layout.treedef.unflatten(row.arrays)
                self.__dict__.update(built.__dict__, _row=None)
            return self.__dict__[name]

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy: what was found out about the leaves is found out again."""
        return State, (self.params, self.opt_state, self.step, self.indices, self.key)


def _flatten(state: State) -> tuple[tuple[Any, ...], Any]:
    params, static = state.params, state._static
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


class _Row(NamedTuple):
    layout: "Layout"
    arrays: Sequence[Any]


class Layout:
    """The order in which the arrays of a state stand in a row."""

    def __init__(self, like: State):
        """Of states of the structure of this one."""
        self.treedef = jax.tree.structure(like)
        self._indices, self._has_key = len(like.indices), like.key is not None
        self._first = self.treedef.num_leaves - 1 - self._indices - self._has_key

    def row(self, state: Any) -> Sequence[Any] | None:
        """The arrays of a state; None if it is of another structure."""
        row = state._row if isinstance(state, State) else None
        if row is not None and row.layout is self:
            return row.arrays
        arrays, treedef = jax.tree.flatten(state)
        return arrays if treedef == self.treedef else None

    def state(self, arrays: Sequence[Any]) -> State:
        """The state of arrays in a row, its trees not built yet."""
        state = object.__new__(State)
        step, *others = arrays[self._first :]
        key = others[self._indices] if self._has_key else None
        indices = tuple(others[: self._indices])
        state.__dict__.update(step=step, indices=indices, key=key, _row=_Row(self, arrays))
        return state

    def on_rows(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """A function of a state and batches, that returns a state and more, as one of a row."""

        def on_row(arrays: Sequence[Any], *batches: Any) -> tuple[Sequence[Any], Any]:
            state, more = fun(self.treedef.unflatten(arrays), *batches)
            row = self.row(state)
            assert row is not None, "a state comes out as it went in"
            return row, more

        return on_row


class Metrics(NamedTuple):
    """What a step returns beside the state.

    Attributes:
        loss: the loss; with gradient accumulation its mean over the microbatches.
        aux: what the function returned with it; with gradient accumulation those of the
            microbatches, stacked along a new first axis.
    """

    loss: jax.Array
    aux: PyTree = None
