"""What all workers do: answer on the standard output what is asked on the standard input."""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_UP = 2
"""Steps at the beginning of a turn that are not timed: caches hold what the last peer needed."""


def memory() -> float:
    """Peak resident memory so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(step: Callable[[], Any], about: dict[str, Any]) -> None:
    """Say that all is ready, then time as many steps as each line asks for.

    Args:
        step: takes one step and waits until it is done.
        about: what is known of it before the first step is timed.
    """
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        for _ in range(WARM_UP):
            step()
        seconds, faults = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        given = {"seconds": seconds, "faults": faults / len(seconds), "memory": memory()}
        print(json.dumps(given), flush=True)
