"""Exact choice, by mixed-integer linear programming."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from pockjax.selection.solvers._problem import InfeasibleError, Problem, Solution
from pockjax.selection.solvers._registry import SOLVERS

_UNITS = 1000  # that a limit is long: HiGHS keeps constraints to within a millionth of a unit
_RULED_OUT = 8
_MARGINS = (1e-9, 1e-8, 1e-7, 1e-6)  # of a limit


@SOLVERS.register("milp")
def solve(problem: Problem, *, seed: int = 0, nodes: int = 5000) -> Solution:
    """Chooses what is worth most, and proves it, with SciPy's HiGHS.

    A binary x for each unit, and z for each level that the backward pass may reach: z[l] <= z[l-1],
    and of the units of a group that lie at or below a level at most as many are chosen as it is
    reached: sum(x) <= z. Costs are linear in both.

    Args:
        problem: what to choose from.
        seed: not used; there is nothing to draw.
        nodes: of the search tree, after which to stop at the best choice so far; its ``gap`` says
            how far from the best it may be. Not a time, so that every machine finds the same.

    Raises:
        InfeasibleError: nothing fits.
    """
    del seed
    problem.singles()
    forbidden = set(problem.forbidden)
    limits = np.array([cost.limit - cost.base for cost in problem.costs])
    chosen, gap = _solved(problem, limits, forbidden, nodes)
    for _ in range(_RULED_OUT):
        if problem.is_feasible(chosen):
            return Solution.of(problem, chosen, gap)
        # HiGHS lets constraints be exceeded by a little. Such a choice is ruled out; but there may
        # be as many of them as there are sets of tiny units, of which these are the best.
        forbidden.add(frozenset(chosen))
        chosen, gap = _solved(problem, limits, forbidden, nodes)
    highest, found = problem.value(chosen) * (1 + gap), _within(problem, chosen)
    for margin in _MARGINS:
        with suppress(InfeasibleError):
            chosen, _ = _solved(problem, limits - margin * np.abs(limits), forbidden, nodes)
            found += _within(problem, chosen)
    if not found:
        raise InfeasibleError("no choice was found that keeps the limits, though some nearly do")
    best = max(found, key=lambda solution: solution.objective)
    return replace(best, gap=max(highest / best.objective - 1, 0.0) if best.objective > 0 else None)


def _within(problem: Problem, chosen: Sequence[int]) -> list[Solution]:
    """A choice, without its least valuable units if it takes that to keep the limits."""
    by_value = sorted(chosen, key=lambda u: float(problem.values[u]))
    for first in range(len(by_value)):
        if problem.is_feasible(by_value[first:]):
            return [Solution.of(problem, by_value[first:])]
    return []


def _solved(
    problem: Problem, limits: np.ndarray, forbidden: set[frozenset[int]], nodes: int
) -> tuple[tuple[int, ...], float]:
    n, n_levels = len(problem.values), int(problem.levels.max()) + 1
    rows: list[tuple[dict[int, float], float, float]] = []  # coefficients, lower, upper
    for cost, limit in zip(problem.costs, limits, strict=True):
        scale = limit / _UNITS if limit > 0 else 1.0
        coefficients = {u: float(a) / scale for u, a in enumerate(cost.own) if a}
        coefficients |= {n + i: float(a) / scale for i, a in enumerate(cost.reach[:n_levels]) if a}
        rows.append((coefficients, -np.inf, limit / scale))
    for members in problem.groups:
        for level in sorted({int(problem.levels[u]) for u in members}):
            below = {u: 1.0 for u in members if problem.levels[u] >= level}
            rows.append((below | {n + level: -1.0}, -np.inf, 0.0))
    for level in range(1, n_levels):
        rows.append(({n + level: 1.0, n + level - 1: -1.0}, -np.inf, 0.0))
    rows.append((dict.fromkeys(range(n), 1.0), 1.0, np.inf))
    for choice in sorted(forbidden, key=sorted):
        # Differs somewhere: the number of differences is at least 1.
        signs = {u: -1.0 if u in choice else 1.0 for u in range(n)}
        rows.append((signs, 1.0 - len(choice), np.inf))
    matrix = sparse.lil_array((len(rows), n + n_levels))
    for i, (coefficients, _, _) in enumerate(rows):
        for j, a in coefficients.items():
            matrix[i, j] = a
    lower: Any = np.array([row[1] for row in rows])
    upper: Any = np.array([row[2] for row in rows])
    worth = np.abs(problem.values).max() or 1.0
    with _silent():
        result = milp(
            np.concatenate([-problem.values / worth, np.zeros(n_levels)]),
            integrality=np.concatenate([np.ones(n), np.zeros(n_levels)]),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(
                sparse.csr_array(matrix),
                lower,
                upper,
            ),
            options={"node_limit": nodes, "mip_rel_gap": 0.0},
        )
    if result.x is None:
        raise InfeasibleError(f"no choice keeps the limits ({result.message})")
    chosen = tuple(np.flatnonzero(result.x[:n] > 0.5).tolist())
    return chosen, float(result.mip_gap or 0.0)


@contextmanager
def _silent() -> Iterator[None]:
    """Without what HiGHS writes to the standard output though it is not asked to (SciPy 1.18)."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
