"""Criteria that read gradients: a few backward passes, nothing is trained."""

import jax
import numpy as np

from pockjax._paths import flatten_with_paths
from pockjax.selection._moments import moments
from pockjax.selection._problem import Problem
from pockjax.selection.criteria._registry import Elements, per_element


@per_element("taylor")
def taylor(problem: Problem, seed: int) -> Elements:
    """How far the optimizer's first step would bring the loss down, to first order: -g·Δw.

    The importance of ElasticTrainer (Huang et al., MobiSys 2023) and GreenTrainer (ICLR 2024).
    """
    mean = moments(problem, seed, ("mean",))["mean"]
    named, treedef = flatten_with_paths(problem.params)
    grads = treedef.unflatten([mean.get(path) for path, _ in named])
    params = treedef.unflatten([x if path in mean else None for path, x in named])
    updates, _ = problem.tx.update(grads, problem.tx.init(params), params)
    paths = [path for path, _ in named if path in mean]
    steps = dict(zip(paths, jax.tree.leaves(updates), strict=True))
    return {path: -g * np.asarray(steps[path], np.float32) for path, g in mean.items()}


@per_element("gradnorm", finish=np.sqrt)
def gradnorm(problem: Problem, seed: int) -> Elements:
    """The norm of the gradient; of channels, the sum of squares."""
    return {path: np.square(g) for path, g in moments(problem, seed, ("mean",))["mean"].items()}


@per_element("snr")
def snr(problem: Problem, seed: int) -> Elements:
    """Signal to noise of the gradient: the square of its mean over its variance among batches."""
    if problem.steps < 2:
        raise ValueError("the noise of a gradient takes two batches at least: steps=2 or more")
    found = moments(problem, seed, ("mean", "square"))

    def ratio(mean: np.ndarray, square: np.ndarray) -> np.ndarray:
        signal = np.square(mean)
        noise = np.maximum(square - signal, 1e-6 * square)
        return np.divide(signal, noise, out=np.zeros_like(signal), where=square > 0)

    return {path: ratio(mean, found["square"][path]) for path, mean in found["mean"].items()}


@per_element("fisher")
def fisher(problem: Problem, seed: int) -> Elements:
    """Fisher potential of the activations.

    TinyTrain (Kwon et al., ICML 2024, arXiv:2307.09988): a channel of activations a with gradient
    g has the potential E[(Σ a·g)²] / 2, the sum over positions, the mean over examples. For the
    activations that a weight w reads or makes that sum is Σ w·∂L/∂w over the channel's weights, so
    gradients of single examples tell it; each element of a bias or a scale is a channel. TinyTrain
    ranks layers by potential over weight norm and multiplications. Here nothing is divided: what a
    unit costs is what a budget is about, and of two units with one potential the cheaper one would
    be worth more even where both fit. Sums of such ratios say nothing, either: one table that is
    only looked up has hardly any multiplications, and would outweigh the rest of a network.
    """
    problem.refuse_adapters("fisher")
    channels = _channels(problem)
    found = moments(problem, seed, ("potential",), channels)["potential"]

    def element(path: str, potential: np.ndarray) -> np.ndarray:
        shape = problem.shapes[path]
        return np.broadcast_to(potential, shape) * (potential.size / max(np.prod(shape), 1))

    return {path: element(path, potential) for path, potential in found.items()}


def _channels(problem: Problem) -> dict[str, tuple[int, ...]]:
    """For each weight the axes of its channels, stacked layers before them; none for others."""
    found: dict[str, tuple[int, ...]] = {}
    for unit in problem.units:
        for path, _ in unit.entries:
            if unit.kind != "weight" or (path in found and unit.axis is None):
                continue
            # All of a weight counts by the channels that its parts are made of.
            axis = len(problem.shapes[path]) - 1 if unit.axis is None else unit.axis
            found[path] = tuple(sorted({*unit.stacked, axis}))
    return found
