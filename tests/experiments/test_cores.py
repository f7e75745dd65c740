"""The pure parts of ``experiments/cores``, and its worker on a tiny problem."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import cores
from experiments.speed.peers import OURS, PEERS, Process, surroundings
from experiments.speed.problem import Problem, write


def test_a_row_compares_with_two_cores() -> None:
    found = {way: [1e-3 * (k + 1)] for k, way in enumerate(cores.WAYS)}
    line = cores.row("net", found)
    assert line.startswith("| net | 1.0 (1.0–1.0), 0.50 | 2.0 (2.0–2.0) | 3.0 (3.0–3.0), 1.50 |")
    assert line.count("|") == len(cores.WAYS) + 2


def test_cores_are_kept_awake_only_inside() -> None:
    def children() -> set[int]:
        return {
            int(stat.split()[0])
            for file in Path("/proc").glob("[0-9]*/stat")
            if (stat := _text(file)).rpartition(")")[2].split()[1:2] == [str(os.getpid())]
        }

    before = children()
    with cores.kept_awake():
        assert len(children() - before) == len(os.sched_getaffinity(0))
    assert children() == before


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # it has ended
        return ""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_parts_on_cores_take_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    write(Problem("mcunet-5fps", "mcunet_99kb", batch=2, size=32), tmp_path)
    usual = PEERS[OURS].command(OURS, tmp_path, "time")
    parts = [*usual[:5], "experiments.cores_worker", "2", str(tmp_path), "time"]
    losses = []
    for command in (usual, parts):
        with Process(command, surroundings(2, "plain"), 2) as process:
            losses.append([process.answer()["loss"]])
            process.ask("3")
    assert sys.executable == usual[0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
