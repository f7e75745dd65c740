"""``experiments/cores``, and the step in parts that it times."""

import os
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import cores
from experiments.speed.parity import compare
from experiments.speed.parts import step_in_parts
from experiments.speed.peers import PEERS, REFERENCE, Process, surroundings
from experiments.speed.problem import Problem, write


def test_a_row_compares_with_two_cores() -> None:
    found = {way: [1e-3 * (k + 1)] for k, way in enumerate(cores.WAYS)}
    line = cores.row("net", found)
    assert line.startswith("| net | 1.0 (1.0–1.0), 0.50 | 2.0 (2.0–2.0) | 3.0 (3.0–3.0), 1.50 |")
    assert line.count("|") == len(cores.WAYS) + 2


def test_cores_are_kept_awake_only_inside() -> None:
    cores_here = sorted(os.sched_getaffinity(0))[:2]
    with cores.kept_awake(2) as busy:
        assert [os.sched_getscheduler(pid) for pid in busy] == [os.SCHED_IDLE] * len(cores_here)
        assert [os.sched_getaffinity(pid) for pid in busy] == [{core} for core in cores_here]
    for pid in busy:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_step_in_parts_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    write(Problem("mcunet-5fps", "mcunet_99kb", batch=4, size=32), tmp_path)
    losses = {}
    for peer in (REFERENCE, "pockjax-parts"):
        command = PEERS[peer].command(peer, tmp_path, "check")
        with Process(command, surroundings(2, "plain"), 2) as process:
            losses[peer] = process.answer()["loss"]
    assert compare(losses, tmp_path)["pockjax-parts"] < 1e-3


def test_a_batch_that_has_no_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(ValueError, match="a batch of 3 has no 2 equal parts"):
        step_in_parts(None, None, (jnp.ones((3, 2)),), None, 0.1, None)
