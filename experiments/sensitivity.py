"""What measuring sensitivities costs, for MobileNetV2 on photographs of clothing.

``python -m experiments.sensitivity`` measures and writes ``experiments/results/sensitivity.json``
Every part is kept as soon as it is there, and measured units in `work`, so an interrupted run
goes on where it was; ``--only`` names parts, ``--fresh`` forgets them.

Parts: ``classifier`` (prepares the network), ``timing`` (steps and candidates, on a quiet machine),
``finetune`` (all units), ``longer`` (some of them, for many more steps, and how both rank them),
``gradients`` (the cheap criteria beside fine-tuning).
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from scipy.stats import spearmanr

import pockjax as pj
from pockjax import models
from pockjax._files import replacing
from pockjax.data import evaluation_batches, read_images
from pockjax.models._preprocess import IMAGENET_MEAN, IMAGENET_STD
from pockjax.selection import Search, Sensitivity, Unit, sensitivity, units

SIDE, BATCH, EPOCHS = 128, 8, 10


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        data: folder of the photographs, with `train` and `validation`.
        out: where to write the figures.
        work: where units that were measured are kept.
        steps: of each fine-tuning.
        judged: held-out batches.
        seeds: how many.
        longer: steps of the longer runs.
        compared: how many units are run for longer.
        rate: of gradient descent.
        only: parts; all of them unless given.
        fresh: forget earlier parts.
    """

    data: Path = Path(os.environ.get("POCKJAX_DATA", "../shared/data")) / "images" / "clothing"
    out: Path = Path("experiments/results/sensitivity.json")
    work: Path = Path("runs/sensitivity")
    steps: int = 16
    judged: int = 16
    seeds: int = 3
    longer: int = 192
    compared: int = 16
    rate: float = 0.01
    only: tuple[str, ...] = ()
    fresh: bool = False


class Setup:
    """The network with a classifier of its own, and the photographs as batches."""

    def __init__(self, config: Config):
        """Nothing is loaded before it is needed."""
        self.config = config

    def batches(self, part: str) -> list[tuple[Any, ...]]:
        """The photographs of a part, shuffled, in batches of one size."""
        images = read_images(
            self.config.data / part, size=SIDE, resize=SIDE, mean=IMAGENET_MEAN, std=IMAGENET_STD
        )
        order = np.random.default_rng(0).permutation(len(images)).tolist()
        found = evaluation_batches(images.take(order), size=BATCH)
        return [tuple(batch) for batch, count in found if count == BATCH]

    @cached_property
    def train(self) -> list[Any]:
        """Batches to learn from."""
        return self.batches("train")

    @cached_property
    def held_out(self) -> list[Any]:
        """Batches to judge by."""
        return self.batches("validation")[: self.config.judged]

    @cached_property
    def network(self) -> Any:
        """Its graph, parameters and statistics, the new classifier random."""
        return nnx.split(models.load("mobilenet_v2", classes=10), nnx.Param, ...)

    def loss(self, params: Any, images: Any, labels: Any) -> Any:
        """Mean cross entropy."""
        logits = nnx.merge(self.network[0], params, self.network[2])(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def accuracy(self, params: Any, images: Any, labels: Any) -> Any:
        """Share of the images that are recognised."""
        logits = nnx.merge(self.network[0], params, self.network[2])(images)
        return (logits.argmax(-1) == labels).mean()

    @cached_property
    def params(self) -> Any:
        """The pretrained parameters and a classifier that was trained on them alone."""
        params, kept = self.network[1], self.config.work / "classifier.npz"
        if kept.exists():
            with np.load(kept) as arrays:
                params["classifier"]["kernel"].set_value(arrays["kernel"])
                params["classifier"]["bias"].set_value(arrays["bias"])
            return jax.tree.map(np.asarray, params)
        mask = pj.mask(params, [("classifier/.*", "all")])
        prefix, suffix = pj.split(self.loss, mask)
        front = jax.jit(pj.rewrite(prefix, measure=False))
        features = [front(params, *batch) for batch in self.train[:128]]
        step = pj.compile(suffix, mask, optax.adam(1e-3), params, features[0])
        state = step.init(params)
        for _ in range(3):
            for batch in features:
                state, _ = step(state, batch)
        classifier = state.params["classifier"]
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as path:
            np.savez(path, kernel=classifier["kernel"][...], bias=classifier["bias"][...])
        return jax.tree.map(np.asarray, state.params)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units of the network."""
        return units(self.loss, self.params, *self.train[0])

    def measure(self, criterion: str, chosen: Any = None, **options: Any) -> Sensitivity:
        """Sensitivities of some units, or of all."""
        options = {"steps": self.config.steps, "seeds": range(self.config.seeds)} | options
        return sensitivity(
            self.loss,
            self.params,
            self.train,
            criterion,
            units=self.units if chosen is None else chosen,
            held_out=self.held_out,
            tx=optax.sgd(self.config.rate),
            **options,
        )


def classifier(setup: Setup) -> dict[str, float]:
    """How good the network is to begin with: its classifier trained, nothing else."""
    judge = jax.jit(pj.rewrite(setup.accuracy, measure=False))
    found = [float(judge(setup.params, *batch)) for batch in setup.batches("validation")]
    return {"accuracy": float(np.mean(found))}


def timing(setup: Setup) -> dict[str, float]:
    """Seconds of steps and of candidates. To be run on a quiet machine."""
    from pockjax.selection._candidates import Program, Trial

    params, batch, config = setup.params, setup.train[0], setup.config
    scheme = pj.mask(params, "configs/schemes/mobilenet_v2.yaml")
    found = {"steps_of_an_epoch": float(len(setup.train))}
    for name, mask in (("sparse", scheme), ("full", True)):
        step = pj.compile(setup.loss, mask, optax.sgd(config.rate), params, *batch)
        state = step.init(params)
        times = []
        for k in range(60):
            start = time.perf_counter()
            state, metrics = step(state, *setup.train[k])
            jax.block_until_ready(metrics.loss)
            times.append(time.perf_counter() - start)
        found[f"{name}_step_s"] = float(np.median(times[5:]))
    trial = Trial(
        setup.loss, None, params, optax.sgd(config.rate), (),
        tuple(unit.entries for unit in setup.units),
        (tuple(setup.train[: config.steps]),), tuple(setup.held_out),
    )  # fmt: skip
    program, start = Program(trial), time.perf_counter()
    program.scores(0, [-1])
    found["compile_s"] = time.perf_counter() - start
    some = np.linspace(0, len(setup.units) - 1, 24).astype(int).tolist()
    start = time.perf_counter()
    program.scores(0, some)
    found["candidate_s"] = (time.perf_counter() - start) / len(some)
    run = EPOCHS * found["steps_of_an_epoch"] * found["sparse_step_s"]
    for seeds in (1, config.seeds):
        cost = found["compile_s"] + seeds * (len(setup.units) + 1) * found["candidate_s"]
        found[f"finetune_over_sparse_run_{seeds}_seeds"] = cost / run
    found["units"] = float(len(setup.units))
    epoch = found["steps_of_an_epoch"] * found["full_step_s"]
    for criterion in ("fisher", "taylor"):
        start = time.perf_counter()
        setup.measure(criterion, seeds=[0], progress=False)
        found[f"{criterion}_s"] = time.perf_counter() - start
        found[f"{criterion}_over_full_epoch"] = found[f"{criterion}_s"] / epoch
    # What follows measuring: a choice in the memory of the published scheme, compiled.
    memory = pj.compile(
        setup.loss, scheme, optax.sgd(config.rate), params, *batch, rewrites="guessed"
    )
    budget = pj.Budget(memory=memory.report.compiled.total_bytes)
    sens, start = setup.measure("taylor", seeds=[0], progress=False), time.perf_counter()
    options = {"tx": optax.sgd(config.rate), "rewrites": "guessed"}
    made = Search(setup.loss, params, batch, sens, **options).find(budget)
    found["search_s"] = time.perf_counter() - start
    found["search_compiled"] = float(len(made.attempts))
    found["search_over_full_epoch"] = found["search_s"] / epoch
    return found


def finetune(setup: Setup) -> dict[str, Any]:
    """All units."""
    start = time.perf_counter()
    found = setup.measure("finetune", folder=setup.config.work)
    found.save(setup.config.out.with_name("sensitivity_mobilenet_v2.json"))
    table = [rank_correlation(a, b) for a, b in _pairs(found.values)]
    best = np.argsort(-found.mean)[:10]
    return {
        "seconds_here": time.perf_counter() - start,
        "units": len(found.units),
        "rank_correlation_between_seeds": table,
        "best": {found.units[k].name: float(found.mean[k]) for k in best},
        "depthwise_mean": _mean(found, lambda u: u.depthwise and u.ratio == 1),
        "expand_mean": _mean(found, lambda u: "expand/conv" in u.name and u.ratio == 1),
        "project_mean": _mean(found, lambda u: "project/conv" in u.name and u.ratio == 1),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's."""
    return float(np.asarray(spearmanr(a, b))[0])


def _mean(found: Sensitivity, holds: Callable[[Unit], bool]) -> float:
    return float(np.mean([x for x, u in zip(found.mean, found.units, strict=True) if holds(u)]))


def _pairs(values: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(values[i], values[j]) for i in range(len(values)) for j in range(i)]


def longer(setup: Setup) -> dict[str, float]:
    """Whether short runs rank units as longer ones do."""
    config = setup.config
    places = np.linspace(0, len(setup.units) - 1, config.compared, dtype=int)
    some = [setup.units[k] for k in places]
    short = setup.measure("finetune", some, folder=config.work)
    long = setup.measure("finetune", some, folder=config.work, steps=config.longer, seeds=[0])
    return {
        "units": float(len(some)),
        "short_steps": float(config.steps),
        "long_steps": float(config.longer),
        "spearman": rank_correlation(short.mean, long.mean),
        "spearman_of_one_seed": rank_correlation(short.values[0], long.mean),
    }


def gradients(setup: Setup) -> dict[str, float]:
    """How the cheap criteria rank units, beside the gain of fine-tuning them."""
    table = setup.measure("finetune", folder=setup.config.work)
    weights = [k for k, unit in enumerate(setup.units) if unit.kind == "weight"]
    found = {}
    for criterion in ("fisher", "taylor", "gradnorm", "snr", "magnitude", "random"):
        other = setup.measure(criterion, seeds=[0], progress=False)
        found[criterion] = rank_correlation(table.mean[weights], other.mean[weights])
    return found


PARTS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "classifier": classifier,
    "timing": timing,
    "finetune": finetune,
    "longer": longer,
    "gradients": gradients,
}


def main(config: Config) -> None:
    """Measures what is not there yet, and writes all of it."""
    found: dict[str, Any] = {}
    if config.out.exists() and not config.fresh:
        found = json.loads(config.out.read_text())
    setup = Setup(config)
    for name, part in PARTS.items():
        if name in found or (config.only and name not in config.only):
            continue
        found[name] = part(setup)
        print(name, json.dumps(found[name], indent=1), flush=True)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(config.out) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
