"""What masks cost, predicted from one trace of the loss."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pockjax._compat import Jaxpr
from pockjax.autodiff import IndexedMask, Plan, inlined, is_array
from pockjax.costs import (
    CompiledCost,
    Prediction,
    Rates,
    Separable,
    count_flops,
    predict_temp_bytes,
    tree_bytes,
    work_of,
)
from pockjax.masks import pack, resolve
from pockjax.rewrites import BACKENDS, Rewriter
from pockjax.training._step import Step, compile
from pockjax.training._trees import check_batch, shapes_of
from pockjax.training._update import Update

PyTree = Any


@dataclass(frozen=True)
class Probe:
    """One mask that was compiled and timed.

    Attributes:
        predicted: bytes of intermediate arrays as predicted, before any correction.
        compiled: what the executable takes.
        seconds: median time of a step.
        work: (classes,): the work of a step.
    """

    predicted: int
    compiled: CompiledCost
    seconds: float
    work: np.ndarray


class CostModel:
    """Predicts what training a mask costs, without compiling anything for it.

    The loss is traced once; each mask is differentiated, its convolutions take the forms that
    `compile` would choose, and the resulting jaxpr is measured.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        tx: optax.GradientTransformation,
        params: PyTree,
        *batch: Any,
        has_aux: bool = False,
        accumulate: int = 1,
        key: jax.Array | None = None,
        merge_aux: Callable[[PyTree, PyTree], PyTree] | None = None,
        residuals: str = "kept",
        rewrites: str = "measured",
    ):
        """Takes what `compile` takes, without the mask.

        >>> import jax.numpy as jnp
        >>> import pockjax as pj
        >>> params = {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}
        >>> loss = lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2)
        >>> costs = CostModel(loss, optax.adam(0.1), params, jnp.ones((8, 4)))
        >>> costs.predict({"w": False, "b": True}).gradient_bytes
        8
        """
        batch = shapes_of(batch, numbers=True)
        check_batch(batch, accumulate)
        nothing = IndexedMask.of(False)
        self._update = Update(
            fun, nothing, tx, shapes_of(params), batch, has_aux, accumulate, key, merge_aux
        )
        self._kept = residuals != "xla"
        self._rewrites = rewrites
        self._options: dict[str, Any] = {
            "has_aux": has_aux, "accumulate": accumulate, "key": key, "merge_aux": merge_aux,
            "residuals": residuals, "rewrites": rewrites,
        }  # fmt: skip
        self.probes: list[Probe] = []
        self._correction = np.array([1.0, 0.0])
        self._rates: Rates | None = None

    @cached_property
    def _rewriter(self) -> Rewriter | None:
        if self._rewrites == "none" or jax.default_backend() not in BACKENDS:
            return None
        return Rewriter(measure=self._rewrites == "measured")

    def _update_of(self, mask: PyTree, remat: Plan | bool = ()) -> Update:
        """The update of a mask; shares the trace of the loss."""
        resolve(self._update.params, mask)
        update = replace(self._update, mask=IndexedMask.of(mask), remat=remat)
        update.__dict__["primal"] = self._update.primal
        return update

    def predict(self, mask: PyTree, remat: Plan | bool = ()) -> Prediction:
        """What training a mask is expected to cost.

        Args:
            mask: what to train, see `compile`.
            remat: what the backward pass computes again, see `compile`.

        Raises:
            MaskError: if the mask does not fit the parameters.
        """
        update = self._update_of(mask, remat)
        jaxpr = self._jaxpr(update)
        joint, params = update.joint, update.primal.params
        passes, n_params = joint.passes, len(params.arrays)
        kept = passes.forward.out_avals[joint.n_forward_out :]
        held = [joint.inputs[i] for i in passes.kept_inputs if i >= n_params]
        packed = jax.eval_shape(lambda arrays: pack(params.tree(arrays), mask), params.arrays)
        arguments = tree_bytes(jaxpr.in_avals)
        results = tree_bytes(jaxpr.out_avals) - tree_bytes(update.example_state)
        slope, offset = self._correction
        temp = max(int(slope * predict_temp_bytes(jaxpr) + offset), 0)
        return Prediction(
            memory_bytes=arguments + results + temp,
            argument_bytes=arguments,
            temp_bytes=temp,
            residual_bytes=tree_bytes([*kept, *held]),
            optimizer_bytes=tree_bytes(update.example_state.opt_state),
            gradient_bytes=tree_bytes(packed),
            flops=count_flops(jaxpr),
            seconds=None if self._rates is None else self._rates.of(work_of(jaxpr)),
        )

    def best_plan(self, mask: PyTree) -> Plan:
        """The blocks to compute again so that a mask's backward pass keeps the fewest bytes."""
        return self._update.primal.best_plan(mask)

    def calibrate(self, masks: Sequence[PyTree], repeats: int = 5) -> None:
        """Compiles and times a few masks, and corrects later predictions by what was off.

        Args:
            masks: three to five, from the cheapest to the dearest; more are better.
            repeats: how often each is run, in turn.
        """
        update, options = self._update, self._options
        steps = [
            compile(update.fun, mask, update.tx, update.params, *update.batch, **options)
            for mask in masks
        ]
        traced = [self._jaxpr(self._update_of(mask)) for mask in masks]
        for step, jaxpr, seconds in zip(steps, traced, _timed(steps, repeats), strict=True):
            cost, predicted = CompiledCost.of(step.compiled), predict_temp_bytes(jaxpr)
            self.probes.append(Probe(predicted, cost, seconds, work_of(jaxpr)))
        self._correction = self.correction(
            np.array([float(p.predicted) for p in self.probes]),
            np.array([float(p.compiled.temp_bytes) for p in self.probes]),
        )
        self._rates = Rates.fitted([p.work for p in self.probes], [p.seconds for p in self.probes])

    @staticmethod
    def correction(predicted: np.ndarray, compiled: np.ndarray) -> np.ndarray:
        """Slope and offset that bring predictions nearest to what was compiled.

        Args:
            predicted: (probes,): bytes.
            compiled: (probes,): bytes.
        """
        ratio = float(np.exp(np.median(np.log(compiled / np.maximum(predicted, 1.0)))))
        if len(predicted) < 3 or np.ptp(predicted) < 0.2 * predicted.max():
            return np.array([ratio, 0.0])
        rows = np.column_stack([predicted, np.full(len(predicted), compiled.min())])
        rows = rows / compiled[:, None]
        # A little trust in the prediction keeps few probes from turning it round.
        pull = np.array([[0.1 * np.median(predicted / compiled), 0.0], [0.0, 0.1]])
        aim = np.array([0.1 * ratio * np.median(predicted / compiled), 0.0])
        found, *_ = np.linalg.lstsq(
            np.vstack([rows, pull]), np.concatenate([np.ones(len(compiled)), aim]), rcond=None
        )
        slope, offset = found[0], found[1] * compiled.min()
        return np.array([slope, offset]) if slope > 0 else np.array([ratio, 0.0])

    def separable(self, masks: Sequence[PyTree], depths: Sequence[int]) -> Separable:
        """The cost of units as sums, for a linear solver.

        Takes one prediction for each unit.

        Args:
            masks: each trains one unit and nothing else.
            depths: of each, how far down the backward pass has to go; the input is 0.
        """
        alone = [self.predict(mask) for mask in masks]
        jaxpr = inlined(self._update.primal.jaxpr)
        state = tree_bytes(self._update.params) + tree_bytes(self._update.batch)
        base = {
            "memory_bytes": float(state + predict_temp_bytes(jaxpr)),
            "flops": float(self._update.accumulate * count_flops(jaxpr)),
            "optimizer_bytes": 0.0,
        }
        if self._rates is not None:
            base["seconds"] = self._rates.of(work_of(jaxpr))
        base = {name: min(v, *(getattr(p, name) for p in alone)) for name, v in base.items()}
        return Separable.fitted(base, alone, depths)

    def _jaxpr(self, update: Update) -> Jaxpr:
        """The whole step, as it would be handed to XLA."""
        step = update.step(self._kept, early=True)
        jaxpr = jax.make_jaxpr(step)(update.example_state, *update.arrays_of(update.batch))
        if self._rewriter is not None:
            jaxpr = self._rewriter.rewritten(jaxpr)
        return inlined(jaxpr)


def _timed(steps: Sequence[Step], repeats: int) -> list[float]:
    """Median seconds of each step, run in turn so that all meet the same disturbances."""
    times: list[list[float]] = [[] for _ in steps]
    for i in range(repeats + 1):
        for step, found in zip(steps, times, strict=True):
            update = step._update
            batch = _filled(update.batch)
            state = jax.block_until_ready(step.init(_filled(update.params), donate=True))
            begun = time.perf_counter()
            jax.block_until_ready(step(state, *batch))
            if i:
                found.append(time.perf_counter() - begun)
    return [float(np.median(found)) for found in times]


def _filled(tree: PyTree) -> PyTree:
    """Arrays of small numbers, which no operation makes slower than others."""
    return jax.tree.map(
        lambda a: jnp.full(a.shape, 0.01).astype(a.dtype) if is_array(a) else a, tree
    )
