"""A training step of JAX, alone or through pockjax, in a process of its own."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import pockjax as pj
from experiments.speed.parts import step_in_parts
from experiments.speed.problem import Problem, as_torch, entries, read
from experiments.speed.worker import Made, work
from pockjax.costs import CompiledCost, flops_of

Weights = Callable[[], dict[str, np.ndarray]]


def make(name: str, folder: Path, rate: float) -> Callable[[], Made]:
    """Load the problem; what is returned compiles what `name` says."""
    problem = Problem(**json.loads((folder / "question.json").read_text()))
    loss, params, batch = read(problem, folder)
    chosen = entries(problem, params)
    everything = name.endswith("-full")
    trained = [everything or entry is not False for entry in chosen]
    mask = True if everything else pj.mask(params, problem.rules)

    def weights_of(params: Any) -> dict[str, np.ndarray]:
        return as_torch(problem, params, trained)

    def build() -> Made:
        match name:
            case "jax-full" | "jax-leaves":
                return _plain(loss, params, batch, trained, rate, weights_of)
            case "jax-forward" | "pockjax-forward":
                fun = loss if name.startswith("jax") else pj.rewrite(loss)
                return _forward(fun, params, batch, flops_of(loss, params, *batch))
            case "pockjax" | "pockjax-full":
                return _sparse(loss, params, batch, mask, rate, weights_of)
            case "pockjax-unrewritten":
                return _sparse(loss, params, batch, mask, rate, weights_of, "none")
            case "pockjax-cached":
                prefix, suffix = pj.split(loss, mask)
                features = jax.block_until_ready(jax.jit(prefix)(params, *batch))
                return _sparse(suffix, params, (features,), mask, rate, weights_of)
            case "pockjax-parts":
                return step_in_parts(loss, params, batch, mask, rate, weights_of)
        raise ValueError(f"no peer is named {name!r}")

    return build


def _plain(
    loss: Any, params: Any, batch: Any, trained: Sequence[bool], rate: float, weights_of: Any
) -> Made:
    """JAX's own gradient of the trained leaves, and plain gradient descent on them."""
    leaves, treedef = jax.tree.flatten(params)
    ours = [x for x, yes in zip(leaves, trained, strict=True) if yes]
    frozen = [x for x, yes in zip(leaves, trained, strict=True) if not yes]

    def merged(ours: Any, frozen: Any) -> Any:
        one, other = iter(ours), iter(frozen)
        return jax.tree.unflatten(treedef, [next(one) if yes else next(other) for yes in trained])

    def step(ours: Any, frozen: Any, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(lambda ours: loss(merged(ours, frozen), *batch))(ours)
        return [x - rate * g for x, g in zip(ours, grads, strict=True)], value

    compiled = jax.jit(step, donate_argnums=0).lower(ours, frozen, *batch).compile()
    held = [jax.numpy.copy(x) for x in ours]

    def run() -> Any:
        nonlocal held
        held, value = compiled(held, frozen, *batch)
        return jax.block_until_ready(value)

    return Made(run, lambda: weights_of(merged(held, frozen)), about=_about(compiled))


def _sparse(
    loss: Any,
    params: Any,
    batch: Any,
    mask: Any,
    rate: float,
    weights_of: Any,
    rewrites: Any = "measured",
) -> Made:
    """The compiled step of a mask."""
    step = pj.compile(loss, mask, optax.sgd(rate), params, *batch, rewrites=rewrites)
    state = step.init(params)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, *batch)
        return jax.block_until_ready(metrics.loss)

    about = _about(step.compiled) | {
        "flops": step.report.predicted.flops,
        "full_flops": step.report.full.flops,
    }
    return Made(run, lambda: weights_of(state.params), about=about)


def _forward(fun: Any, params: Any, batch: Any, flops: int) -> Made:
    compiled = jax.jit(fun).lower(params, *batch).compile()
    about = _about(compiled) | {"flops": flops}
    return Made(lambda: jax.block_until_ready(compiled(params, *batch)), about=about)


def _about(compiled: Any) -> dict[str, Any]:
    cost = CompiledCost.of(compiled)
    return {
        "version": f"jax {jax.__version__}",
        "temp_bytes": cost.temp_bytes,
        "total_bytes": cost.total_bytes,
        "moved_bytes": compiled.cost_analysis()["bytes accessed"],
    }


if __name__ == "__main__":
    pj.keep_memory()
    work(make)
