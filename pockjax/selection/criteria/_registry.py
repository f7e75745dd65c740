"""Criteria by name: each is one function, registered by a decorator."""

from collections.abc import Callable

import numpy as np

from pockjax._names import Registry
from pockjax.selection._problem import Problem

Criterion = Callable[[Problem], np.ndarray]
Elements = dict[str, np.ndarray]
PerElement = Callable[[Problem, int], Elements]

_CRITERIA = Registry[Criterion]("criterion")
_PER_ELEMENT = Registry[PerElement]("criterion for channels")


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Registers ``criterion(problem) -> (seeds, units)``: what each unit is worth by each seed.

    Raises:
        ValueError: the name is taken.
    """
    return _CRITERIA.register(name)


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
        _PER_ELEMENT.add(name, function)
        return function

    return register


def names() -> tuple[str, ...]:
    """The criteria that there are."""
    return _CRITERIA.names()


def criterion_named(name: str) -> Criterion:
    """The criterion of a name.

    Raises:
        ValueError: there is none; the message has those that there are.
    """
    return _CRITERIA[name]


def elements_named(name: str) -> PerElement:
    """What each element is worth by the criterion of a name.

    Raises:
        ValueError: there is none, or it says nothing of single elements.
    """
    return _PER_ELEMENT[name]


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
