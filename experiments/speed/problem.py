"""One training problem as files that every peer can read: weights, a batch, what is trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from pockjax.models import bert, efficientnet_lite, llama, mcunet, mobilenet_v2, resnet

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

    @property
    def rules(self) -> Path:
        """The scheme's file."""
        return SCHEMES / f"{self.scheme}.yaml"


_MOBILE = {
    "mobilenet_v2": mobilenet_v2.MobileNetV2Config(),
    "efficientnet_lite0": efficientnet_lite.LITE_0,
    "mcunet-5fps": mcunet.MCUNET_5FPS,
}
_BERT = {"all-minilm-l6-v2": bert.MINILM, "bert-base": bert.BERT_BASE}


def network(model: str) -> dict[str, Any]:
    """Shape and kind of a network, as numbers that a peer can build it from."""
    if model in _MOBILE:
        return {"kind": "mobile", **asdict(_MOBILE[model].network)}
    if model in _BERT:
        return {"kind": "bert", **asdict(replace(_BERT[model], classes=TEXT_CLASSES))}
    if model == "resnet50":
        return {"kind": "resnet", **asdict(resnet.RESNET_50)}
    if model == "smollm2-135m":
        return {"kind": "llama", **asdict(llama.SMOLLM2_135M)}
    raise ValueError(f"no peer can build {model!r}; there are {[*_MOBILE, *_BERT]} and two more")


def build(problem: Problem) -> nnx.Module:
    """The model without arrays."""

    def make() -> nnx.Module:
        if problem.model == "smollm2-135m":
            config = replace(llama.SMOLLM2_135M, rope="halves")
            return llama.Llama(config, rngs=nnx.Rngs(0))
        classes = TEXT_CLASSES if problem.model in _BERT else None
        return models.load(problem.model, weights=None, classes=classes)

    return nnx.eval_shape(make)


def names(model: nnx.Module, problem: Problem) -> dict[str, str]:
    """Map each array's path to torch's name; where torch has no such model, one like the path."""
    return {
        path: _published(problem.model).get(path, _dotted(path)) for path in _flat(nnx.state(model))
    }


def _published(model: str) -> Mapping[str, str]:
    match model:
        case "mobilenet_v2":
            return mobilenet_v2.published_names(mobilenet_v2.MobileNetV2Config())
        case "efficientnet_lite0":
            return efficientnet_lite.published_names(efficientnet_lite.LITE_0)
        case "resnet50":
            return resnet.published_names(resnet.RESNET_50)
        case "smollm2-135m":
            return models.llama_names(llama.SMOLLM2_135M)
    return bert.published_names(_BERT[model], ()) if model in _BERT else {}


def _dotted(path: str) -> str:
    return path.replace("/", ".").removesuffix("kernel") + "weight" * path.endswith("kernel")


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
    """Draw weights and a batch, and write them down.

    `question.json` is the problem; `problem.json` has the network's shape, torch's name for each
    path, and the names of all parameters and of those that the scheme trains; `parts.npz` says
    which entries of an array are trained where the scheme names a part of it.
    """
    generator = np.random.default_rng(0)
    model = build(problem)
    named = names(model, problem)
    weights = {
        named[path]: to_torch(path, _drawn(generator, path, variable.shape))
        for path, variable in _flat(nnx.state(model)).items()
    }
    save_file(weights, folder / "weights.safetensors")
    params = nnx.state(model, nnx.Param)
    chosen = _chosen(params, problem)
    parts = {named[path]: to_torch(path, x) for path, x in chosen.items() if 0 < x.sum() < x.size}
    np.savez(folder / "parts.npz", allow_pickle=False, **parts)
    for name, value in _batch(problem, model, generator).items():
        np.save(folder / f"{name}.npy", value)
    given = {
        "model": problem.model,
        "network": network(problem.model),
        "names": named,
        "params": [named[path] for path in _flat(params)],
        "trained": [named[path] for path, x in chosen.items() if x.any()],
    }
    (folder / "problem.json").write_text(json.dumps(given))
    (folder / "question.json").write_text(json.dumps(asdict(problem)))


def _flat(state: Any) -> dict[str, Any]:
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _chosen(params: Any, problem: Problem) -> dict[str, np.ndarray]:
    """For each parameter, which of its entries are trained."""
    mask = pj.mask(params, problem.rules)
    blank = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    ones = jax.tree.map(lambda x: jnp.ones_like(x), pj.pack(blank, mask))
    return {
        path: np.asarray(variable[...]) > 0
        for path, variable in _flat(pj.unpack(blank, ones, mask)).items()
    }


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
    model = build(problem)
    named = names(model, problem)
    graph, state = nnx.split(model)
    for path, variable in _flat(state).items():
        variable.set_value(jnp.asarray(from_torch(path, tensors[named[path]])))
    graph, params, rest = nnx.split(nnx.merge(graph, state), nnx.Param, ...)
    batch = tuple(jnp.asarray(np.load(folder / f"{name}.npy")) for name in ("inputs", "labels"))

    def loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, rest)
        given = (inputs, inputs >= 0) if isinstance(model, models.Bert) else (inputs,)
        logits = model(*given)  # type: ignore[operator]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, params, batch


def entries(problem: Problem, params: Any) -> list[bool | pj.Part]:
    """What of each leaf of the params is trained."""
    mask = pj.mask(params, problem.rules)
    return jax.tree.leaves(mask, is_leaf=lambda entry: isinstance(entry, pj.Part))


def as_torch(problem: Problem, params: Any, trained: Sequence[bool]) -> dict[str, np.ndarray]:
    """The leaves that are trained, in torch's names and layout."""
    named = names(build(problem), problem)
    return {
        named[path]: to_torch(path, np.asarray(variable[...]))
        for (path, variable), yes in zip(_flat(params).items(), trained, strict=True)
        if yes
    }
