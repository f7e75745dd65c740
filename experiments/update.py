"""Parameters written early or late, and several steps in one call: bytes, time and page faults.

``python -m experiments.update`` compiles each step both ways and writes
``experiments/results/update.md``; begin it with POCKJAX_KEEP_MEMORY=0 and without.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro

import pockjax as pj
from experiments.speed.problem import SCHEMES, Problem, read, write
from pockjax._files import replacing

PROBLEMS = {
    "MobileNetV2": Problem("mobilenet_v2", "mobilenet_v2", 8, 128),
    "MiniLM, 2 texts": Problem("all-minilm-l6-v2", "minilm", 2, 128),
}
OPTIMIZERS = {"sgd": optax.sgd(1e-3), "adam": optax.adam(1e-3)}
HEADER = (
    "| model | trained | optimizer | temporary MB, late | early | ms, late | early | four a call "
    "| faults, late | early | four in a call |"
)


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        only: models; all of them unless given.
        optimizers: which.
        steps: steps to time.
        out: file for the table.
    """

    only: tuple[str, ...] = tuple(PROBLEMS)
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    steps: int = 20
    out: Path = Path("experiments/results/update.md")


def rows(name: str, config: Config) -> list[str]:
    """A row for each mask and optimizer."""
    problem, found = PROBLEMS[name], []
    with tempfile.TemporaryDirectory() as folder:
        write(problem, Path(folder))
        loss, params, batch = read(problem, Path(folder))
    four = tuple(jnp.stack([x] * 4) for x in batch)
    for trained in ("scheme", "full"):
        mask = pj.mask(params, SCHEMES / f"{problem.scheme}.yaml") if trained == "scheme" else True
        for optimizer in config.optimizers:
            measured, state = {}, None
            for updates in ("late", "early"):
                step = pj.compile(
                    loss, mask, OPTIMIZERS[optimizer], params, *batch, updates=updates
                )
                state = step.init(params)
                measured[updates] = step.measure(state, *batch, steps=config.steps)
            many = _many(step, state, four, config.steps // 4)  # type: ignore[possibly-unbound]
            cells = [
                *(f"{m.temp_bytes / 1e6:.1f}" for m in measured.values()),
                *(f"{1e3 * m.seconds:.1f}" for m in measured.values()),
                f"{1e3 * many.seconds / 4:.1f}",
                *(f"{m.faults:.0f}" for m in measured.values()),
                f"{(many.faults or 0) / 4:.0f}",
            ]
            found.append(f"| {name} | {trained} | {optimizer} | {' | '.join(cells)} |")
            print(found[-1], flush=True)
    return found


def _many(step: pj.Step, state: pj.State, four: tuple[jax.Array, ...], times: int):  # noqa: ANN202
    from pockjax.training._measure import measured

    def run() -> pj.Metrics:
        nonlocal state
        state, metrics = step.many(state, *four)
        return metrics

    return measured(run, max(1, times), 0)


def main(config: Config) -> None:
    """Measures, and writes the table after each model."""
    memory = "kept" if pj.keep_memory() else "taken anew"
    lines = [
        f"# Updates within the backward pass (memory {memory})",
        "", HEADER, "|---|---|---|" + "---:|" * 8,
    ]  # fmt: skip
    for name in config.only:
        lines += rows(name, config)
        with replacing(config.out) as path:
            path.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    pj.keep_memory()
    main(tyro.cli(Config))
