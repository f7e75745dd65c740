"""How an update becomes an executable: variants, compiler options, the library for products."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pockjax._compat import Jaxpr
from pockjax.autodiff import IndexedMask, Plan, inlined, is_array
from pockjax.costs import best_order, count_flops
from pockjax.masks import resolve
from pockjax.prefix import Features, Front, split
from pockjax.rewrites import BACKENDS, DEFAULT_LIBRARY, LIBRARIES, Rewriter, fastest
from pockjax.training._state import Metrics, State
from pockjax.training._trees import check_batch, made_up, shapes_of
from pockjax.training._update import Update

PyTree = Any
_log = logging.getLogger("pockjax")
Residuals = Literal["auto", "kept", "xla"]
Rewrites = Literal["measured", "guessed", "none"]
Updates = Literal["early", "late"]

# Operations; below, a step is quick with any library, and above, its products are so large that
# XLA's choice is the best.
_WORTH_TIMING = range(200_000_000, 20_000_000_000)
_MEMORY_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@dataclass(frozen=True)
class Options:
    """What `compile` is told beside a function, a mask, an optimizer, and shapes; see there."""

    has_aux: bool = False
    accumulate: int = 1
    key: jax.Array | None = None
    merge_aux: Callable[[PyTree, PyTree], PyTree] | None = None
    residuals: Residuals = "kept"
    rewrites: Rewrites = "measured"
    updates: Updates = "early"
    frozen_dtype: Any = None
    front_pieces: int = 2

    def __post_init__(self) -> None:
        """Raises ValueError for what makes no sense."""
        for name, kind in (("residuals", Residuals), ("rewrites", Rewrites), ("updates", Updates)):
            allowed = get_args(kind)
            if getattr(self, name) not in allowed:
                named = ", ".join(map(repr, allowed))
                raise ValueError(f"{name} must be one of {named}, got {getattr(self, name)!r}")
        if self.frozen_dtype is not None and not jnp.issubdtype(self.frozen_dtype, jnp.floating):
            raise ValueError(
                f"frozen_dtype must be a floating point dtype, got {self.frozen_dtype!r}"
            )
        if not isinstance(self.front_pieces, int) or self.front_pieces < 1:
            raise ValueError(f"front_pieces must be a positive integer, got {self.front_pieces!r}")
        if self.merge_aux is not None and not self.has_aux:
            raise ValueError("merge_aux needs auxiliary outputs: a function with has_aux=True")

    def update(
        self,
        fun: Callable[..., Any],
        mask: PyTree,
        tx: optax.GradientTransformation,
        params: PyTree,
        batch: tuple[Any, ...],
        remat: Plan | bool = False,
    ) -> Update:
        """The update of a mask.

        Raises:
            MaskError: if the mask does not fit ``params``.
            ValueError: if ``accumulate`` does not divide the batch.
        """
        if remat and self.residuals != "kept":
            raise ValueError(
                f"remat needs residuals='kept', got {self.residuals!r}: else XLA may undo it"
            )
        resolve(params, mask)
        batch = shapes_of(batch, numbers=True)
        check_batch(batch, self.accumulate)
        dtype = None if self.frozen_dtype is None else jnp.dtype(self.frozen_dtype)
        return Update(
            fun, IndexedMask.of(mask), tx, shapes_of(params), batch, self.has_aux, self.accumulate,
            self.key, self.merge_aux, dtype, remat,
        )  # fmt: skip

    def rewriter(self, update: Update) -> Rewriter | None:
        """What finds faster forms for a step; None if all stays as it is."""
        if self.rewrites == "none" or jax.default_backend() not in BACKENDS:
            return None
        if update.is_spread:
            _log.warning(
                "the arrays lie on a mesh, so all operations stay as they are, which on a CPU can "
                "take many times as long; put them on one device, or on a mesh of one whose "
                "axis_types are Auto"
            )
            return None
        return Rewriter(measure=self.rewrites == "measured")


def behind_the_front(
    fun: Callable[..., Any], mask: PyTree, params: PyTree, batch: tuple[Any, ...], options: Options
) -> tuple[Front, Callable[..., Any], tuple[Features]]:
    """The frozen front of a loss, the rest, and the shapes of what passes from one to the other.

    Raises:
        ValueError: for options that a step without its front has not, or if nothing is frozen
            before the first trained layer.
    """
    refused = {
        "accumulate": options.accumulate > 1, "key": options.key is not None,
        "merge_aux": options.merge_aux is not None,  # may write what the front has read
        "frozen_dtype": options.frozen_dtype is not None,
    }  # fmt: skip
    if any(refused.values()):
        names = " and ".join(name for name, given in refused.items() if given)
        raise ValueError(f"a step without its frozen front cannot have {names}")
    front, rest = split(fun, mask)
    plan = front.plan(params, batch)
    if not plan.features:
        raise ValueError("nothing is frozen before the first trained layer; leave out prefix")
    arrays = plan.args.arrays_of(batch)
    passed = tuple(arrays[i] for i in plan.passed)
    return front, rest, (Features(tuple(plan.features), passed, plan),)


def variants(residuals: Residuals) -> tuple[str, ...]:
    """What is compiled, to take the one that needs the least memory."""
    return ("kept", "xla") if residuals == "auto" else (residuals,)


@dataclass(frozen=True)
class Program:
    """How an update is compiled.

    Attributes:
        kept: whether what the backward pass keeps is fixed.
        early: whether parameters are written within the backward pass.
        rewriter: finds faster forms; None to leave all as it is.
        depth_first: whether operations are run depth first, instead of in XLA's usual order; None
            to find out which takes less memory, on a CPU (see `pockjax.costs.best_order`).
        library: what computes matrix products; None to find out which is the fastest here.
    """

    kept: bool
    early: bool
    rewriter: Rewriter | None
    depth_first: bool | None = None
    library: str | None = None

    def function(self, update: Update) -> Callable[..., tuple[State, Metrics]]:
        """One step."""
        return update.step(self.kept, self.early)

    def compiled(
        self, update: Update, fun: Callable[..., Any] | None = None, batch: Any = None
    ) -> tuple["Program", Any]:
        """The executable of one step, or of another function, on the state's arrays in a row.

        Returns:
            This, with what was found out, and the executable.
        """
        # A state goes in where it came out, so the one must be said to be the other.
        shardings = None
        if update.shardings is not None:
            shardings = (jax.tree.leaves(update.shardings), None)
        fun = self.function(update) if fun is None else fun
        batch = update.arrays_of(update.batch) if batch is None else batch
        if self.rewriter is not None:
            fun = partial(self.rewriter.run, fun)
        step = jax.jit(update.layout.on_rows(fun), donate_argnums=0, out_shardings=shardings)
        traced = step.trace(jax.tree.leaves(update.example_state), *batch)
        depth_first = self.depth_first
        if depth_first is None:
            depth_first = jax.default_backend() == "cpu" and _is_better_depth_first(traced.jaxpr)
        lowered = traced.lower()
        options = _MEMORY_ORDER if depth_first else {}
        if self.library is not None or not self._is_timed(update):
            library = self.library or DEFAULT_LIBRARY
            executable = lowered.compile(compiler_options=LIBRARIES[library] | options or None)
        else:
            library, executable = fastest(
                lowered, lambda executable: _runs(executable, update, batch), options
            )
        return replace(self, depth_first=depth_first, library=library), executable

    def _is_timed(self, update: Update) -> bool:
        """Whether it is worth while to time the step with each library."""
        if self.rewriter is None or not self.rewriter.measure:
            return False
        arrays = jax.tree.leaves((update.example_state, update.batch))
        return count_flops(update.joint.jaxpr) in _WORTH_TIMING and all(
            isinstance(a.dtype, np.dtype) for a in arrays if is_array(a)
        )


def predicted[T](predict: Callable[[], T]) -> T | None:
    """What is predicted; None, with a warning, where that fails, as no compile need fail for it."""
    try:
        return predict()
    except Exception as error:
        _log.warning("the memory of a step could not be predicted: %r", error)
        return None


def _is_better_depth_first(jaxpr: Jaxpr) -> bool:
    found = predicted(lambda: best_order(inlined(jaxpr)))
    return found is not None and found[0]


def _runs(executable: Any, update: Update, batch: Any) -> Callable[[], Any]:
    """Runs a step on arrays that are made up."""
    state, arrays = made_up((jax.tree.leaves(update.example_state), batch))

    def run() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(executable(state, *arrays))

    return run
