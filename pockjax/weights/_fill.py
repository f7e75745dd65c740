"""Put arrays from a file into a module that has none yet."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pockjax.weights._errors import WeightsError


def from_torch(value: np.ndarray) -> np.ndarray:
    """Bring a weight of torch's into Flax's layout: kernels have their output channels last.

    >>> from_torch(np.zeros((8, 3, 5, 7))).shape  # output, input, height, width
    (5, 7, 3, 8)
    >>> from_torch(np.zeros((8, 3))).shape
    (3, 8)
    """
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value


def fill[Module: nnx.Module](
    build: Callable[[], Module],
    names: Mapping[str, str],
    tensors: Mapping[str, np.ndarray],
    *,
    file: Path,
    layout: Callable[[np.ndarray], np.ndarray] = from_torch,
    fresh: tuple[str, ...] = (),
) -> Module:
    """Build a module whose arrays are those of a file; no random weights are drawn for it.

    Args:
        build: Makes the module; only its shapes are computed.
        names: For each path of an array in the module ("blocks/0/conv/kernel") its name in the
            file.
        tensors: The arrays of the file.
        file: Where they are from, for messages.
        layout: Brings an array of the file into the module's layout.
        fresh: Paths, or beginnings of paths, that the file has nothing for. Their arrays are left
            as shapes, for the caller to replace.

    Raises:
        WeightsError: An array is missing or has another shape; nothing is half filled.
    """
    graph, state = nnx.split(nnx.eval_shape(build))
    for path, variable in nnx.to_flat_state(state):
        ours = "/".join(map(str, path))
        if ours.startswith(fresh):
            continue
        name = names.get(ours)
        if name is None or name not in tensors:
            raise WeightsError(f"{file} has no array {name or '?'!r} for {ours}")
        value = layout(tensors[name])
        if value.shape != variable.shape:
            raise WeightsError(
                f"{file}: {ours} has shape {tuple(variable.shape)} in the model, and shape "
                f"{value.shape} in the file, as {name!r}"
            )
        variable.set_value(jnp.asarray(value, variable.dtype))
    return nnx.merge(graph, state)
