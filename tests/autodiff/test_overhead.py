"""Tracing with a mask takes no more than twice as long as `jax.grad`'s own trace."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pockjax as pj
from experiments.core import ratio_of_times
from experiments.networks import transformer, transformer_params

LAYERS, WIDTH, HEADS, FFN = 30, 16, 2, 32
LIMIT, ATTEMPTS = 2.0, 3

MASKS: dict[str, Any] = {
    "biases and channels": [(".*bias", "all"), (".*(query|up)/kernel", {"in": 0.25})],
    "output channels of every kernel": [(".*kernel", {"out": 0.25})],
}


@pytest.fixture(autouse=True)
def without_collections() -> Iterator[None]:
    """Collections of what other tests left behind would be timed with whoever they meet."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("rules", MASKS)
def test_trace(rules: str, scanned: bool, record_property: Callable[[str, object], None]) -> None:
    params = jax.eval_shape(
        lambda: transformer_params(jax.random.key(0), LAYERS, WIDTH, FFN, scanned=scanned)
    )
    x = jax.ShapeDtypeStruct((2, 8, WIDTH), jnp.float32)
    mask = pj.mask(params, MASKS[rules])

    def trace(grad: Callable[..., Any]) -> None:
        # A function of its own each time, so that no cache knows it.
        jax.jit(grad(lambda p, x: jnp.sum(transformer(p, x, HEADS)))).trace(params, x)

    medians = []
    for _ in range(ATTEMPTS):
        ratios = ratio_of_times(
            lambda: trace(lambda f: pj.grad(f, mask)), lambda: trace(jax.grad), repeats=3
        )
        medians.append(float(np.median(ratios)))
        if medians[-1] < LIMIT:
            break
    record_property("ratio", medians[-1])
    print(f"{rules}: {medians[-1]:.2f} times jax.grad's trace")
    assert min(medians) < LIMIT
