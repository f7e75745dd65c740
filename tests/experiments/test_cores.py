"""The pure parts of ``experiments/cores``, and its worker on a tiny problem."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cores, cores_worker
from experiments.speed.peers import OURS, PEERS, Process, surroundings
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


def test_parts_must_have_the_gradient_of_the_whole() -> None:
    expected = jnp.array([1e-3, 2e-3, 7.0])  # the loss comes last
    cores_worker._same(expected, expected + 1e-7)
    with pytest.raises(ValueError, match="differs from the whole's by 5.0e-01"):
        cores_worker._same(expected, expected + 1e-3)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_parts_on_cores_take_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    write(Problem("mcunet-5fps", "mcunet_99kb", batch=2, size=32), tmp_path)
    usual = PEERS[OURS].command(OURS, tmp_path, "check")
    parts = [*usual[:5], "experiments.cores_worker", "2", str(tmp_path), "check"]
    losses = []
    for command in (usual, parts):
        with Process(command, surroundings(2, "plain"), 2) as process:
            losses.append(process.answer()["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    with np.load(tmp_path / f"{OURS}.npz") as whole, np.load(tmp_path / "2.npz") as both:
        assert set(whole) == set(both)
        for name in whole:  # at a rate so large that they are the gradient
            far = np.max(np.abs(whole[name] - both[name])) / np.max(np.abs(whole[name]))
            assert far < 1e-3, name
