"""Run a job in a process of its own and show how far it is."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import Progress

from pockjax.demo import _worker
from pockjax.demo._config import Job
from pockjax.demo._results import TimingResult, TrainingResult
from pockjax.demo._worker import Event, Failed, Progressed, Stage


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why and what to do next."""


def run_job(job: Job, log: Path, progress: Progress, title: str) -> TrainingResult | TimingResult:
    """Do a job in a child process, whose memory is then that of the job and nothing else.

    Args:
        job: What to do.
        log: File for what the child's libraries print, if they print anything.
        progress: Gets a bar for the job.
        title: What to call it.

    Raises:
        DemoError: The child failed or was killed.
    """
    steps = job.config.alternations if job.mode == "compare" else job.config.steps
    bar = progress.add_task(title, total=steps, stage="starting", loss="")
    result: TrainingResult | TimingResult | None = None
    with _events(job, log, title) as events:
        for event in events:
            match event:
                case Stage(name):
                    progress.update(bar, stage=name)
                    if name == "training":  # time left is the steps' alone
                        progress.reset(bar, total=steps, stage=name, loss="")
                case Progressed(done, loss):
                    shown = "" if loss is None else f"loss {loss:.3f}"
                    progress.update(bar, completed=done, loss=shown)
                case Failed(_, out_of_memory=True):
                    raise DemoError(_out_of_memory(title))
                case Failed(message):
                    raise DemoError(_failed(title, message, log))
                case TrainingResult() | TimingResult():
                    result = event
    assert result is not None, "a child ends with a result unless it failed"
    progress.update(bar, stage="done")
    if not log.stat().st_size:
        log.unlink()
    return result


@contextmanager
def _events(job: Job, log: Path, title: str) -> Iterator[Iterator[Event]]:
    """Run a child for the length of the block, giving what it sends until it ends."""
    # A fork would share JAX's threads, and this process's memory would count as the child's.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_worker.work, args=(job, sender, log), daemon=True)
    child.start()
    sender.close()  # so that the end of the child is the end of the events

    def events() -> Iterator[Event]:
        while True:
            try:
                yield receiver.recv()
            except EOFError:
                break
        child.join()
        if child.exitcode == -signal.SIGKILL:  # as Linux does to whoever takes the last memory
            raise DemoError(_out_of_memory(title))
        if child.exitcode:
            reason = f"the process ended with exit code {child.exitcode}"
            raise DemoError(_failed(title, reason, log))

    try:
        yield events()
    finally:
        receiver.close()
        child.kill()  # nothing, if it has ended
        child.join()


def _out_of_memory(title: str) -> str:
    return (
        f"{title}: the process was killed or refused memory, most likely because there was not "
        "enough.\nTry a smaller --batch or --length, or close other programs."
    )


def _failed(title: str, reason: str, log: Path) -> str:
    return f"{title}: {reason}\nThe whole story is in {log}."
