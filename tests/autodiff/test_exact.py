"""The packed gradient is the dense gradient, packed: for every function and every mask."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import pallas as pl

import pockjax as pj
from tests.autodiff.oracle import (
    assert_close,
    assert_identical,
    compare,
    dense,
    epsilon,
)
from tests.autodiff.programs import FAMILIES, Program, programs

COMPILED, EAGER, SLOW = 50, 13, 5000


# Programs are large, and compiling them is slow: neither is a fault of a test.
SLOW_TO_DRAW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def check_all(check: Callable[[st.DataObject], None], examples: int) -> None:
    """Runs ``check`` on exactly as many examples as asked for."""
    count = 0

    @settings(max_examples=examples, suppress_health_check=SLOW_TO_DRAW, deadline=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal count
        check(data)
        count += 1

    run()
    assert count >= examples


def sparse(p: Program, how: str) -> Callable[..., Any]:
    """The transform under test, as a value and a packed gradient."""
    if how == "value_and_grad":
        return pj.value_and_grad(p.fun, p.mask, has_aux=p.has_aux)

    def by_vjp(params: Any, *args: Any) -> Any:
        out, vjp_fn, *aux = pj.vjp(p.fun, p.mask, params, *args, has_aux=p.has_aux)
        grads = vjp_fn(jnp.ones_like(out))
        return ((out, *aux) if p.has_aux else out), grads

    def by_grad(params: Any, *args: Any) -> Any:
        out = pj.grad(p.fun, p.mask, has_aux=p.has_aux)(params, *args)
        grads, *aux = out if p.has_aux else (out,)
        value = p.fun(params, *args)
        return ((value[0], *aux) if p.has_aux else value), grads

    return by_vjp if how == "vjp" else by_grad


def check_compiled(data: st.DataObject, family: str) -> None:
    p = data.draw(programs(FAMILIES[family]))
    how = data.draw(st.sampled_from(["value_and_grad", "vjp", "vjp", "grad"]))
    with p.precision():
        compare(sparse(p, how), dense(p.fun, p.mask, p.has_aux), *p.inputs())


def check_eager(data: st.DataObject, family: str) -> None:
    p = data.draw(programs(FAMILIES[family], max_layers=1))
    how = data.draw(st.sampled_from(["value_and_grad", "vjp"]))
    with p.precision():
        params, *args = p.inputs()
        found, grads = sparse(p, how)(params, *args)
        wanted, dense_grads = dense(p.fun, p.mask, p.has_aux)(params, *args)
        assert_close(grads, dense_grads, dense_grads, epsilon(params, args))
        if not p.compiled:
            wanted = p.fun(params, *args)
            assert_identical(found, wanted)
        else:
            assert_close(found, wanted, wanted, epsilon(params, args))


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family: str) -> None:
    check_all(lambda data: check_compiled(data, family), COMPILED)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager(family: str) -> None:
    check_all(lambda data: check_eager(data, family), EAGER)


def test_at_least_500_cases() -> None:
    assert len(FAMILIES) * (COMPILED + EAGER) >= 500


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many(family: str) -> None:
    check_all(lambda data: check_compiled(data, family), SLOW // len(FAMILIES))


@pytest.mark.parametrize("rows", [pj.part[[0], 1:3], pj.part[jnp.array([0]), jnp.array([3, 1])]])
def test_a_part_of_an_axis_that_is_broadcast(rows: pj.Part) -> None:
    def fun(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.broadcast_to(w, (2, 5, 4)) @ x))

    w, x = jnp.linspace(-1, 1, 4).reshape(1, 4), jnp.linspace(0, 1, 12).reshape(4, 3)
    compare(pj.value_and_grad(fun, rows), dense(fun, rows), w, x)


@pytest.mark.parametrize("mask", [pj.part[:, :2], pj.part[:, jnp.array([3, 0])]])
@pytest.mark.parametrize("shape", [(4, 0), (0,), (2, 0, 3)])
def test_arrays_without_elements(shape: tuple[int, ...], mask: pj.Part) -> None:
    def fun(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(w.reshape(shape)) + jnp.sum(jnp.ones((3, 0)) @ w) + jnp.sum(x)

    compare(pj.value_and_grad(fun, mask), dense(fun, mask), jnp.zeros((0, 4)), jnp.ones(3))


def test_branches_for_other_platforms_are_not_compiled() -> None:
    def kernel(x: Any, out: Any) -> None:
        out[...] = x[...] * 2

    @jax.custom_vjp
    def accelerated(w: jax.Array) -> jax.Array:
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype))(w)

    accelerated.defvjp(lambda w: (accelerated(w), None), lambda _, g: (g * 2,))

    def fun(w: jax.Array, x: jax.Array) -> jax.Array:
        w = lax.platform_dependent(w, cpu=lambda w: w * 2, cuda=accelerated, default=accelerated)
        return jnp.sum(jnp.sin(x @ w))

    w, x = jnp.linspace(-1, 1, 12).reshape(3, 4), jnp.linspace(0, 1, 6).reshape(2, 3)
    for mask in (pj.part[:2], True):
        compare(pj.value_and_grad(fun, mask), dense(fun, mask), w, x)
        step = pj.compile(fun, mask, optax.sgd(0.1), w, x)
        step(step.init(w), x)
