"""How far apart two cores are, which on a virtual machine changes from minute to minute.

Its host moves a core to another die or socket and back. What one core has written then reaches the
other far more slowly than through a cache that they share, and a step of many short parallel
operations takes much more time, while one of long products hardly changes: a ratio of two steps
says nothing unless both were taken with the cores in the same places.
"""

import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

_FAR = 1.5  # times the shortest way there and back
_WINDOW = 0.004  # seconds; the shortest of several counts, the others were disturbed
_WINDOWS = 8
_PATIENCE = 5.0  # seconds
_OTHER = """
import mmap, os, sys, time
parent, end = os.getppid(), time.monotonic() + 10
with open(sys.argv[1], "r+b") as file:
    word = mmap.mmap(file.fileno(), 1)
print(flush=True)
while os.getppid() == parent and time.monotonic() < end:
    for _ in range(10_000):
        if word[0]: word[0] = 0
"""


def there_and_back(cores: Sequence[int]) -> float:
    """Seconds until a word written by one process is answered by one on another core.

    Most of it is the interpreter's time; what the way between the cores adds is told by comparing.

    Args:
        cores: the two processors.

    Raises:
        RuntimeError: nothing answers.
    """
    own = os.sched_getaffinity(0)
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(1))
        file.flush()
        command = [sys.executable, "-S", "-c", _OTHER, file.name]
        other = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            os.sched_setaffinity(other.pid, [cores[1]])
            os.sched_setaffinity(0, [cores[0]])
            assert other.stdout is not None
            if not other.stdout.readline():
                raise RuntimeError("the process that answers from the other core has ended")
            with mmap.mmap(file.fileno(), 1) as word:
                return min(_round_trip(word) for _ in range(_WINDOWS))
        finally:
            other.kill()
            other.communicate()
            os.sched_setaffinity(0, own)


def _round_trip(word: mmap.mmap) -> float:
    begun, trips = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < _WINDOW:
        for _ in range(100):
            word[0] = 1
            while word[0]:
                if time.perf_counter() - begun > _PATIENCE:
                    raise RuntimeError("the process on the other core does not answer")
        trips += 100
    return spent / trips


def near(ways: Sequence[float]) -> list[bool]:
    """Which of several measured ways are about as short as the shortest.

    >>> near([1.7e-7, 2.1e-7, 3.3e-7, 1.6e-7])
    [True, True, False, True]
    """
    limit = _FAR * min(ways, default=0.0)
    return [way <= limit for way in ways]
