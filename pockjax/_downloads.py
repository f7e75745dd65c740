"""A bar for downloads on the terminal; needs the extra `cli`."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pockjax import hub


@contextmanager
def download_bar(title: str, console: Console) -> Iterator[hub.Progress]:
    """Yield what to hand to `hub.fetch` as `progress`; the bar shows once something arrives."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        bar = bars.add_task(f"fetching {title}", total=None, visible=False)
        yield lambda done, total: bars.update(bar, completed=done, total=total, visible=True)
