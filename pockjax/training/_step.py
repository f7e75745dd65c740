"""The compiled training step: built once from a function and a mask, run many times."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pockjax._allocator import advise
from pockjax.autodiff import IndexedMask, Plan, is_array
from pockjax.costs import CompiledCost, Prediction
from pockjax.masks import MaskError, Scheme, pack, resolve
from pockjax.prefix import Front
from pockjax.rewrites import Choice
from pockjax.training._forecast import least_memory
from pockjax.training._measure import Measurement, measured
from pockjax.training._program import (
    Options,
    Program,
    Residuals,
    Rewrites,
    Updates,
    behind_the_front,
    variants,
)
from pockjax.training._report import Report, make_report
from pockjax.training._state import Metrics, State
from pockjax.training._trees import difference, shapes_of
from pockjax.training._update import Update

PyTree = Any


def compile(  # noqa: A001  (named as what jax.stages does: lower, then compile)
    fun: Callable[..., Any],
    mask: PyTree,
    tx: optax.GradientTransformation,
    params: PyTree,
    *batch: Any,
    has_aux: bool = False,
    accumulate: int = 1,
    key: jax.Array | None = None,
    merge_aux: Callable[[PyTree, PyTree], PyTree] | None = None,
    residuals: Residuals = "kept",
    rewrites: Rewrites = "measured",
    updates: Updates = "early",
    frozen_dtype: Any = None,
    remat: Plan | bool = False,
    front_pieces: int = 2,
    prefix: bool = False,
) -> "Step":
    """Compiles a training step that computes, stores and updates only what a mask names.

    Args:
        fun: ``fun(params, *batch)``, or ``fun(params, *batch, key)`` if a key is given: the loss, a
            real scalar, or with ``has_aux`` a pair of the loss and any pytree of arrays. As in
            `jax.jit` it is traced: what it does beside computing happens once, now.
        mask: what to train. Indices given as `jax.Array` become part of the state and can be
            exchanged later, see `Step.reselect`.
        tx: an optax transformation. It sees the trained parts alone, so its state, weight decay
            and gradient norms are theirs. Beside the gradient it may ask by name for ``value``, the
            loss, and ``grad``, but not for the function itself, as a line search does.
        params: the parameters, or their shapes (`jax.ShapeDtypeStruct`). If they were put on a mesh
            or a device, the state lives and stays there. Leaves that are no arrays, such as the
            flags and functions of Equinox modules, are constants of the step.
        *batch: an example of the other arguments, arrays or shapes. Python numbers count as arrays
            and may change from step to step; truth values, text and all else are constants.
        has_aux: whether ``fun`` returns auxiliary outputs (metrics, batch statistics). With
            ``accumulate`` those of the microbatches are stacked along a new first axis.
        accumulate: number of microbatches that the first axis of every batch array is cut into;
            their gradients are averaged, and memory is that of one of them. Scalars are not cut:
            each microbatch gets them whole.
        key: a random key. Each step hands ``fun`` a key of its own, derived from this one.
        merge_aux: ``merge_aux(params, aux) -> params``, called after each update: writes what the
            forward pass computed (batch statistics) into frozen parameters. With ``accumulate`` it
            gets the stacked aux, and must take the mean or the last over its first axis.
        residuals: ``"kept"`` fixes what the backward pass keeps to the fewest bytes, which halves
            the memory of many networks; ``"xla"`` leaves the choice to XLA; ``"auto"`` compiles
            both and takes what needs the least memory. On a CPU the order of operations is chosen
            for the least memory too, as predicted.
        rewrites: how to find faster forms of convolutions, on a CPU (see `pockjax.rewrite`):
            ``"measured"`` times them once on each machine, about a second for each new kind of
            convolution; ``"guessed"`` takes the likeliest; ``"none"`` leaves all as it is. So does
            a mesh of several devices, or one with explicit axes, as the log says.
        updates: ``"early"`` writes a parameter as soon as its gradient is there and nothing reads
            it any more, so that gradients are not held until the end; what an optimizer computes
            from all gradients, such as a global norm, is waited for. ``"late"`` writes all of them
            after the backward pass. With ``accumulate`` it is always late.
        frozen_dtype: ``"bfloat16"`` rounds the operands of matrix products and convolutions that
            depend on nothing trained, and sums them in float32; parameters, gradients and all else
            stay as they are. It is faster where the machine has instructions for it.
        remat: what the backward pass computes again instead of keeping it (rematerialisation, as
            by `jax.checkpoint`): True finds the blocks that leave the fewest bytes to keep; spans
            ``((start, stop), ...)`` of the equations of ``fun``, jits inlined, name them. See
            `Step.remat`.
        front_pieces: in how many parts of the batch the frozen front may be computed, one after the
            other, on a CPU. Its activations take that fraction of memory, and its time grows a
            little with each part: with two by some percent, with more further. More are taken only
            if the step is predicted to need clearly less memory, the front treats examples one by
            one, and the parts are equal; never with ``remat``.
        prefix: whether to leave out the frozen front of ``fun``, whose output for an example never
            changes (see `pockjax.split`). The step then takes features instead of a batch, which
            ``step.prefix(params, *batch)`` computes, and which `pockjax.fit` keeps by itself.

    Returns:
        The step. ``fun`` was traced once, and is never called again.

    Raises:
        MaskError: if the mask does not fit ``params``.
        TypeError: if ``fun`` does not return one real scalar, if ``tx`` asks for what a step does
            not have, or if ``tx`` or ``merge_aux`` change shapes or dtypes of what they return.
        ValueError: if ``accumulate`` does not divide the batch, for ``merge_aux`` without aux, if
            ``front_pieces`` is less than 1, if ``remat`` does not fit ``fun`` or is asked for when
            XLA chooses the residuals, or for ``prefix`` with ``accumulate``, ``key``, ``merge_aux``
            or ``frozen_dtype``, or where nothing is frozen before the first trained layer.

    >>> import pockjax as pj
    >>> params = {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}
    >>> loss = lambda params, x, y: jnp.mean((x @ params["w"] + params["b"] - y) ** 2)
    >>> mask = {"w": pj.part[:2], "b": True}
    >>> x, y = jnp.ones((8, 4)), jnp.zeros((8, 2))
    >>> step = pj.compile(loss, mask, optax.sgd(0.1), params, x, y)
    >>> state, metrics = step(step.init(params), x, y)
    >>> float(metrics.loss)
    16.0
    """
    options = Options(
        has_aux, accumulate, key, merge_aux, residuals, rewrites, updates, frozen_dtype,
        front_pieces,
    )  # fmt: skip
    front = None
    if prefix:
        front, fun, batch = behind_the_front(fun, mask, params, batch, options)
    update = options.update(fun, mask, tx, params, batch, remat)
    rewriter = options.rewriter(update)
    update = least_memory(update, options, rewriter)
    programs = {
        name: Program(name == "kept", updates == "early", rewriter) for name in variants(residuals)
    }
    compiled = {name: program.compiled(update) for name, program in programs.items()}
    costs = {name: CompiledCost.of(executable) for name, (_, executable) in compiled.items()}
    best = min(costs, key=lambda name: costs[name].total_bytes)
    program, executable = compiled[best]
    if jax.default_backend() == "cpu":
        advise(costs[best].temp_bytes)
    choices = () if rewriter is None else tuple(rewriter.choices)
    choices = choices[: len(choices) // len(programs)]
    step = Step(executable, update, costs, best, choices, program)
    step.prefix = front
    return step


class Step:
    """A compiled training step, made by `compile`.

    ``state, metrics = step(state, *batch)`` runs it. The state is donated: use the one returned.

    Attributes:
        predicted: what a cost model expected of it, see `CostModel.compile`.
        prefix: the frozen front, ``prefix(params, *batch) -> features``, if the step was compiled
            without it.
    """

    def __init__(
        self,
        compiled: Any,
        update: Update,
        costs: dict[str, CompiledCost],
        chosen: str,
        rewrites: tuple[Choice, ...],
        program: Program,
    ):
        """Wraps an executable; use `compile`."""
        self._program = program
        self._many: dict[int, Any] = {}
        self._measured: Measurement | None = None
        self.predicted: Prediction | None = None
        self.prefix: Front | None = None
        self._compiled, self._update = compiled, update
        self._costs, self._chosen, self._rewrites = costs, chosen, rewrites

    def init(
        self, params: PyTree, *, mask: PyTree = None, key: Any = None, donate: bool = False
    ) -> State:
        """The state to begin with.

        Args:
            params: of the structure and shapes that the step was compiled for.
            mask: the same mask with other values in its traced indices; default the one compiled.
            key: random key of the run; default the one compiled with.
            donate: take the arrays over instead of copying them: saves their size, but ``params``
                cannot be used any more after the first step.

        Raises:
            TypeError: if params differ from what was compiled; the message names the path.
            MaskError: if the mask is not the one compiled.
        """
        advice = "; compile another step for it"
        problem = difference(self._update.params, params, "parameter", advice=advice)
        if problem is not None:
            raise TypeError(problem)
        indexed = self._update.mask if mask is None else self._same_mask(params, mask)
        key = self._own_key(key)
        params = jax.tree.map(
            lambda a, x: jnp.array(x, copy=not donate) if is_array(a) else a,
            self._update.params,
            params,
        )
        return self._update.new_state(params, tuple(map(jnp.copy, indexed.indices)), key)

    def _own_key(self, key: Any) -> jax.Array | None:
        """A copy of the key to begin with."""
        compiled = self._update.key
        if compiled is None:
            if key is not None:
                raise TypeError("a key was given, but the step was compiled without one")
            return None
        key = compiled if key is None else key
        problem = difference(shapes_of(compiled), key, "key")
        if problem is not None:
            raise TypeError(
                f"{problem}; jax.random.key and jax.random.PRNGKey make different kinds"
            )
        return jnp.copy(key)

    def __call__(self, state: State, *batch: Any) -> tuple[State, Metrics]:
        """Runs one step.

        Raises:
            TypeError: if the state or the batch differs in structure, shape, dtype or constants
                from what was compiled.
        """
        arrays = self._update.arrays_of(batch)
        try:
            return self._run(self._compiled, state, arrays)
        except (TypeError, ValueError) as error:
            problem = self._update.difference(batch)
            if problem is None:
                raise
            raise TypeError(problem) from error

    def _run(self, compiled: Any, state: State, arrays: tuple[Any, ...]) -> tuple[State, Metrics]:
        """Runs an executable on a state."""
        layout = self._update.layout
        row = layout.row(state)
        if row is None:
            raise TypeError(self._update.state_difference(state))
        try:
            row, metrics = compiled(row, *arrays)
        except (TypeError, ValueError) as error:
            problem = self._update.state_difference(state)
            if problem is None:
                raise
            raise TypeError(problem) from error
        return layout.state(row), metrics

    def many(self, state: State, *batches: Any) -> tuple[State, Metrics]:
        """Runs several steps in one call: temporary memory is allocated once for all of them.

        A program of its own is compiled for each number of steps, once. The steps are those that
        as many calls would take.

        Args:
            state: the state so far; donated.
            *batches: each array of a batch with a new first axis, of steps.

        Returns:
            The state after the last step, and the metrics of all, along a new first axis.

        Raises:
            TypeError: if a batch differs from what was compiled.
            ValueError: if arrays differ in the number of steps, or there are none.
        """
        arrays = self._update.arrays_of(batches)
        sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(arrays)}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            raise ValueError(
                "each array of the batches needs a first axis of steps, as long as the others'; "
                f"found {sorted(sizes)}"
            )
        [(steps,)] = sizes
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x))
            if is_array(x) else x, batches,
        )  # fmt: skip
        problem = self._update.difference(one)
        if problem is not None:
            raise TypeError(problem)
        if steps not in self._many:
            fun = self._program.function(self._update)
            _, self._many[steps] = self._program.compiled(
                self._update,
                lambda state, *batches: jax.lax.scan(lambda s, b: fun(s, *b), state, batches),
                jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct((steps, *x.shape), x.dtype),
                    self._update.arrays_of(self._update.batch),
                ),
            )
        return self._run(self._many[steps], state, arrays)

    def measure(
        self, state: State, *batch: Any, steps: int = 20, limit: float = math.inf
    ) -> Measurement:
        """Times steps on a copy of a state; from then on the report shows it too.

        Args:
            state: where to begin; it stays as it is.
            *batch: the same for all steps.
            steps: how many to time, after two to warm up.
            limit: seconds after which no more steps are begun, if there were three.

        >>> import pockjax as pj
        >>> step = pj.compile(lambda w: jnp.sum(w**2), True, optax.sgd(0.1), jnp.ones(3))
        >>> step.measure(step.init(jnp.ones(3)), steps=5).steps
        5
        """
        state = jax.tree.map(jnp.copy, state)

        def run() -> Any:
            nonlocal state
            state, metrics = self(state, *batch)
            return state.step, metrics  # the whole state would be built to be waited for

        temp = self._costs[self._chosen].temp_bytes
        self._measured = measured(run, steps, temp, limit)
        return self._measured

    def reselect(self, state: State, mask: PyTree) -> State:
        """Trains other positions from here on, without compiling again.

        Args:
            state: the state so far.
            mask: the mask compiled with, with other values in its traced indices.

        Returns:
            A state with the new indices. The optimizer starts afresh: its moments belong to the
            positions trained before.

        Raises:
            MaskError: if the mask differs in anything but the values of its traced indices.
        """
        indexed = self._same_mask(state.params, mask)
        packed = pack(state.params, mask)
        indices = tuple(map(jnp.copy, indexed.indices))
        state = state.replace(opt_state=self._update.tx.init(packed), indices=indices)
        return self._update.placed(state)

    def _same_mask(self, params: PyTree, mask: PyTree) -> IndexedMask:
        resolve(params, mask)
        indexed = IndexedMask.of(mask)
        if not indexed.matches(self._update.mask):
            raise MaskError(
                "the mask differs from the one compiled in more than the values of its traced "
                "indices (jax.Array); compile another step for it"
            )
        return indexed

    @property
    def report(self) -> Report:
        """What the step costs, predicted and compiled, and what was left out and why."""
        return replace(self._report, measured=self._measured, expected=self.predicted)

    @cached_property
    def _report(self) -> Report:
        return make_report(
            self._update,
            self._costs,
            self._chosen,
            self._rewrites,
            self._program,
        )

    @property
    def remat(self) -> Plan:
        """The spans of equations of the loss that the backward pass computes again."""
        return self._update.plan

    @cached_property
    def mask_text(self) -> str:
        """The mask as text, as schemes are written; index arrays of the state by their length."""
        mask = self._update.mask
        lengths = [jnp.arange(len(x), dtype=x.dtype) for x in mask.indices]
        return str(Scheme.from_mask(self._update.params, mask.tree(lengths)))

    @property
    def compiled(self) -> Any:
        """The executable, a `jax.stages.Compiled` of the state's arrays in a row and the batch."""
        return self._compiled
