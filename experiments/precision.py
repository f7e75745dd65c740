"""What frozen layers in bfloat16 cost in accuracy: MiniLM on BBC News, several seeds.

``python -m experiments.precision`` fine-tunes by the published scheme with and without
``frozen_dtype="bfloat16"`` and writes ``experiments/results/precision.json`` and ``.md``.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx

import pockjax as pj
from pockjax import hub
from pockjax._files import replacing
from pockjax.data import Encoded, Loader, encode, evaluation_batches, read_folders, split
from pockjax.models import load_bert


@dataclass(frozen=True)
class Config:
    """What to train.

    Attributes:
        steps: steps of a run.
        seeds: number of runs of each kind; the seed decides split, order and classifier.
        batch: texts in a batch.
        length: tokens of a text.
        learning_rate: of Adam, after a warm-up.
        test: texts to test on at most.
        out: file for the results, without suffix.
    """

    steps: int = 200
    seeds: int = 3
    batch: int = 16
    length: int = 64
    learning_rate: float = 1e-4
    test: int = 400
    out: Path = Path("experiments/results/precision")


def arguments(batch: Encoded) -> tuple[Any, ...]:
    """Tokens, which of them count, labels."""
    return batch.tokens, batch.valid, batch.labels


def accuracy(config: Config, seed: int, frozen_dtype: str | None) -> dict[str, float]:
    """Fine-tune once and test."""
    weights = hub.fetch("all-minilm-l6-v2")
    corpus = read_folders(hub.fetch("bbc-news"))
    parts = split(corpus, held_out=0.2, seed=seed)
    train, test = (encode(part, weights / "tokenizer.json", length=config.length) for part in parts)
    kept = np.random.default_rng(seed).permutation(len(test))[: config.test]
    test = Encoded(test.tokens[kept], test.valid[kept], test.labels[kept])
    graph, params, rest = nnx.split(
        load_bert(weights, classes=len(corpus.classes), rngs=nnx.Rngs(seed)), nnx.Param, ...
    )

    def predict(params: Any, tokens: Any, valid: Any) -> jax.Array:
        return nnx.merge(graph, params, rest)(tokens, valid)

    def loss(params: Any, tokens: Any, valid: Any, labels: Any) -> jax.Array:
        logits = predict(params, tokens, valid)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    mask = pj.mask(params, Path("configs/schemes/minilm.yaml"))
    loader = Loader(train, size=config.batch, seed=seed)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 10), max(2, config.steps)
    )
    example = arguments(next(iter(Loader(train, size=config.batch))))
    step = pj.compile(loss, mask, optax.adam(schedule), params, *example, frozen_dtype=frozen_dtype)
    state, losses = pj.fit(step, step.init(params), loader, steps=config.steps, arguments=arguments)
    # Both are tested in float32, as they would be used.
    hits = jax.jit(lambda *given: predict(*given[:3]).argmax(-1) == given[3])
    right = sum(
        int(hits(state.params, *arguments(batch))[:count].sum())
        for batch, count in evaluation_batches(test, size=config.batch)
    )
    return {
        "accuracy": right / len(test),
        "last_loss": float(losses[-10:].mean()),
        "seconds": step.measure(state, *example, steps=10).seconds,
    }


def main(config: Config) -> None:
    """Run all and write the results."""
    found: dict[str, list[dict[str, float]]] = {"float32": [], "bfloat16": []}
    for seed in range(config.seeds):
        for name, dtype in (("float32", None), ("bfloat16", "bfloat16")):
            found[name].append(accuracy(config, seed, dtype))
            print(seed, name, found[name][-1], flush=True)
    lines = [
        f"# Frozen layers of MiniLM in bfloat16: BBC News, {config.steps} steps of {config.batch} "
        f"texts of {config.length} tokens", "",
        "| frozen layers | accuracy, each seed | mean | mean loss of last 10 steps | ms a step |",
        "|---|---|---:|---:|---:|",
    ]  # fmt: skip
    for name, runs in found.items():
        mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        each = ", ".join(f"{100 * run['accuracy']:.2f} %" for run in runs)
        lines.append(
            f"| {name} | {each} | {100 * mean['accuracy']:.2f} % | {mean['last_loss']:.4f} | "
            f"{1e3 * float(np.median([run['seconds'] for run in runs])):.0f} |"
        )
    settings = {**asdict(config), "out": None}
    with replacing(config.out.with_suffix(".json")) as path:
        path.write_text(json.dumps({"config": settings, "runs": found}, indent=2) + "\n")
    with replacing(config.out.with_suffix(".md")) as path:
        path.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main(tyro.cli(Config))
