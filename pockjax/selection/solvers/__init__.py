"""Solvers: which units to train, by name; each chooses under linear costs."""

from pockjax.selection.solvers import _evolution, _greedy, _milp, _random
from pockjax.selection.solvers._problem import Cost as Cost
from pockjax.selection.solvers._problem import InfeasibleError as InfeasibleError
from pockjax.selection.solvers._problem import Problem as Problem
from pockjax.selection.solvers._problem import Solution as Solution
from pockjax.selection.solvers._registry import SOLVERS as SOLVERS
from pockjax.selection.solvers._registry import Solver as Solver

__all__ = ["_evolution", "_greedy", "_milp", "_random"]  # imported for what they register
