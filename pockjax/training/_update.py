"""The update as one traced function; two variants differ in what the backward pass keeps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pockjax._compat import Jaxpr, eval_jaxpr, spreads
from pockjax.autodiff import (
    Arrays,
    IndexedMask,
    Joint,
    Plan,
    Primal,
    differentiate,
    inlined,
    is_array,
    trace,
)
from pockjax.masks import apply_updates, pack, resolve
from pockjax.prefix import in_pieces
from pockjax.training._placement import home_of, shardings_of
from pockjax.training._precision import lowered
from pockjax.training._schedule import Schedule
from pockjax.training._state import Layout, Metrics, State
from pockjax.training._trees import difference, same, shapes_of, unaliased

PyTree = Any


@dataclass(frozen=True, eq=False)
class Update:
    """A training update under construction: the function traced once, nothing compiled yet.

    Attributes:
        fun: the loss.
        mask: what to train, its traced indices apart.
        tx: the optimizer.
        params: shapes of the parameters; what is no array stays as it is.
        batch: shapes of the batch; what is no array stays as it is.
        has_aux: whether ``fun`` returns auxiliary outputs.
        accumulate: number of microbatches.
        key: random key to begin with, or None.
        merge_aux: writes auxiliary outputs into frozen parameters.
        frozen_dtype: what operands of frozen products are rounded to, or None.
        remat: which equations of the loss the backward pass computes again; True for the blocks
            that keep the fewest bytes.
        pieces: in how many parts of the batch the frozen front is computed.
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
    frozen_dtype: Any = None
    remat: Plan | bool = ()
    pieces: int = 1

    @cached_property
    def traced(self) -> Primal:
        """The loss of one microbatch; the only time that ``fun`` is called."""
        args = list(jax.tree.map(self._micro_shape, self.batch))
        if self.key is not None:
            args.append(shapes_of(self.key))
        primal = trace(self.fun, self.params, args, has_aux=self.has_aux, scalar=True)
        if self.frozen_dtype is None:
            return primal
        trained = self._trained(primal)
        others = [False] * (len(primal.jaxpr.invars) - len(trained))
        return replace(primal, jaxpr=lowered(primal.jaxpr, [*trained, *others], self.frozen_dtype))

    @cached_property
    def primal(self) -> Primal:
        """The loss of one microbatch, its frozen front in pieces.

        Raises:
            MixedExamples: if the front cannot be computed in so many pieces.
        """
        return self.traced if self.pieces == 1 else self._pieced[0]

    @cached_property
    def front(self) -> Jaxpr:
        """The frozen front, computed for the whole microbatch.

        Raises:
            MixedExamples: if it cannot be computed in pieces.
        """
        return self._pieced[1]

    @cached_property
    def _pieced(self) -> tuple[Primal, Jaxpr]:
        return in_pieces(self.traced, self._trained(self.traced), self.pieces)

    def changed(self, **fields: Any) -> "Update":
        """The same update with another mask, remat or number of pieces; shares the trace."""
        update = replace(self, **fields)
        if "mask" not in fields or self.frozen_dtype is None:  # else it depends on what is frozen
            update.__dict__["traced"] = self.traced
        return update

    def in_pieces(self, pieces: int) -> "Update":
        """The same update, its frozen front computed for a part of the batch at a time."""
        if pieces not in self._divided:
            self._divided[pieces] = self.changed(pieces=pieces)
        return self._divided[pieces]

    @cached_property
    def _divided(self) -> dict[int, "Update"]:
        return {}

    def _trained(self, primal: Primal) -> list[bool]:
        """Of each array of the parameters, whether anything of it is trained."""
        entries, _, _ = resolve(self.params, self.mask.tree(self.mask.indices))
        pairs = zip(entries, primal.params.is_array, strict=True)
        return [entry is not False for entry, is_array in pairs if is_array]

    @cached_property
    def joint(self) -> Joint:
        """Loss and packed gradient of one microbatch."""
        mask = self.mask.tree(self.mask.indices)
        return differentiate(self.primal.rematerialised(self.plan), mask)

    @cached_property
    def plan(self) -> Plan:
        """The spans of equations that the backward pass computes again."""
        if not isinstance(self.remat, bool):
            return self.remat
        mask = self.mask.tree(self.mask.indices)
        return self.primal.best_plan(mask) if self.remat else ()

    def _micro_shape(self, a: Any) -> Any:
        if not self._is_cut(a):
            return a
        return jax.ShapeDtypeStruct((a.shape[0] // self.accumulate, *a.shape[1:]), a.dtype)

    def _is_cut(self, a: Any) -> bool:
        """Whether microbatches get a piece each; scalars and what is no array go whole to each."""
        return self.accumulate > 1 and is_array(a) and len(a.shape) > 0

    @cached_property
    def args(self) -> Arrays:
        """The batch, taken apart."""
        return Arrays.of(self.batch)

    def arrays_of(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """A batch without what is no array, which is a constant of the step.

        Raises:
            TypeError: if that differs from what was compiled.
        """
        if all(self.args.is_array):
            return batch
        leaves, treedef = jax.tree.flatten(batch)
        compiled = zip(leaves, self.args.leaves, self.args.is_array, strict=False)
        if treedef != self.args.treedef or not all(yes or same(x, a) for x, a, yes in compiled):
            raise TypeError(self.difference(batch))
        pairs = zip(leaves, self.args.is_array, strict=True)
        return treedef.unflatten([x if yes else None for x, yes in pairs])

    def difference(self, batch: tuple[Any, ...]) -> str | None:
        """In what a batch differs from what was compiled, in words; None if in nothing."""
        advice = "; compile another step for it, or pad the batch"
        return difference(self.batch, batch, "batch argument", advice=advice)

    def state_difference(self, state: Any) -> str | None:
        """In what a state differs from what was compiled, in words; None if in nothing."""
        advice = "; begin with Step.init, or compile another step for it"
        return difference(self.example_state, state, "state", advice=advice)

    def step(self, kept: bool, early: bool) -> Callable[..., tuple[State, Metrics]]:
        """The update as a function of state and batch, ready to be compiled.

        Args:
            kept: whether to fix what the backward pass keeps.
            early: whether to write parameters as soon as their gradients exist.
        """

        def update(state: State, *batch: Any) -> tuple[State, Metrics]:
            schedule = self.schedule(kept, early)
            [seed] = [jnp.ones((), aval.dtype) for aval in self.primal.out_avals]
            arrays = self.primal.params.arrays_of(state.params)
            given = (state.step, state.indices, state.key, batch)
            (loss, *aux), outs = schedule.run(
                [*arrays, *jax.tree.leaves(given), seed],
                jax.tree.leaves((state.opt_state, state.indices)),
            )
            params = self.primal.params.tree(outs[: len(arrays)], like=state.params)
            opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), outs[len(arrays) :])
            aux = jax.tree.unflatten(self.primal.aux_tree, aux)
            state = State(params, opt_state, state.step + 1, state.indices, state.key)
            return state, Metrics(loss, aux)

        return update

    def schedule(self, kept: bool, early: bool) -> Schedule:
        """Gradient and optimizer's update, taken apart and put in order."""
        state, batch = self._state_shapes, self.arrays_of(self.batch)
        primal, packing = self.primal, self.joint.packing
        packed = jax.tree.structure(packing.tree(range(len(packing.slots))))
        arrays = primal.params.arrays_of(self.params)

        def gradient(arrays: Any, given: Any, seed: Any) -> Any:
            step, indices, key, batch = given
            state_now = State(primal.params.tree(arrays), None, step, indices, key)
            loss, aux, grads = self._differentiated(state_now, batch, kept, seed)
            return [loss, *jax.tree.leaves(aux)], jax.tree.leaves(grads)

        def update(arrays: Any, grads: Any, forward: Any, opt_state: Any, indices: Any) -> Any:
            mask = self.mask.tree(indices)
            params = before = primal.params.tree(arrays)
            loss, aux = forward[0], jax.tree.unflatten(primal.aux_tree, forward[1:])
            updates, opt_state = self._optimized(
                opt_state, loss, jax.tree.unflatten(packed, grads), pack(params, mask)
            )
            params = apply_updates(params, updates, mask)
            if self.merge_aux is not None:
                params = self.merge_aux(params, aux)
                _check_same(before, params, "after merge_aux parameter")
            return primal.params.arrays_of(params), jax.tree.leaves(opt_state)

        [seed] = [jax.ShapeDtypeStruct((), aval.dtype) for aval in primal.out_avals]
        given = (state.step, state.indices, state.key, batch)
        first, outs = jax.make_jaxpr(gradient, return_shape=True)(arrays, given, seed)
        forward, grads = outs
        then = jax.make_jaxpr(update)(arrays, grads, forward, state.opt_state, state.indices)
        early = early and self.accumulate == 1
        return Schedule(inlined(first), inlined(then), len(arrays), len(grads), early)

    def _optimized(self, before: PyTree, loss: Any, grads: PyTree, packed: PyTree) -> Any:
        """What the optimizer makes of the gradient, and its new state."""
        tx = optax.with_extra_args_support(self.tx)
        extra = {"value": loss, "grad": grads}
        while True:
            try:
                updates, opt_state = tx.update(grads, before, packed, **extra)
                break
            except TypeError as error:
                # Some transformations refuse what they do not ask for, alone or in a chain.
                refusal = str(error).partition("unexpected keyword argument")[2]
                unasked = [name for name in extra if repr(name) in refusal]
                if unasked:
                    del extra[unasked[0]]
                    continue
                if "required keyword-only argument" not in str(error):
                    raise
                raise TypeError(
                    f"the optimizer cannot be used in a compiled step: {error}. A step gives it "
                    "the gradient, its state, the trained parameters, and by name value (the "
                    "loss) and grad (the gradient)"
                ) from error
        _check_same(before, opt_state, "after the optimizer's update its state")
        return updates, opt_state

    def _differentiated(
        self, state: State, batch: tuple[Any, ...], kept: bool, seed: Any
    ) -> tuple[Any, Any, Any]:
        arrays = jax.tree.leaves(batch)
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        if self.accumulate == 1:
            return self._gradient(state, arrays if key is None else [*arrays, key], kept, seed)
        n, cut = self.accumulate, [self._is_cut(a) for a in arrays]
        micro = [
            jnp.reshape(a, (n, a.shape[0] // n, *a.shape[1:]))
            for a, yes in zip(arrays, cut, strict=True)
            if yes
        ]
        keys = None if key is None else jax.random.split(key, n)

        def body(total: PyTree, xs: Any) -> tuple[PyTree, Any]:
            pieces, key = iter(xs[0]), xs[1]
            args = [next(pieces) if yes else a for a, yes in zip(arrays, cut, strict=True)]
            args = args if key is None else [*args, key]
            loss, aux, grads = self._gradient(state, args, kept, seed)
            return jax.tree.map(jnp.add, total, (loss, grads)), aux

        joint = self.joint
        grads = joint.packing.tree(joint.jaxpr.out_avals[joint.n_forward_out :])
        start = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), (*joint.primal.out_avals, grads)
        )
        total, aux = lax.scan(body, start, (micro, keys))
        loss, grads = jax.tree.map(lambda a: a / n, total)
        return loss, aux, grads

    def _gradient(
        self, state: State, args: Sequence[Any], kept: bool, seed: Any
    ) -> tuple[Any, Any, Any]:
        joint = self.joint
        inputs = [*joint.primal.params.arrays_of(state.params), *args, *state.indices]
        if not kept:
            outs = eval_jaxpr(joint.jaxpr, joint.jaxpr.consts, *inputs, seed)
            n = joint.n_forward_out
            return (*joint.primal.outputs(outs[:n]), joint.packing.tree(outs[n:]))
        passes = joint.passes
        outs = eval_jaxpr(passes.forward, passes.forward.consts, *inputs)
        held = [*(inputs[i] for i in passes.kept_inputs), *outs[joint.n_forward_out :]]
        # What is kept is fixed here: XLA may neither keep more nor compute it again from earlier.
        held = lax.optimization_barrier(held)
        grads = eval_jaxpr(passes.backward, passes.backward.consts, *held, seed)
        return (*joint.primal.outputs(outs[: joint.n_forward_out]), joint.packing.tree(grads))

    @cached_property
    def example_state(self) -> State:
        """Shapes of the state, with their shardings if anything has one."""
        if self.shardings is None:
            return self._state_shapes
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self._state_shapes,
            self.shardings,
        )

    @cached_property
    def layout(self) -> Layout:
        """The order in which the executable takes and returns the arrays of the state."""
        return Layout(self._state_shapes)

    @cached_property
    def shardings(self) -> State | None:
        """Where the arrays of the state live, before and after a step; None if JAX may choose."""
        if self._home is None:
            return None
        return shardings_of(self._state_shapes, self.mask.tree(self.mask.indices), self._home)

    @property
    def is_spread(self) -> bool:
        """Whether arrays are spread over the devices of a mesh, or have types that say so."""
        return isinstance(self._home, jax.sharding.NamedSharding) and spreads(self._home.mesh)

    @cached_property
    def _home(self) -> Any:
        return home_of(self.params, self.batch)

    @cached_property
    def _state_shapes(self) -> State:
        params = self.primal.params

        def init(arrays: Sequence[Any], indices: tuple[Any, ...], key: Any) -> State:
            return self._new_state(params.tree(arrays), indices, key)

        state = jax.eval_shape(init, params.arrays, self.mask.indices, self.key)
        return state.replace(params=self.params)

    def new_state(self, params: PyTree, indices: tuple[Any, ...], key: Any) -> State:
        """The state to begin with, ready to be donated."""
        return self.placed(self._new_state(params, indices, key))

    def _new_state(self, params: PyTree, indices: tuple[Any, ...], key: Any) -> State:
        packed = pack(params, self.mask.tree(indices))
        return State(params, self.tx.init(packed), jnp.zeros((), jnp.int32), indices, key)

    def placed(self, state: State) -> State:
        """A state where the step expects it, no two arrays of it in the same memory."""
        if self.shardings is not None:
            state = jax.device_put(state, self.shardings)
        return unaliased(state)


def _check_same(before: PyTree, after: PyTree, what: str) -> None:
    """Raises TypeError if a part of the state comes out of a step other than it went in."""
    problem = difference(before, after, what, was="was", origin="what went in")
    if problem is not None:
        raise TypeError(f"{problem}; a state must come out of a step as it went in")
