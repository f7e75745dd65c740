"""What training each unit alone is worth."""

from dataclasses import dataclass

import numpy as np

from pockjax.selection._units import Unit


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """A table of units and what each is worth.

    Attributes:
        units: the units.
        values: (seeds, units): the worth of each unit by each seed; the larger, the better.
        criterion: the name of the criterion.
    """

    units: tuple[Unit, ...]
    values: np.ndarray
    criterion: str

    @property
    def mean(self) -> np.ndarray:
        """(units,): the mean over the seeds."""
        return self.values.mean(axis=0)

    @property
    def spread(self) -> np.ndarray:
        """(units,): the standard deviation over the seeds."""
        return self.values.std(axis=0)
