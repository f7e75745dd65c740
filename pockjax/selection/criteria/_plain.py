"""Criteria that look at no data."""

import numpy as np

from pockjax.selection._problem import Problem
from pockjax.selection.criteria._registry import Elements, criterion, per_element


@per_element("magnitude", finish=np.sqrt)
def magnitude(problem: Problem, seed: int) -> Elements:
    """The norm of the weights; of channels, the sum of squares. Every seed says the same."""
    problem.refuse_adapters("magnitude")
    return {path: np.square(w) for path, w in problem.weights.items()}


@criterion("random")
def random(problem: Problem) -> np.ndarray:
    """Between 0 and 1 by chance: what any other criterion has to beat at the same budget."""
    count = len(problem.units)
    return np.stack([np.random.default_rng(seed).random(count) for seed in problem.seeds])
