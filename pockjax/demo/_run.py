"""The demo from beginning to end."""

import dataclasses
import tempfile
from pathlib import Path
from typing import cast

import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import pockjax as pj
from pockjax import hub
from pockjax._downloads import download_bar
from pockjax.data import Encoded, encode, read_folders, split
from pockjax.demo._config import DemoConfig, Job, scheme_file
from pockjax.demo._processes import run_job
from pockjax.demo._report import Report
from pockjax.demo._results import TimingResult, TrainingResult
from pockjax.models import Bert, BertConfig


def run(config: DemoConfig, console: Console | None = None) -> Report:
    """Fine-tune twice, time both steps, show the comparison and write it to `config.out`.

    Args:
        config: What to do.
        console: Where to show it; the terminal unless given.

    Raises:
        HubError: The weights or the texts could not be fetched.
        MissingExtraError: `pip install 'pockjax[cli,text]'` is needed.
        FileNotFoundError: A given scheme, weights or data does not exist.
        ValueError: There are too few texts, one is in two classes, or the scheme does not fit.
        DemoError: A training process failed or was killed.
    """
    console = console or Console()
    scheme = scheme_file(config.scheme)
    config.out.mkdir(parents=True, exist_ok=True)
    weights, texts = (_fetch(source, console) for source in (config.weights, config.data))

    corpus = read_folders(texts)
    _check_fit(scheme, weights, classes=len(corpus.classes))
    parts = split(corpus, held_out=config.held_out, seed=config.seed)
    train, test = (encode(part, weights / "tokenizer.json", length=config.length) for part in parts)
    if len(train) < config.batch or not len(test):
        raise ValueError(
            f"{len(train)} texts to train on and {len(test)} held out are too few for batches of "
            f"{config.batch}; change batch or held_out"
        )
    console.print(
        f"{len(train)} texts to train on, {len(test)} held out, "
        f"{len(corpus.classes)} classes: {', '.join(corpus.classes)}"
    )
    with tempfile.TemporaryDirectory(prefix="pockjax-") as scratch, _steps(console) as progress:
        job = Job(
            mode="full",
            config=config,
            classes=corpus.classes,
            weights=weights,
            scheme=scheme,
            train=_save(train, Path(scratch) / "train.npz"),
            test=_save(test, Path(scratch) / "test.npz"),
        )

        def done(mode: str, title: str) -> TrainingResult | TimingResult:
            log = config.out / f"{mode}.log"
            return run_job(dataclasses.replace(job, mode=mode), log, progress, title)

        full = cast(TrainingResult, done("full", "full"))
        sparse = cast(TrainingResult, done("sparse", "sparse"))
        timing = cast(TimingResult, done("compare", "both"))

    report = Report(config, scheme, len(train), len(test), full, sparse, timing)
    files = report.write(config.out)
    console.print(report.table())
    console.print(report.remark())
    console.print("Written: " + ", ".join(map(str, files)))
    return report


def _check_fit(scheme: Path, weights: Path, *, classes: int) -> None:
    """Find out from shapes alone, before minutes are spent, whether the scheme fits the model."""
    config = BertConfig.from_json(weights / "config.json", classes=classes)
    model = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    pj.mask(nnx.state(model, nnx.Param), scheme)


def _fetch(source: str, console: Console) -> Path:
    with download_bar(source, console) as progress:
        return hub.fetch(source, progress=progress)


def _steps(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<7}{task.fields[stage]:<15}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]:<11}"),
        TimeRemainingColumn(),
        console=console,
    )


def _save(data: Encoded, file: Path) -> Path:
    np.savez(file, tokens=data.tokens, valid=data.valid, labels=data.labels)
    return file
