"""The largest error of a packed gradient over random functions and masks.

The functions are those of the tests, so a checkout with the development extra is needed.
"""

import warnings
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

import pockjax as pj
from tests.autodiff.oracle import compare, dense
from tests.autodiff.programs import FAMILIES, Program, programs


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        cases: how many functions and masks.
        roundings: largest error of a gradient, in units of what one rounding of every input
            changes in the dense gradient.
        values: how many of the values, evaluated op by op, were equal to the function's bit by bit.
        evaluated: of how many.
    """

    cases: int
    roundings: float
    values: int
    evaluated: int


def sweep(cases: int, start: int = 0) -> Sweep:
    """Compares the packed with the dense gradient on ``cases`` random functions."""
    errors: list[float] = []
    equal: list[bool] = []

    @seed(start)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.one_of(*(programs(layers) for layers in FAMILIES.values())))
    def check(p: Program) -> None:
        with p.precision():
            sparse = pj.value_and_grad(p.fun, p.mask, has_aux=p.has_aux)
            errors.append(compare(sparse, dense(p.fun, p.mask, p.has_aux), *p.inputs()))
            # Where the function holds compiled programs, the order of additions is XLA's choice.
            if not p.compiled and len(equal) < cases // 10:
                (found, _), wanted = sparse(*p.inputs()), p.fun(*p.inputs())
                pair = (found[0], wanted[0]) if p.has_aux else (found, wanted)
                equal.append(np.array_equal(*map(jnp.asarray, pair), equal_nan=True))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)
        check()
    return Sweep(len(errors), max(errors), sum(equal), len(equal))
