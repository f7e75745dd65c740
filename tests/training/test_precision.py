"""Frozen layers in half precision: what is rounded, and what is not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import pockjax as pj
from pockjax.training._precision import lowered

KEYS = jax.random.split(jax.random.key(0), 5)
PARAMS = {
    "conv": jax.random.normal(KEYS[0], (3, 3, 4, 8)) / 6,
    "front": jax.random.normal(KEYS[1], (3, 8, 8)) / 3,
    "trained": jax.random.normal(KEYS[2], (8, 8)) / 3,
    "after": jax.random.normal(KEYS[3], (8, 2)) / 3,
}
MASK = {"conv": False, "front": False, "trained": True, "after": False}
X = jax.random.normal(KEYS[4], (4, 6, 6, 4))


def front(params: Any, x: Any) -> Any:
    x = lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = x.mean((1, 2))
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["front"])[0]


def loss(params: Any, x: Any) -> Any:
    return jnp.mean((jnp.tanh(front(params, x) @ params["trained"]) @ params["after"]) ** 2)


def operands(jaxpr: Any) -> list[tuple[str, str]]:
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append((eqn.primitive.name, str(eqn.invars[0].aval.dtype)))
        for value in eqn.params.values():
            if hasattr(value, "eqns"):
                found += operands(value)
    return found


def test_products_before_the_first_trained_layer_are_rounded_and_no_others() -> None:
    jaxpr = jax.make_jaxpr(loss)(PARAMS, X)
    names = sorted(PARAMS)
    found = lowered(jaxpr, [name == "trained" for name in names] + [False], jnp.bfloat16)
    assert operands(found) == [
        ("conv_general_dilated", "bfloat16"),
        ("dot_general", "bfloat16"),
        ("dot_general", "float32"),
        ("dot_general", "float32"),
    ]


@pytest.mark.parametrize("rewrites", ["none", "guessed"])
def test_gradients_are_those_of_the_rounded_features(rewrites: Any) -> None:
    def by_hand(trained: Any) -> Any:
        low = {k: PARAMS[k].astype(jnp.bfloat16).astype(jnp.float32) for k in ("conv", "front")}
        rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
        x = lax.conv_general_dilated(
            rounded(X), low["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).mean((1, 2))
        for w in low["front"]:
            x = jnp.tanh(rounded(x) @ w)
        return jnp.mean((jnp.tanh(x @ trained) @ PARAMS["after"]) ** 2)

    given: dict[str, Any] = {"rewrites": rewrites}
    step = pj.compile(loss, MASK, optax.sgd(1.0), PARAMS, X, frozen_dtype="bfloat16", **given)
    state, metrics = step(step.init(PARAMS), X)
    value, gradient = jax.value_and_grad(by_hand)(PARAMS["trained"])
    # A sum in another order may round a feature to its other neighbour: 2^-8 of one of many.
    np.testing.assert_allclose(metrics.loss, value, rtol=2e-3)
    found = PARAMS["trained"] - state.params["trained"]
    np.testing.assert_allclose(found, gradient, atol=2e-3 * float(jnp.abs(gradient).max()))
    assert found.dtype == jnp.float32
    assert float(metrics.loss) != float(loss(PARAMS, X))


def test_off_by_default_and_of_floating_dtype() -> None:
    step = pj.compile(loss, MASK, optax.sgd(1.0), PARAMS, X)
    assert "bf16" not in step.compiled.as_text()
    with pytest.raises(ValueError, match="floating"):
        pj.compile(loss, MASK, optax.sgd(1.0), PARAMS, X, frozen_dtype="int8")
