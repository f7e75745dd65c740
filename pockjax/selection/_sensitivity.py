"""What training each unit alone is worth, as a table that can be read, drawn and kept."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pockjax._extras import require
from pockjax._files import replacing
from pockjax.masks import Part
from pockjax.masks._train import normalise_train, parse_index
from pockjax.selection._units import Unit

_FIELDS = ("name", "group", "kind", "depth", "ratio", "axis", "grain", "macs", "depthwise")


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """A table of units and what each is worth.

    Attributes:
        units: the units.
        values: (seeds, units): the worth of each unit by each seed; the larger, the better.
        criterion: the name of the criterion.
        settings: how it was measured, for the record.
    """

    units: tuple[Unit, ...]
    values: np.ndarray
    criterion: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> np.ndarray:
        """(units,): the mean over the seeds."""
        return self.values.mean(axis=0)

    @property
    def spread(self) -> np.ndarray:
        """(units,): the standard deviation over the seeds."""
        return self.values.std(axis=0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON, or, if the path ends in ".parquet", as Parquet.

        Raises:
            ValueError: the path ends in something else.
            MissingExtraError: Parquet needs ``pip install 'pockjax[parquet]'``.
        """
        path = Path(path)
        rows = [_row(unit) for unit in self.units]
        head = {"criterion": self.criterion, "settings": self.settings}
        if path.suffix == ".json":
            for row, values in zip(rows, self.values.T.tolist(), strict=True):
                row["values"] = values
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({**head, "units": rows}, indent=1) + "\n")
        elif path.suffix == ".parquet":
            pa, pq = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
            for row, values in zip(rows, self.values.T.tolist(), strict=True):
                row |= {"values": values, "entries": json.dumps(row["entries"])}
            table = pa.Table.from_pylist(rows).replace_schema_metadata(
                {"pockjax": json.dumps(head)}
            )
            with replacing(path) as temporary:
                pq.write_table(table, temporary)
        else:
            raise ValueError(f"a table is kept as .json or .parquet, not as '{path.name}'")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Sensitivity":
        """Reads a table that `save` wrote.

        Raises:
            ValueError: the file holds no such table.
            OSError: it cannot be read.
        """
        path = Path(path)
        try:
            if path.suffix == ".parquet":
                table = require("pyarrow.parquet", "parquet").read_table(path)
                head = json.loads(table.schema.metadata[b"pockjax"])
                rows = [{**row, "entries": json.loads(row["entries"])} for row in table.to_pylist()]
            else:
                head = json.loads(path.read_text())
                rows = head["units"]
            values = np.array([row["values"] for row in rows], np.float64).T
            return cls(tuple(map(_unit, rows)), values, head["criterion"], head["settings"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"'{path}' holds no table of sensitivities: {error!r}") from error

    def __str__(self) -> str:
        """A table with one line for each unit, in the order of the units."""
        rows = [("unit", "ratio", "worth"), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def markdown(self) -> str:
        """The same table in Markdown."""
        rows = [("unit", "ratio", "worth"), ("---", "---:", "---:"), *self._cells()]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def __rich__(self) -> Any:
        """The same table for `rich`, the better a unit the brighter."""
        table = require("rich.table", "cli").Table(title=f"sensitivity by {self.criterion}")
        for name in ("unit", "ratio", "worth"):
            table.add_column(name, justify="left" if name == "unit" else "right")
        order = np.argsort(np.argsort(self.mean))
        for cells, rank in zip(self._cells(), order, strict=True):
            quarter = int(4 * rank // max(len(self.units), 1))
            table.add_row(*cells, style=("dim", "", "", "bold")[quarter])
        return table

    def _cells(self) -> list[tuple[str, str, str]]:
        return [
            (unit.name, f"{unit.ratio:.0%}", _pm(m, s))
            for unit, m, s in zip(self.units, self.mean, self.spread, strict=True)
        ]

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws what each weight is worth as bars, and the biases of the last k layers as a line.

        Both go from the input to the output; the bars of a weight stand for its ratios, the line is
        where the cumulative biases begin.

        Args:
            path: where to write the figure; the suffix says in which format.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            MissingExtraError: ``pip install 'pockjax[cli]'`` is needed.
        """
        figure_module = require("matplotlib.figure", "cli")
        weights = [k for k, unit in enumerate(self.units) if unit.kind != "bias"]
        biases = [k for k, unit in enumerate(self.units) if unit.kind == "bias"]
        layers = sorted(
            {self.units[k].group: self.units[k].depth for k in weights}.items(), key=lambda x: x[1]
        )
        place = {group: i for i, (group, _) in enumerate(layers)}
        figure = figure_module.Figure(figsize=(max(6.0, 0.22 * len(layers) + 2), 4.5))
        axes = figure.add_subplot()
        suffixes = {k: self.units[k].name.removeprefix(self.units[k].group) for k in weights}
        kinds = list(dict.fromkeys(suffixes.values()))
        for j, kind in enumerate(kinds):
            own = [k for k in weights if suffixes[k] == kind]
            width = 0.8 / len(kinds)
            axes.bar(
                [place[self.units[k].group] + (j - (len(kinds) - 1) / 2) * width for k in own],
                self.mean[own],
                width,
                yerr=self.spread[own] if len(self.values) > 1 else None,
                error_kw={"linewidth": 0.5},
                label=kind.strip() or "all channels",
            )
        if biases:
            depths = np.array([depth for _, depth in layers])
            where = [np.searchsorted(depths, self.units[k].depth) - 0.5 for k in biases]
            order = np.argsort(where, kind="stable")
            chosen = np.array(biases)[order]
            label = "biases from here on" if self.units[biases[0]].group == "biases" else "biases"
            line = axes.plot(np.array(where)[order], self.mean[chosen], "k.-", lw=1, label=label)
            if len(self.values) > 1:
                low, high = self.mean - self.spread, self.mean + self.spread
                axes.fill_between(
                    np.array(where)[order], low[chosen], high[chosen],
                    color=line[0].get_color(), alpha=0.15, linewidth=0,
                )  # fmt: skip
        axes.set_xticks(range(len(layers)), [group for group, _ in layers], rotation=90, fontsize=6)
        axes.set_ylabel(f"worth by {self.criterion}")
        axes.axhline(0, color="gray", linewidth=0.5)
        axes.legend(fontsize=7)
        figure.tight_layout()
        if path is not None:
            path = Path(path)
            with replacing(path) as temporary:
                figure.savefig(temporary)
        return figure


def _pm(mean: float, spread: float) -> str:
    return f"{mean:+.3g} ± {spread:.1g}"


def _row(unit: Unit) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(unit, name) for name in _FIELDS}
    row["stacked"] = list(unit.stacked)
    row["entries"] = [[path, normalise_train(entry)] for path, entry in unit.entries]
    return row


def _unit(row: dict[str, Any]) -> Unit:
    def entry(train: Any) -> bool | Part:
        return True if train == "all" else parse_index(train)

    entries = tuple((path, entry(train)) for path, train in row["entries"])
    fields = {name: row[name] for name in _FIELDS}
    return Unit(entries=entries, stacked=tuple(row["stacked"]), **fields)
