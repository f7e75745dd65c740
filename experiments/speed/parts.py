"""A step whose gradient is computed for a part of the batch on each core, in one process.

XLA's CPU client shares one pool of threads among all that it runs, and cuts each operation up for
them. Here each part of the batch has a client of its own, whose pool is one thread on one core; the
usual client applies the mean of the gradients. Clients are made by a function of jaxlib that is not
public, which is why this is an experiment: it shows what such a step would gain. Unlike a step of
`pockjax.compile`, it copies the trained parameters to each part and the gradients back, leaves the
library for products to XLA, and computes its frozen front in one piece.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxlib import xla_client

import pockjax as pj
from experiments.speed.worker import Made


def step_in_parts(
    loss: Any, params: Any, batch: Sequence[jax.Array], mask: Any, rate: float, weights_of: Any
) -> Made:
    """Plain gradient descent on the mean of the losses of the parts, one for each core.

    Raises:
        ValueError: if the batch has no such parts.
    """
    cores = sorted(os.sched_getaffinity(0))
    size, rest = divmod(len(batch[0]), len(cores))
    if rest:
        raise ValueError(f"a batch of {len(batch[0])} has no {len(cores)} equal parts")
    held, unravel = ravel_pytree(pj.pack(params, mask))

    def gradient(packed: jax.Array, params: Any, *batch: Any) -> jax.Array:
        """Loss and gradient in a row: one array to move, whatever the number of leaves."""
        params = pj.unpack(params, unravel(packed), mask)
        value, grads = pj.value_and_grad(loss, mask)(params, *batch)
        return jnp.append(ravel_pytree(grads)[0], value)

    def update(packed: jax.Array, results: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        mean = jnp.mean(jnp.stack(results), 0)
        return packed - rate * mean[:-1], mean[-1]

    [here, *_] = jax.devices()
    parts: list[tuple[Any, Any, Callable[..., jax.Array]]] = []
    for k, core in enumerate(cores):
        with _on_core(core):
            [device] = xla_client.make_cpu_client(num_devices=1, asynchronous=True).devices()
            rows = [x[k * size : (k + 1) * size] for x in batch]
            given = jax.device_put((held, params, *rows), device)
            with jax.default_device(device):  # forms are timed where they will run
                compiled = jax.jit(pj.rewrite(gradient)).lower(*given).compile()
        parts.append((device, given[1:], compiled))

    def gradients() -> list[jax.Array]:
        moved = [jax.device_put(held, device) for device, _, _ in parts]
        found = [run(x, *given) for x, (_, given, run) in zip(moved, parts, strict=True)]
        return jax.device_put(found, here)

    apply = jax.jit(update, donate_argnums=0).lower(held, gradients()).compile()

    def run() -> Any:
        nonlocal held
        held, value = apply(held, gradients())
        return jax.block_until_ready(value)

    about = {"version": f"jax {jax.__version__}"}
    return Made(run, lambda: weights_of(pj.unpack(params, unravel(held), mask)), about=about)


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    """Threads that begin in here run on one core; XLA's pools and loops are made for one."""
    before, known = os.sched_getaffinity(0), os.environ.get("NPROC")
    os.sched_setaffinity(0, {core})
    os.environ["NPROC"] = "1"
    try:
        yield
    finally:
        del os.environ["NPROC"]
        if known is not None:
            os.environ["NPROC"] = known
        os.sched_setaffinity(0, before)
