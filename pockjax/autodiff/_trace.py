"""From a function and a mask to one jaxpr of its value and its packed gradient."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pockjax.autodiff.rules  # noqa: F401  (registers the rules)
from pockjax._compat import Jaxpr
from pockjax.autodiff._expose import expose
from pockjax.autodiff._exposed import Context, Fallback, Term, Value, carrying
from pockjax.autodiff._fold import fold
from pockjax.autodiff._indices import IndexedMask
from pockjax.autodiff._jaxprs import evaluated, inlined, size_in_bytes
from pockjax.autodiff._remat import Plan, Recomputable, best_plan, marked
from pockjax.autodiff._residuals import Split, split_passes
from pockjax.autodiff._start import before_trained, joined, weights_alone
from pockjax.autodiff._thin import thin_scans
from pockjax.masks import Block, resolve

PyTree = Any


@dataclass(frozen=True)
class Arrays:
    """A pytree whose arrays can be exchanged; what is not an array stays as it is."""

    treedef: Any
    leaves: tuple[Any, ...]
    is_array: tuple[bool, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Arrays":
        """Finds the arrays of a tree."""
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(leaves), tuple(map(is_array, leaves)))

    @property
    def arrays(self) -> list[Any]:
        """The arrays alone."""
        return self.arrays_of(self.leaves)

    def arrays_of(self, tree: PyTree) -> list[Any]:
        """The arrays of another tree of the same structure."""
        leaves = jax.tree.leaves(tree)
        return [x for x, yes in zip(leaves, self.is_array, strict=True) if yes]

    def tree(self, arrays: Sequence[Any], like: PyTree = None) -> PyTree:
        """The tree (or another of the same structure) with other arrays."""
        remaining = iter(arrays)
        leaves = self.leaves if like is None else jax.tree.leaves(like)
        pairs = zip(leaves, self.is_array, strict=True)
        return self.treedef.unflatten([next(remaining) if yes else x for x, yes in pairs])


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or the shape of one, which a program can have as its input."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


@dataclass(frozen=True, eq=False)
class Primal:
    """A function as a jaxpr of its arrays; traced once, differentiated for any mask.

    Attributes:
        jaxpr: maps the arrays of the params and of the arguments to outputs and auxiliary outputs.
        params: the params, taken apart.
        args: the arguments, positional and by name, taken apart.
        out_tree: structure of the outputs.
        aux_tree: structure of the auxiliary outputs.
        out_avals: types of the outputs.
    """

    jaxpr: Jaxpr
    params: Arrays
    args: Arrays
    out_tree: Any
    aux_tree: Any
    out_avals: list[Any]

    def outputs(self, arrays: Sequence[Any]) -> tuple[PyTree, PyTree]:
        """Outputs and auxiliary outputs from the flat outputs of `jaxpr`."""
        n = len(self.out_avals)
        return self.out_tree.unflatten(arrays[:n]), self.aux_tree.unflatten(arrays[n:])

    def rematerialised(self, plan: Plan) -> "Primal":
        """The same function, with blocks that a backward pass is to compute again marked.

        Raises:
            ValueError: the plan is not one for this function.
        """
        return replace(self, jaxpr=marked(inlined(self.jaxpr), plan)) if plan else self

    def best_plan(self, mask: PyTree) -> Plan:
        """The blocks to compute again so that a mask's backward pass keeps the fewest bytes."""
        entries, _, _ = resolve(self.params.treedef.unflatten(self.params.leaves), mask)
        pairs = zip(entries, self.params.is_array, strict=True)
        trained = [entry is not False for entry, is_array in pairs if is_array]
        trained += [False] * (len(self.jaxpr.invars) - len(trained))
        return best_plan(inlined(self.jaxpr), trained)


@dataclass(frozen=True)
class Packing:
    """The structure of a packed tree; holds no arrays.

    Attributes:
        treedef: structure of the params.
        slots: for each leaf of the params, which of the packed arrays is its trained part; None
            where it is frozen.
    """

    treedef: Any
    slots: tuple[int | None, ...]

    def tree(self, arrays: Sequence[Any]) -> PyTree:
        """The packed tree of some arrays."""
        return self.treedef.unflatten([None if i is None else arrays[i] for i in self.slots])


@dataclass(frozen=True, eq=False)
class Joint:
    """Outputs and packed gradient of a function as one folded jaxpr.

    Attributes:
        primal: the function.
        jaxpr: maps `inputs` and the cotangents of the outputs to outputs, auxiliary outputs and the
            packed gradient's arrays.
        inputs: the arrays (or shapes) of the params, the arguments and the mask's traced indices.
        packing: the structure of the packed gradient.
        fallbacks: where the gradient is computed wider than asked.
    """

    primal: Primal
    jaxpr: Jaxpr
    inputs: list[Any]
    packing: Packing
    fallbacks: tuple[Fallback, ...]

    @property
    def n_forward_out(self) -> int:
        """Number of outputs that are not gradients."""
        return len(self.jaxpr.outvars) - sum(i is not None for i in self.packing.slots)

    @property
    def residual_bytes(self) -> int:
        """What the backward pass keeps from the forward pass, parameters aside."""
        n_params = len(self.primal.params.arrays)
        held = [self.inputs[i] for i in self.passes.kept_inputs if i >= n_params]
        kept = self.passes.forward.out_avals[self.n_forward_out :]
        return sum(map(size_in_bytes, [*kept, *held]))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the packed gradient."""
        return sum(map(size_in_bytes, self.jaxpr.out_avals[self.n_forward_out :]))

    def run(self, inputs: Sequence[Any]) -> tuple[PyTree, PyTree, PyTree]:
        """Value, auxiliary outputs and packed gradient of a scalar function."""
        [aval] = self.primal.out_avals
        outs = evaluated(self.jaxpr, self.jaxpr.consts, *inputs, np.ones((), aval.dtype))
        n = self.n_forward_out
        return (*self.primal.outputs(outs[:n]), self.packing.tree(outs[n:]))

    @cached_property
    def passes(self) -> Split:
        """The same function in two passes with as few bytes between them as possible."""
        jaxpr = inlined(self.jaxpr)
        jaxpr = thin_scans(jaxpr, Recomputable.of(jaxpr.eqns).loops)
        n_params = len(self.primal.params.arrays)
        return split_passes(jaxpr, len(self.inputs), self.n_forward_out, n_params)


def trace(
    fun: Callable[..., Any],
    params: PyTree,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    has_aux: bool = False,
    scalar: bool = True,
) -> Primal:
    """Traces ``fun``, once.

    Args:
        fun: ``fun(params, *args, **kwargs)``, an output or (with ``has_aux``) a pair of output and
            aux.
        params: arrays or shapes.
        args: arrays, shapes, or anything else, which is passed on as it is.
        kwargs: the same, by name.
        has_aux: whether ``fun`` returns auxiliary outputs that are not differentiated.
        scalar: whether the output must be one real scalar.
    """
    tree, rest = Arrays.of(params), Arrays.of((tuple(args), dict(kwargs or {})))
    n_params = len(tree.arrays)
    found: list[Any] = []

    def flat_fun(*arrays: Any) -> list[Any]:
        args, kwargs = rest.tree(arrays[n_params:])
        out = fun(tree.tree(arrays[:n_params]), *args, **kwargs)
        out, aux = _checked_pair(out) if has_aux else (out, None)
        outs, out_tree = jax.tree.flatten(out)
        auxs, aux_tree = jax.tree.flatten(aux)
        found[:] = [out_tree, aux_tree, len(outs)]
        return [*outs, *auxs]

    jaxpr = jax.make_jaxpr(flat_fun)(*tree.arrays, *rest.arrays)
    out_tree, aux_tree, n_out = found
    primal = Primal(jaxpr, tree, rest, out_tree, aux_tree, list(jaxpr.out_avals[:n_out]))
    if scalar:
        _check_scalar(primal)
    return primal


def differentiate(primal: Primal, mask: PyTree) -> Joint:
    """Exposes what the mask trains, differentiates and folds."""
    tree, jaxpr, indexed = primal.params, primal.jaxpr, IndexedMask.of(mask)
    params = tree.treedef.unflatten(tree.leaves)
    inputs = [*tree.arrays, *primal.args.arrays, *indexed.indices]
    n_params, n_in, n_out = len(tree.arrays), len(jaxpr.invars), len(primal.out_avals)

    def entries(indices: Sequence[Any]) -> list[tuple[Any, str]]:
        blocks, _, paths = resolve(params, indexed.tree(indices))
        named = zip(blocks, paths, tree.is_array, strict=True)
        return [(block, path) for block, path, is_array in named if is_array]

    known = entries(indexed.indices)
    whole = [i for i, (block, _) in enumerate(known) if block is True]
    parts = {i: block for i, (block, _) in enumerate(known) if isinstance(block, Block)}
    deltas = [jax.ShapeDtypeStruct(b.packed_shape, inputs[i].dtype) for i, b in parts.items()]
    before, jaxpr = before_trained(jaxpr, {*whole, *parts})
    of_weights = weights_alone(before, n_params)
    ctx = Context()

    def joint(*flat: Any) -> list[Any]:
        arrays, flat = flat[: len(inputs)], flat[len(inputs) :]
        known, flat = flat[: len(of_weights)], flat[len(of_weights) :]
        deltas, seeds = flat[: len(parts)], flat[len(parts) :]
        blocks = entries(arrays[n_in:])

        def exposed(trained: Sequence[Any], deltas: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            values = [Value(x, weight=i < n_params) for i, x in enumerate(arrays[:n_in])]
            for i, x in zip(whole, trained, strict=True):
                values[i] = Value(x, live=True, weight=True)
            for i, delta in zip(parts, deltas, strict=True):
                values[i] = carrying(arrays[i], [Term(delta, *blocks[i])], [values[i]])
            values += [Value(x, weight=yes) for x, yes in zip(known, of_weights, strict=True)]
            outs = [v.dense() for v in expose(ctx, jaxpr, values)]
            return outs[:n_out], outs[n_out:]

        trained = [arrays[i] for i in whole]
        outs, vjp_fn, aux = jax.vjp(exposed, trained, list(deltas), has_aux=True)
        return [*outs, *aux, *jax.tree.leaves(vjp_fn(list(seeds)))]

    seeds = [jax.ShapeDtypeStruct(a.shape, tangent_dtype(a)) for a in primal.out_avals]
    traced = jax.make_jaxpr(joint)(*inputs, *before.out_avals, *deltas, *seeds)
    traced = joined(before, traced, len(inputs))
    zeros = [len(inputs) <= i < len(inputs) + len(deltas) for i in range(len(traced.invars))]
    folded, _ = fold(traced, zeros)
    folded = folded.replace(
        invars=[v for v, zero in zip(folded.invars, zeros, strict=True) if not zero],
        debug_info=folded.debug_info.with_unknown_names(),
    )
    place = {i: at for at, i in enumerate([*whole, *parts])}
    arrays = itertools.count()
    slots = [place.get(next(arrays)) if is_array else None for is_array in tree.is_array]
    packing = Packing(tree.treedef, tuple(slots))
    return Joint(primal, folded, inputs, packing, tuple(ctx.fallbacks))


def _checked_pair(out: Any) -> tuple[Any, Any]:
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"with has_aux=True the function must return a pair (output, aux), got {type(out)}"
        )
    return out


def _check_scalar(primal: Primal) -> None:
    if primal.out_tree != jax.tree.structure(0):
        raise TypeError(
            f"gradient only defined for scalar-output functions, got {primal.out_tree}; "
            "return (loss, aux) with has_aux=True, or use pj.vjp"
        )
    [aval] = primal.out_avals
    if aval.shape != () or not jnp.issubdtype(aval.dtype, jnp.floating):
        raise TypeError(
            "gradient only defined for functions with one real scalar output, got "
            f"{aval.str_short()}; use pj.vjp for other outputs"
        )


def tangent_dtype(aval: Any) -> Any:
    """Dtype of the cotangents of an output."""
    return aval.dtype if jnp.issubdtype(aval.dtype, jnp.inexact) else jax.dtypes.float0
