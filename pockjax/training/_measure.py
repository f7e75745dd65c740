"""What a step takes where it runs: time, page faults, temporary memory."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Measurement:
    """Time and page faults of a step.

    Attributes:
        steps: how many were timed.
        seconds: median of a step.
        low: a quarter of the steps took less, seconds.
        high: a quarter of the steps took more, seconds.
        faults: pages that the system had to hand out in a step, on average; None where the system
            does not count them.
        temp_bytes: what XLA allocates for each step.
    """

    steps: int
    seconds: float
    low: float
    high: float
    faults: float | None
    temp_bytes: int

    def __str__(self) -> str:
        """One line."""
        faults = "" if self.faults is None else f", {self.faults:.0f} page faults"
        return (
            f"{1e3 * self.seconds:.3g} ms a step (middle half {1e3 * self.low:.3g} to "
            f"{1e3 * self.high:.3g}, {self.steps} steps){faults}, temporary "
            f"{self.temp_bytes / 2**20:.4g} MiB"
        )


def measured(
    run: Callable[[], Any], steps: int, temp_bytes: int, limit: float = math.inf
) -> Measurement:
    """Times a step.

    Args:
        run: takes one step and returns what has to be waited for.
        steps: how many to time, after two that are not.
        temp_bytes: what is known of its memory.
        limit: seconds after which no more steps are begun, if there were three.
    """
    if steps < 1:
        raise ValueError(f"at least one step is timed, not {steps}")
    for _ in range(2):
        jax.block_until_ready(run())
    seconds, before = [], _faults()
    for _ in range(steps):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begun)
        if len(seconds) >= 3 and sum(seconds) > limit:
            break
    after = _faults()
    low, median, high = (float(q) for q in np.percentile(seconds, [25, 50, 75]))
    faults = None if before is None or after is None else (after - before) / len(seconds)
    return Measurement(len(seconds), median, low, high, faults, temp_bytes)


def _faults() -> int | None:
    """Minor page faults of this process so far."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
