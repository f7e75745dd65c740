"""Schemes found under a budget, beside the published one and random ones of the same budget.

``python -m experiments.search`` measures sensitivities, searches at each budget, checks the memory
of the compiled steps, fine-tunes with the found scheme, the published one and random masks, and for
many random masks compares summed sensitivity with the accuracy really reached. Every result is kept
in ``experiments/results/search/<task>.json`` as soon as it is there: an interrupted run goes on
where it was. The table is ``experiments/results/search/search.md``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from scipy.stats import pearsonr, spearmanr

import pockjax as pj
from pockjax._files import replacing
from pockjax._tasks import Task, arguments, classification
from pockjax.data import training_batches
from pockjax.selection import Found, Search, Sensitivity


@dataclass(frozen=True)
class Setting:
    """A model and its data.

    Attributes:
        model: name of the model.
        data: folder or name of the data.
        published: the scheme to stand beside.
        batch: examples in a batch.
        learning_rate: of Adam.
        budgets: of memory, as fractions of full backpropagation; the published scheme's own memory
            is one more.
    """

    model: str
    data: str
    published: str
    batch: int
    learning_rate: float
    budgets: tuple[str, ...]


SETTINGS = {
    "minilm-bbc": Setting("all-minilm-l6-v2", "bbc-news", "minilm", 16, 2e-4, ("35%", "50%")),
    "mobilenet-clothing": Setting(
        "mobilenet_v2", "images/clothing/train", "mobilenet_v2", 16, 1e-3, ("25%", "40%")
    ),
}


@dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        tasks: of ``SETTINGS``.
        data: folder with data sets that are no source of the hub.
        criterion: how sensitivity is measured.
        steps: of each fine-tuning.
        seeds: number of seeds of each comparison.
        masks: random masks whose accuracy is compared with their sensitivity.
        examples: held-out examples that accuracy is measured on.
        size: pixels of an image's side, or tokens of a text.
        out: folder for the results.
    """

    tasks: tuple[str, ...] = tuple(SETTINGS)
    data: Path = Path("../shared/data")
    criterion: str = "fisher"
    steps: int = 150
    seeds: int = 3
    masks: int = 30
    examples: int = 300
    size: int = 128
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


@dataclass(frozen=True, eq=False)
class Experiment:
    """One task."""

    setting: Setting
    config: Config
    task: Task
    results: Results

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer of every run."""
        return optax.adam(self.setting.learning_rate)

    def accuracy(self, mask: Any, remat: Any, seed: int) -> float:
        """Held-out accuracy after fine-tuning a mask."""
        task, config = self.task, self.config
        batches = training_batches(task.train, size=self.setting.batch, seed=seed)
        first = arguments(next(batches))
        step = pj.compile(task.loss, mask, self.tx, task.params, *first, remat=remat)
        state = step.init(task.params)
        for _ in range(config.steps):
            state, _ = step(state, *arguments(next(batches)))
        examples = min(config.examples, len(task.test))
        found = task.accuracy(state.params, size=self.setting.batch, examples=examples)
        jax.clear_caches()
        return found

    def compare(self, name: str, mask: Any, remat: Any = ()) -> list[float]:
        """Accuracies of a mask by each seed."""
        return [
            self.results.get(
                f"accuracy {name} seed {seed} steps {self.config.steps}",
                lambda seed=seed: self.accuracy(mask, remat, seed),
            )
            for seed in range(self.config.seeds)
        ]

    def memory(self, name: str, mask: Any) -> int:
        """Memory of a mask's compiled step."""
        batch = arguments(next(training_batches(self.task.train, size=self.setting.batch, seed=0)))

        def measured() -> int:
            step = pj.compile(self.task.loss, mask, self.tx, self.task.params, *batch)
            return step.report.compiled.total_bytes

        return self.results.get(f"memory {name}", measured)


def run(name: str, config: Config) -> None:
    """All of one task."""
    setting = SETTINGS[name]
    folder = config.data / setting.data
    source = str(folder) if folder.is_dir() else setting.data
    task = classification(setting.model, source, size=config.size, seed=0)
    experiment = Experiment(setting, config, task, Results(config.out / f"{name}.json"))
    params, results = task.params, experiment.results
    batches = task.batches(size=setting.batch, count=8, seed=0)
    beside = [("classifier/.*", "all")]
    sens = _sensitivity(experiment, batches, config.out / f"{name}-{config.criterion}.json")
    search = Search(task.loss, params, batches[0], sens, tx=experiment.tx, beside=beside)
    published = pj.mask(params, f"configs/schemes/{setting.published}.yaml")
    own = experiment.memory("published", published)
    budgets = {"published": own, **{budget: budget for budget in setting.budgets}}
    values = {unit.name: float(worth) for unit, worth in zip(sens.units, sens.mean, strict=True)}

    experiment.compare("full", True)
    experiment.compare("published", published)
    for label, memory in budgets.items():
        for kind, remat in (("found", True), ("found without remat", False)):
            if not remat and label != "published":
                continue
            chosen = search if remat else Search(
                task.loss, params, batches[0], sens, tx=experiment.tx, beside=beside, remat=False
            )  # fmt: skip
            scheme = results.get(
                f"{kind} {label}",
                lambda c=chosen, m=memory: _described(c.find(pj.Budget(memory=m))),
            )
            parsed = pj.Scheme.parse(scheme["scheme"])
            assert scheme["memory"] <= scheme["limit"], f"{label}: the budget is not kept"
            mask, plan = pj.mask(params, parsed), parsed.notes.get("remat", ())
            experiment.compare(f"{kind} {label}", mask, plan)
        for draw in range(config.seeds):
            scheme = results.get(
                f"random {draw} {label}",
                lambda m=memory, draw=draw: _described(
                    search.find(
                        pj.Budget(memory=m), solver="random", seed=draw,
                        solver_options={"evaluations": 1},
                    )
                ) | {"draw": draw},
            )  # fmt: skip
            parsed = pj.Scheme.parse(scheme["scheme"])
            mask, plan = pj.mask(params, parsed), parsed.notes.get("remat", ())
            results.get(
                f"accuracy random {label} seed {draw} steps {config.steps}",
                lambda mask=mask, plan=plan, draw=draw: experiment.accuracy(mask, plan, draw),
            )
    _rank(experiment, sens, values, config.masks)


def _sensitivity(experiment: Experiment, batches: list[Any], path: Path) -> Sensitivity:
    if path.exists():
        return Sensitivity.load(path)
    task, config = experiment.task, experiment.config
    sens = pj.sensitivity(
        task.loss, task.params, batches, config.criterion, tx=experiment.tx, steps=8, seeds=(0,),
        beside=[("classifier/.*", "all")], progress=False,
    )  # fmt: skip
    sens.save(path)
    return sens


def _described(found: Found) -> dict[str, Any]:
    notes = found.scheme.notes
    return {
        "scheme": str(found.scheme),
        "objective": found.objective,
        "gap": found.gap,
        "memory": notes["compiled"]["memory"],
        "predicted": found.scheme.predicted["memory"],
        "limit": notes["limits"]["memory"],
        "remat": len(found.remat),
        "compiled": notes["steps_compiled"],
        "units": notes["units"],
    }


def _rank(experiment: Experiment, sens: Sensitivity, values: dict[str, float], count: int) -> None:
    """Accuracy of random masks of any size, to stand beside their summed sensitivity."""
    task, results = experiment.task, experiment.results
    head = tuple((f"classifier/{name}", True) for name in ("kernel", "bias"))
    by_group: dict[str, list[pj.Unit]] = {}
    for unit in sens.units:
        entries = tuple(e for e in unit.entries if not e[0].startswith("classifier/"))
        if entries:
            stripped = pj.Unit(unit.name, unit.group, unit.kind, entries, unit.depth, unit.ratio)
            by_group.setdefault(unit.group, []).append(stripped)
    for number in range(count):
        generator = np.random.default_rng([7, number])
        share = generator.uniform(0.05, 0.5)
        chosen = [
            units[int(generator.integers(len(units)))]
            for units in by_group.values() if generator.random() < share
        ]  # fmt: skip
        always = pj.Unit("classifier", "classifier", "weight", head, 0)
        mask = pj.union(task.params, [always, *chosen])
        results.get(
            f"mask {number} steps {experiment.config.steps}",
            lambda mask=mask, chosen=chosen: {
                "sensitivity": sum(values[unit.name] for unit in chosen),
                "accuracy": experiment.accuracy(mask, (), 0),
            },
        )


def table(config: Config) -> str:
    """Everything that has been found so far, as Markdown."""
    lines = [
        f"Memory is XLA's total of the compiled step; accuracy is held-out, after {config.steps} "
        f"steps, mean ± standard deviation over seeds. Criterion: {config.criterion}.", "",
        "| task | what is trained | budget, MB | compiled, MB | predicted, MB | blocks again "
        "| sensitivity | accuracy |", "|---|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    notes = []
    for name in config.tasks:
        path = config.out / f"{name}.json"
        if not path.exists():
            continue
        rows = json.loads(path.read_text())
        budgets = ("published", *SETTINGS[name].budgets)
        kinds = ["full", "published"]
        kinds += [f"{k} {b}" for b in budgets for k in ("found", "found without remat", "random")]
        for kind in kinds:
            accuracies = [
                rows[key] for seed in range(config.seeds)
                if (key := f"accuracy {kind} seed {seed} steps {config.steps}") in rows
            ]  # fmt: skip
            label = kind.removeprefix("random ") if kind.startswith("random ") else None
            found = rows.get(kind) or rows.get(f"random 0 {label}")
            if not accuracies and not found:
                continue
            cells = [name, kind, "", "", "", "", ""]
            if kind == "published" and "memory published" in rows:
                cells[3] = f"{rows['memory published'] / 1e6:.1f}"
            if found:
                sizes = [found[k] / 1e6 for k in ("limit", "memory", "predicted")]
                cells[2:5] = [f"{size:.1f}" for size in sizes]
                cells[5:] = [str(found["remat"]), f"{found['objective']:.4g}"]
            shown = f"{np.mean(accuracies):.3f} ± {np.std(accuracies):.3f}" if accuracies else "-"
            lines.append(f"| {' | '.join([*cells, shown])} |")
        masks = [v for k, v in rows.items() if k.startswith("mask ")
                 and k.endswith(f"steps {config.steps}")]  # fmt: skip
        if len(masks) >= 5:
            x, y = ([mask[key] for mask in masks] for key in ("sensitivity", "accuracy"))
            notes.append(
                f"{name}: over {len(masks)} random masks, summed sensitivity and accuracy "
                f"correlate by {pearsonr(x, y)[0]:.2f} (Pearson) and {spearmanr(x, y)[0]:.2f} "
                "(Spearman)."
            )
    return "\n".join([*lines, "", *notes])


def main(config: Config) -> None:
    """Run what is missing, and write the table."""
    config.out.mkdir(parents=True, exist_ok=True)
    for name in config.tasks:
        run(name, config)
    text = table(config)
    print(text)
    with replacing(config.out / "search.md") as path:
        path.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
