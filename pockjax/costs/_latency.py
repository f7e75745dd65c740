"""How long a step takes: its work by class, and the rates of this machine."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from pockjax._compat import Jaxpr, JaxprEqn, shape_of, subjaxprs
from pockjax.autodiff import size_in_bytes
from pockjax.costs._flops import count_flops

CLASSES = ("matrix products", "convolutions", "bytes of loops", "bytes of others", "calls")
"""FLOPs of products, FLOPs of convolutions, bytes read and written, and how many operations."""


def work_of(jaxpr: Jaxpr) -> np.ndarray:
    """(classes,): the work of a jaxpr, of each class; loops count as often as they run.

    >>> import jax, jax.numpy as jnp
    >>> jaxpr = jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 5)))
    >>> work_of(jaxpr).tolist()
    [60.0, 0.0, 0.0, 124.0, 1.0]
    """
    found = Counter[str]()
    _count(jaxpr, 1, found)
    return np.array([float(found[name]) for name in CLASSES])


def _count(jaxpr: Jaxpr, times: int, found: Counter[str]) -> None:
    for eqn in jaxpr.eqns:
        inner = subjaxprs(eqn)
        name = eqn.primitive.name
        if inner and not name.startswith(("reduce", "scatter", "cum", "sort")):
            often = times * (eqn.params["length"] if name == "scan" else 1)
            for body in inner[:1] if name.startswith("custom_") else inner:
                _count(body, often, found)
            continue
        if name in _FREE:
            continue
        product = {"dot_general": CLASSES[0], "conv_general_dilated": CLASSES[1]}.get(name)
        if product is not None:
            found[product] += times * count_flops(jaxpr.replace(eqns=[eqn]))
        found[CLASSES[3 if product or name in _SLOW else 2]] += times * _traffic(eqn)
        found[CLASSES[4]] += times


_FREE = frozenset(
    "reshape squeeze expand_dims copy_p stop_gradient name optimization_barrier broadcast_in_dim "
    "iota".split()
)
_SLOW = frozenset("reduce_sum reduce_max argmax transpose gather scatter-add cumsum sort".split())


def _traffic(eqn: JaxprEqn) -> int:
    """Bytes that an operation reads and writes; of an array it only looks into, what it takes."""
    made = sum(size_in_bytes(v.aval) for v in eqn.outvars)
    if eqn.primitive.name in ("gather", "dynamic_slice", "slice"):
        return 2 * made
    if eqn.primitive.name == "dynamic_update_slice":
        return 2 * size_in_bytes(eqn.invars[1].aval)
    return made + sum(size_in_bytes(a.aval) for a in eqn.invars if shape_of(a))


@dataclass(frozen=True, eq=False)
class Rates:
    """Seconds for each unit of work, on this machine.

    Attributes:
        seconds: (classes,): for a unit of each class of `CLASSES`.
        fixed: for a step that does nothing.
    """

    seconds: np.ndarray
    fixed: float

    def of(self, work: np.ndarray) -> float:
        """The time of some work, in seconds."""
        return float(work @ self.seconds + self.fixed)

    @classmethod
    def fitted(cls, works: Sequence[np.ndarray], times: Sequence[float]) -> "Rates":
        """Rates that explain measured times best, none of them negative.

        Errors count relative to the time measured. Where there are fewer measurements than classes,
        a little of every rate is taken from a machine of ordinary balance.

        Args:
            works: (classes,) each, see `work_of`.
            times: of each, in seconds.
        """
        table, measured = np.array(works), np.array(times)
        scale = float(np.median(measured / np.maximum(table @ _ORDINARY, 1e-12)))
        prior = scale * _ORDINARY
        # In units of the prior, so that all rates are near one.
        rows = np.column_stack([table * prior, np.full(len(measured), measured.min())])
        rows = rows / measured[:, None]
        pull = _TRUST * np.eye(rows.shape[1])
        expected = _TRUST * np.array([*np.ones(len(prior)), 0.0])
        found, _ = nnls(np.vstack([rows, pull]), np.concatenate([np.ones(len(measured)), expected]))
        return cls(found[:-1] * prior, float(found[-1] * measured.min()))


_ORDINARY = np.array([1 / 3e11, 1 / 1e11, 1 / 3e10, 1 / 1e10, 2e-6])
_TRUST = 0.05
