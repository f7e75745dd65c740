"""How far a loop is and how long it will take: a bar where rich is installed, lines elsewhere."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EVERY = 10.0  # seconds between two lines


@contextmanager
def shown(steps: int, start: int, show: bool) -> Iterator[Callable[[int, float], None]]:
    """Gives a function to call with the number of steps done and the latest loss.

    Args:
        steps: how many there are.
        start: how many were done before.
        show: whether to show anything at all.
    """
    if not show or start >= steps:
        yield lambda done, loss: None
    elif sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("", total=steps, completed=start, loss="")
            yield lambda done, loss: progress.update(bar, completed=done, loss=f"loss {loss:.4g}")
    else:
        yield _lines(steps, start)


def _lines(steps: int, start: int) -> Callable[[int, float], None]:
    begun = last = time.monotonic()

    def tell(done: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _EVERY and done < steps:
            return
        last = now
        left = (now - begun) / max(1, done - start) * (steps - done)
        print(f"step {done}/{steps}, loss {loss:.4g}, {left:.0f} s left", file=sys.stderr)

    return tell
