"""What rematerialisation saves and costs: memory and time of a step with and without it.

``python -m experiments.remat`` compiles full backpropagation and the published scheme of each
model, keeping what the backward pass reads and computing blocks again, times the steps in turn, and
writes ``experiments/results/remat.md``.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

import pockjax as pj
from experiments.models_table import Config as Sizes
from experiments.models_table import filled, problem, shapes
from pockjax._files import replacing

MODELS = {"mobilenet_v2": "mobilenet_v2", "all-minilm-l6-v2": "minilm"}


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        out: folder for the results.
        rounds: how often each step has its turn.
    """

    out: Path = Path("experiments/results")
    rounds: int = 15


def measure(model: str, scheme: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model."""
    loss, params, batch, words = problem(shapes(model), Sizes())
    masks = {"full": True, "scheme": pj.mask(params, f"configs/schemes/{scheme}.yaml")}
    params = filled(params)
    tx = optax.sgd(0.01)
    steps, states, losses, seconds = {}, {}, {}, {}
    for kind, mask in masks.items():
        for remat in (False, True):
            steps[kind, remat] = pj.compile(loss, mask, tx, params, *batch, remat=remat)
            states[kind, remat] = steps[kind, remat].init(params)
            seconds[kind, remat] = []
    for turn in range(rounds + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            states[key], metrics = step(states[key], *batch)
            losses.setdefault(key, []).append(float(jax.block_until_ready(metrics.loss)))
            if turn:  # the first warms up
                seconds[key].append(time.perf_counter() - start)
    rows = []
    for (kind, remat), step in steps.items():
        np.testing.assert_allclose(losses[kind, remat], losses[kind, False], rtol=1e-3)
        report = step.report
        rows.append({
            "model": model, "batch": words, "mask": kind, "remat": remat,
            "spans": len(step.remat), "residual_bytes": report.residual_bytes,
            "predicted_temp_bytes": report.temp_bytes,
            "temp_bytes": report.compiled.temp_bytes, "total_bytes": report.compiled.total_bytes,
            "flops": report.flops, "seconds": float(np.median(seconds[kind, remat])),
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [
        "| model | batch | mask | again | kept, MB | temporary, MB | predicted | in all, MB "
        "| GFLOP | ms |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = [
            row[f"{name}_bytes"] / 1e6 for name in ("residual", "temp", "predicted_temp", "total")
        ]
        cells = [row["model"], row["batch"], row["mask"]]
        cells.append(f"{row['spans']} spans" if row["remat"] else "nothing")
        cells += [f"{size:.1f}" for size in sizes]
        cells += [f"{row['flops'] / 1e9:.2f}", f"{row['seconds'] * 1e3:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Measure, and write the table."""
    rows = []
    for model, scheme in MODELS.items():
        rows += measure(model, scheme, config.rounds)
        print(table(rows), flush=True)
    where = f"jax {jax.__version__}, {jax.default_backend()}"
    note = f"Rematerialisation, {where}; times are medians of steps taken in turn.\n"
    for name, text in (
        ("remat.json", json.dumps({"where": where, "rows": rows}, indent=2)),
        ("remat.md", f"{note}\n{table(rows)}"),
    ):
        with replacing(config.out / name) as path:
            path.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
