"""Criteria by name: each is one function, registered by a decorator."""

import difflib
from collections.abc import Callable
from typing import Any

import numpy as np

from pockjax.selection._problem import Problem

Criterion = Callable[[Problem], np.ndarray]
Elements = dict[str, np.ndarray]
PerElement = Callable[[Problem, int], Elements]

_CRITERIA: dict[str, Criterion] = {}
_PER_ELEMENT: dict[str, PerElement] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Registers ``criterion(problem) -> (seeds, units)``: what each unit is worth by each seed.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: Criterion) -> Criterion:
        if name in _CRITERIA:
            raise ValueError(f"a criterion named {name!r} is registered already")
        _CRITERIA[name] = function
        return function

    return register


def per_element(
    name: str, finish: Callable[[np.ndarray], np.ndarray] | None = None
) -> Callable[[PerElement], PerElement]:
    """Registers ``criterion(problem, seed) -> {path: array}``: what each element is worth.

    A unit is worth the sum over what it trains of its arrays, and a channel the sum over what is
    in it: such a criterion can choose channels too.

    Args:
        name: of the criterion.
        finish: applied to the sums of units.
    """

    def register(function: PerElement) -> PerElement:
        def of_units(problem: Problem) -> np.ndarray:
            found = [_sums(problem, function(problem, seed)) for seed in problem.seeds]
            values = np.stack(found)
            return values if finish is None else finish(values)

        criterion(name)(of_units)
        _PER_ELEMENT[name] = function
        return function

    return register


def names() -> tuple[str, ...]:
    """The criteria that there are."""
    return tuple(sorted(_CRITERIA))


def criterion_named(name: str) -> Criterion:
    """The criterion of a name.

    Raises:
        ValueError: there is none; the message has those that there are.
    """
    if name not in _CRITERIA:
        raise ValueError(_unknown("criterion", name, names()))
    return _CRITERIA[name]


def elements_named(name: str) -> PerElement:
    """What each element is worth by the criterion of a name.

    Raises:
        ValueError: there is none, or it says nothing of single elements.
    """
    if name not in _PER_ELEMENT:
        raise ValueError(_unknown("criterion for channels", name, tuple(sorted(_PER_ELEMENT))))
    return _PER_ELEMENT[name]


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    near: Any = difflib.get_close_matches(name, known) or known
    return f"no {what} is named {name!r}; there are: {', '.join(near)}"


def _sums(problem: Problem, elements: Elements) -> np.ndarray:
    """(units,): the sum over what each unit trains."""
    return np.array(
        [
            sum(
                float(elements[path][np.ix_(*problem.positions(path, entry))].sum(dtype=np.float64))
                for path, entry in unit.entries
            )
            for unit in problem.units
        ]
    )
