"""Whether all peers compute the same: the loss of the first step, and the gradients."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from experiments.speed.peers import PEERS, REFERENCE
from experiments.speed.worker import CHECK_RATE

LOSS, GRADIENT = 1e-4, 5e-3
"""The largest relative differences that pass. float32 in another order gives about 1e-5, and more
where units of a deep network stand at the edge of their ReLU: the gradient of ResNet-50's first
layer that JAX finds in float32 is 1.7e-3 away from the one that it finds in float64."""
SMALL = 1e-5
"""Of the norm of the largest gradient: below that a gradient is what rounding left of zero, as that
of a key's bias is."""

Arrays = Mapping[str, np.ndarray]


class DisagreementError(AssertionError):
    """Two peers do not compute the same thing."""


def compare(losses: Mapping[str, float], folder: Path) -> dict[str, float]:
    """Compare what all peers found with what plain JAX found.

    Args:
        losses: of the first step, by peer.
        folder: the problem, and the weights that each peer wrote after a step at `CHECK_RATE`.

    Returns:
        The largest relative difference of a loss, and of a gradient for each peer that has one.

    Raises:
        DisagreementError: a difference is too large, a peer trained other arrays than it says, or
            changed what it ought to have left alone.
    """
    right = losses[REFERENCE]
    apart = {name: abs(loss - right) / abs(right) for name, loss in losses.items()}
    if not all(far <= LOSS for far in apart.values()):  # not one is no number either
        raise DisagreementError(f"the peers compute different losses: {dict(losses)}")
    given = json.loads((folder / "problem.json").read_text())
    parts = dict(np.load(folder / "parts.npz"))
    start = load_file(folder / "weights.safetensors")
    truth = gradients(start, dict(np.load(folder / f"{REFERENCE}.npz")))
    found = {"loss": max(apart.values())}
    for name in losses:
        trains = PEERS[name].trains
        if name == REFERENCE or trains in ("nothing", "adapters"):
            continue
        theirs = gradients(start, dict(np.load(folder / f"{name}.npz")))
        wanted = given["params" if trains == "everything" else "trained"]
        if theirs.keys() != set(wanted):
            raise DisagreementError(f"{name} trains other arrays: {theirs.keys() ^ set(wanted)}")
        expected = {n: truth[n] for n in wanted}
        if trains == "scheme":
            expected |= {n: truth[n] * part for n, part in parts.items()}
            if touched := [n for n, part in parts.items() if theirs[n][~part].any()]:
                raise DisagreementError(f"{name} changes frozen entries of {touched}")
        found[name] = difference(name, theirs, expected)
    return found


def gradients(before: Arrays, after: Arrays) -> dict[str, np.ndarray]:
    """What a step of gradient descent has subtracted, without the rate."""
    return {
        n: (before[n].astype(np.float64) - after[n].astype(np.float64)) / CHECK_RATE for n in after
    }


def difference(name: str, found: Arrays, expected: Arrays) -> float:
    """The largest relative difference of an array.

    Raises:
        DisagreementError: it is too large.
    """
    size = {n: float(np.linalg.norm(value)) for n, value in expected.items()}
    floor = SMALL * max(size.values())
    errors = {
        n: float(np.linalg.norm(found[n] - expected[n])) / max(size[n], floor) for n in expected
    }
    worst = max(errors, key=lambda n: np.nan_to_num(errors[n], nan=np.inf))
    if not errors[worst] <= GRADIENT:
        raise DisagreementError(
            f"{name}: the gradient of {worst} is {errors[worst]:.1e} of its norm away from the "
            f"one of {REFERENCE}; allowed are {GRADIENT}"
        )
    return errors[worst]
