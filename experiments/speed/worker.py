"""What all workers do: build a step, say so, and answer what is asked on the standard input.

`start` runs a worker with ``NAME FOLDER ASKED``. Asked to "check", it takes one step at a very
large learning rate and writes its weights down: their change is the gradient of the very program
that is timed. Asked for "time", it takes as many steps as each line of its input says. Peers have
environments of their own, so this module imports NumPy alone.
"""

import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RATE = 1e-3
CHECK_RATE = 1e4
"""So large that what float32 rounds off the weights does not matter to their change."""
WARM_UP = 2
"""Steps at the beginning of a turn that are not timed: caches hold what the last peer needed."""
TURN = 30.0
"""Seconds after which a turn ends, however many steps were asked for."""


@dataclass(frozen=True)
class Made:
    """A step that is ready to be taken.

    Attributes:
        step: takes one and waits until it is done; returns the loss before it.
        weights: the trained weights as they now are, in PyTorch's names and layout.
        lazy: whether the first step compiles.
        about: what else is known.
    """

    step: Callable[[], Any]
    weights: Callable[[], Mapping[str, np.ndarray]] = dict
    lazy: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


def resident(which: str = "VmRSS") -> float:
    """Resident memory now, or its peak ("VmHWM"), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return 1024 * float(line.split()[1])
    raise ValueError(f"this system does not report {which}")


def settle() -> float:
    """Give back what building left behind, let the peak begin anew; resident memory, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def work(make: Callable[[str, Path, float], Callable[[], Made]]) -> None:
    """Build what the command line names, and serve it.

    Args:
        make: called with a peer's name, the problem's folder and a learning rate, loads weights and
            batch; what it returns builds the step, and may compile it.
    """
    name, folder, asked = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    build = make(name, folder, CHECK_RATE if asked == "check" else RATE)
    begun = time.perf_counter()
    made = build()
    resting = settle()
    loss = float(made.step())
    about = {"loss": loss, **made.about}
    if asked == "check":
        np.savez(folder / f"{name}.npz", **dict[str, Any](made.weights()))
        print(json.dumps(about), flush=True)
        return
    peak = resident("VmHWM")  # of building and of the first step
    about["build_seconds"] = time.perf_counter() - begun
    if made.lazy:
        resting = settle()
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        answer = _turn(made.step, int(line))
        answer["peak_above_ready"] = max(resident("VmHWM"), 0 if made.lazy else peak) - resting
        print(json.dumps(answer), flush=True)


def _turn(step: Callable[[], Any], count: int) -> dict[str, Any]:
    begun = time.perf_counter()
    for _ in range(WARM_UP):
        step()
        if time.perf_counter() - begun > TURN / 4:
            break
    seconds, faults = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    while len(seconds) < count and (not seconds or time.perf_counter() - begun < TURN):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"seconds": seconds, "faults": faults / len(seconds)}
