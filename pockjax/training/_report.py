"""What a step costs, predicted and compiled, and what the mask left out of it."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import jax

from pockjax._paths import flatten_with_paths
from pockjax.autodiff import Fallback, Joint, differentiate, inlined
from pockjax.costs import (
    CompiledCost,
    Prediction,
    count_flops,
    predict_temp_bytes,
    reached_params,
    tree_bytes,
)
from pockjax.masks import describe, pack
from pockjax.rewrites import DEFAULT_LIBRARY, Choice
from pockjax.training._measure import Measurement
from pockjax.training._program import Program, predicted
from pockjax.training._update import Update


@dataclass(frozen=True)
class Estimate:
    """What a mask costs, counted from the jaxpr; bytes and operations per step.

    Attributes:
        flops: floating-point operations of the loss and its gradient.
        residual_bytes: what the backward pass keeps from the forward pass, parameters aside.
        optimizer_bytes: the optimizer's state.
        gradient_bytes: the packed gradient.
        trained: number of trained parameters.
    """

    flops: int
    residual_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    trained: int


@dataclass(frozen=True)
class ParameterRow:
    """One parameter array in a report.

    Attributes:
        path: its path.
        shape: its shape.
        trained: shape of its trained part; None if it is frozen.
        backward: whether a cotangent passes through the operation that uses it.
        saved: whether the forward pass saves the input of that operation for its gradient.
    """

    path: str
    shape: tuple[int, ...]
    trained: tuple[int, ...] | None
    backward: bool
    saved: bool


@dataclass(frozen=True)
class Report:
    """What a step costs and what was left out of it; prints as a table.

    Attributes:
        predicted: counted from the jaxpr for this mask.
        full: the same for training every parameter.
        compiled: what the executable takes, as XLA says.
        flops: operations of one whole step, optimizer included, loops counted as they run.
        temp_bytes: predicted peak of intermediate arrays, to stand beside ``compiled.temp_bytes``;
            None where it could not be predicted.
        residuals: ``"kept"`` or ``"xla"``: which variant was compiled.
        variants: total bytes of each variant that was compiled.
        rows: every parameter.
        fallbacks: where a gradient is computed wider than asked, and why.
        rewrites: the form that was chosen for each convolution, and what each form takes here.
        library: what computes matrix products.
        depth_first: whether operations are run in an order that takes less memory than XLA's usual
            one, see `pockjax.costs.best_order`.
        front_pieces: in how many parts of the batch the frozen front is computed.
        measured: time and page faults, once `Step.measure` was called.
        expected: what a cost model predicted, if it compiled the step (see `CostModel.compile`).
    """

    predicted: Estimate
    full: Estimate
    compiled: CompiledCost
    flops: int
    temp_bytes: int | None
    residuals: str
    variants: dict[str, int]
    rows: tuple[ParameterRow, ...]
    fallbacks: tuple[Fallback, ...]
    rewrites: tuple[Choice, ...] = ()
    library: str | None = None
    depth_first: bool = False
    front_pieces: int = 1
    measured: Measurement | None = None
    expected: Prediction | None = None

    @property
    def predicted_total_bytes(self) -> int | None:
        """Predicted memory of a step, to stand beside ``compiled.total_bytes``."""
        if self.expected is not None:
            return self.expected.memory_bytes
        if self.temp_bytes is None:
            return None
        return self.compiled.total_bytes - self.compiled.temp_bytes + self.temp_bytes

    @property
    def residual_bytes(self) -> int:
        """What the backward pass keeps from the forward pass, parameters aside."""
        return self.predicted.residual_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return self.predicted.optimizer_bytes

    @property
    def dropped_backward(self) -> tuple[str, ...]:
        """Parameters whose operation has no backward pass at all."""
        return tuple(row.path for row in self.rows if not row.backward)

    @property
    def dropped_activations(self) -> tuple[str, ...]:
        """Parameters whose operation's input is not saved for their gradient."""
        return tuple(row.path for row in self.rows if not row.saved)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "predicted": {**asdict(self.predicted), "temp_bytes": self.temp_bytes},
            "full": asdict(self.full),
            "compiled": self.compiled.as_dict(),
            "flops": self.flops,
            "residuals": self.residuals,
            "variants": self.variants,
            "parameters": [asdict(row) for row in self.rows],
            "fallbacks": [{**asdict(f), "message": str(f)} for f in self.fallbacks],
            "library": self.library,
            "depth_first": self.depth_first,
            "front_pieces": self.front_pieces,
            "rewrites": [asdict(choice) for choice in self.rewrites],
            "measured": None if self.measured is None else asdict(self.measured),
            "expected": None if self.expected is None else self.expected.as_dict(),
        }

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows of what, this mask, full backprop, and their ratio; the first is the header."""
        rows = [("per step", "this mask", "full backprop", "ratio")]
        for what, name, unit in (
            ("trained parameters", "trained", ""),
            ("FLOPs of loss and gradient", "flops", "FLOP"),
            ("kept for the backward pass", "residual_bytes", "B"),
            ("gradient", "gradient_bytes", "B"),
            ("optimizer state", "optimizer_bytes", "B"),
        ):
            ours, full = getattr(self.predicted, name), getattr(self.full, name)
            ratio = f"{full / ours:.2f}x" if ours else "-"
            rows.append((what, _quantity(ours, unit), _quantity(full, unit), ratio))
        return rows

    def to_markdown(self) -> str:
        """The report as Markdown."""
        header, *rows = self.table()
        lines = [f"| {' | '.join(header)} |", "|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, "", *self._notes()])

    def __str__(self) -> str:
        """The report as text."""
        rows = self.table()
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([*lines, "", *self._notes()])

    def __rich__(self) -> Any:
        """The report as a rich table."""
        from pockjax._extras import require

        require("rich", "cli")
        from rich.console import Group
        from rich.table import Table

        header, *rows = self.table()
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        return Group(table, *self._notes())

    def _notes(self) -> list[str]:
        c, expected = self.compiled, self.expected
        temp = self.temp_bytes if expected is None else expected.temp_bytes
        whole = self.predicted_total_bytes
        total, arguments, results, alias, temporary = (
            _quantity(n, "B")
            for n in (
                c.total_bytes, c.argument_bytes, c.output_bytes, c.alias_bytes, c.temp_bytes,
            )
        )  # fmt: skip
        backward, activations = len(self.dropped_backward), len(self.dropped_activations)
        notes = [
            f"Compiled: {total} = arguments {arguments} + results {results} - in place {alias} + "
            f"temporary {temporary}; residuals: {self.residuals}"
            f"{', run depth first' * self.depth_first}"
            f"{f'; frozen front in {self.front_pieces} pieces' * (self.front_pieces > 1)}.",
            f"Predicted: {_quantity(whole, 'B')}, of which temporary {_quantity(temp, 'B')}"
            f"{_milliseconds(expected)}."
            if whole is not None and temp is not None
            else "Predicted: nothing; the log says why.",
            f"Of {len(self.rows)} parameter arrays, {backward} have no backward pass and for "
            f"{activations} no activation is saved.",
        ]
        if self.measured is not None:
            notes.append(f"Measured: {self.measured}.")
        forms = Counter(c.form for c in self.rewrites if not c.is_original)
        if forms:
            named = ", ".join(f"{count} as {form}" for form, count in forms.most_common())
            notes.append(
                f"Of {len(self.rewrites)} convolutions, {forms.total()} are computed in a form "
                f"that is faster here: {named}."
            )
        if self.library not in (None, DEFAULT_LIBRARY):
            notes.append(f"Matrix products are computed by {self.library}, which is faster here.")
        if self.fallbacks:
            notes.append("Computed wider than asked, then sliced:")
            notes += [f"  {fallback}" for fallback in self.fallbacks]
        return notes


def _milliseconds(expected: Prediction | None) -> str:
    if expected is None or expected.seconds is None:
        return ""
    return f"; {1e3 * expected.seconds:.3g} ms a step"


def _quantity(value: float, unit: str) -> str:
    """A number with a prefix: binary for bytes, decimal for the rest.

    >>> _quantity(1536, "B"), _quantity(2.5e9, "FLOP"), _quantity(12, "")
    ('1.5 KiB', '2.5 GFLOP', '12')
    """
    base, prefixes = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit == "B" else (
        1000, ("", "k", "M", "G", "T", "P"),
    )  # fmt: skip
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    number = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{number} {prefixes[power]}{unit}".strip()


def make_report(
    update: Update,
    costs: dict[str, CompiledCost],
    chosen: str,
    rewrites: tuple[Choice, ...],
    program: Program,
) -> Report:
    """Counts, predicts and compares; traces nothing of the user's function again."""
    mask = update.mask.tree(update.mask.indices)
    traced = jax.make_jaxpr(program.function(update))(
        update.example_state, *update.arrays_of(update.batch)
    )
    rewritten = traced if program.rewriter is None else program.rewriter.rewritten(traced)
    return Report(
        predicted=_estimate(update, update.joint, mask),
        full=_estimate(update, differentiate(update.traced, True), True),
        compiled=costs[chosen],
        flops=count_flops(traced),
        temp_bytes=predicted(
            lambda: predict_temp_bytes(inlined(rewritten), bool(program.depth_first))
        ),
        residuals=chosen,
        variants={name: cost.total_bytes for name, cost in costs.items()},
        rows=_rows(update, mask),
        fallbacks=update.joint.fallbacks,
        rewrites=rewrites,
        library=program.library,
        depth_first=bool(program.depth_first),
        front_pieces=update.pieces,
    )


def _estimate(update: Update, joint: Joint, mask: Any) -> Estimate:
    params = joint.primal.params
    packed = jax.eval_shape(lambda arrays: pack(params.tree(arrays), mask), params.arrays)
    return Estimate(
        flops=update.accumulate * count_flops(joint.jaxpr),
        residual_bytes=joint.residual_bytes,
        optimizer_bytes=tree_bytes(jax.eval_shape(update.tx.init, packed)),
        gradient_bytes=tree_bytes(packed),
        trained=sum(x.size for x in jax.tree.leaves(packed)),
    )


def _rows(update: Update, mask: Any) -> tuple[ParameterRow, ...]:
    description = {row.path: row for row in describe(update.params, mask)}
    primal = update.traced
    named = [
        path
        for (path, _), yes in zip(
            flatten_with_paths(update.params)[0], primal.params.is_array, strict=True
        )
        if yes
    ]
    trained = [description[path].trained_shape is not None for path in named]
    reached = reached_params(primal.jaxpr, trained)
    return tuple(
        ParameterRow(
            path,
            description[path].shape,
            description[path].trained_shape,
            backward=i in reached,
            # The gradient of a bias needs no activation.
            saved=trained[i] and len(description[path].shape) > 1,
        )
        for i, path in enumerate(named)
    )
