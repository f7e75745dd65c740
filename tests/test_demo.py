"""The demo: its parts, all of it on a tiny model, and (slow) as people run it."""

import dataclasses
import io
import json
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import tokenizers
import yaml
from rich.console import Console
from rich.progress import Progress

from pockjax.demo import DemoConfig, DemoError, run
from pockjax.demo._config import Job, scheme_file
from pockjax.demo._memory import PeakMemory, _return_freed_memory, _Sampler
from pockjax.demo._processes import run_job
from pockjax.demo._report import plot_trained
from pockjax.demo._results import TimingResult
from pockjax.masks import Description, MaskError
from pockjax.masks._describe import Row

_TOPICS = {"birds": ["owl", "wren", "swan"], "food": ["rice", "leek", "plum"]}


@pytest.fixture
def tiny(tmp_path, publish_bert) -> DemoConfig:
    """A run of the whole demo in seconds: two layers of width 16, texts of a few words."""
    words = ["[PAD]", "[UNK]", "the", "a", *(word for topic in _TOPICS.values() for word in topic)]
    weights = publish_bert(vocabulary=len(words))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(weights / "tokenizer.json"))

    generator = np.random.default_rng(0)
    for topic, nouns in _TOPICS.items():
        (tmp_path / "texts" / topic).mkdir(parents=True)
        for number in range(30):
            text = " ".join(generator.choice([*nouns, "the", "a"], 7)) + f" {number} {topic}"
            (tmp_path / "texts" / topic / f"{number}.txt").write_text(text)

    scheme = tmp_path / "tiny.yaml"
    rules = [
        {"path": "layers/1/.*bias", "train": "all"},
        {"path": "layers/1/ffn/up/kernel", "train": {"in": 0.5}},
        {"path": "classifier/.*", "train": "all"},
    ]
    scheme.write_text(yaml.safe_dump({"name": "tiny", "rules": rules}))
    return DemoConfig(
        steps=30,
        batch=8,
        length=8,
        learning_rate=3e-2,
        alternations=2,
        scheme=str(scheme),
        weights=str(weights),
        data=str(tmp_path / "texts"),
        out=tmp_path / "out",
    )


def test_whole_demo(tiny):
    shown = io.StringIO()
    report = run(tiny, Console(file=shown, width=100))
    assert {path.name for path in tiny.out.iterdir()} == {
        "report.json",
        "scheme.yaml",
        "trained.png",
    }
    assert (tiny.out / "trained.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((tiny.out / "scheme.yaml").read_text())["name"] == "tiny"
    assert "held-out accuracy" in shown.getvalue() and "times as fast" in shown.getvalue()

    full, sparse = report.full, report.sparse
    assert report.held_out_texts == 12
    assert full.first_loss == pytest.approx(sparse.first_loss, rel=1e-5)
    assert full.accuracy > 0.8 and sparse.accuracy > 0.8
    assert full.parameters.trained == full.parameters.size == sparse.parameters.size
    # Nine biases of layer 1, half of the 16 inputs of its 16x24 kernel, the classifier.
    assert sparse.parameters.trained == (7 * 16 + 24) + 8 * 24 + (16 * 2 + 2)
    assert sparse.flops < full.flops
    assert sparse.optimizer_bytes < full.optimizer_bytes
    assert sparse.training_bytes < full.training_bytes

    written = json.loads((tiny.out / "report.json").read_text())
    assert written["sparse"]["accuracy"] == sparse.accuracy
    assert len(written["timing"]["sparse_seconds"]) == tiny.alternations


@pytest.mark.parametrize("missing", ["weights", "data", "scheme"])
def test_missing_input_is_named_before_anything_starts(tiny, missing):
    config = dataclasses.replace(tiny, **{missing: "/nowhere"})
    with pytest.raises((RuntimeError, FileNotFoundError), match="/nowhere"):
        run(config, Console(file=io.StringIO()))


def test_scheme_that_does_not_fit_is_explained_before_anything_starts(tiny, tmp_path):
    scheme = {"rules": [{"path": "blocks/0/.*", "train": "all"}]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(scheme))
    with pytest.raises(MaskError, match="blocks/0/"):
        run(tiny, Console(file=io.StringIO()))
    assert not any(tiny.out.iterdir())


def _job(config, folder) -> Job:
    return Job("full", config, ("a", "b"), folder, folder, folder, folder)


def test_failed_child_is_explained(tiny, tmp_path):
    log = tmp_path / "full.log"
    with Progress(console=Console(file=io.StringIO())) as progress:
        with pytest.raises(DemoError, match=r"(?s)full: FileNotFoundError.*config.json.*full.log"):
            run_job(_job(tiny, tmp_path), log, progress, "full")
    assert "Traceback" in log.read_text()


def test_killed_child_is_explained(tiny, tmp_path):
    def kill() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        pid = children[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with Progress(console=Console(file=io.StringIO())) as progress:
        with pytest.raises(DemoError, match="smaller --batch"):
            run_job(_job(tiny, tmp_path), tmp_path / "log", progress, "full")
    killer.join()


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch": -1}, {"held_out": 1.0}, {"learning_rate": 0.0}]
)
def test_impossible_choices_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DemoConfig(**wrong)


def test_shipped_scheme_is_found_by_name():
    assert yaml.safe_load(scheme_file("minilm").read_text())["name"] == "minilm"


def test_unknown_scheme_lists_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match="minilm"):
        scheme_file("maxilm")


def test_peak_memory_counts_what_is_gone_again():
    with PeakMemory() as memory:
        np.ones(8_000_000).sum()  # 64 MB
    assert 60e6 < memory.growth < 80e6


def test_sampled_memory_agrees_with_the_kernel():
    _return_freed_memory()  # what other tests have freed would be used unseen
    sampler = _Sampler()
    before = sampler.peak
    sampler.start()
    block = np.ones(8_000_000)
    time.sleep(0.05)
    del block
    assert 55e6 < sampler.stop() - before < 90e6


def test_ratios_pair_neighbours():
    assert TimingResult((4.0, 6.0), (2.0, 2.0)).ratios == (2.0, 3.0)


def test_plot_has_a_cell_for_each_parameter():
    rows = (
        Row("embeddings/word/embedding", (4, 2), None),
        Row("layers/0/up/kernel", (2, 8), (2, 4)),
        Row("layers/1/up/kernel", (2, 8), (2, 8)),
        Row("classifier/bias", (3,), (3,)),
    )
    axes = plot_trained(Description(rows), title="small").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        *("embeddings", "0", "1", "classifier")
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("word/embedding", "up/kernel", "bias")
    ]
    assert [text.get_text() for text in axes.texts] == ["50%"]


@pytest.mark.slow
def test_real_demo(minilm, bbc_news, tmp_path):
    report = run(DemoConfig(out=tmp_path), Console(file=io.StringIO()))
    full, sparse = report.full, report.sparse
    assert full.accuracy > 0.94
    assert sparse.accuracy > full.accuracy - 0.02
    assert np.median(report.timing.ratios) > 1.3
    for result in (full, sparse):  # what XLA promises and what the system saw
        assert result.measured_bytes == pytest.approx(result.training_bytes, rel=0.3)
