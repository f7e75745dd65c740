"""The work of a child process: one training, or the timing of both steps."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import pockjax as pj
from pockjax.costs import tree_bytes
from pockjax.data import Encoded, evaluation_batches, training_batches
from pockjax.demo._config import Job
from pockjax.demo._memory import PeakMemory
from pockjax.demo._results import TimingResult, TrainingResult
from pockjax.masks import describe
from pockjax.models import load_bert

_AVERAGED_STEPS = 10


@dataclass(frozen=True)
class Stage:
    """The child begins something that takes a while."""

    name: str


@dataclass(frozen=True)
class Progressed:
    """The child finished a step; `loss` is the training loss before its update."""

    steps: int
    loss: float | None = None


@dataclass(frozen=True)
class Failed:
    """The child gave up."""

    message: str
    out_of_memory: bool


Event = Stage | Progressed | Failed | TrainingResult | TimingResult


def work(job: Job, events: Connection, log: Path) -> None:
    """Do a job, sending events and last a result or `Failed`; what libraries print goes to a log.

    Made for `multiprocessing.Process`. Whoever starts it also ends it: Ctrl-C is not for the child.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    try:
        events.send(
            _compare(job, events.send) if job.mode == "compare" else _train(job, events.send)
        )
    except BrokenPipeError:
        pass  # nobody is left to tell
    except Exception as error:
        traceback.print_exc()
        out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        events.send(Failed(f"{type(error).__name__}: {error}", out_of_memory))


@dataclass(frozen=True)
class _Task:
    """The fine-tuning, up to what is trained."""

    params: Any
    loss: Callable[..., jax.Array]
    predict: Callable[..., jax.Array]
    optimizer: optax.GradientTransformation


def _task(job: Job) -> _Task:
    config = job.config
    model = load_bert(job.weights, classes=len(job.classes), rngs=nnx.Rngs(config.seed))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def predict(params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, rest)(tokens, valid)

    def loss(params: Any, tokens: jax.Array, valid: jax.Array, labels: jax.Array) -> jax.Array:
        logits = predict(params, tokens, valid)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=max(1, config.steps // 10),
        decay_steps=max(2, config.steps),
    )
    return _Task(params, loss, predict, optax.adam(schedule))


def _mask(job: Job, params: Any, mode: str) -> Any:
    return pj.mask(params, True if mode == "full" else job.scheme)


def _train(job: Job, send: Callable[[Event], None]) -> TrainingResult:
    config = job.config
    send(Stage("loading"))
    task = _task(job)
    train, test = _load(job.train), _load(job.test)
    batches = training_batches(train, size=config.batch, seed=config.seed)
    params, predict = task.params, task.predict
    mask = _mask(job, params, job.mode)
    parameters, parameter_bytes = describe(params, mask), tree_bytes(params)

    send(Stage("compiling"))
    started = time.perf_counter()
    arguments = _arguments(next(batches))
    step = pj.compile(task.loss, mask, task.optimizer, params, *arguments)
    compile_seconds = time.perf_counter() - started
    # Once on a copy that is thrown away: what the first step loads for good is not training's.
    jax.block_until_ready(step(step.init(params), *arguments)[1].loss)

    send(Stage("training"))
    seconds: list[float] = []
    with PeakMemory() as memory:
        # The only parameters from here on, as in any training.
        state = step.init(params, donate=True)
        del task, params
        last = time.perf_counter()

        def progressed(done: int, metrics: pj.Metrics) -> None:
            nonlocal last
            now = time.perf_counter()
            seconds.append(now - last)
            send(Progressed(done, float(metrics.loss)))
            last = now

        state, losses = pj.fit(
            step, state, batches, steps=config.steps, arguments=_arguments,
            on_step=progressed, progress=False,
        )  # fmt: skip

    send(Stage("evaluating"))
    report = step.report
    return TrainingResult(
        accuracy=_accuracy(predict, state.params, test, config.batch),
        first_loss=float(losses[0]),
        last_loss=float(np.mean(losses[-_AVERAGED_STEPS:])),
        step_seconds=float(np.median(seconds)),
        compile_seconds=compile_seconds,
        parameter_bytes=parameter_bytes,
        optimizer_bytes=int(report.optimizer_bytes),
        compiled_bytes=int(report.compiled.total_bytes),
        residual_bytes=int(report.residual_bytes),
        measured_bytes=memory.growth,
        flops=float(report.flops),
        parameters=parameters,
    )


def _compare(job: Job, send: Callable[[Event], None]) -> TimingResult:
    config = job.config
    send(Stage("compiling both"))
    task = _task(job)
    batches = training_batches(_load(job.train), size=config.batch, seed=config.seed)
    arguments = _arguments(next(batches))
    modes = ("full", "sparse")
    steps, states = {}, {}
    for mode in modes:
        mask = _mask(job, task.params, mode)
        steps[mode] = pj.compile(task.loss, mask, task.optimizer, task.params, *arguments)
        states[mode] = steps[mode].init(task.params)

    send(Stage("timing in turn"))
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for alternation in range(config.alternations + 1):
        # Each goes first as often as the other.
        for mode in modes if alternation % 2 else reversed(modes):
            started = time.perf_counter()
            states[mode], metrics = steps[mode](states[mode], *arguments)
            jax.block_until_ready((states[mode].params, metrics.loss))
            seconds[mode].append(time.perf_counter() - started)
        if alternation:  # the first warms up
            send(Progressed(alternation))
    return TimingResult(tuple(seconds["full"][1:]), tuple(seconds["sparse"][1:]))


def _accuracy(predict: Callable[..., jax.Array], params: Any, test: Encoded, size: int) -> float:
    @jax.jit
    def hits(params: Any, tokens: jax.Array, valid: jax.Array, labels: jax.Array) -> jax.Array:
        return predict(params, tokens, valid).argmax(axis=-1) == labels

    right = sum(
        int(hits(params, *_arguments(batch))[:count].sum())
        for batch, count in evaluation_batches(test, size=size)
    )
    return right / len(test)


def _arguments(batch: Encoded) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.asarray(batch.tokens), jnp.asarray(batch.valid), jnp.asarray(batch.labels)


def _load(file: Path) -> Encoded:
    with np.load(file, allow_pickle=False) as arrays:
        return Encoded(arrays["tokens"], arrays["valid"], arrays["labels"])
