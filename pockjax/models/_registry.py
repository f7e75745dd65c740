"""Models by name: each architecture's file registers its sizes, and `load` builds one of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
from flax import nnx

from pockjax import hub
from pockjax._names import Registry
from pockjax.models._preprocess import ImagePreprocess
from pockjax.models._sources import locate

PRETRAINED = "pretrained"


class Builder(Protocol):
    """Builds one model of a family."""

    def __call__(self, weights: Path | None, classes: int | None, rngs: nnx.Rngs) -> nnx.Module:
        """Build the model.

        Args:
            weights: The file or folder to read; None leaves the weights random.
            classes: Outputs of a new classifier; None keeps the published one. Models that are not
                classifiers refuse a number, with a ValueError.
            rngs: For the weights that are not read.
        """
        ...


@dataclass(frozen=True)
class Entry:
    """A model that `load` knows.

    Attributes:
        name: What it is called; schemes name it in `model`.
        about: What it is, in one line.
        build: Builds it.
        inputs: Shape and dtype of each argument of the model, without the batch axis.
        source: Name of the hub source with its pretrained weights, if there is one.
        file: The file of that source, or of any folder of weights, that holds them; None if the
            builder reads the folder itself.
        origin: Where to get weights by hand, if no source has them.
        preprocess: What images have to go through; None if the model takes something else.
    """

    name: str
    about: str
    build: Builder
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    source: str | None = None
    file: str | None = None
    origin: str | None = None
    preprocess: ImagePreprocess | None = None

    @property
    def license(self) -> str | None:
        """Licence of the pretrained weights that `source` names."""
        return None if self.source is None else hub.sources()[self.source].license


_ENTRIES = Registry[Entry]("model")


def register(
    name: str,
    *,
    about: str,
    inputs: tuple[jax.ShapeDtypeStruct, ...],
    source: str | None = None,
    file: str | None = None,
    origin: str | None = None,
    preprocess: ImagePreprocess | None = None,
) -> Callable[[Builder], Builder]:
    """Make a builder known under a name; the arguments are those of `Entry`.

    Raises:
        ValueError: The name is taken.
    """

    def add(build: Builder) -> Builder:
        found = Entry(name, about, build, inputs, source, file, origin, preprocess)
        _ENTRIES.add(name, found)
        return build

    return add


def names() -> tuple[str, ...]:
    """The names that `load` knows, in alphabetical order."""
    return _ENTRIES.names()


def entry(name: str) -> Entry:
    """What is known about a model.

    Raises:
        ValueError: Nothing has that name; the message has the nearest ones.
    """
    return _ENTRIES[name]


def load(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = PRETRAINED,
    classes: int | None = None,
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """Build a model by name, with its published weights.

    Args:
        name: One of `names()`.
        weights: "pretrained" for the published ones, which are downloaded the first time; None for
            random ones; else a local file or folder, a name from `pockjax.hub.sources()`, or a
            repository of Hugging Face's as "hf://organisation/name", where a revision
            ("@revision") and a file ("/file") may follow.
        classes: Outputs of a new classifier with random weights; None keeps the published one.
        rngs: For random weights; seed 0 unless given.

    Raises:
        ValueError: An unknown name, or weights that do not fit the model.
        FileNotFoundError: The weights are not where the argument says.
        HubError: They could not be downloaded.

    Example:
        >>> model = load("resnet20", weights=None, classes=3)
        >>> model(jax.numpy.zeros((1, 32, 32, 3))).shape
        (1, 3)
    """
    model = entry(name)
    path = None if weights is None else weights_path(name, weights)
    return model.build(path, classes, nnx.Rngs(0) if rngs is None else rngs)


def weights_path(
    name: str,
    weights: str | os.PathLike[str] = PRETRAINED,
    *,
    progress: hub.Progress | None = None,
) -> Path:
    """The local file or folder of a model's weights, downloaded if need be.

    Args:
        name: One of `names()`.
        weights: As for `load`.
        progress: Called now and then during a download.

    Raises:
        ValueError: An unknown name, or "pretrained" where nothing is published for download.
        FileNotFoundError: The weights are not where the argument says.
        HubError: They could not be downloaded.
    """
    model = entry(name)
    if weights == PRETRAINED:
        if model.source is None:
            raise ValueError(
                f"{name} has no pretrained weights that can be downloaded; give a path as weights"
                + (f" (they are published at {model.origin})" if model.origin else "")
                + ", or None for random ones"
            )
        weights = model.source
    return locate(weights, file=model.file, progress=progress)
