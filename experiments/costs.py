"""What the cost model predicts for random masks, beside what is compiled and measured.

``python -m experiments.costs --models mobilenet_v2 minilm`` appends one mask after the other to
``experiments/results/costs.json`` and continues where it was interrupted.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from scipy.stats import spearmanr

import pockjax as pj
from experiments.networks import (
    conv_net,
    conv_params,
    mlp,
    mlp_params,
    transformer,
    transformer_params,
)
from experiments.speed.problem import Problem, _batch, build
from pockjax import models
from pockjax._files import replacing
from pockjax._paths import flatten_with_paths
from pockjax.costs import CompiledCost
from pockjax.training import CostModel

PROBES = 5
TABLE = {
    "mobilenet_v2": Problem("mobilenet_v2", "", 8, 128),
    "mcunet": Problem("mcunet-5fps", "", 8, 128),
    "efficientnet_lite0": Problem("efficientnet_lite0", "", 8, 128),
    "resnet50": Problem("resnet50", "", 8, 64),
    "minilm": Problem("all-minilm-l6-v2", "", 4, 64),
    "smollm2_135m": Problem("smollm2-135m", "", 1, 64),
}
SMALL = ("mlp", "tanh_mlp", "conv_net", "transformer", "scanned_transformer")


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        out: where results are kept, as JSON and beside it as a table.
        models: names of models.
        masks: random masks of each, beside the five probes that the model is calibrated on.
        timed: how many of them are timed too.
        repeats: how often each of those is run, in turn.
        seconds: stop starting new masks of a model after this long.
    """

    out: Path = Path("experiments/results/costs.json")
    models: tuple[str, ...] = (*SMALL, *TABLE)
    masks: int = 30
    timed: int = 0
    repeats: int = 11
    seconds: float = float("inf")


@dataclass(frozen=True)
class Case:
    """A loss with its parameters and batch, arrays or shapes."""

    loss: Callable[..., jax.Array]
    params: Any
    batch: tuple[Any, ...] = field(default=())


def case(name: str) -> Case:
    """The training problem of a name."""
    key = jax.random.key(0)
    match name:
        case "mlp":
            return Case(_square(mlp), mlp_params(key, [128] * 7), (jnp.ones((256, 128)),))
        case "tanh_mlp":
            net = lambda p, x: mlp(p, x, jnp.tanh)  # noqa: E731
            params = mlp_params(key, [128, 256, 64, 256, 128])
            return Case(_square(net), params, (jnp.ones((256, 128)),))
        case "conv_net":
            params = conv_params(key, [8, 16, 32, 32, 16])
            return Case(_square(conv_net), params, (jnp.ones((4, 16, 16, 8)),))
        case "transformer" | "scanned_transformer":
            params = transformer_params(key, 4, 64, 256, scanned=name != "transformer")
            net = lambda p, x: transformer(p, x, 4)  # noqa: E731
            return Case(_square(net), params, (jnp.ones((2, 64, 64)),))
    problem = TABLE[name]
    model = build(problem)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rest = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), rest)
    arrays = _batch(problem, model, np.random.default_rng(0))
    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays.values())

    def loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, rest)
        given = (inputs, inputs >= 0) if isinstance(model, models.Bert) else (inputs,)
        logits = model(*given)  # type: ignore[operator]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return Case(loss, params, shapes)


def _square(fun: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda params, x: jnp.mean(fun(params, x) ** 2)


def from_the_input(problem: Case) -> list[tuple[str, Any]]:
    """The parameters in the order in which the function reads them, with their paths."""
    depths: dict[str, int] = {}
    for unit in pj.units(problem.loss, problem.params, *problem.batch):
        for path, _ in unit.entries:  # biases of several layers are as deep as the deepest
            depths[path] = max(depths.get(path, 0), unit.depth)
    named, _ = flatten_with_paths(problem.params)
    return sorted(named, key=lambda pair: depths.get(pair[0], 0))


def random_mask(params: Any, named: Sequence[tuple[str, Any]], seed: int) -> Any:
    """A mask of random depth: biases, whole leaves, shares of channels, or all mixed."""
    generator = np.random.default_rng(seed)
    kind = generator.choice(["biases", "leaves", "channels", "mixed"])
    lowest = int(generator.integers(len(named)))
    share = generator.choice([0.1, 0.3, 0.6, 1.0])
    entries: dict[str, Any] = {path: False for path, _ in named}
    entries[named[lowest][0]] = True
    for path, leaf in named[lowest:]:
        if len(leaf.shape) <= 1:
            if kind in ("biases", "mixed") or generator.random() < share:
                entries[path] = True
        elif kind != "biases" and generator.random() < share:
            ratio = 1.0 if kind == "leaves" else generator.choice([0.125, 0.25, 0.5, 1.0])
            axis = len(leaf.shape) - int(generator.integers(1, 3))
            block = slice(0, max(1, int(ratio * leaf.shape[axis])))
            before = (slice(None),) * axis
            entries[path] = True if ratio == 1 else pj.part[(*before, block)]
    return pj.mask(params, lambda path, leaf: entries[path])


def measure(name: str, config: Config, rows: list[dict[str, Any]]) -> None:
    """Adds what is missing of one model to the rows."""
    problem, tx, begun = case(name), optax.adam(1e-3), time.monotonic()
    model = CostModel(problem.loss, tx, problem.params, *problem.batch, rewrites="guessed")
    done = {row["seed"] for row in rows if row["model"] == name}
    named = from_the_input(problem)
    for seed in range(config.masks + PROBES):
        if seed in done or time.monotonic() - begun > config.seconds:
            continue
        mask = random_mask(problem.params, named, seed)
        start = time.monotonic()
        predicted = model.predict(mask)
        took = time.monotonic() - start
        step = pj.compile(
            problem.loss, mask, tx, problem.params, *problem.batch, rewrites="guessed"
        )
        cost = CompiledCost.of(step.compiled)
        row = {
            "model": name, "seed": seed, "predict_seconds": round(took, 2),
            "predicted_temp": predicted.temp_bytes, "predicted_total": predicted.memory_bytes,
            "temp": cost.temp_bytes, "total": cost.total_bytes,
        }  # fmt: skip
        rows.append(row)
        save(config.out, rows)
        error = predicted.memory_bytes / cost.total_bytes - 1
        print(f"{name} {seed}: total {cost.total_bytes / 1e6:.1f} MB, off by {error:+.1%}")
    if config.timed:
        measure_seconds(name, config, model, problem, named, rows)


def measure_seconds(
    name: str,
    config: Config,
    model: CostModel,
    problem: Case,
    named: Sequence[tuple[str, Any]],
    rows: list[dict[str, Any]],
) -> None:
    """Calibrates on the probes, then times other masks beside what is predicted for them."""
    probes = [random_mask(problem.params, named, seed) for seed in range(PROBES)]
    model.calibrate(probes, config.repeats)
    other = CostModel(
        problem.loss, optax.adam(1e-3), problem.params, *problem.batch, rewrites="guessed"
    )
    seeds = range(PROBES, PROBES + config.timed)
    masks = [random_mask(problem.params, named, seed) for seed in seeds]
    other.calibrate(masks, config.repeats)
    by_seed = {row["seed"]: row for row in rows if row["model"] == name}
    for seed, mask, probe in zip(seeds, masks, other.probes, strict=True):
        by_seed[seed] |= {
            "seconds": probe.seconds, "predicted_seconds": model.predict(mask).seconds,
        }  # fmt: skip
    save(config.out, rows)


def save(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows and their table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    where = f"jax {jax.__version__}, {jax.default_backend()}"
    lines = ",\n".join(json.dumps(row) for row in rows)
    with replacing(out) as path:
        path.write_text(f'{{"where": "{where}", "rows": [\n{lines}\n]}}\n')
    with replacing(out.with_suffix(".md")) as path:
        path.write_text(markdown(rows))


def corrected(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """Relative errors of all but the probes, after correcting by the probes."""
    probes = [row for row in rows if row["seed"] < PROBES]
    rest = [row for row in rows if row["seed"] >= PROBES]
    predicted = np.array([float(row["predicted_temp"]) for row in probes])
    model = CostModel.correction(predicted, np.array([float(row["temp"]) for row in probes]))
    found = []
    for row in rest:
        temp = model[0] * row["predicted_temp"] + model[1]
        value = temp if key == "temp" else row["predicted_total"] - row["predicted_temp"] + temp
        found.append(abs(value / row[key] - 1))
    return np.array(found)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The distribution of the errors, model by model."""
    lines = [
        "Relative errors of predicted memory: median / 90th percentile / largest. Corrected: after",
        f"calibration on {PROBES} probes, which are not counted. Rank: Spearman's correlation of",
        "predicted and measured seconds over the masks that were timed.",
        "",
        "| model | masks | total | total, corrected | temp | temp, corrected | rank (masks) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        cells = [name, str(len(own))]
        for key in ("total", "temp"):
            plain = np.array([abs(row[f"predicted_{key}"] / row[key] - 1) for row in own])
            cells += [_spread(plain), _spread(corrected(own, key)) if len(own) > PROBES else ""]
        timed = [row for row in own if "seconds" in row]
        expected, found = ([row[k] for row in timed] for k in ("predicted_seconds", "seconds"))
        cells.append(
            f"{spearmanr(expected, found)[0]:.2f} ({len(timed)})" if len(timed) > 2 else ""
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(errors: np.ndarray) -> str:
    return " / ".join(f"{np.quantile(errors, q):.1%}" for q in (0.5, 0.9, 1.0))


def main(config: Config) -> None:
    """Measures what is missing and writes the table."""
    rows: list[dict[str, Any]] = []
    if config.out.exists():
        rows = json.loads(config.out.read_text())["rows"]
    for name in config.models:
        measure(name, config, rows)
    save(config.out, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main(tyro.cli(Config))
