"""Greedy choice: always the unit that is worth most for what it costs."""

import numpy as np

from pockjax.selection.solvers._problem import Partial, Problem, Solution, best_single, better
from pockjax.selection.solvers._registry import SOLVERS


@SOLVERS.register("greedy")
def solve(problem: Problem, *, seed: int = 0) -> Solution:
    """Adds units, or exchanges one for another of its group, by value gained for cost added.

    A cost counts by the part of its limit that it takes, and of several costs the scarcest.

    Args:
        problem: what to choose from.
        seed: not used; there is nothing to draw.

    Raises:
        InfeasibleError: nothing fits.
    """
    del seed
    single = best_single(problem)
    partial = Partial(problem)
    scales = [max(cost.limit - cost.base, 1e-300) for cost in problem.costs]
    while True:
        now = partial.chosen
        before, value = partial.costs(now), problem.value(now)
        best, best_rate = None, 0.0
        for unit in range(len(problem.values)):
            if unit in now:
                continue
            chosen = partial.with_unit(unit)
            gain = problem.value(chosen) - value
            if gain <= 0 or not partial.fits(chosen):
                continue
            added = max(
                (
                    (a - b) / s
                    for a, b, s in zip(partial.costs(chosen), before, scales, strict=True)
                ),
                default=0.0,
            )
            rate = gain / added if added > 0 else np.inf
            if rate > best_rate:
                best, best_rate = unit, rate
        if best is None:
            break
        partial.put(best)
    if not problem.is_feasible(now):
        return Solution.of(problem, single)
    return Solution.of(problem, better(problem, now, single))
