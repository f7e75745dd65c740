"""Budgets: what can be written, and what is refused."""

import pytest

import pockjax as pj
from pockjax.selection import Budget, BudgetError


@pytest.mark.parametrize(
    ("given", "amount"),
    [
        ({"memory": "48MiB"}, 48 * 2**20),
        ({"memory": "1.5 GB"}, 1.5e9),
        ({"memory": 50_000}, 50_000),
        ({"memory": "5e4B"}, 5e4),
        ({"optimizer": "10KB"}, 10_000),
        ({"optimizer": "10kB"}, 10_000),
        ({"latency": "20ms"}, 0.02),
        ({"latency": "1.2 s"}, 1.2),
        ({"latency": "300 µs"}, 3e-4),
        ({"latency": 2}, 2),
        ({"flops": "3GFLOP"}, 3e9),
        ({"flops": "3 GFLOPs"}, 3e9),
        ({"extra_memory": "2MiB"}, 2**21),
    ],
)
def test_amounts(given, amount):
    [limit] = Budget(**given).limits.values()
    assert limit.amount == pytest.approx(amount) and not limit.of_full


def test_fractions_are_of_full_backpropagation():
    budget = Budget(memory="30%", latency="12.5 %", flops="1GFLOP")
    assert budget.absolute({"memory": 1000, "latency": 0.8}) == {
        "memory": 300, "latency": pytest.approx(0.1), "flops": 1e9,
    }  # fmt: skip
    assert budget.as_dict() == {"memory": "30%", "latency": "12.5 %", "flops": "1GFLOP"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "at least one of memory, extra_memory, optimizer, latency, flops"),
        ({"memory": 0.3}, r"might be a fraction or a number of bytes.*'30%'"),
        ({"latency": 0.02}, r"might be a fraction or a number of seconds.*'2%'"),
        ({"memory": 1}, "might be a fraction"),
        ({"memory": "48"}, r"cannot be read; write an amount such as '48MiB'"),
        ({"memory": "48ms"}, r"cannot be read.*units: B, kB"),
        ({"latency": "20 parsecs"}, "cannot be read"),
        ({"memory": "much"}, "cannot be read"),
        ({"memory": "-3MiB"}, "must be above 0"),
        ({"memory": -3}, "must be above 0"),
        ({"memory": "0%"}, "must be above 0"),
        ({"memory": float("inf")}, "finite"),
        ({"memory": True}, "neither a number nor text"),
        ({"memory": [3]}, "neither a number nor text"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(BudgetError, match=message):
        Budget(**given)


def test_it_is_public():
    assert pj.Budget is Budget
