"""Making masks, out of whatever is at hand to say what should be trained."""

import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from pockjax._paths import flatten_with_paths
from pockjax.masks._part import MaskError, Part
from pockjax.masks._resolve import resolve_leaf, spread
from pockjax.masks._rules import Rule, apply_rules
from pockjax.masks._scheme import Scheme


def mask(params: PyTree, scheme: Any) -> PyTree:
    """Say what is trained of every leaf of the parameters.

    Args:
        params: pytree of arrays, tracers or `jax.ShapeDtypeStruct`. Leaves that are no
            arrays of floating dtype are never trained.
        scheme: one of

            - a `Scheme`, or the path of a YAML file with one;
            - a sequence of rules, each a `Rule` or ``(pattern, what to train)``;
            - a predicate ``(path, leaf) -> bool or Part``;
            - a pytree of True, False and `Part` with the structure of `params`, or a
              prefix of it;
            - for an `nnx.State`, an NNX filter: a Variable type, an object such as
              ``nnx.All(...)``, or a list of those, any of which may hold.

    Returns:
        A pytree of the structure of `params` with True (trained), False (frozen) or a
        `Part` (a block is trained) for each leaf.

    Raises:
        MaskError: if the scheme does not fit the parameters, singles out a leaf that
            has no gradient, or trains nothing.
        OSError: if a scheme's file cannot be read.

    >>> import jax.numpy as jnp
    >>> params = {"dense": {"bias": jnp.zeros(4), "kernel": jnp.zeros((8, 4))}}
    >>> mask(params, [(".*/bias", "all"), (".*/kernel", {"in": 0.5})])
    {'dense': {'bias': True, 'kernel': part[:4]}}
    >>> mask(params, lambda path, leaf: leaf.ndim == 1)
    {'dense': {'bias': True, 'kernel': False}}
    """
    named, treedef = flatten_with_paths(params)
    _check_form(scheme)
    if isinstance(scheme, str | os.PathLike):
        scheme = Scheme.load(scheme)
    elif _is_rules(scheme):
        scheme = Scheme.from_rules(scheme)

    if isinstance(scheme, Scheme):
        entries = apply_rules(scheme.rules, named)
    elif _is_nnx_filter(scheme):
        entries = _filter_nnx(params, scheme)
    elif callable(scheme) and jax.tree_util.all_leaves([scheme]):
        entries = [_ask(scheme, path, leaf) for path, leaf in named]
    else:
        entries = spread(scheme, [path for path, _ in named], treedef)

    resolved = [
        resolve_leaf(leaf, entry, path) for (path, leaf), entry in zip(named, entries, strict=True)
    ]
    if all(entry is False for entry in resolved):
        raise MaskError(f"nothing is trained: none of the {len(named)} leaves is selected")
    return treedef.unflatten(
        # A whole subtree may be asked for; what of it has no gradient stays frozen.
        False if block is False else entry
        for entry, block in zip(entries, resolved, strict=True)
    )


def _check_form(scheme: Any) -> None:
    """Raises MaskError for what is nearly a scheme, and would be taken for something else."""
    if isinstance(scheme, str) and scheme in ("all", "none"):
        raise MaskError(
            f"{scheme!r} is what a rule may train, not a scheme: write True to train everything, "
            "or rules such as [('.*/bias', 'all')]"
        )
    if isinstance(scheme, list | tuple) and not scheme:
        raise MaskError("there are no rules, so nothing would be trained")
    if isinstance(scheme, Rule) or (
        isinstance(scheme, list | tuple) and isinstance(scheme[0], str) and len(scheme) in (2, 3)
    ):
        raise MaskError(f"rules must be a list, even if there is one: [{scheme!r}]")


def _is_rules(scheme: Any) -> bool:
    """Whether this is a sequence of rules and not a mask for a list of parameters."""
    return (
        isinstance(scheme, list | tuple)
        and len(scheme) > 0
        and all(
            isinstance(item, Rule)
            or (isinstance(item, list | tuple) and len(item) > 0 and isinstance(item[0], str))
            for item in scheme
        )
    )


def _ask(predicate: Callable[[str, Any], Any], path: str, leaf: Any) -> bool | Part:
    answer = predicate(path, leaf)
    if isinstance(answer, Part):
        return answer
    if isinstance(answer, bool | np.bool_):
        return bool(answer)
    raise MaskError(f"predicate must return True, False or a Part, got {answer!r} for '{path}'")


def _is_nnx_filter(scheme: Any) -> bool:
    """Whether this is an NNX filter that nothing else here could be.

    NNX takes strings, booleans, ``...`` and functions as filters, too; here those
    have their own meaning.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    if isinstance(scheme, list | tuple):
        return len(scheme) > 0 and all(map(_is_nnx_filter, scheme))
    if isinstance(scheme, type):
        return issubclass(scheme, nnx.Variable)
    return type(scheme).__module__ == nnx.filterlib.__name__


def _filter_nnx(params: PyTree, scheme: Any) -> list[bool | Part]:
    nnx = sys.modules["flax.nnx"]
    holds = nnx.filterlib.to_predicate(scheme)

    def is_variable(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    entries: list[bool | Part] = []
    for key_path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable):
        if not is_variable(node):
            raise MaskError(
                f"an nnx filter needs an nnx.State, but the leaf at "
                f"{jax.tree_util.keystr(key_path)} is in no nnx.Variable"
            )
        path = tuple(getattr(key, "key", getattr(key, "name", None)) for key in key_path)
        entries += [bool(holds(path, node))] * len(jax.tree.leaves(node))
    return entries
