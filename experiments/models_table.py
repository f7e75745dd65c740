"""Step FLOPs and memory of each reference model, by full backprop and by each scheme for it.

``python -m experiments.models_table`` builds every model that a scheme in ``configs/schemes``
names, compiles its training step twice, takes a step where the arrays fit, and writes what it found
into ``docs/models.md``. Rows are kept in ``experiments/results/models.json`` as they are made: an
interrupted run goes on where it was, and ``--fresh`` begins anew.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.progress import track

import pockjax as pj
from pockjax import models
from pockjax._files import replacing
from pockjax.costs import tree_bytes
from pockjax.training import Estimate

SCHEMES = Path("configs/schemes")
CLASSES = 10
SIDE = 128  # pixels
TOKENS = 128
WORDS = 512  # of the vocabulary; every model has as many


@dataclass(frozen=True)
class Config:
    """What to write, and where.

    Attributes:
        out: where rows are kept.
        page: the page that holds the table, between two marks.
        only: names of schemes; all of them unless given.
        images: in a batch.
        texts: in a batch, of 128 tokens each, for encoders; a language model gets one.
        largest: parameters of more bytes than this are compiled for, but no step is taken.
        fresh: forget earlier rows.
    """

    out: Path = Path("experiments/results/models.json")
    page: Path = Path("docs/models.md")
    only: tuple[str, ...] = ()
    images: int = 8
    texts: int = 16
    largest: int = 2**31
    fresh: bool = False


@dataclass(frozen=True)
class Cost:
    """What one training step takes.

    Attributes:
        flops: operations of the loss and its gradient.
        residual_bytes: what the backward pass keeps from the forward pass.
        trained: number of trained parameters.
        compiled_bytes: memory of the executable: arguments, results and temporary arrays.
    """

    flops: int
    residual_bytes: int
    trained: int
    compiled_bytes: int

    @classmethod
    def of(cls, estimate: Estimate, step: pj.Step) -> "Cost":
        """From a step's report."""
        counts = (estimate.flops, estimate.residual_bytes, estimate.trained)
        return cls(*counts, compiled_bytes=step.report.compiled.total_bytes)


@dataclass(frozen=True)
class Row:
    """One scheme on the model that it is for.

    Attributes:
        model: its name.
        scheme: the name of the scheme's file.
        batch: what a batch is.
        full: training everything.
        sparse: training what the scheme says.
        fallbacks: number of gradients that are computed wider than asked.
        loss: of the step that was taken with random weights; None if none was taken.
    """

    model: str
    scheme: str
    batch: str
    full: Cost
    sparse: Cost
    fallbacks: int
    loss: float | None


def shapes(name: str) -> nnx.Module:
    """A model without arrays, ten classes where it has classes, bfloat16 if it is a large one."""

    def build() -> nnx.Module:
        is_language_model = issubclass(model_type, models.Llama)
        return models.load(name, weights=None, classes=None if is_language_model else CLASSES)

    model_type = type(nnx.eval_shape(lambda: models.load(name, weights=None)))
    model = nnx.eval_shape(build)
    if tree_bytes(nnx.state(model)) > 2**33:
        halved = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), nnx.state(model)
        )
        nnx.update(model, halved)
    return model


def problem(model: Any, config: Config) -> tuple[Any, Any, tuple[Any, ...], str]:
    """A loss, the shapes of its parameters, a batch, and the batch in words."""
    generator = np.random.default_rng(0)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rest = filled(rest)
    if isinstance(model, models.Llama):
        tokens = generator.integers(0, WORDS, (1, 2 * TOKENS + 1), np.int32)
        batch, words = (tokens[:, :-1], tokens[:, 1:]), f"1 × {2 * TOKENS} tokens"
    elif isinstance(model, models.Bert):
        tokens = generator.integers(0, WORDS, (config.texts, TOKENS), np.int32)
        labels = generator.integers(0, CLASSES, config.texts, np.int32)
        batch, words = (tokens, tokens >= 0, labels), f"{config.texts} × {TOKENS} tokens"
    else:
        images = generator.normal(size=(config.images, SIDE, SIDE, 3)).astype(np.float32)
        labels = generator.integers(0, CLASSES, config.images, np.int32)
        batch, words = (images, labels), f"{config.images} images of {SIDE} px"

    def loss(params: Any, *batch: Any) -> jax.Array:
        *inputs, labels = batch
        logits = nnx.merge(graph, params, rest)(*inputs).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, params, batch, words


def filled(tree: Any) -> Any:
    """Arrays in place of shapes: small random numbers, and ones where a scale belongs."""
    generator = np.random.default_rng(1)

    def array(path: Any, x: Any) -> jax.Array:
        if jax.tree_util.keystr(path).find("scale") >= 0 or "var" in jax.tree_util.keystr(path):
            return jnp.ones(x.shape, x.dtype)
        fan = np.prod(x.shape[:-1]) if x.ndim > 1 else np.inf
        return jnp.asarray(generator.standard_normal(x.shape, np.float32) * fan**-0.5, x.dtype)

    return jax.tree_util.tree_map_with_path(array, tree)


def measure(scheme: Path, config: Config) -> Row:
    """Compile both steps of a model, and take one of the sparse ones."""
    name = pj.Scheme.load(scheme).model
    assert name is not None, f"{scheme} names no model"
    loss, params, batch, words = problem(shapes(name), config)
    # Plain gradient descent, so that the memory is the backward pass's and not the optimizer's.
    steps = {
        kind: pj.compile(loss, mask, optax.sgd(0.01), params, *batch)
        for kind, mask in {"full": True, "sparse": pj.mask(params, scheme)}.items()
    }
    taken = None
    if tree_bytes(params) <= config.largest:
        state, metrics = steps["sparse"](steps["sparse"].init(filled(params), donate=True), *batch)
        taken = float(metrics.loss)
        assert np.isfinite(taken), f"{scheme.stem}: the loss is {taken}"
    report = steps["sparse"].report
    return Row(
        name,
        scheme.stem,
        words,
        Cost.of(report.full, steps["full"]),
        Cost.of(report.predicted, steps["sparse"]),
        len(report.fallbacks),
        taken,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [
        "| model | scheme | batch | trained | GFLOP a step: full | scheme | ratio "
        "| kept activations, MB: full | scheme | ratio | step memory, MB: full | scheme | ratio |",
        "|---|---|---|---:|" + "---:|" * 9,
    ]
    for row in sorted(rows, key=lambda row: (row["model"], row["scheme"])):
        full, sparse = row["full"], row["sparse"]
        cells = [row["model"], row["scheme"], row["batch"]]
        cells.append(f"{100 * sparse['trained'] / full['trained']:.1f} %")
        for name, unit in (("flops", 1e9), ("residual_bytes", 1e6), ("compiled_bytes", 1e6)):
            cells += [f"{one[name] / unit:.4g}" for one in (full, sparse)]
            cells.append(f"{full[name] / sparse[name]:.1f}×")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Measure what has not been measured, and write the table."""
    rows: dict[str, dict[str, Any]] = {}
    if config.out.exists() and not config.fresh:
        rows = {row["scheme"]: row for row in json.loads(config.out.read_text())["rows"]}
    schemes = [
        s for s in sorted(SCHEMES.glob("*.yaml")) if not config.only or s.stem in config.only
    ]
    for scheme in track([s for s in schemes if s.stem not in rows], "measuring"):
        rows[scheme.stem] = asdict(measure(scheme, config))
        print(f"{scheme.stem}: {rows[scheme.stem]}", flush=True)
        data = {"where": f"jax {jax.__version__}, {jax.default_backend()}"}
        with replacing(config.out) as path:
            Path(path).write_text(json.dumps(data | {"rows": list(rows.values())}, indent=2) + "\n")
        jax.clear_caches()
    text = config.page.read_text()
    begin, end = "<!-- table -->", "<!-- end of table -->"
    new = re.sub(
        f"{begin}.*?{end}",
        lambda _: f"{begin}\n{table(list(rows.values()))}\n{end}",
        text,
        flags=re.DOTALL,
    )
    with replacing(config.page) as path:
        Path(path).write_text(new)


if __name__ == "__main__":
    main(tyro.cli(Config))
