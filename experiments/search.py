"""Schemes found under a budget beside published and random ones; and what sensitivity tells.

``python -m experiments.search`` fine-tunes, for each task,

- random masks of any size, and compares the accuracy that each reaches with its summed sensitivity
  by every criterion (``masks``);
- what `pj.search` finds in the memory of the published scheme, the published scheme itself, and
  random masks that fill the same memory (``compare``).

The new classifier is trained alone before anything is measured: of a random classifier, gradients
say nothing of the layers below. Every result is kept in ``<out>/<task>.json`` as soon as it is
there: an interrupted run goes on where it was. The tables are ``<out>.md``.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
from pockjax.selection import Found, Search, Sensitivity, Unit

BESIDE = [("classifier/.*", "all")]
CRITERIA = ("fisher", "taylor", "gradnorm", "snr", "magnitude", "random")


@dataclass(frozen=True)
class Setting:
    """A model and its data.

    Attributes:
        model: name of the model.
        data: folder or name of the data.
        published: the scheme to stand beside.
        size: pixels of an image's side, or tokens of a text.
        batch: examples in a batch.
        learning_rate: of Adam.
    """

    model: str
    data: str
    published: str
    size: int
    batch: int
    learning_rate: float


SETTINGS = {
    "mobilenet-clothing": Setting(
        "mobilenet_v2", "images/clothing/train", "mobilenet_v2", 96, 16, 3e-4
    ),
    "minilm-bbc": Setting("all-minilm-l6-v2", "bbc-news", "minilm", 64, 8, 2e-4),
}


@dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        tasks: of ``SETTINGS``.
        parts: ``masks``, ``compare``.
        criteria: what random masks are compared by.
        criterion: what the search maximises.
        budgets: of memory, beside that of the published scheme; fractions of full backpropagation.
        steps: of each fine-tuning.
        warm: steps in which the new classifier is trained alone before.
        seeds: number of seeds of each comparison, and of random masks at a budget.
        masks: random masks of any size.
        examples: held-out examples at most.
        data: folder with data sets that are no source of the hub.
        out: folder for the results.
    """

    tasks: tuple[str, ...] = tuple(SETTINGS)
    parts: tuple[str, ...] = ("masks", "compare")
    criteria: tuple[str, ...] = CRITERIA
    criterion: str = "fisher"
    budgets: tuple[str, ...] = ()
    steps: int = 60
    warm: int = 100
    seeds: int = 3
    masks: int = 30
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
        self.tx = optax.adam(self.setting.learning_rate)
        self.batches = self.task.batches(size=self.setting.batch, count=8, seed=0)
        self.params = self._trained(self._step(BESIDE, optax.adam(1e-3)), 99, config.warm)

    def _step(self, rules: Any, tx: optax.GradientTransformation, **options: Any) -> Any:
        params = self.task.params
        mask = pj.mask(params, rules)
        return pj.compile(self.task.loss, mask, tx, params, *self.batches[0], **options)

    def _trained(self, step: Any, seed: int, count: int, params: Any = None) -> Any:
        state = step.init(self.task.params if params is None else params)
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

    def reached(self, rules: Any, seeds: Sequence[int], remat: Any = False) -> dict[str, Any]:
        """What fine-tuning a mask reaches, for each seed, and the memory of its compiled step."""
        step = self._step(rules, self.tx, remat=remat)
        runs = [
            self.judged(self._trained(step, seed, self.config.steps, self.params)) for seed in seeds
        ]
        return {
            "accuracy": [run["accuracy"] for run in runs],
            "loss": [run["loss"] for run in runs],
            "memory": step.report.compiled.total_bytes,
        }

    def sensitivity(self, criterion: str) -> Sensitivity:
        """Sensitivities by a criterion, measured once."""
        path = self.config.out / self.name / f"{criterion}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            sens = pj.sensitivity(
                self.task.loss, self.params, self.batches, criterion, tx=self.tx, steps=8,
                beside=BESIDE, progress=False,
            )  # fmt: skip
            sens.save(path)
        return Sensitivity.load(path)

    @property
    def key(self) -> str:
        """What results of fine-tuning depend on."""
        return f"{self.config.warm}+{self.config.steps} steps"

    def masks(self) -> None:
        """Random masks of any size, and what they reach."""
        units = pj.units(self.task.loss, self.task.params, *self.batches[0])
        by_group: dict[str, list[Unit]] = {}
        for unit in units:
            if not any(path.startswith("classifier/") for path, _ in unit.entries) or (
                unit.kind == "bias"
            ):
                by_group.setdefault(unit.group, []).append(_without_classifier(unit))
        self.results.get(f"start, {self.key}", lambda: self.judged(self.params))
        for number in range(self.config.masks):
            generator = np.random.default_rng([7, number])
            share = generator.uniform(0.05, 0.5)
            chosen = [
                members[int(generator.integers(len(members)))]
                for members in by_group.values() if generator.random() < share
            ]  # fmt: skip
            chosen = [unit for unit in chosen if unit.entries]
            mask = pj.union(self.task.params, [_classifier(self.task.params), *chosen])
            self.results.get(
                f"mask {number}, {self.key}",
                lambda mask=mask, chosen=chosen: {
                    "units": [unit.name for unit in chosen], **self.reached(mask, [0]),
                },
            )  # fmt: skip
        for criterion in self.config.criteria:
            self.sensitivity(criterion)

    def compare(self) -> None:
        """Found, published and random masks at one budget."""
        seeds, get = range(self.config.seeds), self.results.get
        rules = f"configs/schemes/{self.setting.published}.yaml"
        get(f"start, {self.key}", lambda: self.judged(self.params))
        published = get(f"published, {self.key}", lambda: self.reached(rules, seeds))
        get(f"full, {self.key}", lambda: self.reached([(".*", "all")], seeds))
        sens = self.sensitivity(self.config.criterion)
        search = Search(
            self.task.loss, self.params, self.batches[0], sens, tx=self.tx, beside=BESIDE,
            remat=False,
        )  # fmt: skip
        for budget in (published["memory"], *self.config.budgets):
            label = budget if isinstance(budget, str) else "as published"

            def found(solver: str, seed: int, budget: Any = budget) -> dict[str, Any]:
                options = {"evaluations": 1} if solver == "random" else {}
                made = search.find(
                    pj.Budget(memory=budget), solver=solver, seed=seed, solver_options=options
                )
                return _described(made)

            name = f"{self.config.criterion} {label}"
            scheme = get(f"scheme {name}", lambda f=found: f("milp", 0))
            mask = pj.Scheme.parse(scheme["scheme"])
            get(f"found {name}, {self.key}", lambda m=mask: self.reached(m, seeds))
            for draw in seeds:
                name = f"random {draw} {label}"
                scheme = get(f"scheme {name}", lambda f=found, d=draw: f("random", d))
                mask = pj.Scheme.parse(scheme["scheme"])
                get(f"{name}, {self.key}", lambda m=mask: self.reached(m, seeds))


def _without_classifier(unit: Unit) -> Unit:
    entries = tuple(e for e in unit.entries if not e[0].startswith("classifier/"))
    return Unit(unit.name, unit.group, unit.kind, entries, unit.depth)


def _classifier(params: Any) -> Unit:
    entries = tuple((f"classifier/{name}", True) for name in ("kernel", "bias"))
    return Unit("classifier", "classifier", "weight", entries, 0)


def _described(found: Found) -> dict[str, Any]:
    notes = found.scheme.notes
    return {
        "scheme": str(found.scheme),
        "objective": found.objective,
        "memory": notes["compiled"]["memory"],
        "predicted": found.scheme.predicted["memory"],
        "limit": notes["limits"]["memory"],
        "compiled": notes["steps_compiled"],
        "units": notes["units"],
    }


def table(config: Config) -> str:
    """Everything that has been found so far, as Markdown."""
    lines = []
    for name in config.tasks:
        path = config.out / f"{name}.json"
        if not path.exists():
            continue
        rows, setting = json.loads(path.read_text()), SETTINGS[name]
        lines += [
            f"## {name}", "",
            f"Batches of {setting.batch}, size {setting.size}, Adam {setting.learning_rate}. "
            "Memory is XLA's total of the compiled step. Mean ± standard deviation over seeds.", "",
            "| what is trained | memory, MB | predicted, MB | held-out accuracy | held-out loss |",
            "|---|---:|---:|---:|---:|",
        ]  # fmt: skip
        for key, row in rows.items():
            if key.startswith(("scheme", "mask")):
                continue
            scheme = rows.get("scheme " + key.removeprefix("found ").rsplit(", ", 1)[0])
            sizes = [row.get("memory"), scheme and scheme["predicted"]]
            cells = ["-" if size is None else f"{size / 1e6:.1f}" for size in sizes]
            for measure in ("accuracy", "loss"):
                values = np.atleast_1d(row[measure])
                spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.3f}{spread}")
            lines.append(f"| {' | '.join([key, *cells])} |")
        masks = [row for key, row in rows.items() if key.startswith("mask ")]
        if len(masks) >= 5:
            lines += ["", *_correlations(config.out / name, masks)]
        lines.append("")
    return "\n".join(lines)


def _correlations(folder: Path, masks: list[dict[str, Any]]) -> list[str]:
    """How summed sensitivity goes with what random masks reached, for each criterion there is."""
    accuracy, loss = (np.array([row[k][0] for row in masks]) for k in ("accuracy", "loss"))
    lines = [
        f"Over {len(masks)} random masks, summed sensitivity and what was reached:", "",
        "| criterion | Pearson, accuracy | Spearman, accuracy | Spearman, −loss |",
        "|---|---:|---:|---:|",
    ]  # fmt: skip
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
        for part in config.parts:
            getattr(experiment, part)()
    text = table(config)
    print(text)
    with replacing(config.out.with_suffix(".md")) as path:
        path.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
