"""Published weights of convolutional networks, put into the modules of this package."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from pockjax.models._blocks import classifier
from pockjax.weights import WeightsError, fill, read_safetensors, read_torch

CLASSIFIER = "classifier"


def conv_norm_names(path: str, conv: str, norm: str) -> dict[str, str]:
    """The arrays of a `ConvNorm` and their names in a file of PyTorch's.

    >>> conv_norm_names("stem", "conv1", "bn1")["stem/norm/mean"]
    'bn1.running_mean'
    """
    return {
        f"{path}/conv/kernel": f"{conv}.weight",
        f"{path}/norm/scale": f"{norm}.weight",
        f"{path}/norm/bias": f"{norm}.bias",
        f"{path}/norm/mean": f"{norm}.running_mean",
        f"{path}/norm/var": f"{norm}.running_var",
    }


def classifier_names(name: str) -> dict[str, str]:
    """The arrays of the classifier and their names in a file of PyTorch's."""
    return {f"{CLASSIFIER}/kernel": f"{name}.weight", f"{CLASSIFIER}/bias": f"{name}.bias"}


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, or of a state dict that `torch.save` wrote.

    A checkpoint that holds the state dict under "state_dict", and names that begin with "module."
    (what `torch.nn.DataParallel` leaves), are unwrapped.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: The file is damaged, has code in it, or holds no state dict.
    """
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    state: Any = read_torch(file)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, np.ndarray) for v in state.values()):
        raise WeightsError(f"{file} holds no state dict")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_network[Module: nnx.Module](
    build: Callable[[], Module],
    names: Mapping[str, str],
    file: Path,
    *,
    classes: int | None,
    rngs: nnx.Rngs,
) -> Module:
    """Build a network from a file of PyTorch's, with a new classifier if `classes` is given.

    Args:
        build: Makes the network; only its shapes are computed.
        names: For each path of an array its name in the file.
        file: Safetensors, or written by `torch.save`.
        classes: Outputs of a new classifier; None keeps the one in the file.
        rngs: For the new classifier.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It cannot be read, or does not fit the network.
    """
    fresh = () if classes is None else (f"{CLASSIFIER}/",)
    model = fill(build, names, read_tensors(file), file=file, fresh=fresh)
    return model if classes is None else new_classifier(model, classes, rngs)


def new_classifier[Module: nnx.Module](model: Module, classes: int, rngs: nnx.Rngs) -> Module:
    """Replace the classifier of a model; returns the same model."""
    old: nnx.Linear = getattr(model, CLASSIFIER)
    setattr(model, CLASSIFIER, classifier(old.in_features, classes, rngs))
    return model
