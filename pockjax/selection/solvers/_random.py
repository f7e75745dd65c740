"""Random choice: what every search has to beat."""

import numpy as np

from pockjax.selection.solvers._problem import Partial, Problem, Solution, best_single, better
from pockjax.selection.solvers._registry import SOLVERS


@SOLVERS.register("random")
def solve(problem: Problem, *, seed: int = 0, evaluations: int = 256) -> Solution:
    """The best of some random choices, each filled up until nothing more fits.

    Args:
        problem: what to choose from.
        seed: decides what is drawn.
        evaluations: number of choices.

    Raises:
        InfeasibleError: nothing fits.
    """
    best = best_single(problem)
    for chosen in draws(problem, seed, evaluations):
        best = better(problem, best, chosen)
    return Solution.of(problem, best)


def draws(problem: Problem, seed: int, count: int) -> list[tuple[int, ...]]:
    """Random choices that keep the limits."""
    generator = np.random.default_rng(seed)
    found = [draw(problem, generator) for _ in range(count)]
    return [chosen for chosen in found if problem.is_feasible(chosen)]


def draw(problem: Problem, generator: np.random.Generator) -> tuple[int, ...]:
    """One random choice, filled up until nothing more fits."""
    partial = Partial(problem)
    # Without a bound on the depth, the first deep unit would nearly always take the whole budget.
    deepest = generator.integers(problem.levels.max() + 1)
    order = [u for u in generator.permutation(len(problem.values)) if problem.levels[u] <= deepest]
    partial.fill(order)
    return partial.chosen
