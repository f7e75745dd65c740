"""What a step gains from a second core, and what keeps it from gaining more.

``python -m experiments.cores`` takes the schemes of `experiments.speed` and writes
``experiments/results/cores.md``. In turn it times a step

- on one core, and on two;
- on two that never sleep: another process of the lowest priority runs on each whenever nothing else
  does, so that a thread need not wait until its core has woken up;
- in one process with the gradient of half of the batch on each core (`experiments.speed.parts`);
- on each core a step of half of the batch, in two processes that share nothing: about what could be
  attained, though each does by itself what does not depend on the batch.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tyro

from experiments.speed.__main__ import read_config
from experiments.speed.limits import machine
from experiments.speed.peers import OURS, PEERS, Process, surroundings
from experiments.speed.problem import write
from pockjax._files import replacing

_BUSY = """
import os
parent = os.getppid()
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
print(flush=True)
while os.getppid() == parent: pass
"""
WAYS = (
    "one core",
    "two cores",
    "two, kept awake",
    "half the batch on each, one process",
    "two processes",
)


@dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        only: names of files in ``configs/speed``.
        rounds: how often each way has its turn.
        steps: steps in a turn.
        out: file for the table.
    """

    only: tuple[str, ...] = ("mobilenet_v2", "mcunet", "efficientnet_lite0", "resnet50")
    rounds: int = 8
    steps: int = 5
    out: Path = Path("experiments/results/cores.md")


def measure(name: str, config: Config) -> dict[str, list[float]]:
    """Seconds of each step, by the way that it is taken."""
    problem, _ = read_config(name)
    if problem.batch % 2:
        raise SystemExit(f"{name}: a batch of {problem.batch} has no halves")
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        whole, half = Path(scratch, "whole"), Path(scratch, "half")
        for folder, batch in ((whole, problem.batch), (half, problem.batch // 2)):
            folder.mkdir()
            write(replace(problem, batch=batch), folder)

        def start(peer: str, folder: Path, cores: int, first: int = 0) -> Process:
            command = PEERS[peer].command(peer, folder, "time")
            process = Process(command, surroundings(cores, "hugepages"), cores, first)
            stack.enter_context(process).answer()
            return process

        alone, both = start(OURS, whole, 1), start(OURS, whole, 2)
        apart = start("pockjax-parts", whole, 2)
        pair = [start(OURS, half, 1, core) for core in range(2)]
        pool = stack.enter_context(ThreadPoolExecutor(2))

        def steps(process: Process) -> list[float]:
            return process.ask(str(config.steps))["seconds"]

        def awake() -> list[float]:
            with kept_awake(2):
                return steps(both)

        def halves() -> list[float]:
            return [max(taken) for taken in zip(*pool.map(steps, pair), strict=True)]

        turns: tuple[Callable[[], list[float]], ...] = (
            lambda: steps(alone),
            lambda: steps(both),
            awake,
            lambda: steps(apart),
            halves,
        )
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for k in range(config.rounds):
            for way, turn in zip(WAYS, turns, strict=True):
                found[way] += turn()
            print(f"{name}: round {k + 1} of {config.rounds}", flush=True)
    return found


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


def row(name: str, found: dict[str, list[float]]) -> str:
    """A line of the table: milliseconds, and how they compare with two cores as they are."""
    usual = np.median(found[WAYS[1]])
    cells = []
    for way in WAYS:
        low, middle, high = np.percentile(found[way], [10, 50, 90])
        share = f", {middle / usual:.2f}" if way != WAYS[1] else ""
        cells.append(f"{1e3 * middle:.1f} ({1e3 * low:.1f}–{1e3 * high:.1f}){share}")
    return f"| {name} | {' | '.join(cells)} |"


def main(config: Config) -> None:
    """Measure, print and write."""
    head = [
        "Milliseconds of a step of each published scheme: median, 10th and 90th percentile, and",
        "over that on two cores. How much a second core gains differs from machine to machine.",
        f"`python -m experiments.cores --rounds {config.rounds} --steps {config.steps}`, where a",
        f"large product runs at {machine()['flops_per_second'] / 1e9:.0f} GFLOP/s on all cores.",
        "",
        f"| model | {' | '.join(WAYS)} |",
        "|---|" + "---:|" * len(WAYS),
    ]
    lines: list[str] = []
    for name in config.only:
        lines.append(row(name, measure(name, config)))
        with replacing(config.out) as path:
            path.write_text("\n".join([*head, *lines]) + "\n")
    print(config.out.read_text())


if __name__ == "__main__":
    main(tyro.cli(Config))
