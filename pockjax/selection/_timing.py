"""How long a compiled step takes."""

import time
from typing import Any

import jax
import numpy as np

from pockjax.training import Step

_WARM_UP = 2


def step_seconds(
    step: Step, params: Any, batch: tuple[Any, ...], *, steps: int = 15, seconds: float = 20.0
) -> float:
    """The median time of a step, after some to warm up.

    Args:
        step: the step.
        params: arrays to begin with; copied.
        batch: arrays of the batch.
        steps: number of steps to time, at least 3.
        seconds: after which no more steps are begun.

    Raises:
        ValueError: params or batch are shapes alone.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((params, batch))):
        raise ValueError("a budget of latency needs arrays to time steps with, not their shapes")
    state, taken = step.init(params), []
    begin = time.perf_counter()
    for number in range(_WARM_UP + steps):
        start = time.perf_counter()
        state, metrics = step(state, *batch)
        jax.block_until_ready((state, metrics))
        if number >= _WARM_UP:
            taken.append(time.perf_counter() - start)
        if len(taken) >= 3 and time.perf_counter() - begin > seconds:
            break
    return float(np.median(taken))
