"""How far a long piece of work is: a bar where `rich` is installed, lines where it is not."""

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any, Self

_SECONDS = 10.0  # between two lines


class Progress:
    """Shows on standard error how many of some pieces are done, and the time left."""

    def __init__(self, what: str, total: int, *, done: int = 0, shown: bool = True):
        """Nothing is shown before the block is entered.

        Args:
            what: is being done, in a word.
            total: number of pieces.
            done: how many of them were done before.
            shown: whether to show anything at all.
        """
        self._what, self._total, self._before, self._done = what, total, done, done
        self._shown = shown and done < total
        self._bars: Any = None
        self._start = self._said = time.monotonic()

    def __enter__(self) -> Self:
        """Begin."""
        self._start = self._said = time.monotonic()
        if self._shown and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
            self._bars = _bars()
            self._bars.start()
            self._bar = self._bars.add_task(
                self._what, total=self._total, completed=self._done, note=""
            )
        return self

    def advance(self, note: str = "") -> None:
        """One piece more.

        Args:
            note: what else there is to say of it.
        """
        self._done += 1
        now = time.monotonic()
        if self._bars is not None:
            self._bars.update(self._bar, completed=self._done, note=note)
        elif self._shown and (now - self._said >= _SECONDS or self._done == self._total):
            self._said = now
            print(self.line(now - self._start, note), file=sys.stderr, flush=True)

    def line(self, seconds: float, note: str = "") -> str:
        """How far it is after so many seconds, in words.

        >>> progress = Progress("training", 10, done=2, shown=False)
        >>> progress.advance(), progress.advance()
        (None, None)
        >>> progress.line(60.0, "loss 0.5")
        'training: 4 of 10 done, loss 0.5, about 180 s left'
        """
        left = seconds / max(self._done - self._before, 1) * (self._total - self._done)
        parts = [f"{self._done} of {self._total} done", note, f"about {left:.0f} s left"]
        return f"{self._what}: {', '.join(filter(None, parts))}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End; the bar disappears."""
        if self._bars is not None:
            self._bars.stop()


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"), TimeRemainingColumn(), TextColumn("left"),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
