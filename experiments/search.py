"""Schemes found under a budget beside published and random ones; and what sensitivity tells.

``python -m experiments.search`` fine-tunes, for each task,

- full backpropagation, the published scheme, what `pj.search` finds in the memory of that scheme,
  and what it finds there where every unit is worth a random number (``compare``);
- random masks of any size (``masks``);

and compares the accuracy that random masks reach with their summed sensitivity by every criterion:
among masks of any size, and among those of one size, where larger is not simply better.

Everything is trained at several learning rates, and counts at its best. The new classifier is
trained alone before anything is measured: of a random classifier, gradients say nothing of the
layers below. Every result is kept in ``<out>/<task>.json`` as soon as it is there: an interrupted
run goes on where it was. The tables are ``<out>.md``.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from scipy.stats import pearsonr, spearmanr

import pockjax as pj
from pockjax._files import replacing
from pockjax._tasks import Task, arguments, classification
from pockjax.data import evaluation_batches, training_batches
from pockjax.selection import Search, Sensitivity, Unit

BESIDE = [("classifier/.*", "all")]
OPTIONS: dict[str, Any] = {"rewrites": "guessed"}  # nothing is timed: the same on any machine
CRITERIA = ("finetune", "fisher", "taylor", "gradnorm", "snr", "magnitude", "random")
RATES = (1e-4, 3e-4)


@dataclass(frozen=True)
class Setting:
    """A model and its data.

    Attributes:
        model: name of the model.
        data: folder or name of the data.
        published: the scheme to stand beside.
        size: pixels of an image's side, or tokens of a text.
        batch: examples in a batch.
        warm: steps in which the new classifier is trained alone before.
        steps: of each fine-tuning.
    """

    model: str
    data: str
    published: str
    size: int
    batch: int
    warm: int
    steps: int


SETTINGS = {
    "mobilenet-clothing": Setting(
        "mobilenet_v2", "images/clothing/train", "mobilenet_v2", 96, 16, 100, 100
    ),
    "minilm-bbc": Setting("all-minilm-l6-v2", "bbc-news", "minilm", 64, 8, 20, 40),
}


@dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        tasks: of ``SETTINGS``.
        parts: ``compare``, ``masks``.
        criteria: what random masks are compared by.
        searched: what searches maximise.
        seeds: runs of the full, the published and the found masks.
        masks: random masks of any size.
        random: random masks in the memory of the published scheme.
        examples: held-out examples at most.
        data: folder with data sets that are no source of the hub.
        out: folder for the results.
    """

    tasks: tuple[str, ...] = tuple(SETTINGS)
    parts: tuple[str, ...] = ("compare", "masks")
    criteria: tuple[str, ...] = CRITERIA
    searched: tuple[str, ...] = ("finetune", "fisher")
    seeds: int = 3
    masks: int = 30
    random: int = 12
    examples: int = 512
    data: Path = Path(os.environ.get("POCKJAX_DATA", "../shared/data"))
    out: Path = Path("experiments/results/search")


class Results:
    """Results by name, in a file that is written anew with each."""

    def __init__(self, path: Path):
        """Read what there is."""
        self.path = path
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """A result; made if it is not there."""
        if name not in self.rows:
            self.rows[name] = make()
            print(f"{self.path.stem}: {name}: {json.dumps(self.rows[name])[:160]}", flush=True)
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(self.rows, indent=1) + "\n")
        return self.rows[name]


class Experiment:
    """One task."""

    def __init__(self, name: str, config: Config):
        """Load the task, and train its classifier."""
        self.name, self.config, self.setting = name, config, SETTINGS[name]
        folder = config.data / self.setting.data
        source = str(folder) if folder.is_dir() else self.setting.data
        self.task: Task = classification(self.setting.model, source, size=self.setting.size, seed=0)
        self.results = Results(config.out / f"{name}.json")
        # One compiled step serves all rates.
        self.tx = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
        self.batches = self.task.batches(size=self.setting.batch, count=16, seed=0)
        self._searches: list[Search] = []
        warm = self._step(BESIDE)
        self.params = self._trained(warm, 1e-3, 99, self.setting.warm, self.task.params)

    def _step(self, rules: Any) -> pj.Step:
        params = self.task.params
        return pj.compile(
            self.task.loss, pj.mask(params, rules), self.tx, params, *self.batches[0], **OPTIONS
        )

    def _trained(self, step: pj.Step, rate: float, seed: int, count: int, params: Any) -> Any:
        state = step.init(params)
        state.opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
        loader = training_batches(self.task.train, size=self.setting.batch, seed=seed)
        for _ in range(count):
            state, _ = step(state, *arguments(next(loader)))
        return state.params

    @cached_property
    def _held_out(self) -> list[Any]:
        test = self.task.test
        test = test.take(np.arange(min(self.config.examples, len(test))))
        pairs = evaluation_batches(test, size=self.setting.batch)
        return [tuple(map(jnp.asarray, arguments(b))) for b, n in pairs if n == self.setting.batch]

    @cached_property
    def _judge(self) -> Any:
        def judged(params: Any, *batch: Any) -> tuple[jax.Array, jax.Array]:
            *inputs, labels = batch
            logits = self.task.predict(params, *inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return (logits.argmax(-1) == labels).mean(), losses.mean()

        return jax.jit(pj.rewrite(judged, measure=False))

    def judged(self, params: Any) -> dict[str, float]:
        """Accuracy and loss on held-out examples."""
        found = np.mean([jax.device_get(self._judge(params, *b)) for b in self._held_out], axis=0)
        return {"accuracy": round(float(found[0]), 5), "loss": round(float(found[1]), 5)}

    def reached(self, rules: Any, seeds: Sequence[int], step: pj.Step | None = None) -> Any:
        """What fine-tuning a mask reaches, and the memory of its compiled step.

        Returns:
            ``accuracy`` and ``loss`` for each learning rate and seed; ``memory`` in bytes.
        """
        step = step or self._step(rules)
        runs = [
            [
                self.judged(self._trained(step, rate, seed, self.setting.steps, self.params))
                for seed in seeds
            ]
            for rate in RATES
        ]
        return {
            "accuracy": [[run["accuracy"] for run in row] for row in runs],
            "loss": [[run["loss"] for run in row] for row in runs],
            "memory": step.report.compiled.total_bytes,
        }

    def sensitivity(self, criterion: str) -> Sensitivity:
        """Sensitivities by a criterion, measured once."""
        path = self.config.out / self.name / f"{criterion}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            sens = pj.sensitivity(
                self.task.loss, self.params, self.batches[:8], criterion, tx=optax.adam(RATES[-1]),
                steps=16, held_out=self.batches[8:], beside=BESIDE, seeds=[0],
                folder=path.parent / "pieces",
            )  # fmt: skip
            sens.save(path)
        return Sensitivity.load(path)

    def masks(self) -> None:
        """Random masks of any size, and what they reach."""
        units = pj.units(self.task.loss, self.task.params, *self.batches[0])
        by_group: dict[str, list[Unit]] = {}
        for unit in map(_without_classifier, units):
            if unit.entries:
                by_group.setdefault(unit.group, []).append(unit)
        for number in range(self.config.masks):
            generator = np.random.default_rng([7, number])
            share = generator.uniform(0.05, 0.5)
            chosen = [
                members[int(generator.integers(len(members)))]
                for members in by_group.values() if generator.random() < share
            ]  # fmt: skip
            mask = pj.union(self.task.params, [_classifier(), *chosen])
            self.results.get(
                f"mask {number}",
                lambda mask=mask, chosen=chosen: {
                    "units": [unit.name for unit in chosen], **self.reached(mask, [0]),
                },
            )  # fmt: skip

    def compare(self) -> None:
        """Found, published and random masks at one budget."""
        seeds, get = range(self.config.seeds), self.results.get
        rules = f"configs/schemes/{self.setting.published}.yaml"
        get("start", lambda: {k: [[v]] for k, v in self.judged(self.params).items()})
        get("full", lambda: self.reached([(".*", "all")], seeds))
        published = get("published", lambda: self.reached(rules, seeds))
        budget = pj.Budget(memory=published["memory"])
        for criterion in self.config.searched:
            get(
                f"found by {criterion}",
                lambda c=criterion: self.found(self.sensitivity(c), budget, seeds),
            )
        units = self.sensitivity("random").units
        for draw in range(self.config.random):
            worth = np.random.default_rng([11, draw]).random((1, len(units)))
            sens = Sensitivity(units, worth, "random")
            get(f"random {draw}", lambda s=sens: self.found(s, budget, [0]))

    def _search(self, sens: Sensitivity) -> Search:
        for search in self._searches:
            with suppress(ValueError):  # of other units
                return search.by(sens)
        self._searches.append(Search(
            self.task.loss, self.params, self.batches[0], sens, tx=self.tx, beside=BESIDE,
            **OPTIONS,
        ))  # fmt: skip
        return self._searches[-1]

    def found(self, sens: Sensitivity, budget: pj.Budget, seeds: Sequence[int]) -> dict[str, Any]:
        """What is found under a budget, and what it reaches."""
        search, start = self._search(sens), time.monotonic()
        made = search.find(budget)
        seconds = time.monotonic() - start
        notes = made.scheme.notes
        return {
            "units": notes["units"], "objective": made.objective, "gap": made.gap,
            "predicted": made.scheme.predicted["memory"], "compiled": notes["steps_compiled"],
            "search_seconds": round(seconds, 1), "scheme": str(made.scheme),
            **self.reached(made.mask, seeds, made.step),
        }  # fmt: skip


def _without_classifier(unit: Unit) -> Unit:
    entries = tuple(e for e in unit.entries if not e[0].startswith("classifier/"))
    return Unit(unit.name, unit.group, unit.kind, entries, unit.depth)


def _classifier() -> Unit:
    entries = tuple((f"classifier/{name}", True) for name in ("kernel", "bias"))
    return Unit("classifier", "classifier", "weight", entries, 0)


class Best(NamedTuple):
    """What all seeds reached at the learning rate of the lowest loss."""

    accuracy: np.ndarray
    loss: np.ndarray
    rate: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Best":
        """The best of a row."""
        accuracy, loss = np.array(row["accuracy"]), np.array(row["loss"])
        k = int(np.nanargmin(loss.mean(axis=1)))
        return cls(accuracy[k], loss[k], RATES[k])


def _first_seeds(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and loss of each row with its first seed, at the best rate for that."""
    first = [{k: [rate[:1] for rate in row[k]] for k in ("accuracy", "loss")} for row in rows]
    found = [Best.of(row) for row in first]
    return np.array([one.accuracy[0] for one in found]), np.array([one.loss[0] for one in found])


def table(config: Config) -> str:
    """Everything that has been found so far, as Markdown."""
    lines = [
        "Everything was trained at the learning rates "
        f"{', '.join(f'{rate:g}' for rate in RATES)} of Adam, and counts at its best. Memory is "
        "XLA's total of the compiled step. Mean ± standard deviation: over seeds; for random masks "
        "over masks.", "",
    ]  # fmt: skip
    for name in SETTINGS:
        path = config.out / f"{name}.json"
        if path.exists():
            lines += _section(name, json.loads(path.read_text()), config)
    return "\n".join(lines)


def _section(name: str, rows: dict[str, Any], config: Config) -> list[str]:
    setting = SETTINGS[name]
    lines = [
        f"## {name}", "",
        f"Batches of {setting.batch}, size {setting.size}; {setting.warm} steps of the classifier "
        f"alone, then {setting.steps} steps.", "",
        "| what is trained | memory, MB | predicted, MB | held-out accuracy | held-out loss |"
        " learning rate |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    drawn = [row for key, row in rows.items() if key.startswith("random ")]
    single = {key: row for key, row in rows.items() if not key.startswith(("mask ", "random "))}
    for key, row in single.items():
        accuracy, loss, rate = Best.of(row)
        lines.append(_line(key, [row], accuracy, loss, "" if key == "start" else f"{rate:g}"))
    if drawn:
        accuracy, loss = _first_seeds(drawn)
        lines += [_line(f"{len(drawn)} random masks", drawn, accuracy, loss, ""), ""]
        for key, row in single.items():
            [own_accuracy], [own_loss] = _first_seeds([row])
            lines.append(
                f"- {key}, with the seed of the random masks: {own_accuracy:.3f}, more accurate "
                f"than {np.mean(accuracy < own_accuracy):.0%} of them; loss {own_loss:.3f}, lower "
                f"than {np.mean(loss > own_loss):.0%}."
            )
    anysize = [row for key, row in rows.items() if key.startswith("mask ")]
    for kind, masks in (("of any size", anysize), ("of one memory", drawn)):
        if len(masks) >= 10:  # of fewer, correlations say nothing
            lines += ["", f"{len(masks)} random masks {kind}, summed sensitivity and what was "
                      "reached:", "", *_correlations(config.out / name, masks)]  # fmt: skip
    return [*lines, ""]


def _line(
    key: str, rows: list[dict[str, Any]], accuracy: np.ndarray, loss: np.ndarray, rate: str
) -> str:
    cells = []
    for size in ("memory", "predicted"):
        found = [row[size] / 1e6 for row in rows if size in row]
        cells.append(f"{np.mean(found):.1f}" if found else "-")
    for values in (accuracy, loss):
        spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
        cells.append(f"{values.mean():.3f}{spread}")
    return f"| {' | '.join([key, *cells, rate])} |"


def _correlations(folder: Path, masks: list[dict[str, Any]]) -> list[str]:
    """How summed sensitivity goes with what random masks reached, for each criterion there is."""
    accuracy, loss = _first_seeds(masks)
    lines = [
        "| criterion | Pearson, accuracy | Spearman, accuracy | Spearman, −loss |",
        "|---|---:|---:|---:|",
    ]
    sums = {"number of units": np.array([len(row["units"]) for row in masks], float)}
    for path in sorted(folder.glob("*.json")):
        sens = Sensitivity.load(path)
        worth = {unit.name: float(x) for unit, x in zip(sens.units, sens.mean, strict=True)}
        sums[path.stem] = np.array([sum(worth[name] for name in row["units"]) for row in masks])
    for name, total in sums.items():
        cells = (pearsonr(total, accuracy)[0], spearmanr(total, accuracy)[0],
                 spearmanr(total, -loss)[0])  # fmt: skip
        lines.append(f"| {name} | {' | '.join(f'{x:.2f}' for x in cells)} |")
    return lines


def main(config: Config) -> None:
    """Run what is missing, and write the tables."""
    config.out.mkdir(parents=True, exist_ok=True)
    for name in config.tasks:
        experiment = Experiment(name, config)
        for criterion in config.criteria:
            experiment.sensitivity(criterion)
        for part in config.parts:
            getattr(experiment, part)()
    text = table(config)
    print(text)
    with replacing(config.out.with_suffix(".md")) as path:
        path.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
