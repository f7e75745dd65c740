"""Time training steps of pockjax and its peers in turn, and write tables of the ratios.

``python -m experiments.speed`` takes every file of ``configs/speed``, with one thread and with two;
``--only mobilenet_v2 --threads 2`` one of them. Each peer is a process with the same weights,
batch, threads and allocator setting. First each takes one step, whose loss and gradients are
compared with plain JAX's; then the peers take a few steps each in turn. They run in environments of
their own: ``make speed`` sets them up. A peer that is not there, or fails, is reported with the
reason. What was measured with the same versions and settings is not measured again.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
import yaml

from experiments.speed.page import page, plot
from experiments.speed.parity import compare
from experiments.speed.peers import (
    OURS,
    PEERS,
    REFERENCE,
    Memory,
    PeerError,
    Process,
    surroundings,
)
from experiments.speed.placement import near, there_and_back
from experiments.speed.problem import Problem, network, write
from pockjax._files import replacing

CONFIGS = Path("configs/speed")
_MOST_ROUNDS = 3  # times those asked for


@dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        only: names of files in ``configs/speed``; all of them unless given.
        peers: which peers; all of them unless given. pockjax and plain JAX are always among them.
        threads: processors that each peer may use; one table for each number.
        rounds: how often each peer has its turn. Turns while the processors were farther apart than
            at other times do not count (`experiments.speed.placement`); there are up to twice as
            many more rounds to make up for them.
        steps: steps in a turn; fewer if they take more than half a minute.
        together: peers that take turns with each other and are in memory at a time. pockjax is
            among them each time, so that ratios are of steps taken in turn.
        memory: what the C library does with what a step frees, for every peer: keep it for the next
            step, or give it back, with huge pages or small ones. Steps whose temporary arrays are
            large take up to twice the time where each page is taken anew.
        again: measure what has been measured too.
        compare_only: stop when losses and gradients have been compared; nothing is written.
        out: folder for the results.
    """

    only: tuple[str, ...] = ()
    peers: tuple[str, ...] = tuple(PEERS)
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 8
    steps: int = 5
    together: int = 8
    memory: Memory = "hugepages"
    again: bool = False
    compare_only: bool = False
    out: Path = Path("experiments/results/speed")


def read_config(name: str) -> tuple[Problem, dict[str, float]]:
    """The problem of that name, and the ratios to be reached in it."""
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    targets = given.pop("targets", {})
    return Problem(**given), targets


def stamp(config: Config, name: str, threads: int) -> dict[str, Any]:
    """What a result depends on: it is measured again if any of this changes."""
    own = [p for p in Path(__file__).parent.glob("*.py") if p.stem not in ("page", "ratios")]
    sources = [*sorted(Path("pockjax").rglob("*.py")), *sorted(own)]
    environments = sorted({peer.environment for peer in PEERS.values()} - {""})
    there = [n for n in environments if Path(f".venv-{n}/bin/python").exists()]
    return {
        "jax": jax.__version__,
        "code": _digest(sources),
        "environments": {n: _digest([Path(f"requirements/{n}.txt")]) for n in there},
        "problem": asdict(read_config(name)[0]),
        "peers": [*config.peers],
        "threads": threads,
        "settings": [config.rounds, config.steps, config.together, config.memory],
    }


def _digest(files: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:16]


def run(name: str, threads: int, config: Config) -> dict[str, Any]:
    """Check and time all peers on one problem."""
    problem, _ = read_config(name)
    kind = network(problem.model)["kind"]
    environment = surroundings(threads, config.memory)
    wanted = [n for n in PEERS if n in (OURS, REFERENCE, *config.peers)]
    absent = {n: why for n in wanted if (why := PEERS[n].missing(kind)) is not None}
    say = _Narrator(f"{name}, {threads} threads")
    with TemporaryDirectory(prefix="pockjax-speed-") as scratch:
        folder = Path(scratch)
        write(problem, folder)

        def start(peer: str, asked: str) -> Process:
            return Process(PEERS[peer].command(peer, folder, asked), environment, threads)

        limits = [_limits(folder, environment, threads)]
        say("the machine's limits are known")
        losses = {}
        for peer in wanted:
            if peer not in absent:
                try:
                    with start(peer, "check") as process:
                        losses[peer] = process.answer()["loss"]
                except PeerError as error:
                    absent[peer] = str(error)
                say(f"{peer}: {absent.get(peer, 'took a step')}")
        for needed in (REFERENCE, OURS):
            if needed in absent:
                raise RuntimeError(f"{name}: {needed} failed: {absent[needed]}")
        differences = compare(losses, folder)
        say(f"all agree: {max(differences.values()):.1e} is the largest relative difference")
        if config.compare_only:
            print(json.dumps({"differences": differences, "absent": absent}, indent=1))
            return {}
        figures: dict[str, Any] = {}
        others = [peer for peer in losses if peer != OURS]
        size = max(1, config.together - 1)
        cores = sorted(os.sched_getaffinity(0))[: min(threads, 2)]
        for k in range(0, len(others), size):
            seated = [OURS, *others[k : k + size]]
            found, failed = _sitting(seated, start, config, say, cores)
            absent |= failed
            for peer, figure in found.items():
                figures.setdefault(peer, figure)
        # At another moment the cores may be nearer; where they are is not measured here.
        try:
            limits.append(_limits(folder, environment, threads))
        except PeerError as error:
            say(f"the limits were not measured again: {error}")
    return {
        "problem": asdict(problem),
        "stamp": stamp(config, name, threads),
        "threads": threads,
        "memory": config.memory,
        "absent": absent,
        "differences": differences,
        "limits": min(limits, key=lambda found: found["step"]["seconds"]),
        "peers": {n: figures[n] for n in wanted if n in figures},
    }


class _Narrator:
    """Says what has been done, and how long it has been."""

    def __init__(self, what: str):
        self._what, self._begun = what, time.monotonic()

    def __call__(self, done: str) -> None:
        minutes, seconds = divmod(round(time.monotonic() - self._begun), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {self._what}: {done}", flush=True)


def _limits(folder: Path, environment: dict[str, str], threads: int) -> dict[str, Any]:
    with Process(PEERS[OURS].run("limits", str(folder)), environment, threads) as process:
        return process.answer()


def _sitting(
    seated: Sequence[str], start: Any, config: Config, say: _Narrator, cores: Sequence[int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time peers in turn: their figures, and why some have none."""
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        about: dict[str, dict[str, Any]] = {}
        for peer in seated:
            process = stack.enter_context(start(peer, "time"))
            try:
                about[peer] = process.answer()
                processes[peer] = process
            except PeerError as error:
                failed[peer] = str(error)
            say(f"{peer}: {failed.get(peer, 'is ready')}")
        turns = _turns(processes, failed, config, say, cores)
    there = {peer: turns[peer] for peer in processes if peer not in failed}
    counted = _counted(there)
    for peer in [peer for peer in there if not any(counted[peer])]:
        failed[peer] = "the processors were apart at all of its turns"
        del there[peer]
    if OURS in failed:
        raise RuntimeError(f"{OURS} failed: {failed[OURS]}")
    ours = float(np.median(_seconds(there[OURS], counted[OURS])))
    return {
        peer: figure(_seconds(own, counted[peer]), ours, own[-1].answer, about[peer])
        | {
            "turns": len(own),
            "turns_apart": counted[peer].count(False),
            "shortest_way": min(turn.way for turn in own),
        }
        for peer, own in there.items()
    }, failed


class _Turn(NamedTuple):
    """Steps of a peer, and the longer of the ways between the processors before and after."""

    answer: dict[str, Any]
    way: float


def _turns(
    processes: Mapping[str, Process],
    failed: dict[str, str],
    config: Config,
    say: _Narrator,
    cores: Sequence[int],
) -> dict[str, list[_Turn]]:
    """Turns of all peers, until each has had enough that count; adds to `failed`."""

    def measured() -> float:
        return there_and_back(cores) if len(cores) == 2 else 0.0

    way = measured()
    turns: dict[str, list[_Turn]] = {peer: [] for peer in processes}
    for k in range(_MOST_ROUNDS * config.rounds):
        for peer, process in processes.items():
            if peer in failed:
                continue
            try:
                answer = process.ask(str(config.steps))
            except PeerError as error:
                failed[peer] = str(error)
                if peer == OURS:
                    return turns
                continue
            before, way = way, measured()
            turns[peer].append(_Turn(answer, max(before, way)))
        counted = _counted({peer: own for peer, own in turns.items() if peer not in failed})
        least = min(map(sum, counted.values()), default=config.rounds)
        say(f"round {k + 1}, of which {least} of {config.rounds} count")
        if least >= config.rounds:
            break
    return turns


def _counted(turns: Mapping[str, Sequence[_Turn]]) -> dict[str, list[bool]]:
    """Of each peer's turns, which count."""
    flags = iter(near([turn.way for own in turns.values() for turn in own]))
    return {peer: [next(flags) for _ in own] for peer, own in turns.items()}


def _seconds(turns: Sequence[_Turn], counted: Sequence[bool]) -> list[float]:
    taken = [turn.answer["seconds"] for turn, yes in zip(turns, counted, strict=True) if yes]
    return [seconds for steps in taken for seconds in steps]


def figure(
    seconds: Sequence[float], ours: float, last: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    """What is kept of a peer's turns.

    Args:
        seconds: of each step.
        ours: the median of pockjax's steps in the same sitting.
        last: the answer to the last turn.
        about: what the peer said of itself.
    """
    low, median, high = np.percentile(seconds, [10, 50, 90])
    return {
        "milliseconds": {"p10": 1e3 * low, "median": 1e3 * median, "p90": 1e3 * high},
        "count": len(seconds),
        "over_ours": float(median) / ours,
        "faults_per_step": last["faults"],
        "peak_above_ready": last["peak_above_ready"],
        **about,
    }


def publish(folder: Path) -> None:
    """The page and the plot of all that has been measured."""
    results: dict[str, dict[int, Any]] = {}
    for file in sorted(folder.glob("*-*t.json")):
        name = file.stem.rpartition("-")[0]
        result = json.loads(file.read_text()) | {"targets": read_config(name)[1]}
        results.setdefault(name, {})[result["threads"]] = result
    with replacing(folder / "speed.md") as path:
        path.write_text(page(results))
    with replacing(folder / "speed.svg") as path:
        plot(results, path)


def main(config: Config) -> None:
    """Time, print and write."""
    if unknown := [n for n in config.peers if n not in PEERS]:
        raise SystemExit(f"no peers are named {unknown}; there are {', '.join(PEERS)}")
    # Ended from outside, it ends the peers too, which would hold their memory otherwise.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    config.out.mkdir(parents=True, exist_ok=True)
    names = config.only or tuple(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
    tables = [(name, threads) for name in names for threads in config.threads]
    begun, measured = time.monotonic(), 0
    for k, (name, threads) in enumerate(tables):
        file = config.out / f"{name}-{threads}t.json"
        if not config.again and file.exists():
            known = json.loads(file.read_text())
            if known["stamp"] == stamp(config, name, threads):
                print(f"{file} is up to date")
                continue
        result = run(name, threads, config)
        if config.compare_only:
            continue
        with replacing(file) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")
        publish(config.out)
        measured += 1
        left = (time.monotonic() - begun) / measured * (len(tables) - k - 1) / 60
        print(f"{file} is written; about {left:.0f} minutes left", flush=True)
    if config.compare_only:
        return
    publish(config.out)
    print((config.out / "speed.md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Config))
