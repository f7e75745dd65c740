"""A step whose gradient is computed for a part of the batch on each core, in one process.

XLA's CPU client shares one pool of threads among all that it runs, and wakes them for every
operation. Here each part of the batch has a client of its own, whose pool is one thread on one
core; the usual client applies the mean of the gradients. Clients are made by a function of jaxlib
that is not public, which is why this is an experiment: it shows what such a step would gain.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxlib import xla_client

import pockjax as pj
from experiments.speed.problem import Problem, as_torch, entries, read
from experiments.speed.worker import Made, work

FAR = 1e-3
"""The largest difference of a gradient from the whole batch's, over the largest number in it."""


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Threads that begin in here run on one core, and XLA's pools and loops are made for one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[core]})
    os.environ["NPROC"] = "1"
    try:
        yield
    finally:
        del os.environ["NPROC"]
        os.sched_setaffinity(0, before)


def make(name: str, folder: Path, rate: float) -> Callable[[], Made]:
    """Load the problem; `name` is the number of parts."""
    problem = Problem(**json.loads((folder / "question.json").read_text()))
    loss, params, batch = read(problem, folder)
    mask, parts = pj.mask(params, problem.rules), int(name)
    packed, unravel = ravel_pytree(pj.pack(params, mask))
    trained = [entry is not False for entry in entries(problem, params)]

    def gradient(packed: jax.Array, params: Any, *batch: Any) -> jax.Array:
        """Loss and gradient in a row: one array to move, whatever the number of leaves."""
        params = pj.unpack(params, unravel(packed), mask)
        loss_now, grads = pj.value_and_grad(loss, mask)(params, *batch)
        return jnp.append(ravel_pytree(grads)[0], loss_now)

    def update(packed: jax.Array, results: Any) -> tuple[jax.Array, jax.Array]:
        mean = jnp.mean(jnp.stack(results), 0)
        return packed - rate * mean[:-1], mean[-1]

    def build() -> Made:
        here, held = jax.local_devices()[0], packed
        whole = jax.jit(pj.rewrite(gradient))(held, params, *batch)
        lanes = []
        for k in range(parts):
            n = problem.batch // parts
            with on_core(k):
                [device] = xla_client.make_cpu_client(num_devices=1, asynchronous=True).devices()
                rows = [x[k * n : (k + 1) * n] for x in batch]
                given = jax.device_put((held, params, *rows), device)
                with jax.default_device(device):  # forms are timed where they will run
                    compiled = jax.jit(pj.rewrite(gradient)).lower(*given).compile()
            lanes.append((device, given[1:], compiled))

        def gradients() -> list[Any]:
            moved = [jax.device_put(held, device) for device, _, _ in lanes]
            found = [run(x, *given) for x, (_, given, run) in zip(moved, lanes, strict=True)]
            return jax.device_put(found, here)

        _same(whole, jnp.mean(jnp.stack(gradients()), 0))
        apply = jax.jit(update, donate_argnums=0).lower(held, gradients()).compile()
        held = jnp.copy(held)

        def step() -> Any:
            nonlocal held
            held, value = apply(held, gradients())
            return jax.block_until_ready(value)

        def weights() -> dict[str, np.ndarray]:
            return as_torch(problem, pj.unpack(params, unravel(held), mask), trained)

        return Made(step, weights)

    return build


def _same(expected: jax.Array, found: jax.Array) -> None:
    """Raises ValueError if gradients differ by more than rounding."""
    expected, found = expected[:-1], found[:-1]  # without the loss, which is far larger
    far = float(jnp.max(jnp.abs(expected - found)) / jnp.max(jnp.abs(expected)))
    if not far <= FAR:
        raise ValueError(f"the gradient of the parts differs from the whole's by {far:.1e}")


if __name__ == "__main__":
    pj.keep_memory()
    work(make)
