"""A run on disk: its state, its losses and where it was in the data, in one file.

Plain NumPy arrays and JSON, and not orbax: a state of a step is a flat list of arrays that one
process holds, the file is replaced as a whole, and nothing in it is ever executed.
"""

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pockjax._files import replacing
from pockjax._paths import flatten_with_paths
from pockjax.training._state import State


def save(
    file: Path,
    state: State,
    position: Mapping[str, Any],
    losses: np.ndarray,
    identity: Mapping[str, str],
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        file: where; its folder is made.
        state: between two steps.
        position: where the data are, as JSON.
        losses: of all steps so far.
        identity: what the run is of, by name: a run of something else does not go on from here.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays, types = {"losses": np.asarray(losses)}, {}
    for i, (path, leaf) in enumerate(flatten_with_paths(state)[0]):
        if leaf is None:
            continue
        array = np.asarray(_data(leaf))
        types[path] = [f"leaf{i}", str(leaf.dtype), list(leaf.shape)]
        # Bytes, because NumPy's format knows nothing of bfloat16.
        arrays[f"leaf{i}"] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    arrays["about"] = np.frombuffer(
        json.dumps(
            {"types": types, "position": dict(position), "identity": dict(identity)}
        ).encode(),
        np.uint8,
    )
    with replacing(file) as temporary, temporary.open("wb") as out:
        np.savez(out, allow_pickle=False, **arrays)


def load(
    file: Path, like: State, identity: Mapping[str, str]
) -> tuple[State, dict[str, Any], np.ndarray]:
    """Reads a checkpoint.

    Args:
        file: what `save` wrote.
        like: a state of the same step, which gives structure and places.
        identity: what the run is of.

    Returns:
        The state, the position in the data, and the losses.

    Raises:
        ValueError: the file is no checkpoint, or one of something else.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            arrays = dict(content)
        about = json.loads(arrays["about"].tobytes())
        types, losses = about["types"], arrays["losses"]
        named, treedef = flatten_with_paths(like)
        expected = {path: [str(x.dtype), list(x.shape)] for path, x in named if x is not None}
        found = {path: [dtype, shape] for path, (_, dtype, shape) in types.items()}
        if not all(name in arrays for name, _, _ in types.values()):
            raise ValueError("arrays are missing")
        known = dict(about["identity"])
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        EOFError,
        TypeError,
        AttributeError,
        zlib.error,
        NotImplementedError,
    ) as error:
        raise ValueError(f"{file} is no checkpoint of a training run, or is damaged") from error
    if expected != found:
        differ = sorted(p for p in {*expected, *found} if expected.get(p) != found.get(p))
        raise ValueError(
            f"{file} is a checkpoint of another step: {differ[0]} is {found.get(differ[0])} there "
            f"and {expected.get(differ[0])} here ({len(differ)} arrays differ); give another "
            "folder, or remove it"
        )
    for name in sorted({*known, *identity}):
        if known.get(name) != identity.get(name):
            raise ValueError(
                f"{file} is a checkpoint of a run over another {name}; give another folder, or "
                "remove it"
            )
    leaves = [None if x is None else _restored(arrays[types[path][0]], x) for path, x in named]
    return jax.tree.unflatten(treedef, leaves), about["position"], losses


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _restored(raw: np.ndarray, like: Any) -> jax.Array:
    data = _data(like)
    array = raw.view(data.dtype).reshape(data.shape)
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    # A copy of its own: the state is donated.
    return jax.device_put(array, like.sharding) if like.committed else jnp.array(array)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
