"""The update as one traced function; two variants differ in what the backward pass keeps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pockjax._compat import eval_jaxpr
from pockjax._paths import flatten_with_paths
from pockjax.autodiff import IndexedMask, Joint, Primal, differentiate, trace
from pockjax.masks import apply_updates, pack
from pockjax.training._state import Metrics, State

PyTree = Any


@dataclass(frozen=True, eq=False)
class Update:
    """A training update under construction: the function traced once, nothing compiled yet.

    Attributes:
        fun: the loss.
        mask: what to train, its traced indices apart.
        tx: the optimizer.
        params: shapes of the parameters.
        batch: shapes of the batch.
        has_aux: whether ``fun`` returns auxiliary outputs.
        accumulate: number of microbatches.
        key: random key to begin with, or None.
        merge_aux: writes auxiliary outputs into frozen parameters.
    """

    fun: Callable[..., Any]
    mask: IndexedMask
    tx: optax.GradientTransformation
    params: PyTree
    batch: tuple[Any, ...]
    has_aux: bool
    accumulate: int
    key: jax.Array | None
    merge_aux: Callable[[PyTree, PyTree], PyTree] | None

    @cached_property
    def primal(self) -> Primal:
        """The loss of one microbatch; the only time that ``fun`` is called."""
        args = list(jax.tree.map(self._micro_shape, self.batch))
        if self.key is not None:
            args.append(shapes_of(self.key))
        return trace(self.fun, self.params, args, has_aux=self.has_aux, scalar=True)

    @cached_property
    def joint(self) -> Joint:
        """Loss and packed gradient of one microbatch."""
        return differentiate(self.primal, self.mask.tree(self.mask.indices))

    def _micro_shape(self, a: Any) -> Any:
        if self.accumulate == 1:
            return a
        return jax.ShapeDtypeStruct((a.shape[0] // self.accumulate, *a.shape[1:]), a.dtype)

    def step(self, kept: bool) -> Callable[..., tuple[State, Metrics]]:
        """The update as a function of state and batch, ready to be compiled."""

        def update(state: State, *batch: Any) -> tuple[State, Metrics]:
            mask = self.mask.tree(state.indices)
            loss, aux, grads = self._differentiated(state, batch, kept)
            # Parameters are written only after the whole backward pass has read them; without this
            # order XLA would copy each of them before it is updated in place.
            arrays = self.primal.params.arrays_of(state.params)
            grads, arrays = lax.optimization_barrier((grads, arrays))
            params = self.primal.params.tree(arrays, like=state.params)
            updates, opt_state = self.tx.update(grads, state.opt_state, pack(params, mask))
            params = apply_updates(params, updates, mask)
            if self.merge_aux is not None:
                params = self.merge_aux(params, aux)
            state = State(params, opt_state, state.step + 1, state.indices, state.key)
            return state, Metrics(loss, aux)

        return update

    def _differentiated(
        self, state: State, batch: tuple[Any, ...], kept: bool
    ) -> tuple[Any, Any, Any]:
        args = list(batch)
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        if self.accumulate == 1:
            return self._gradient(state, args if key is None else [*args, key], kept)
        n = self.accumulate
        micro = jax.tree.map(lambda a: jnp.reshape(a, (n, a.shape[0] // n, *a.shape[1:])), args)
        keys = None if key is None else jax.random.split(key, n)

        def body(total: PyTree, xs: Any) -> tuple[PyTree, Any]:
            args, key = xs
            args = args if key is None else [*args, key]
            loss, aux, grads = self._gradient(state, args, kept)
            return jax.tree.map(jnp.add, total, (loss, grads)), aux

        joint = self.joint
        grads = joint.packing.tree(joint.jaxpr.out_avals[joint.n_forward_out :])
        start = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), (*joint.primal.out_avals, grads)
        )
        total, aux = lax.scan(body, start, (micro, keys))
        loss, grads = jax.tree.map(lambda a: a / n, total)
        return loss, aux, grads

    def _gradient(self, state: State, args: Sequence[Any], kept: bool) -> tuple[Any, Any, Any]:
        joint = self.joint
        params, others = joint.primal.params, joint.primal.args
        inputs = [
            *params.arrays_of(state.params),
            *others.arrays_of(tuple(args)),
            *state.indices,
        ]
        if not kept:
            return joint.run(inputs)
        passes = joint.passes
        outs = eval_jaxpr(passes.forward, passes.forward.consts, *inputs)
        held = [*(inputs[i] for i in passes.kept_inputs), *outs[joint.n_forward_out :]]
        # What is kept is fixed here: XLA may neither keep more nor compute it again from earlier.
        held = lax.optimization_barrier(held)
        [seed] = [jnp.ones((), aval.dtype) for aval in joint.primal.out_avals]
        grads = eval_jaxpr(passes.backward, passes.backward.consts, *held, seed)
        return (*joint.primal.outputs(outs[: joint.n_forward_out]), joint.packing.tree(grads))

    def example_state(self) -> State:
        """Shapes of the state."""
        params = self.primal.params

        def init(arrays: Sequence[Any], indices: tuple[Any, ...], key: Any) -> State:
            return self.new_state(params.tree(arrays), indices, key)

        return jax.eval_shape(init, params.arrays, self.mask.indices, self.key)

    def new_state(self, params: PyTree, indices: tuple[Any, ...], key: Any) -> State:
        """The state to begin with."""
        packed = pack(params, self.mask.tree(indices))
        return State(params, self.tx.init(packed), jnp.zeros((), jnp.int32), indices, key)


def shapes_of(tree: PyTree) -> PyTree:
    """The shapes of a tree's arrays, shardings included; other leaves as they are."""

    def shape(x: Any) -> Any:
        if isinstance(x, bool | int | float | complex):
            return jax.ShapeDtypeStruct((), jnp.result_type(x))
        if isinstance(x, jax.ShapeDtypeStruct) or not hasattr(x, "dtype"):
            return x
        sharding = getattr(x, "sharding", None)
        concrete = isinstance(sharding, jax.sharding.NamedSharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if concrete else None)

    return jax.tree.map(shape, tree)


def check_batch(batch: PyTree, accumulate: int) -> None:
    """Raises ValueError if the batch cannot be cut into microbatches."""
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    for path, leaf in flatten_with_paths(batch)[0]:
        if accumulate > 1 and (not leaf.shape or leaf.shape[0] % accumulate):
            raise ValueError(
                f"batch argument {path} of shape {tuple(leaf.shape)} cannot be cut into "
                f"{accumulate} microbatches along its first axis"
            )


def difference(expected: PyTree, found: PyTree, what: str) -> str | None:
    """Where two trees of arrays differ in structure, shape or dtype, in words; None if nowhere."""
    wanted, treedef = flatten_with_paths(expected)
    given, found_treedef = flatten_with_paths(found)
    if treedef != found_treedef:
        missing = sorted({p for p, _ in wanted} - {p for p, _ in given})
        extra = sorted({p for p, _ in given} - {p for p, _ in wanted})
        detail = f"compiled for {treedef}, got {found_treedef}"
        if missing or extra:
            detail = f"missing {missing[:5]}, unexpected {extra[:5]}"
        return f"{what} differs in structure from what was compiled: {detail}"
    for (path, a), (_, b) in zip(wanted, given, strict=True):
        if not hasattr(a, "dtype"):
            continue
        shape, dtype = jnp.shape(b), jax.dtypes.canonicalize_dtype(jnp.result_type(b))
        if (tuple(a.shape), a.dtype) != (shape, dtype):
            return (
                f"{what} {path or ''} was compiled for {a.dtype}{list(a.shape)}, got "
                f"{dtype}{list(shape)}; compile another step for it, or pad the batch"
            )
    return None
