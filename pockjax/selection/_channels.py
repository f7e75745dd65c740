"""Which channels of a weight a unit trains: the first ones, or those that are worth most."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from pockjax.selection._entries import as_entry, positions
from pockjax.selection._units import Unit


def choose_channels(units: Sequence[Unit], elements: Mapping[str, np.ndarray]) -> tuple[Unit, ...]:
    """The units with the same number of channels, those that are worth most.

    Args:
        units: as `pockjax.units` makes them.
        elements: what each element of the parameters is worth, by path.

    Returns:
        Units of the same names, whose parts have the indices of their channels, in order. Channels
        that belong together, as those of a head, are chosen together. Units that train all
        channels stay as they are.

    >>> from pockjax import part
    >>> unit = Unit("w in 0.5", "w", "weight", (("w", part[:2]),), 0, ratio=0.5, axis=0)
    >>> worth = np.array([[1.0], [5.0], [0.0], [2.0]])
    >>> choose_channels([unit], {"w": worth})[0].entries
    (('w', part[1:4:2]),)
    """
    return tuple(unit if unit.axis is None else _chosen(unit, elements) for unit in units)


def _chosen(unit: Unit, elements: Mapping[str, np.ndarray]) -> Unit:
    [(path, entry)], axis = unit.entries, unit.axis
    assert axis is not None
    worth = elements[path]
    places = positions(entry, worth.shape, path)
    count = len(places[axis]) // unit.grain
    places[axis] = np.arange(worth.shape[axis])
    here = worth[np.ix_(*places)].sum(axis=tuple(d for d in range(worth.ndim) if d != axis))
    together = here.reshape(-1, unit.grain).sum(axis=1)
    best = np.sort(np.argsort(-together, kind="stable")[:count])
    places[axis] = (best[:, None] * unit.grain + np.arange(unit.grain)).reshape(-1)
    return replace(unit, entries=((path, as_entry(places, worth.shape)),))
