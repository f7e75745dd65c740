"""Show and write what the demo measured."""

import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from pockjax._files import replacing
from pockjax.demo._config import DemoConfig
from pockjax.demo._results import TimingResult, TrainingResult
from pockjax.masks import Description


@dataclass(frozen=True)
class Report:
    """One run of the demo.

    Attributes:
        config: What was chosen.
        scheme: The scheme file used.
        training_texts: Number of texts to train on.
        held_out_texts: Number of texts to measure accuracy on.
        full: Fine-tuning by full backpropagation.
        sparse: Fine-tuning by the scheme.
        timing: Both steps in turn.
    """

    config: DemoConfig
    scheme: Path
    training_texts: int
    held_out_texts: int
    full: TrainingResult
    sparse: TrainingResult
    timing: TimingResult

    def table(self) -> Table:
        """The comparison, for a terminal."""
        full, sparse = self.full, self.sparse
        table = Table(title="Full and sparse backpropagation")
        table.add_column("")
        for name in ("full", "sparse", "full ÷ sparse"):
            table.add_column(name, justify="right")

        def row(name: str, values: tuple[float, float], unit: str, scale: float) -> None:
            shown = [f"{value / scale:,.1f} {unit}" for value in values]
            ratio = f"{values[0] / values[1]:.2f}" if values[1] > 0 else "–"
            table.add_row(name, *shown, ratio)

        difference = 100 * (sparse.accuracy - full.accuracy)
        table.add_row(
            "held-out accuracy",
            f"{full.accuracy:.1%}",
            f"{sparse.accuracy:.1%}",
            f"{difference:+.1f} points",
        )
        trained = full.parameters.trained, sparse.parameters.trained
        row("parameters trained", trained, "M", 1e6)
        times = (full.step_seconds, sparse.step_seconds)
        row("step time, while training", times, "ms", 1e-3)
        row("operations a step", (full.flops, sparse.flops), "GFLOP", 1e9)
        for name in ("training", "measured", "optimizer", "residual"):
            sizes = getattr(full, f"{name}_bytes"), getattr(sparse, f"{name}_bytes")
            row(_MEMORY_ROWS[name], sizes, "MB", 1e6)
        return table

    def remark(self) -> str:
        """The fair comparison of step times, and what memory means, in two sentences."""
        low, middle, high = np.quantile(self.timing.ratios, [0.25, 0.5, 0.75])
        return (
            f"Timed in turn in one process, the sparse step is {middle:.2f} times as fast "
            f"(middle half {low:.2f} to {high:.2f} of {len(self.timing.ratios)} alternations). "
            f"Memory is what training adds to the {self.full.parameter_bytes / 1e6:.0f} MB of "
            "parameters."
        )

    def to_json(self) -> str:
        """Everything measured, with units in the names, and on what machine."""
        low, middle, high = np.quantile(self.timing.ratios, [0.25, 0.5, 0.75])
        content: dict[str, Any] = {
            "config": asdict(self.config),
            "machine": {
                "system": platform.platform(),
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "jax": jax.__version__,
                "backend": jax.default_backend(),
            },
            "texts": {"training": self.training_texts, "held_out": self.held_out_texts},
            "full": _summary(self.full),
            "sparse": _summary(self.sparse),
            "timing": asdict(self.timing)
            | {"times_faster": {"median": middle, "quartiles": [low, high]}},
        }
        return json.dumps(content, indent=2, default=str)

    def write(self, folder: Path) -> list[Path]:
        """Write report.json, scheme.yaml and trained.png, each whole or not at all.

        Returns:
            The three files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        report, scheme, plot = (
            folder / name for name in ("report.json", "scheme.yaml", "trained.png")
        )
        with replacing(report) as temporary:
            temporary.write_text(self.to_json() + "\n")
        with replacing(scheme) as temporary:
            shutil.copyfile(self.scheme, temporary)
        with replacing(plot) as temporary:
            figure = plot_trained(self.sparse.parameters, title=self.scheme.stem)
            figure.savefig(temporary, dpi=150)
        return [report, scheme, plot]


_MEMORY_ROWS = {
    "training": "training memory, compiled",
    "measured": "training memory, measured (RSS)",
    "optimizer": "  of it optimizer state",
    "residual": "  of it kept for backward, predicted",
}


def _summary(result: TrainingResult) -> dict[str, Any]:
    parameters = result.parameters
    return asdict(result) | {
        "training_bytes": result.training_bytes,
        "parameters": {
            "elements": parameters.size,
            "trained": parameters.trained,
            "rows": [asdict(row) for row in parameters if row.trained],
        },
    }


def plot_trained(parameters: Description, *, title: str) -> Figure:
    """Draw which fraction of each parameter is trained: kinds down, layers across.

    Args:
        parameters: What is trained. A number in a path is taken for the layer's.
        title: Stands above, with the totals.
    """
    cells = {_place(row.path): row.trained / row.size for row in parameters}
    columns = sorted({column for _, column in cells}, key=_column_order)
    # What stands in the first column comes first; kinds that all layers share stand together.
    first = {row: min(columns.index(c) for r, c in cells if r == row) for row, _ in cells}
    rows = sorted(first, key=lambda row: (first[row], row))
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), fraction in cells.items():
        grid[rows.index(row), columns.index(column)] = fraction

    figure = Figure(figsize=(3 + 0.6 * len(columns), 1.8 + 0.25 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    axes = figure.subplots()
    image = axes.pcolormesh(
        grid, cmap="Blues", vmin=0, vmax=1, edgecolor="lightgrey", linewidth=0.8
    )
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (row, column), fraction in np.ndenumerate(grid):
        if 0 < fraction < 1:
            color = "white" if fraction > 0.6 else "black"
            place = (column + 0.5, row + 0.5)
            axes.annotate(
                f"{fraction:.0%}", place, ha="center", va="center", fontsize=6, color=color
            )
    trained, size = parameters.trained, parameters.size
    axes.set_title(
        f"{title}: {trained / 1e6:.2f} of {size / 1e6:.2f} M parameters ({trained / size:.1%})",
        fontsize=9,
    )
    axes.set_xlabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes, label="fraction trained")
    return figure


def _place(path: str) -> tuple[str, str]:
    """The row and column of a parameter."""
    steps = path.split("/")
    numbers = [i for i, step in enumerate(steps) if step.isdecimal()]
    if numbers:
        return "/".join(steps[numbers[0] + 1 :]), steps[numbers[0]]
    return "/".join(steps[1:]) or path, steps[0]


def _column_order(column: str) -> tuple[bool, bool, int, str]:
    """What feeds the layers, the layers by number, what follows them."""
    number = int(column) if column.isdecimal() else 0
    return column in ("classifier", "head"), not column.startswith("embed"), number, column
