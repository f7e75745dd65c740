"""What order and pieces do to the memory and the time of a step, all in turn.

``python -m experiments.memory`` compiles, for each problem of ``configs/speed``, the step of its
scheme and that of full backpropagation in XLA's usual order and depth first, and the scheme's with
its frozen front in 1, 2 and 4 pieces, runs them in turn, and writes after each problem
``experiments/results/memory.md``. Begin it with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 on Linux.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro

import pockjax as pj
from experiments.speed.__main__ import read_config
from experiments.speed.problem import read, write
from pockjax._files import replacing
from pockjax.costs import CompiledCost
from pockjax.rewrites import Rewriter
from pockjax.training._program import Options, Program

MODELS = ("mobilenet_v2", "mcunet", "efficientnet_lite0", "resnet50", "minilm", "smollm2_135m")
HEADER = """\
Total memory is XLA's, of arguments, results and temporary arrays. Milliseconds are medians, with
the 10th and 90th percentile; the steps of a model and a mask were taken in turn. *Taken* is what
`pj.compile` chooses by itself.

| model | trained | order | pieces | total MB | ms | p10–p90 | taken |
|---|---|---|---:|---:|---:|---:|---|
"""


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        only: problems of ``configs/speed``.
        rounds: how often each step has its turn.
        steps: steps in a turn; the first is not counted.
        out: file for the table.
    """

    only: tuple[str, ...] = MODELS
    rounds: int = 12
    steps: int = 3
    out: Path = Path("experiments/results/memory.md")


class Form(NamedTuple):
    """One way to compile a step."""

    depth_first: bool
    pieces: int


def rows(name: str, config: Config) -> list[str]:
    """A row for each form of each mask of a problem."""
    problem, _ = read_config(name)
    with TemporaryDirectory() as folder:
        write(problem, Path(folder))
        loss, params, batch = read(problem, Path(folder))
    found = []
    for trained, mask in (("scheme", pj.mask(params, problem.rules)), ("full", True)):
        step = pj.compile(loss, mask, optax.sgd(0.01), params, *batch)
        taken = Form(step.report.depth_first, step.report.front_pieces)
        update = Options().update(loss, mask, optax.sgd(0.01), params, batch)
        forms = {Form(depth_first, 1) for depth_first in (False, True)} | {taken}
        if taken.pieces > 1:
            forms |= {Form(taken.depth_first, pieces) for pieces in (1, 2, 4)}
        runs, totals, library = {}, {}, None
        for form in sorted(forms):
            program = Program(True, True, Rewriter(), form.depth_first, library)
            own = update if form.pieces == 1 else update.in_pieces(form.pieces)
            program, executable = program.compiled(own)
            library = program.library  # the same for all
            totals[form] = CompiledCost.of(executable).total_bytes
            state = own.new_state(jax.tree.map(jax.numpy.copy, params), (), None)
            runs[form] = _runner(executable, jax.tree.leaves(state), batch)
        seconds = {form: [] for form in runs}
        for _ in range(config.rounds):
            for form, run in runs.items():
                run()
                seconds[form] += [run() for _ in range(config.steps - 1)]
        for form in runs:
            ms = 1e3 * np.array(seconds[form])
            order = "depth first" if form.depth_first else "usual"
            low, high = np.quantile(ms, (0.1, 0.9))
            found.append(
                f"| {name} | {trained} | {order} | {form.pieces} | {totals[form] / 1e6:.1f} | "
                f"{np.median(ms):.1f} | {low:.1f}–{high:.1f} | {'yes' * (form == taken)} |"
            )
            print(found[-1], flush=True)
    return found


def _runner(executable: Any, row: list[Any], batch: Any) -> Callable[[], float]:
    """Runs one step, and returns its seconds."""

    def run() -> float:
        nonlocal row
        begun = time.perf_counter()
        row, metrics = executable(row, *batch)
        jax.block_until_ready(metrics.loss)
        return time.perf_counter() - begun

    return run


def main(config: Config) -> None:
    """Measure, and write the table after each problem."""
    lines: list[str] = []
    for name in config.only:
        lines += rows(name, config)
        with replacing(config.out) as path:
            path.write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    pj.keep_memory()
    main(tyro.cli(Config))
