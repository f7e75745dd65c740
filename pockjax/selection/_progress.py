"""How far a long piece of work is: a bar where `rich` is installed, lines where it is not."""

import sys
import time
from types import TracebackType
from typing import Any, Self

_SECONDS = 10.0  # between two lines


class Progress:
    """Shows on standard error how many of some pieces are done, and the time left."""

    def __init__(self, total: int, *, done: int = 0, shown: bool = True):
        """Nothing is shown before the block is entered.

        Args:
            total: number of pieces.
            done: how many of them were done before.
            shown: whether to show anything at all.
        """
        self._total, self._before, self._done, self._shown = total, done, done, shown
        self._bars: Any = None
        self._start = self._said = time.monotonic()

    def __enter__(self) -> Self:
        """Begin."""
        self._start = self._said = time.monotonic()
        if not self._shown:
            return self
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bars
        except ModuleNotFoundError:
            return self
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bars = Bars(*columns, *times, console=Console(stderr=True), transient=True)
        self._bars.start()
        self._bar = self._bars.add_task("sensitivity", total=self._total, completed=self._done)
        return self

    def advance(self) -> None:
        """One piece more."""
        self._done += 1
        if self._bars is not None:
            self._bars.update(self._bar, completed=self._done)
        elif self._shown and time.monotonic() - self._said >= _SECONDS:
            self._said = time.monotonic()
            print(self.line(self._said - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """How far it is after so many seconds, in words.

        >>> progress = Progress(10, done=2)
        >>> progress.advance(), progress.advance()
        (None, None)
        >>> progress.line(60.0)
        'sensitivity: 4 of 10 done, about 180 s left'
        """
        fresh = max(self._done - self._before, 1)
        left = seconds / fresh * (self._total - self._done)
        return f"sensitivity: {self._done} of {self._total} done, about {left:.0f} s left"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End; the bar disappears."""
        if self._bars is not None:
            self._bars.stop()
