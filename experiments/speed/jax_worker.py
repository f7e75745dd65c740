"""A training step of JAX, alone or through pockjax, in a process of its own."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import pockjax as pj
from experiments.speed.problem import SCHEMES, Problem, names, read, to_torch
from experiments.speed.worker import memory, serve
from pockjax.costs import CompiledCost

RATE = 1e-3


def plain(loss: Any, params: Any, batch: Any, mask: Any) -> tuple[Any, Any, Any]:
    """JAX's own gradient of the trained leaves, and plain gradient descent on them."""
    entries = jax.tree.leaves(pj.mask(params, mask)) if mask is not True else None
    leaves, treedef = jax.tree.flatten(params)
    trained = [entries is None or entries[i] is True for i in range(len(leaves))]
    ours = [x for x, yes in zip(leaves, trained, strict=True) if yes]
    frozen = [x for x, yes in zip(leaves, trained, strict=True) if not yes]

    def step(ours: Any, frozen: Any, *batch: Any) -> Any:
        def of_trained(ours: Any) -> Any:
            one, other = iter(ours), iter(frozen)
            merged = [next(one) if yes else next(other) for yes in trained]
            return loss(jax.tree.unflatten(treedef, merged), *batch)

        value, grads = jax.value_and_grad(of_trained)(ours)
        return [x - RATE * g for x, g in zip(ours, grads, strict=True)], value

    compiled = jax.jit(step, donate_argnums=0).lower(ours, frozen, *batch).compile()
    held = [jax.numpy.copy(x) for x in ours]

    def run() -> Any:
        nonlocal held
        held, value = compiled(held, frozen, *batch)
        return jax.block_until_ready(value)

    return run, compiled, None


def through_pockjax(
    loss: Any, params: Any, batch: Any, mask: Any, rewrites: Any = "measured"
) -> tuple[Any, Any, Any]:
    """The compiled step of a mask."""
    mask = mask if mask is True else pj.mask(params, mask)
    step = pj.compile(loss, mask, optax.sgd(RATE), params, *batch, rewrites=rewrites)
    state = step.init(params)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, *batch)
        return jax.block_until_ready(metrics.loss)

    return run, step.compiled, step


def peer(name: str, problem: Problem, folder: Path) -> None:
    """Build what `name` says, and serve it."""
    loss, params, batch = read(problem, folder)
    scheme = SCHEMES / f"{problem.scheme}.yaml"
    loaded, begun = memory(), time.perf_counter()
    step = None
    match name:
        case "jax-full":
            run, compiled, step = plain(loss, params, batch, True)
        case "jax-leaves":
            run, compiled, step = plain(loss, params, batch, scheme)
        case "pockjax":
            run, compiled, step = through_pockjax(loss, params, batch, scheme)
        case "pockjax-full":
            run, compiled, step = through_pockjax(loss, params, batch, True)
        case "pockjax-unrewritten":
            run, compiled, step = through_pockjax(loss, params, batch, scheme, "none")
        case "pockjax-cached":
            mask = pj.mask(params, scheme)
            prefix, suffix = pj.split(loss, mask)
            features = jax.block_until_ready(jax.jit(prefix)(params, *batch))
            run, compiled, step = through_pockjax(suffix, params, (features,), scheme)
        case "pockjax-forward":
            forward = pj.rewrite(loss)
            compiled = jax.jit(forward).lower(params, *batch).compile()

            def run() -> Any:
                return jax.block_until_ready(compiled(params, *batch))
        case _:
            raise ValueError(f"no peer is named {name!r}")
    seconds = time.perf_counter() - begun
    first = float(run())
    cost = CompiledCost.of(compiled)
    about = {
        "loss": first,
        "compile_seconds": seconds,
        "loaded": loaded,
        "temp_bytes": cost.temp_bytes,
        "total_bytes": cost.total_bytes,
        "version": f"jax {jax.__version__}",
    }
    if step is not None:
        about["flops"] = step.report.predicted.flops
        about["full_flops"] = step.report.full.flops
    if name == "pockjax":
        packed = pj.grad(loss, pj.mask(params, scheme))(params, *batch)
        named = names(problem.model) or {}
        found = {}
        for key_path, variable in nnx.to_flat_state(packed):
            path = "/".join(map(str, key_path))
            if variable.get_value() is not None:
                found[named.get(path, path)] = to_torch(path, np.asarray(variable[...]))
        np.savez(folder / f"{name}.npz", **found)
    serve(run, about)


if __name__ == "__main__":
    peer(sys.argv[1], Problem(**json.loads(sys.argv[2])), Path(sys.argv[3]))
