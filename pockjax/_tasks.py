"""Classification tasks by name: a model with a new classifier, its loss, and data for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pockjax import data, hub, models

DEFAULT_TEXTS = "bbc-news"
_PRETRAINED = "pretrained"


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be learnt, up to what is trained.

    Attributes:
        params: the parameters.
        loss: ``loss(params, *batch)``, the mean cross-entropy of a batch.
        predict: ``predict(params, *inputs)``, the logits.
        train: examples to learn from.
        test: held-out examples.
        classes: names of the classes.
    """

    params: Any
    loss: Callable[..., jax.Array]
    predict: Callable[..., jax.Array]
    train: Any
    test: Any
    classes: tuple[str, ...]

    def batches(self, *, size: int, count: int, seed: int) -> list[tuple[np.ndarray, ...]]:
        """Batches to learn from, as arguments of the loss."""
        loader = data.training_batches(self.train, size=size, seed=seed)
        return [arguments(next(loader)) for _ in range(count)]

    def accuracy(self, params: Any, *, size: int, examples: int | None = None) -> float:
        """Accuracy on the held-out examples, or on the first of them."""
        test = self.test if examples is None else self.test.take(np.arange(examples))

        @jax.jit
        def hits(params: Any, inputs: Sequence[jax.Array], labels: jax.Array) -> jax.Array:
            return self.predict(params, *inputs).argmax(axis=-1) == labels

        right = 0
        for batch, count in data.evaluation_batches(test, size=size):
            *inputs, labels = arguments(batch)
            right += int(hits(params, inputs, jnp.asarray(labels))[:count].sum())
        return right / len(test)


def arguments(batch: Any) -> tuple[np.ndarray, ...]:
    """A batch of images or texts as arguments of the loss, the labels last."""
    if isinstance(batch, data.Encoded):
        return batch.tokens, batch.valid, batch.labels
    return tuple(batch)


def classification(
    model: str,
    folder: str = "",
    *,
    weights: str | None = _PRETRAINED,
    size: int = 128,
    held_out: float = 0.2,
    seed: int = 0,
) -> Task:
    """A model that is to tell the classes of a folder of images or of texts apart.

    Args:
        model: a name that `pockjax.models` knows, of a network for images or of a text encoder.
        folder: has a folder of images, or of .txt files, for each class; or the name of a source of
            `pockjax.hub`. Of texts the default is BBC News.
        weights: as for `pockjax.models.load`.
        size: pixels of an image's side, or tokens of a text.
        held_out: fraction of the examples that is held out.
        seed: for the split and the new classifier.

    Raises:
        ValueError: the model takes neither images nor texts.
        FileNotFoundError: there are no data.
    """
    entry = models.entry(model)
    if entry.preprocess is not None:
        if not folder:
            raise ValueError(f"{model} needs data: a folder with a folder of images for each class")
        examples = data.read_images(
            folder, size=size, mean=entry.preprocess.mean, std=entry.preprocess.std
        )
        train, test = data.split(examples, held_out=held_out, seed=seed)
    elif len(entry.inputs) == 2:
        source = folder or DEFAULT_TEXTS
        path = Path(source) if Path(source).is_dir() else hub.fetch(source)
        tokenizer = models.weights_path(model, weights or _PRETRAINED)
        tokenizer = (tokenizer if tokenizer.is_dir() else tokenizer.parent) / "tokenizer.json"
        corpus = data.read_folders(path)
        examples = corpus
        parts = data.split(corpus, held_out=held_out, seed=seed)
        train, test = (data.encode(part, tokenizer, length=size) for part in parts)
    else:
        raise ValueError(f"{model} is no classifier of images or texts; see `pockjax models list`")
    classes = examples.classes
    net = models.load(model, weights=weights, classes=len(classes), rngs=nnx.Rngs(seed))
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def predict(params: Any, *inputs: Any) -> jax.Array:
        call: Any = nnx.merge(graph, params, rest)
        return call(*inputs)

    def loss(params: Any, *batch: Any) -> jax.Array:
        *inputs, labels = batch
        logits = predict(params, *inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return Task(params, loss, predict, train, test, classes)
