"""Solvers by name."""

from collections.abc import Callable

from pockjax._names import Registry
from pockjax.selection.solvers._problem import Solution

# solve(problem, *, seed=0, **options of its own) -> Solution. The same seed gives the same choice;
# where nothing at all fits it raises InfeasibleError.
type Solver = Callable[..., Solution]

SOLVERS = Registry[Solver]("solver")
"""All solvers; ``@SOLVERS.register(name)`` makes a function one of them."""
