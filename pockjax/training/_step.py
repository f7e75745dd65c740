"""The compiled training step: built once from a function and a mask, run many times."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from pockjax.autodiff import IndexedMask
from pockjax.costs import CompiledCost
from pockjax.masks import MaskError, pack, resolve
from pockjax.training._report import Report, make_report
from pockjax.training._state import Metrics, State
from pockjax.training._update import Update, check_batch, difference, shapes_of

PyTree = Any
Residuals = Literal["auto", "kept", "xla"]


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
) -> "Step":
    """Compiles a training step that computes, stores and updates only what a mask names.

    Args:
        fun: ``fun(params, *batch)``, or ``fun(params, *batch, key)`` if a key is given: the loss, a
            real scalar, or with ``has_aux`` a pair of the loss and any pytree of arrays.
        mask: what to train. Indices given as `jax.Array` become part of the state and can be
            exchanged later, see `Step.reselect`.
        tx: any optax transformation. It sees the trained parts alone, so its state, weight decay
            and gradient norms are theirs.
        params: the parameters, or their shapes (`jax.ShapeDtypeStruct`).
        *batch: an example of the other arguments, arrays or shapes.
        has_aux: whether ``fun`` returns auxiliary outputs (metrics, batch statistics).
        accumulate: number of microbatches that the first axis of every batch array is cut into;
            their gradients are averaged, and memory is that of one of them.
        key: a random key. Each step hands ``fun`` a key of its own, derived from this one.
        merge_aux: ``merge_aux(params, aux) -> params``, called after each update: writes what the
            forward pass computed (batch statistics) into frozen parameters.
        residuals: ``"kept"`` fixes what the backward pass keeps to the fewest bytes, which halves
            the memory of many networks; ``"xla"`` leaves the choice to XLA; ``"auto"`` compiles
            both and takes the one that needs less memory.

    Returns:
        The step. ``fun`` was traced once, and is never called again.

    Raises:
        MaskError: if the mask does not fit ``params``.
        TypeError: if ``fun`` does not return one real scalar.
        ValueError: if ``accumulate`` does not divide the batch.

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
    if residuals not in ("auto", "kept", "xla"):
        raise ValueError(f"residuals must be 'auto', 'kept' or 'xla', got {residuals!r}")
    resolve(params, mask)
    check_batch(batch, accumulate)
    update = Update(
        fun, IndexedMask.of(mask), tx, shapes_of(params), shapes_of(batch), has_aux, accumulate,
        key, merge_aux,
    )  # fmt: skip
    variants = {"auto": ("kept", "xla")}.get(residuals, (residuals,))
    compiled = {name: _compiled(update, name == "kept") for name in variants}
    costs = {name: CompiledCost.of(executable) for name, executable in compiled.items()}
    best = min(costs, key=lambda name: costs[name].total_bytes)
    return Step(compiled[best], update, costs, best)


def _compiled(update: Update, kept: bool) -> Any:
    step = jax.jit(update.step(kept), donate_argnums=0)
    return step.lower(update.example_state(), *update.batch).compile()


class Step:
    """A compiled training step, made by `compile`.

    ``state, metrics = step(state, *batch)`` runs it. The state is donated: use the one returned.
    """

    def __init__(self, compiled: Any, update: Update, costs: dict[str, CompiledCost], chosen: str):
        """Wraps an executable; use `compile`."""
        self._compiled, self._update = compiled, update
        self._costs, self._chosen = costs, chosen

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
        problem = difference(self._update.params, params, "parameter")
        if problem is not None:
            raise TypeError(problem)
        indexed = self._update.mask if mask is None else self._same_mask(params, mask)
        if self._update.key is not None:
            key = jnp.copy(self._update.key if key is None else key)
        elif key is not None:
            raise TypeError("a key was given, but the step was compiled without one")
        if not donate:
            params = jax.tree.map(lambda x: jnp.copy(x) if hasattr(x, "dtype") else x, params)
        return self._update.new_state(params, tuple(map(jnp.copy, indexed.indices)), key)

    def __call__(self, state: State, *batch: Any) -> tuple[State, Metrics]:
        """Runs one step.

        Raises:
            TypeError: if the batch differs in structure, shape or dtype from what was compiled.
        """
        try:
            return self._compiled(state, *batch)
        except (TypeError, ValueError) as error:
            problem = difference(self._update.batch, batch, "batch argument")
            if problem is None:
                raise
            raise TypeError(problem) from error

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
        return state.replace(opt_state=self._update.tx.init(packed), indices=indices)

    def _same_mask(self, params: PyTree, mask: PyTree) -> IndexedMask:
        resolve(params, mask)
        indexed = IndexedMask.of(mask)
        if not indexed.matches(self._update.mask):
            raise MaskError(
                "the mask differs from the one compiled in more than the values of its traced "
                "indices (jax.Array); compile another step for it"
            )
        return indexed

    @cached_property
    def report(self) -> Report:
        """What the step costs, predicted and compiled, and what was left out and why."""
        return make_report(self._update, self._costs, self._chosen)

    @property
    def compiled(self) -> Any:
        """The executable, a `jax.stages.Compiled`."""
        return self._compiled
