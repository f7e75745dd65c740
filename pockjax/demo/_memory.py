"""The peak of this process's memory while a block runs."""

import ctypes
import gc
import threading
from pathlib import Path
from typing import Self

from pockjax._extras import require

_SAMPLING_SECONDS = 0.002


class PeakMemory:
    """Measure how far the resident memory of this process rises inside a `with` block.

    On Linux the kernel keeps the peak and is told to start anew, which misses nothing and costs
    nothing. Elsewhere a thread samples it, and can miss a short peak.

    Attributes:
        baseline: Resident bytes on entry.
        peak: The most resident bytes seen inside the block; set on exit.

    >>> with PeakMemory() as memory:
    ...     block = bytearray(50_000_000)
    >>> memory.growth > 40_000_000
    True
    """

    baseline: int
    peak: int

    def __init__(self) -> None:
        """Measure nothing yet."""
        self._sampler: _Sampler | None = None

    @property
    def growth(self) -> int:
        """Bytes from the baseline to the peak."""
        return self.peak - self.baseline

    def __enter__(self) -> Self:
        """Give freed memory back to the system, so that it cannot be used unseen; then start."""
        gc.collect()
        _return_freed_memory()
        if not _restart_kernel_peak():
            self._sampler = _Sampler()
            self._sampler.start()
            self.baseline = self._sampler.peak
        else:
            self.baseline = _kernel_peak()
        return self

    def __exit__(self, *_: object) -> None:
        """Read the peak."""
        self.peak = _kernel_peak() if self._sampler is None else self._sampler.stop()


def _return_freed_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # not glibc


def _restart_kernel_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _kernel_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = require("psutil", "cli").Process()
        self._done = threading.Event()
        self.peak = self._resident()

    def _resident(self) -> int:
        return self._process.memory_info().rss

    def run(self) -> None:
        while not self._done.wait(_SAMPLING_SECONDS):
            self.peak = max(self.peak, self._resident())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self.peak, self._resident())
