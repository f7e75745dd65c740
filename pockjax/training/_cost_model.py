"""What masks cost, predicted from one trace of the loss."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax

from pockjax.autodiff import IndexedMask, Plan, inlined
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
from pockjax.masks import resolve
from pockjax.rewrites import Rewriter
from pockjax.training._forecast import Forecast, forecast
from pockjax.training._program import Options
from pockjax.training._step import Step
from pockjax.training._step import compile as compile_step
from pockjax.training._trees import made_up
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
        **options: Any,
    ):
        """Takes what `compile` takes, without the mask.

        Args:
            fun: the loss.
            tx: the optimizer.
            params: the parameters, or their shapes.
            *batch: an example of the other arguments, or their shapes.
            **options: of `compile`, but for ``remat``.

        Raises:
            ValueError: if an option makes no sense.

        >>> import jax.numpy as jnp
        >>> import pockjax as pj
        >>> params = {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}
        >>> loss = lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2)
        >>> costs = CostModel(loss, optax.adam(0.1), params, jnp.ones((8, 4)))
        >>> costs.predict({"w": False, "b": True}).gradient_bytes
        8
        """
        self._options = Options(**options)
        self._update = self._options.update(fun, False, tx, params, batch)
        self.probes: list[Probe] = []
        self._correction = np.array([1.0, 0.0])
        self._rates: Rates | None = None

    @cached_property
    def _rewriter(self) -> Rewriter | None:
        return self._options.rewriter(self._update)

    def _update_of(self, mask: PyTree, remat: Plan | bool = ()) -> Update:
        """The update of a mask; shares the trace of the loss."""
        resolve(self._update.params, mask)
        return self._update.changed(mask=IndexedMask.of(mask), remat=remat)

    def predict(self, mask: PyTree, remat: Plan | bool = ()) -> Prediction:
        """What training a mask is expected to cost.

        Args:
            mask: what to train, see `compile`.
            remat: what the backward pass computes again, see `compile`.

        Raises:
            MaskError: if the mask does not fit the parameters.
        """
        expected = self._forecast(self._update_of(mask, remat))
        update, jaxpr = expected.update, expected.jaxpr
        arguments = tree_bytes(jaxpr.in_avals)
        results = tree_bytes(jaxpr.out_avals) - tree_bytes(update.example_state)
        slope, offset = self._correction
        temp = max(int(slope * expected.temp_bytes + offset), 0)
        return Prediction(
            memory_bytes=arguments + results + temp,
            argument_bytes=arguments,
            temp_bytes=temp,
            residual_bytes=update.joint.residual_bytes,
            optimizer_bytes=tree_bytes(update.example_state.opt_state),
            gradient_bytes=update.joint.gradient_bytes,
            flops=count_flops(jaxpr),
            seconds=None if self._rates is None else self._rates.of(work_of(jaxpr)),
        )

    def compile(self, mask: PyTree, remat: Plan | bool = ()) -> Step:
        """The compiled step of a mask; its report has the prediction beside it.

        Args:
            mask: what to train, see `pockjax.compile`.
            remat: what the backward pass computes again, see `pockjax.compile`.

        Raises:
            MaskError: if the mask does not fit the parameters.
        """
        step = self._compiled(mask, remat)
        step.predicted = self.predict(mask, remat)
        return step

    def _compiled(self, mask: PyTree, remat: Plan | bool = ()) -> Step:
        u, options = self._update, vars(self._options)
        return compile_step(u.fun, mask, u.tx, u.params, *u.batch, remat=remat, **options)

    def best_plan(self, mask: PyTree) -> Plan:
        """The blocks to compute again so that a mask's backward pass keeps the fewest bytes."""
        return self._update_of(mask).traced.best_plan(mask)

    def calibrate(self, masks: Sequence[PyTree], repeats: int = 5) -> None:
        """Compiles and times a few masks, and corrects later predictions by what was off.

        Args:
            masks: three to five, from the cheapest to the dearest; more are better.
            repeats: how often each is run, in turn.

        Raises:
            ValueError: there are no masks.
        """
        if not masks:
            raise ValueError("there are no masks to compile and time")
        steps = [self._compiled(mask) for mask in masks]
        expected = [self._forecast(self._update_of(mask)) for mask in masks]
        for step, one, seconds in zip(steps, expected, _timed(steps, repeats), strict=True):
            cost = CompiledCost.of(step.compiled)
            self.probes.append(Probe(one.temp_bytes, cost, seconds, work_of(one.jaxpr)))
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

    def predict_each(
        self,
        masks: Sequence[PyTree],
        depths: Sequence[int],
        progress: Callable[[int], Any] = lambda done: None,
    ) -> list[Prediction]:
        """What training each of many small masks is expected to cost.

        At each depth the mask with the smallest gradient is predicted; what the others there cost
        beyond it is counted from their gradients alone, which takes a fraction of the time.

        Args:
            masks: each trains one unit.
            depths: of each, how far down the backward pass has to go; the input is 0.
            progress: called with the number of masks that are done.
        """
        members: dict[int, list[int]] = {}
        for i, depth in enumerate(depths):
            members.setdefault(depth, []).append(i)
        found: dict[int, Prediction] = {}
        for same in members.values():
            updates = {i: self._update_of(masks[i]) for i in same}
            first = min(same, key=lambda i: updates[i].joint.gradient_bytes)
            found[first] = self.predict(masks[first])
            for i in same:
                if i != first:
                    found[i] = self._beside(found[first], updates[first], updates[i])
                progress(len(found))
        return [found[i] for i in range(len(masks))]

    def separable(self, masks: Sequence[PyTree], depths: Sequence[int]) -> Separable:
        """The cost of units as sums, for a linear solver.

        Args:
            masks: each trains one unit and nothing else.
            depths: of each, how far down the backward pass has to go; the input is 0.
        """
        alone = self.predict_each(masks, depths)
        jaxpr = inlined(self._update.traced.jaxpr)
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

    def _beside(self, known: Prediction, its: Update, update: Update) -> Prediction:
        """The prediction of a mask whose backward pass goes as far down as that of another."""
        old, new = its.joint, update.joint
        residuals = new.residual_bytes - old.residual_bytes
        optimizer = tree_bytes(update.example_state.opt_state) - known.optimizer_bytes
        seconds = known.seconds
        if self._rates is not None and seconds is not None:
            work = work_of(inlined(new.jaxpr)) - work_of(inlined(old.jaxpr))
            seconds += self._update.accumulate * float(work @ self._rates.seconds)
        flops = self._update.accumulate * (count_flops(new.jaxpr) - count_flops(old.jaxpr))
        return replace(
            known,
            memory_bytes=known.memory_bytes + residuals + optimizer,
            argument_bytes=known.argument_bytes + optimizer,
            temp_bytes=known.temp_bytes + residuals,
            residual_bytes=known.residual_bytes + residuals,
            optimizer_bytes=known.optimizer_bytes + optimizer,
            gradient_bytes=new.gradient_bytes,
            flops=known.flops + flops,
            seconds=seconds,
        )

    def _forecast(self, update: Update) -> Forecast:
        return forecast(update, self._options, self._rewriter)


def _timed(steps: Sequence[Step], repeats: int) -> list[float]:
    """Median seconds of each step, run in turn so that all meet the same disturbances."""
    times: list[list[float]] = [[] for _ in steps]
    for i in range(repeats + 1):
        for step, found in zip(steps, times, strict=True):
            update = step._update
            batch = made_up(update.batch)
            state, _ = step(step.init(made_up(update.params), donate=True), *batch)
            jax.block_until_ready(state)  # the caches have this step's arrays now
            begun = time.perf_counter()
            jax.block_until_ready(step(state, *batch))
            if i:
                found.append(time.perf_counter() - begun)
    return [float(np.median(found)) for found in times]
