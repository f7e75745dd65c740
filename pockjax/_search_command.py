"""`pockjax search`: from a configuration to a scheme."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import optax
import yaml
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from pockjax._extras import require
from pockjax._files import replacing
from pockjax._names import unknown_key
from pockjax._tasks import classification
from pockjax.selection import Budget, Found, Point, Search, Sensitivity, sensitivity, units
from pockjax.selection._budget import amount
from pockjax.selection.criteria import criterion_named
from pockjax.selection.solvers import SOLVERS


@dataclass(frozen=True)
class SearchConfig:
    """What to search for; the fields of a YAML file.

    Attributes:
        model: name of a model, see `pockjax models list`.
        budget: what a step may take, such as ``{memory: 48MiB, latency: 50%}``; see
            `pockjax.Budget`.
        data: folder with a folder of images, or of .txt files, for each class; of texts, BBC News
            unless given.
        weights: ``pretrained``, or as for `pockjax.models.load`.
        criterion: how sensitivity is measured.
        solver: how units are chosen.
        batch: examples in a batch.
        size: pixels of an image's side, or tokens of a text.
        ratios: of the channels of each weight that may be chosen.
        steps: batches that sensitivity is measured with, for each seed.
        seeds: of the measurement.
        learning_rate: of the optimizer, Adam, whose state counts.
        remat: whether the backward pass may compute blocks again.
        beside: pattern of the paths that are trained in any case: the new classifier.
        seed: for the split, the new classifier, and solvers that draw.
        points: budgets on the curve of what a budget buys; 0 for no curve.
        out: folder for the results.
    """

    model: str
    budget: Mapping[str, Any]
    data: str = ""
    weights: str = "pretrained"
    criterion: str = "fisher"
    solver: str = "milp"
    batch: int = 16
    size: int = 128
    ratios: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    steps: int = 8
    seeds: tuple[int, ...] = (0,)
    learning_rate: float = 1e-3
    remat: bool = False
    beside: str = "classifier/.*"
    seed: int = 0
    points: int = 8
    out: Path = field(default=Path("runs/search"))

    def __post_init__(self) -> None:
        """Read the budget, and make lists of YAML what they stand for."""
        if not isinstance(self.budget, Mapping):
            raise ValueError(f"budget must be a mapping such as {{memory: 48MiB}}: {self.budget!r}")
        _check_keys(self.budget, Budget, "budget")
        Budget(**self.budget)
        for name, kind in (("ratios", float), ("seeds", int)):
            try:
                object.__setattr__(self, name, tuple(map(kind, getattr(self, name))))
            except (TypeError, ValueError):
                raise ValueError(
                    f"{name} must be a list of numbers, got {getattr(self, name)!r}"
                ) from None
        if not all(0 < ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"ratios are above 0 and at most 1, got {list(self.ratios)}")
        if not isinstance(self.out, str | Path):
            raise ValueError(f"out must be a folder, got {self.out!r}")
        object.__setattr__(self, "out", Path(self.out))
        for name in ("batch", "size", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        # Before the sensitivity is measured, which takes minutes.
        criterion_named(self.criterion)
        SOLVERS[self.solver]

    @classmethod
    def load(cls, path: Path) -> "SearchConfig":
        """Read a configuration.

        Raises:
            ValueError: it is not one; the message says what is wrong with which field.
            OSError: it cannot be read.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(content, Mapping):
                raise ValueError(f"must be a mapping, got {type(content).__name__}")
            _check_keys(content, cls, "field")
            missing = [name for name in ("model", "budget") if name not in content]
            if missing:
                raise ValueError(f"{missing[0]} is missing")
            return cls(**content)
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def _check_keys(content: Mapping[str, Any], made_of: Any, what: str) -> None:
    problem = unknown_key(content, [f.name for f in dataclasses.fields(made_of)], what)
    if problem is not None:
        raise ValueError(problem)


def run(config: SearchConfig, console: Console) -> list[Path]:
    """Measure, search, write and show what was found.

    Returns:
        The files: scheme.yaml, sensitivity.json, sensitivity.png, report.md, and unless ``points``
        is 0 pareto.json and pareto.png.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    task = classification(
        config.model, config.data, weights=config.weights, size=config.size, seed=config.seed
    )
    batches = task.batches(size=config.batch, count=max(2, config.steps), seed=config.seed)
    tx, beside = optax.adam(config.learning_rate), [(config.beside, "all")]
    # The fine-tuning of the paper takes the same steps as the training to come.
    sens = sensitivity(
        task.loss, task.params, batches, config.criterion, tx=tx, steps=config.steps,
        units=units(task.loss, task.params, *batches[0], ratios=config.ratios),
        seeds=config.seeds, beside=beside, folder=config.out / "measured",
        progress=console.is_terminal,
    )  # fmt: skip
    sens.save(config.out / "sensitivity.json")
    with Progress(console=console, transient=True) as bar:
        shown: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bar.add_task(what, total=total)
            bar.update(shown[what], completed=done, total=total)

        search = Search(
            task.loss, task.params, batches[0], sens, tx=tx, beside=beside, remat=config.remat,
            progress=progress,
        )  # fmt: skip
        found = search.find(
            Budget(**config.budget), solver=config.solver, seed=config.seed,
            name=f"{config.model}-{config.criterion}", model=config.model,
        )  # fmt: skip
        quantity = next(iter(config.budget))
        curve = search.pareto(quantity, config.points) if config.points else []
    report = _report(config, found)
    paths = _write(config, sens, found, report, quantity, curve)
    console.print(Markdown(report))
    return paths


def _write(
    config: SearchConfig,
    sens: Sensitivity,
    found: Found,
    report: str,
    quantity: str,
    curve: list[Point],
) -> list[Path]:
    paths = [config.out / name for name in ("scheme.yaml", "sensitivity.json", "sensitivity.png")]
    found.scheme.save(paths[0])
    sens.plot(paths[2])
    paths.append(config.out / "report.md")
    with replacing(paths[-1]) as temporary:
        temporary.write_text(report + "\n")
    if curve:
        points, plot = config.out / "pareto.json", config.out / "pareto.png"
        with replacing(points) as temporary:
            rows = [dataclasses.asdict(point) for point in curve]
            temporary.write_text(
                json.dumps({"quantity": quantity, "points": rows}, indent=1) + "\n"
            )
        _draw(curve, found, quantity, plot)
        paths += [points, plot]
    return paths


def _report(config: SearchConfig, found: Found) -> str:
    notes = found.scheme.notes
    lines = [
        f"# What to train of {config.model}", "",
        f"Found by {config.solver} over {config.criterion}; jax {jax.__version__}, "
        f"{jax.default_backend()}.", "",
        "| | budget | predicted | compiled |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for name, limit in notes["limits"].items():
        predicted = found.scheme.predicted.get(name)
        cells = [name, amount(name, limit)]
        cells.append("-" if predicted is None else amount(name, predicted))
        lines.append(f"| {' | '.join([*cells, amount(name, notes['compiled'][name])])} |")
    again = f"{len(found.remat)} blocks" if found.remat else "nothing"
    lines += [
        "", f"Sensitivity {found.objective:.6g}, {len(found.units)} units; the backward pass "
        f"computes {again} again. Steps compiled: {notes['steps_compiled']}.", "",
        *(f"- `{unit.name}`" for unit in found.units), "", found.step.report.to_markdown(),
    ]  # fmt: skip
    return "\n".join(lines)


def _draw(curve: list[Point], found: Found, quantity: str, path: Path) -> None:
    """Draw the curve of what a budget buys, and what was found on it."""
    figure = require("matplotlib.figure", "cli").Figure(figsize=(6, 4), layout="constrained")
    require("matplotlib.backends.backend_agg", "cli").FigureCanvasAgg(figure)
    axes = figure.subplots()
    scale = {"latency": 1e-3, "flops": 1e9}.get(quantity, 2**20)
    unit = {"latency": "ms", "flops": "GFLOP"}.get(quantity, "MiB")
    axes.step([p.cost / scale for p in curve], [p.objective for p in curve], where="post")
    for remat, marker in ((False, "o"), (True, "s")):
        some = [p for p in curve if p.remat == remat]
        label = "blocks computed again" if remat else "nothing computed again"
        places = [p.cost / scale for p in some], [p.objective for p in some]
        axes.plot(*places, marker, color="C0", label=label, fillstyle="none" if remat else "full")
    compiled = found.scheme.notes["compiled"][quantity] / scale
    axes.plot(
        [compiled], [found.objective], "*", color="C1", markersize=12, label="found, compiled"
    )
    axes.set_xlabel(f"{quantity}, {unit}")
    axes.set_ylabel("summed sensitivity")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
