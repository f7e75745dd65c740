"""A function cut in two: the front that training never changes, and the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from pockjax._compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    dtype_of,
    eval_jaxpr,
    shape_of,
    subjaxprs,
)
from pockjax.autodiff import (
    Arrays,
    Primal,
    cheapest_cut,
    inlined,
    is_array,
    size_in_bytes,
    tidied,
    trace,
)
from pockjax.masks import resolve

PyTree = Any

# What draws random numbers, or calls back into Python, may give others each time: it is no part of
# a front to be kept.
_UNSTEADY = ("random_", "threefry", "rng_", "pure_callback", "io_callback", "debug_callback")


@dataclass(frozen=True, eq=False, repr=False)  # it stands in messages about structures
class Plan:
    """How a function of certain shapes is cut.

    Attributes:
        primal: the function.
        args: its arguments, taken apart; shapes in place of arrays.
        prefix: arrays of params and arguments -> computed features.
        suffix: arrays of params, then computed features, then passed arguments -> outputs.
        passed: positions of the arguments' arrays that the suffix reads itself.
        consumed: positions of those that the prefix reads.
        frozen: positions of the params' arrays that the prefix reads.
    """

    primal: Primal
    args: Arrays
    prefix: Jaxpr
    suffix: Jaxpr
    passed: tuple[int, ...]
    consumed: tuple[int, ...]
    frozen: tuple[int, ...]

    def run(self, frozen: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
        """Computes the features of arguments from the params' arrays that the prefix reads."""
        weights: list[Any] = [None] * len(self.primal.params.arrays)
        for i, x in zip(self.frozen, frozen, strict=True):
            weights[i] = x
        return eval_jaxpr(self.prefix, self.prefix.consts, *weights, *arrays)

    @property
    def features(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the computed features."""
        return [jax.ShapeDtypeStruct(shape_of(v), dtype_of(v)) for v in self.prefix.outvars]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Features:
    """What the rest of a function needs of a batch; a pytree, made by its frozen front.

    Attributes:
        computed: what the front computed; the same for the same examples as long as the front's
            parameters are.
        passed: arguments that the rest reads itself, such as labels.
        plan: how the function was cut.
    """

    computed: tuple[Any, ...]
    passed: tuple[Any, ...]
    plan: Plan = field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of what was computed."""
        return sum(size_in_bytes(x) for x in self.computed)


class Front:
    """The frozen front of a function: ``front(params, *args)`` are the features of a batch."""

    def __init__(self, fun: Callable[..., Any], mask: PyTree):
        """Traces nothing yet; see `split`."""
        self._fun, self._mask = fun, mask
        self._plans: dict[Any, Plan] = {}

    def plan(self, params: PyTree, args: tuple[Any, ...]) -> Plan:
        """How the function is cut for arguments (or shapes of them) like these."""
        tree, rest = Arrays.of(params), Arrays.of(args)
        leaves = [_identity(x) for x in (*tree.leaves, *rest.leaves)]
        key = (tree.treedef, rest.treedef, tuple(leaves))
        if key not in self._plans:
            self._plans[key] = make_plan(self._fun, self._mask, params, args)
        return self._plans[key]

    def __call__(self, params: PyTree, *args: Any) -> Features:
        """The features of a batch."""
        plan = self.plan(params, args)
        weights = plan.primal.params.arrays_of(params)
        arrays = plan.args.arrays_of(args)
        computed = plan.run([weights[i] for i in plan.frozen], arrays)
        return Features(tuple(computed), tuple(arrays[i] for i in plan.passed), plan)


def split(fun: Callable[..., Any], mask: PyTree) -> tuple[Front, Callable[..., Any]]:
    """Cuts a function into its frozen front and the rest.

    The front is whatever depends on no trained parameter and no random number, found from the
    jaxpr: nobody has to say where the layers are. Its output for an example never changes while the
    rest is trained, so it can be computed once and kept (`FeatureCache`). The cut is where the
    fewest bytes cross it.

    A `lax.scan` over layers is not cut: with a trained layer in it, all of it belongs to the rest.

    Args:
        fun: ``fun(params, *args)`` of any output.
        mask: what is trained; a prefix of the params.

    Returns:
        ``prefix(params, *args) -> features``, and ``suffix(params, features, *args) -> output``,
        such that ``suffix(params, prefix(params, *args))`` equals ``fun(params, *args)``. The
        suffix is a function to be differentiated or compiled like ``fun``. Arguments that it reads
        itself, such as labels, are in the features, unless they are given again: a random key that
        has to change must be; ``None`` stands for an argument that is not given. What the front
        reads cannot be given again: the features are made of it.

    Raises:
        MaskError: if the mask does not fit the params.
        ValueError: (from ``suffix``) if an argument is given again that the front reads.

    >>> import jax.numpy as jnp
    >>> import pockjax as pj
    >>> params = {"front": jnp.ones((3, 2)), "head": jnp.ones((2, 1))}
    >>> def loss(params, x, y):
    ...     return jnp.sum((jnp.tanh(x @ params["front"]) @ params["head"] - y) ** 2)
    >>> mask = {"front": False, "head": True}
    >>> prefix, suffix = split(loss, mask)
    >>> x, y = jnp.ones((4, 3)), jnp.ones((4, 1))
    >>> features = prefix(params, x, y)
    >>> [a.shape for a in features.computed]
    [(4, 2)]
    >>> grads = pj.grad(suffix, mask)(params, features)
    >>> grads["head"].shape
    (2, 1)
    """

    def suffix(params: PyTree, features: Features, *args: Any) -> Any:
        plan = features.plan
        passed = _given(plan, features.passed, args)
        inputs = [*plan.primal.params.arrays_of(params), *features.computed, *passed]
        outs = eval_jaxpr(plan.suffix, plan.suffix.consts, *inputs)
        return plan.primal.outputs(outs)[0]

    return Front(fun, mask), suffix


def _identity(leaf: Any) -> Any:
    """What a plan depends on: shapes of arrays, and everything else itself."""
    if is_array(leaf):
        return leaf.shape, str(leaf.dtype)
    # Other objects are known by where they are, and the plan keeps them there.
    return (type(leaf), leaf) if isinstance(leaf, bool | int | float | str) else id(leaf)


def _given(plan: Plan, passed: Sequence[Any], args: tuple[Any, ...]) -> list[Any]:
    """The passed arguments, those that are given again exchanged."""
    whole = plan.args
    children = whole.treedef.children()
    if len(args) > len(children):
        raise TypeError(f"the function takes {len(children)} arguments, {len(args)} were given")
    instead: dict[int, Any] = {}
    first, position = 0, 0
    for k, child in enumerate(children):
        is_array = whole.is_array[first : first + child.num_leaves]
        first += child.num_leaves
        if k < len(args) and args[k] is not None:
            leaves, treedef = jax.tree.flatten(args[k])
            if treedef != child:
                raise TypeError(f"argument {k} was {child}, and is given again as {treedef}")
            arrays = [x for x, yes in zip(leaves, is_array, strict=True) if yes]
            if not set(plan.consumed).isdisjoint(range(position, position + len(arrays))):
                raise ValueError(
                    f"argument {k} is read by the frozen front, whose output is in the features: "
                    "given again, it would change nothing, or only half of what it should; give "
                    "None in its place, and other features for other examples"
                )
            instead.update(enumerate(arrays, position))
        position += sum(is_array)
    return [instead.get(i, x) for i, x in zip(plan.passed, passed, strict=True)]


def make_plan(fun: Callable[..., Any], mask: PyTree, params: PyTree, args: tuple[Any, ...]) -> Plan:
    """Trace a function and find where to cut it."""
    shapes = _shapes(args)
    primal = trace(fun, _shapes(params), shapes, scalar=False)
    n_params = len(primal.params.arrays)
    entries, _, _ = resolve(params, mask)
    pairs = zip(entries, primal.params.is_array, strict=True)
    trained = [entry is not False for entry, is_array in pairs if is_array]
    prefix, suffix = cut(inlined(primal.jaxpr), trained)
    read = read_by(suffix)
    first = n_params + len(prefix.outvars)
    passed = tuple(i for i, v in enumerate(suffix.invars[first:]) if v in read)
    suffix = suffix.replace(
        invars=[*suffix.invars[:first], *(suffix.invars[first + i] for i in passed)],
        debug_info=suffix.debug_info,
    )
    read = read_by(prefix)
    weights, batch = prefix.invars[:n_params], prefix.invars[n_params:]
    return Plan(
        primal,
        Arrays.of(shapes),
        prefix,
        suffix,
        passed,
        consumed=tuple(i for i, v in enumerate(batch) if v in read),
        frozen=tuple(i for i, v in enumerate(weights) if v in read),
    )


def cut(jaxpr: Jaxpr, trained: Sequence[bool]) -> tuple[Jaxpr, Jaxpr]:
    """Cuts a function of parameters and a batch where the fewest bytes cross.

    Args:
        jaxpr: of the function, its jits inlined.
        trained: of each parameter, whether it is trained at all.

    Returns:
        The front: parameters, then the batch -> features; and the rest: parameters, then features,
        then the batch -> outputs.
    """
    weights, batch = jaxpr.invars[: len(trained)], jaxpr.invars[len(trained) :]
    changing = {v for v, yes in zip(weights, trained, strict=True) if yes}
    of_batch = set(batch)
    front: list[JaxprEqn] = []
    constant: list[JaxprEqn] = []  # of frozen weights alone: the same for every example
    rest: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        reads = {a for a in eqn.invars if isinstance(a, Var)}
        varies = bool(reads & of_batch)
        if varies:
            of_batch.update(eqn.outvars)
        if reads & changing or (varies and _is_unsteady(eqn)) or eqn.effects:
            changing.update(eqn.outvars)
            rest.append(eqn)
        else:
            (front if varies else constant).append(eqn)

    wanted = [a for eqn in rest for a in eqn.invars] + list(jaxpr.outvars)
    required = [a for a in wanted if isinstance(a, Var) and a in of_batch and a not in changing]
    there = set(batch)
    found = cheapest_cut(
        front,
        required,
        lambda v: size_in_bytes(v.aval) if v in of_batch and v not in there else 0,
    )
    computed = [v for v in found.kept if v in of_batch and v not in there]
    debug = jaxpr.debug_info.with_unknown_names()
    prefix = tidied(jaxpr.replace(eqns=constant + front, outvars=computed, debug_info=debug))
    suffix = jaxpr.replace(
        invars=[*weights, *computed, *batch],
        eqns=[*constant, *found.recomputed, *rest],
        debug_info=debug,
    )
    return prefix, tidied(suffix)


def _is_unsteady(eqn: JaxprEqn) -> bool:
    """Whether an equation, or one inside it, may give other numbers each time."""
    if eqn.primitive.name.startswith(_UNSTEADY):
        return True
    return any(_is_unsteady(inner) for jaxpr in subjaxprs(eqn) for inner in jaxpr.eqns)


def read_by(jaxpr: Jaxpr) -> set[Var]:
    """What the operations and the results of a jaxpr read."""
    atoms = [a for eqn in jaxpr.eqns for a in eqn.invars] + list(jaxpr.outvars)
    return {a for a in atoms if not isinstance(a, Literal)}


def _shapes(tree: PyTree) -> PyTree:
    """Shapes in place of arrays, so that a plan holds none of them."""
    arrays = Arrays.of(tree)
    return arrays.tree([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays.arrays])
