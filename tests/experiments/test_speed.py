"""The pure parts of ``experiments/speed``, and two of its peers on a tiny problem."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.speed import __main__ as speed
from experiments.speed import peers, ratios
from experiments.speed.page import page, plot
from experiments.speed.parity import DisagreementError, compare
from experiments.speed.peers import PEERS, PeerError, Process
from experiments.speed.placement import there_and_back
from experiments.speed.problem import Problem, write
from experiments.speed.worker import CHECK_RATE

PEER_TIMES = {
    "jax-full": 40.0, "jax-leaves": 12.0, "pockjax-full": 10.0, "pockjax": 2.0,
    "pockjax-forward": 1.0, "torch-full": 5.0, "keras-full": 9.0, "keras-xla-full": 8.0,
}  # fmt: skip
PEER_BYTES = {"jax-full": 900, "jax-leaves": 300, "pockjax-full": 700, "pockjax": 200,
              "pockjax-forward": 100}  # fmt: skip


def result(threads: int = 2) -> dict[str, Any]:
    """A result of made-up numbers."""
    figures = {}
    for name, ms in PEER_TIMES.items():
        figures[name] = {
            "milliseconds": {"p10": ms - 0.5, "median": ms, "p90": ms + 0.5},
            "count": 10,
            "over_ours": ms / PEER_TIMES["pockjax"],
            "build_seconds": 1.0,
            "faults_per_step": 3.0,
            "peak_above_ready": 5e6,
            "version": "x 1.0",
        }
        if name in PEER_BYTES:
            figures[name] |= {"total_bytes": PEER_BYTES[name], "moved_bytes": 2e6, "flops": 100}
    figures["pockjax"]["flops"] = 170
    limit = {"seconds": 5e-4, "products": 3, "kinds": 2, "flops": 10**7}
    return {
        "targets": {"jax_full": 35, "torch_full": 2, "over_forward": 1.1, "torch_leaves": 1.4},
        "threads": threads,
        "absent": {"ort-full": "no .venv-ort/bin/python"},
        "differences": {"loss": 1e-7, "pockjax": 2e-6},
        "limits": {
            "machine": {"processor": "X1", "flops_per_second": 1e11, "bytes_per_second": 1e10},
            "forward": limit,
            "step": limit,
        },
        "peers": figures,
    }


def test_ratios_are_of_times_and_take_the_faster_of_two_forms() -> None:
    found = ratios.ratios(result())
    assert found["jax_full"] == pytest.approx(20)
    assert found["keras_full"] == pytest.approx(4)
    assert found["sparsity"] == pytest.approx(5)
    assert found["compiler_full"] == pytest.approx(4)
    # Twice the time of the forward pass at 1.7 times its operations.
    assert found["over_forward"] == pytest.approx(2 / 1.7)
    assert "torch_leaves" not in found


def test_times_are_compared_through_the_sitting_they_were_taken_in() -> None:
    slow = result()
    # In a sitting on a machine that had become twice as slow, ours took 4 ms.
    slow["peers"]["torch-full"] |= {"milliseconds": {"median": 10.0}, "over_ours": 10.0 / 4.0}
    assert ratios.ratios(slow)["torch_full"] == pytest.approx(2.5)


def test_memory_is_counted_above_inference() -> None:
    given = result()
    assert ratios.ratios(given)["memory_full"] == pytest.approx((700 - 100) / (200 - 100))
    assert ratios.ratios(given)["memory_leaves"] == pytest.approx(200 / 300)
    given["peers"]["pockjax"]["total_bytes"] = 100
    assert math.isinf(ratios.ratios(given)["memory_full"])


def test_bounds_are_shares_of_what_was_measured() -> None:
    found = ratios.bounds(result())["step"]
    assert found["products"] == pytest.approx(0.5)
    assert found["products_share"] == pytest.approx(0.25)
    assert found["traffic"] == pytest.approx(0.2)


def test_the_page_says_what_is_met_missed_not_measured_and_absent() -> None:
    text = page({"tiny": {1: result(1), 2: result(2)}})
    assert "20.00 missed (≥ 35)" in text
    assert "2.50 met (≥ 2)" in text
    assert "not measured (≥ 1.4)" in text
    assert "| PyTorch full ÷ ours | ≥ 2 | 2.50 met | 2.50 met |" in text
    assert "no .venv-ort/bin/python" in text
    assert "Processor, 2 threads: X1." in text
    assert "ms, 1 thread " in text and "ms, 2 threads " in text


def test_every_peer_has_a_row() -> None:
    rows = [line.split("|")[1].strip() for line in page({"tiny": {2: result()}}).splitlines()
            if line.startswith("| ")]  # fmt: skip
    assert set(PEERS) <= set(rows)


def test_the_plot_is_a_small_vector_graphic(tmp_path: Path) -> None:
    file = tmp_path / "speed.svg"
    plot({"tiny": {2: result()}}, file)
    assert "<svg" in file.read_text()
    assert file.stat().st_size < 100_000


def test_a_peer_without_an_environment_says_how_to_make_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    why = PEERS["keras-full"].missing("mobile")
    assert why is not None and "make .venv-keras/.keras" in why
    assert PEERS["jax-full"].missing("mobile") is None


def test_a_peer_that_cannot_do_a_network_says_why() -> None:
    assert PEERS["peft-lora"].missing("mobile") == peers._ON_TRANSFORMERS
    assert PEERS["keras-full"].missing("llama") == peers._NO_LLAMA


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise ValueError('no such op')", "ValueError: no such op"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
    ],
)
def test_a_peer_that_fails_gives_its_last_word(program: str, why: str) -> None:
    with Process([sys.executable, "-c", program], {}, 1) as process:
        with pytest.raises(PeerError, match=why):
            process.answer()


def test_a_peer_answers_line_by_line() -> None:
    program = (
        "import json, sys\n"
        "print('noise'); print(json.dumps({'loss': 1.0}), flush=True)\n"
        "for line in sys.stdin: print(json.dumps({'twice': 2 * int(line)}), flush=True)"
    )
    with Process([sys.executable, "-c", program], {}, 1) as process:
        assert process.answer() == {"loss": 1.0}
        assert process.ask("3") == {"twice": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A problem with an array of which a part is trained, and no steps taken yet."""
    found = tmp_path_factory.mktemp("problem")
    write(Problem("mcunet-5fps", "mcunet_99kb", 1, 16), found)
    return found


def step(folder: Path, name: str, spoil: Any = None) -> None:
    """Write the weights after a step of a gradient that is drawn, not computed."""
    given = json.loads((folder / "problem.json").read_text())
    start, parts = load_file(folder / "weights.safetensors"), np.load(folder / "parts.npz")
    generator = np.random.default_rng(1)
    grads = {n: generator.normal(size=start[n].shape) for n in given["params"]}
    trains = PEERS[name].trains
    if trains != "everything":
        grads = {n: grads[n] for n in given["trained"]}
    if trains == "scheme":
        grads |= {n: grads[n] * parts[n] for n in parts}
    if spoil is not None:
        spoil(grads, given)
    after = {n: (start[n] - CHECK_RATE * g).astype(np.float32) for n, g in grads.items()}
    np.savez(folder / f"{name}.npz", allow_pickle=False, **after)


def test_equal_gradients_pass(folder: Path) -> None:
    losses = {"jax-full": 2.0, "pockjax": 2.0, "torch-leaves": 2.00001, "torch-forward": 2.0}
    for name in ("jax-full", "pockjax", "torch-leaves"):
        step(folder, name)
    found = compare(losses, folder)
    assert found["loss"] == pytest.approx(5e-6)
    assert found["pockjax"] < 1e-5 and found["torch-leaves"] < 1e-5
    assert "torch-forward" not in found


def _wrong(grads: Any, given: Any) -> None:
    grads[given["trained"][0]] *= 1.01


def _nothing(grads: Any, given: Any) -> None:
    grads[given["trained"][-1]] *= 0


def _not_a_number(grads: Any, given: Any) -> None:
    grads[given["trained"][0]] *= np.nan


def _too_much(grads: Any, given: Any) -> None:
    grads["blocks.12.expand.conv.weight"] += 1e-9  # its last input channels are frozen


def _another(grads: Any, given: Any) -> None:
    grads["stem.conv.weight"] = np.ones((16, 3, 3, 3))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_wrong, "the gradient of"),
        (_nothing, "the gradient of"),
        (_not_a_number, "the gradient of"),
        (_too_much, "changes frozen entries"),
        (_another, "trains other arrays"),
    ],
)
def test_wrong_gradients_are_refused(folder: Path, spoil: Any, why: str) -> None:
    step(folder, "jax-full")
    step(folder, "pockjax", spoil)
    with pytest.raises(DisagreementError, match=why):
        compare({"jax-full": 2.0, "pockjax": 2.0}, folder)


@pytest.mark.parametrize("loss", [2.001, math.nan])
def test_another_loss_is_refused(folder: Path, loss: float) -> None:
    with pytest.raises(DisagreementError, match="different losses"):
        compare({"jax-full": 2.0, "torch-forward": loss}, folder)


def test_every_configuration_can_be_read() -> None:
    for file in speed.CONFIGS.glob("*.yaml"):
        problem, targets = speed.read_config(file.stem)
        assert problem.rules.exists()
        assert targets.keys() <= ratios.LABELS.keys()


def test_results_are_measured_again_when_what_they_depend_on_changes() -> None:
    config = speed.Config()
    one = speed.stamp(config, "minilm", 2)
    assert json.loads(json.dumps(one)) == one
    assert speed.stamp(config, "minilm", 1) != one
    assert speed.stamp(speed.Config(rounds=1), "minilm", 2) != one
    assert speed.stamp(speed.Config(again=True), "minilm", 2) == one


@pytest.mark.slow
def test_two_peers_are_compared_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("mcunet-5fps", "mcunet_99kb", 2, 32)
    monkeypatch.setattr(speed, "read_config", lambda name: (problem, {"jax_full": 1.0}))
    config = speed.Config(peers=(), rounds=2, steps=2, out=tmp_path)
    found = json.loads(json.dumps(speed.run("tiny", 1, config)))
    assert found["peers"].keys() == {"jax-full", "pockjax"} and not found["absent"]
    assert found["differences"]["pockjax"] < 1e-3
    assert found["peers"]["jax-full"]["count"] == 4
    assert found["limits"]["step"]["flops"] > found["limits"]["forward"]["flops"]
    text = page({"tiny": {1: found | {"targets": {"jax_full": 1.0}}}})
    assert "plain JAX full ÷ ours" in text and "not asked for" in text


def test_the_way_between_two_cores_is_measured() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two processors")
    assert 0 < there_and_back(cores[:2]) < 1e-3
    assert os.sched_getaffinity(0) == set(cores)


def test_turns_with_cores_apart_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = iter([1.0, 1.1, 1.0, 2.0, 1.0, 1.2, 1.0])  # before the first turn, and after each
    monkeypatch.setattr(speed, "there_and_back", lambda _: next(ways))

    class Peer:
        def __init__(self) -> None:
            self.taken = 0

        def ask(self, steps: str) -> dict[str, Any]:
            self.taken += 1
            return {"seconds": [float(self.taken)] * int(steps)}

    peers: Any = {"a": Peer(), "b": Peer()}
    turns = speed._turns(
        peers, {}, speed.Config(rounds=2, steps=1), speed._Narrator("a test"), [0, 1]
    )
    # The second turn of a and the one of b after it touch the moment when the cores were apart.
    assert {peer: len(own) for peer, own in turns.items()} == {"a": 3, "b": 3}
    counted = speed._counted(turns)
    assert counted == {"a": [True, False, True], "b": [True, False, True]}
    assert speed._seconds(turns["a"], counted["a"]) == [1.0, 3.0]
