"""Timing equal programs in turn, and remembering on disk what came out of it."""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pockjax._files import cache_folder, replacing

_FORMAT = 3  # to be raised when a form or its timing changes: earlier timings are forgotten
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 30
_HOPELESS = 3.0  # times slower than the best in each of two runs: not run again

_log = logging.getLogger("pockjax")


def in_turn(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The fastest run of each of several programs, in seconds.

    They are run in turn, so that whatever else the machine does slows all of them; the fastest run
    is the one that was disturbed the least.

    Args:
        runs: each runs one program and waits until it is done.
        seconds: about how long to go on, for each.
    """
    for run in runs.values():
        run()
    fastest = dict.fromkeys(runs, float("inf"))
    begun, racing = time.perf_counter(), list(runs)
    for done in range(_MOST_ROUNDS):
        for name in racing:
            start = time.perf_counter()
            runs[name]()
            fastest[name] = min(fastest[name], time.perf_counter() - start)
        if done:  # one run may have been disturbed
            limit = _HOPELESS * min(fastest.values())
            racing = [name for name in racing if fastest[name] <= limit]
        spent = time.perf_counter() - begun
        if done + 1 >= _LEAST_ROUNDS and spent > seconds * len(racing):
            break
    return fastest


def remembered(kind: str, what: Any) -> dict[str, Any] | None:
    """What was measured on this machine of something before; None if nothing that makes sense."""
    try:
        content = json.loads(_file(kind, what).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def remember(kind: str, what: Any, content: Mapping[str, Any]) -> None:
    """Keeps what was measured for other processes; only says so in the log if it cannot."""
    file = _file(kind, what)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as path:
            path.write_text(json.dumps(content))
    except OSError as error:
        _log.warning("timings cannot be kept in %s: %s", file.parent, error)


def _file(kind: str, what: Any) -> Path:
    name = _digest(json.dumps([_FORMAT, what], default=str))
    return cache_folder() / kind / _machine() / f"{name}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _machine() -> str:
    """What timings depend on, apart from the program."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = os.environ.get("XLA_FLAGS", "")
    return _digest(json.dumps([version("jaxlib"), _processor(), threads, flags]))


@lru_cache(maxsize=1)
def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"
