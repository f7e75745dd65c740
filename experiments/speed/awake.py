"""Keeping cores awake while programs are timed on them.

A virtual machine's host may take a core that sleeps for a moment away, or put two on one: steps of
many short parallel operations then take twice the time for seconds or minutes, those of long ones
little more, and a ratio says nothing. A core on which something always runs, be it of the lowest
priority, stays.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_BUSY = """
import os
parent = os.getppid()
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
print(flush=True)
while os.getppid() == parent: pass
"""


@contextmanager
def kept_awake(cores: int) -> Iterator[list[int]]:
    """Processes of the lowest priority, one on each of the first cores; their numbers."""
    busy: list[subprocess.Popen[bytes]] = []
    try:
        for core in sorted(os.sched_getaffinity(0))[:cores]:
            busy.append(subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE))
            os.sched_setaffinity(busy[-1].pid, [core])
        for process in busy:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("this system does not let a process wait for idle cores")
        yield [process.pid for process in busy]
    finally:
        for process in busy:
            process.kill()
            process.communicate()
