"""Which parameters' operations have a backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pockjax.costs import reached_params


def chain(params: Any, x: Any) -> Any:
    for w in params:
        x = jnp.tanh(x @ w)
    return x.sum()


def scanned(params: Any, x: Any) -> Any:
    first, stack, last = params
    x = x @ first
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)
    return (x @ last).sum()


def reached(fun: Any, params: Any, trained: list[bool]) -> set[int]:
    jaxpr = jax.make_jaxpr(lambda params, x: fun(params, x))(params, jnp.ones((2, 4)))
    return reached_params(jaxpr, trained)


WRAPPERS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": lambda f: lambda p, x: lax.cond(x.sum() > 0, f, lambda p, x: x.sum(), p, x),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_backward_pass_stops_at_the_first_trained_layer(wrap: str) -> None:
    params = [jnp.ones((4, 4))] * 4
    fun = WRAPPERS[wrap](chain)
    assert reached(fun, params, [False, True, False, False]) == {1, 2, 3}
    assert reached(fun, params, [False] * 4) == set()
    assert reached(fun, params, [True] * 4) == {0, 1, 2, 3}


def test_through_a_scan() -> None:
    params = [jnp.ones((4, 4)), jnp.ones((3, 4, 4)), jnp.ones((4, 4))]
    assert reached(scanned, params, [False, True, False]) == {1, 2}
    assert reached(scanned, params, [False, False, True]) == {2}
    assert reached(scanned, params, [True, False, False]) == {0, 1, 2}


def test_weights_combined_before_their_use() -> None:
    params = [jnp.ones((4, 4)), jnp.ones((4, 4)), jnp.ones(())]
    fun = lambda p, x: (x @ (p[0] + p[1].T * p[2])).sum()  # noqa: E731
    assert reached(fun, params, [False, False, True]) == {0, 1, 2}
    # A regulariser reaches its parameter without any activation.
    assert reached(lambda p, x: (p[0] ** 2).sum() + x.sum(), params, [True, False, False]) == {0}
