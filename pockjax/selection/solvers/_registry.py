"""Solvers by name."""

import difflib
from collections.abc import Callable

from pockjax.selection.solvers._problem import Solution

# solve(problem, *, seed=0, **options of its own) -> Solution. The same seed gives the same choice;
# where nothing at all fits it raises InfeasibleError.
type Solver = Callable[..., Solution]

_SOLVERS: dict[str, Solver] = {}


def register(name: str) -> Callable[[Solver], Solver]:
    """Make a solver known under a name.

    Raises:
        ValueError: the name is taken.
    """

    def add(solver: Solver) -> Solver:
        if name in _SOLVERS:
            raise ValueError(f"a solver named {name!r} is registered already")
        _SOLVERS[name] = solver
        return solver

    return add


def names() -> tuple[str, ...]:
    """The names of the solvers, in alphabetical order."""
    return tuple(sorted(_SOLVERS))


def solver(name: str) -> Solver:
    """A solver by name.

    Raises:
        ValueError: nothing has that name.
    """
    if name not in _SOLVERS:
        near = difflib.get_close_matches(name, _SOLVERS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no solver is named {name!r}{hint}; there are: {', '.join(names())}")
    return _SOLVERS[name]
