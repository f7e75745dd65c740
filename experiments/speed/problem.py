"""One training problem as files that every peer can read: weights, a batch, what is trained."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file, save_file

import pockjax as pj
from pockjax import models
from pockjax.models import bert, efficientnet_lite, llama, mobilenet_v2, resnet

SCHEMES = Path("configs/schemes")
IMAGE_CLASSES, TEXT_CLASSES = 1000, 10


@dataclass(frozen=True)
class Problem:
    """What is trained, on which batch.

    Attributes:
        model: name of the model.
        scheme: name of the scheme's file.
        batch: examples in a batch.
        size: pixels of a side, or tokens of a text.
    """

    model: str
    scheme: str
    batch: int
    size: int


def build(problem: Problem) -> nnx.Module:
    """The model without arrays."""

    def make() -> nnx.Module:
        if problem.model == "smollm2-135m":
            config = replace(llama.SMOLLM2_135M, rope="halves")
            return llama.Llama(config, rngs=nnx.Rngs(0))
        classes = TEXT_CLASSES if problem.model == "all-minilm-l6-v2" else None
        return models.load(problem.model, weights=None, classes=classes)

    return nnx.eval_shape(make)


def names(model: str) -> Mapping[str, str] | None:
    """Map each array's path to torch's name; None where torch has no such model here."""
    match model:
        case "mobilenet_v2":
            return mobilenet_v2.published_names(mobilenet_v2.MobileNetV2Config())
        case "efficientnet_lite0":
            return efficientnet_lite.published_names(efficientnet_lite.LITE_0)
        case "resnet50":
            return resnet.published_names(resnet.RESNET_50)
        case "all-minilm-l6-v2":
            own = {f"classifier/{k}": f"classifier.{v}" for k, v in _CLASSIFIER.items()}
            return bert.published_names(bert.MINILM, ()) | own
        case "smollm2-135m":
            return models.llama_names(llama.SMOLLM2_135M)
    return None


_CLASSIFIER = {"kernel": "weight", "bias": "bias"}


def to_torch(path: str, value: np.ndarray) -> np.ndarray:
    """From Flax's layout to torch's."""
    if value.ndim == 4:
        value = value.transpose(3, 2, 0, 1)
    elif value.ndim == 2 and path.endswith("kernel"):
        value = value.T
    return np.ascontiguousarray(value)


def from_torch(path: str, value: np.ndarray) -> np.ndarray:
    """From torch's layout to Flax's."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 and path.endswith("kernel") else value


def write(problem: Problem, folder: Path) -> None:
    """Draw weights and a batch, and write them down."""
    generator = np.random.default_rng(0)
    model = build(problem)
    named = names(problem.model) or {}
    weights, trained = {}, []
    params = nnx.state(model, nnx.Param)
    rows = pj.describe(params, pj.mask(params, SCHEMES / f"{problem.scheme}.yaml"))
    chosen = {row.path for row in rows if row.trained}
    for key_path, variable in nnx.to_flat_state(nnx.state(model)):
        path = "/".join(map(str, key_path))
        value = _drawn(generator, path, variable.shape)
        weights[named.get(path, path)] = to_torch(path, value)
        if path in chosen:
            trained.append(named.get(path, path))
    save_file(weights, folder / "weights.safetensors")
    for name, value in _batch(problem, model, generator).items():
        np.save(folder / f"{name}.npy", value)
    given = {"model": problem.model, "trained": trained, "torch": bool(named)}
    (folder / "problem.json").write_text(json.dumps(given))


def _drawn(generator: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that keep numbers near one from layer to layer."""
    if path.endswith("var"):
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    if path.endswith("kernel"):
        return generator.normal(0, np.prod(shape[:-1]) ** -0.5, shape).astype(np.float32)
    if path.endswith("embedding"):
        return generator.normal(0, 0.05, shape).astype(np.float32)
    centre = 1.0 if path.endswith("scale") else 0.0
    return generator.normal(centre, 0.1, shape).astype(np.float32)


def _batch(problem: Problem, model: Any, generator: np.random.Generator) -> dict[str, np.ndarray]:
    n, size = problem.batch, problem.size
    if isinstance(model, models.Llama):
        tokens = generator.integers(0, 10_000, (n, size + 1), np.int32)
        return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}
    if isinstance(model, models.Bert):
        tokens = generator.integers(0, 10_000, (n, size), np.int32)
        return {"inputs": tokens, "labels": generator.integers(0, TEXT_CLASSES, n, np.int32)}
    images = generator.normal(size=(n, size, size, 3)).astype(np.float32)
    return {"inputs": images, "labels": generator.integers(0, IMAGE_CLASSES, n, np.int32)}


def read(problem: Problem, folder: Path) -> tuple[Any, Any, tuple[jax.Array, ...]]:
    """The loss as a function of the params and a batch, the params, and the batch."""
    tensors = load_file(folder / "weights.safetensors")
    named = names(problem.model) or {}
    graph, state = nnx.split(build(problem))
    for key_path, variable in nnx.to_flat_state(state):
        path = "/".join(map(str, key_path))
        variable.set_value(jnp.asarray(from_torch(path, tensors[named.get(path, path)])))
    graph, params, rest = nnx.split(nnx.merge(graph, state), nnx.Param, ...)
    batch = tuple(jnp.asarray(np.load(folder / f"{name}.npy")) for name in ("inputs", "labels"))

    def loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, rest)
        given = (inputs, inputs >= 0) if isinstance(model, models.Bert) else (inputs,)
        logits = model(*given)  # type: ignore[operator]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, params, batch
