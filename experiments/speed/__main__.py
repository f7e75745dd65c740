"""Time training steps of pockjax and its peers in turn, and write tables of the ratios.

``python -m experiments.speed`` takes every file of ``configs/speed``; ``--only mobilenet_v2`` one.
Each peer is a process with the same weights, batch, threads and allocator setting; after the losses
of the first step and the gradients have been compared, the peers take a few steps each in turn.
PyTorch runs in an environment of its own: ``make speed`` sets it up. A peer that is not there is
reported as such.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import yaml

from experiments.speed.problem import Problem, write
from pockjax._files import replacing

JAX = (
    "jax-full", "jax-leaves", "pockjax-full", "pockjax-unrewritten", "pockjax", "pockjax-cached",
    "pockjax-forward",
)  # fmt: skip
TORCH = ("torch-full", "torch-leaves", "torch-forward")
RATIOS = {
    "plain JAX full": ("jax-full", "pockjax"),
    "plain JAX same leaves": ("jax-leaves", "pockjax"),
    "PyTorch full": ("torch-full", "pockjax"),
    "PyTorch same leaves": ("torch-leaves", "pockjax"),
    "PyTorch forward over our forward": ("torch-forward", "pockjax-forward"),
    "PyTorch full over our full": ("torch-full", "pockjax-full"),
    "compiler gain, full": ("jax-full", "pockjax-full"),
    "compiler gain, scheme": ("pockjax-unrewritten", "pockjax"),
    "sparsity gain": ("pockjax-full", "pockjax"),
    "prefix gain": ("pockjax", "pockjax-cached"),
}


@dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
        only: names of files in ``configs/speed``; all of them unless given.
        peers: which peers; all of them unless given.
        rounds: how often each peer has its turn.
        steps: steps in a turn.
        threads: processors that each peer may use.
        huge_pages: let glibc ask for huge pages, for every peer: it halves the time of steps whose
            temporary arrays are large.
        torch: the Python of the environment with PyTorch.
        out: folder for the results.
    """

    only: tuple[str, ...] = ()
    peers: tuple[str, ...] = JAX + TORCH
    rounds: int = 8
    steps: int = 5
    threads: int = 2
    huge_pages: bool = True
    torch: Path = Path(".venv-torch/bin/python")
    out: Path = Path("experiments/results/speed")


class Peer:
    """A worker process."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], threads: int):
        """Start it."""
        self.name = name
        self.seconds: list[float] = []
        self.last: dict[str, Any] = {}
        processors = sorted(os.sched_getaffinity(0))[:threads]
        self._process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, processors),
        )
        self.about = self._answer()

    def turn(self, steps: int) -> None:
        """Have it take steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.last = self._answer()
        self.seconds += self.last["seconds"]

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(self._process.stderr.read()[-2000:])


def run(name: str, config: Config) -> dict[str, Any]:
    """Time all peers on one problem."""
    problem = Problem(**yaml.safe_load(Path(f"configs/speed/{name}.yaml").read_text()))
    peers: list[Peer] = []
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="pockjax-speed-") as scratch:
        folder = Path(scratch)
        write(problem, folder)
        has_torch = json.loads((folder / "problem.json").read_text())["torch"]
        try:
            for peer in config.peers:
                if peer.startswith("torch") and not (has_torch and config.torch.exists()):
                    why = "no such network there" if not has_torch else f"no {config.torch}"
                    absent[peer] = why
                    continue
                try:
                    peers.append(_start(peer, problem, folder, config))
                except RuntimeError as error:
                    absent[peer] = str(error).strip().splitlines()[-1]
                print(f"{name}: {peer} {'is ready' if peer not in absent else absent[peer]}")
            differences = _compare(peers, folder)
            for _ in range(config.rounds):
                for peer in peers:
                    peer.turn(config.steps)
        finally:
            for peer in peers:
                peer.stop()
    return {
        "problem": asdict(problem),
        "absent": absent,
        "differences": differences,
        "peers": {peer.name: _figures(peer) for peer in peers},
    }


def _start(name: str, problem: Problem, folder: Path, config: Config) -> Peer:
    given = [name, json.dumps(asdict(problem)), str(folder)]
    environment = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(config.threads)}
    if config.huge_pages:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if name.startswith("torch"):
        command = [str(config.torch), "experiments/speed/torch_worker.py", *given]
    else:
        command = [sys.executable, "-m", "experiments.speed.jax_worker", *given]
    return Peer(name, command, environment, config.threads)


def _compare(peers: list[Peer], folder: Path) -> dict[str, float]:
    """How far the first losses, and the gradients of two implementations, are from each other.

    Raises:
        AssertionError: they are no gradients of the same loss.
    """
    losses = {peer.name: peer.about["loss"] for peer in peers}
    spread = (max(losses.values()) - min(losses.values())) / abs(min(losses.values()))
    assert spread < 1e-3, f"the peers compute different losses: {losses}"
    found = {"loss": spread}
    files = [folder / f"{name}.npz" for name in ("pockjax", "torch-leaves")]
    if all(file.exists() for file in files):
        ours, theirs = (dict(np.load(file)) for file in files)
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        errors = {
            n: np.linalg.norm(ours[n] - theirs[n]) / max(np.linalg.norm(theirs[n]), 1e-12)
            for n in ours
            if np.linalg.norm(theirs[n]) > 1e-7  # a key's bias has no gradient but rounding
        }
        found["gradient"] = float(max(errors.values()))
        assert found["gradient"] < 2e-2, f"gradients differ: {errors}"
    return found


def _figures(peer: Peer) -> dict[str, Any]:
    milliseconds = 1000 * np.array(peer.seconds)
    low, median, high = np.percentile(milliseconds, [10, 50, 90])
    best = {"p10": low, "median": median, "p90": high, "p25": np.percentile(milliseconds, 25)}
    extra = peer.last["memory"] - peer.about["loaded"]
    return {
        "milliseconds": {name: round(float(value), 3) for name, value in best.items()},
        "faults_per_step": peer.last["faults"],
        "peak_above_loaded": extra,
        **peer.about,
    }


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Times of one peer over those of another, medians of steps taken in turn."""
    peers = result["peers"]
    found = {
        name: peers[a]["milliseconds"]["median"] / peers[b]["milliseconds"]["median"]
        for name, (a, b) in RATIOS.items()
        if a in peers and b in peers
    }
    if "pockjax" in peers and "pockjax-forward" in peers and "pockjax-full" in peers:
        about = peers["pockjax"]
        # A backward pass of everything is twice a forward pass, so a third of full is the forward.
        forward = about["full_flops"] / 3
        found["ours over our forward at equal FLOP/s"] = (
            about["milliseconds"]["median"]
            / peers["pockjax-forward"]["milliseconds"]["median"]
            / (about["flops"] / forward)
        )
    return found


def page(results: dict[str, Any], config: Config) -> str:
    """All results as Markdown."""
    machine = f"{platform.machine()}, {config.threads} threads, huge pages: {config.huge_pages}"
    lines = [f"Measured on {machine}. Milliseconds are medians, with the 10th and 90th percentile."]
    for name, result in results.items():
        lines += ["", f"## {name}", ""]
        lines += [
            "| peer | ms | p10–p90 | faults a step | peak above loaded, MB | XLA temp, MB |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for peer, f in result["peers"].items():
            ms, temp = f["milliseconds"], f.get("temp_bytes")
            lines.append(
                f"| {peer} | {ms['median']:.1f} | {ms['p10']:.1f}–{ms['p90']:.1f} "
                f"| {f['faults_per_step']:.0f} | {f['peak_above_loaded'] / 1e6:.0f} "
                f"| {'' if temp is None else f'{temp / 1e6:.1f}'} |"
            )
        lines += [f"| {peer} | {why} | | | | |" for peer, why in result["absent"].items()]
        lines += ["", "| ratio | |", "|---|---:|"]
        lines += [f"| {what} | {value:.2f} |" for what, value in ratios(result).items()]
        far = ", ".join(f"{what} {value:.1e}" for what, value in result["differences"].items())
        lines += ["", f"Largest relative difference between the peers: {far}."]
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Time, print and write."""
    config.out.mkdir(parents=True, exist_ok=True)
    names = config.only or tuple(sorted(p.stem for p in Path("configs/speed").glob("*.yaml")))
    results = {}
    for name in names:
        results[name] = run(name, config)
        with replacing(config.out / f"{name}.json") as path:
            path.write_text(json.dumps(results[name] | {"ratios": ratios(results[name])}, indent=2))
        print(page({name: results[name]}, config), flush=True)
    known = {p.stem: json.loads(p.read_text()) for p in sorted(config.out.glob("*.json"))}
    with replacing(config.out / "speed.md") as path:
        path.write_text(page(known, config))


if __name__ == "__main__":
    main(tyro.cli(Config))
