"""Wrong use is said clearly, and NaNs of a user's own stay."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pockjax as pj

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "step": jnp.array(3)}
MASK = {"w": pj.part[:1], "b": True, "step": False}
X = jnp.ones((4, 3))


def loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(x @ params["w"] + params["b"])


TRANSFORMS = [pj.grad, pj.value_and_grad]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (lambda p, x: x @ p["w"], r"one real scalar output, got float32\[4,2\]; use pj.vjp"),
        (lambda p, x: (loss(p, x), 1.0), "scalar-output functions.*has_aux=True"),
        (lambda p, x: {"loss": loss(p, x)}, "scalar-output functions"),
        (lambda p, x: None, "scalar-output functions"),
        (lambda p, x: p["step"] * 2, r"one real scalar output, got int32\[\]"),
        (lambda p, x: loss(p, x) * 1j, r"one real scalar output, got complex64\[\]"),
    ],
    ids=["array", "pair", "dict", "None", "integer", "complex"],
)
def test_only_scalars_have_gradients(transform: Any, fun: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        transform(fun, MASK)(PARAMS, X)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("out", [1.0, (1.0, 2.0, 3.0), [1.0, 2.0]], ids=["no aux", "3", "list"])
def test_aux_is_the_second_of_a_pair(transform: Any, out: Any) -> None:
    with pytest.raises(TypeError, match=r"has_aux=True.*pair \(output, aux\)"):
        transform(lambda p, x: out, MASK, has_aux=True)(PARAMS, X)
    with pytest.raises(TypeError, match=r"has_aux=True.*pair \(output, aux\)"):
        pj.vjp(lambda p, x: out, MASK, PARAMS, X, has_aux=True)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"w": True, "b": True}, "not in the mask: 'step'"),
        ({**MASK, "c": True}, "only in the mask: 'c'"),
        ({**MASK, "w": pj.part[:4]}, r"'w', shape \(3, 2\).*bound 4 exceeds"),
        ({**MASK, "w": pj.part[:, :, :1]}, r"'w'.*3 indices, but the array has 2 axes"),
        ({**MASK, "w": pj.part[[0, 0]]}, "'w'.*index 0 is repeated"),
        ({**MASK, "step": pj.part[:1]}, "'step'.*int32"),
        ({**MASK, "w": jnp.ones((3, 2), bool)}, "'w' must be True, False or a Part"),
        ({**MASK, "w": 1}, "'w' must be True, False or a Part, got 1$"),
        ([("w", "all")], r"True, False or a Part, got 'w'. pj.mask\(params, scheme\) makes a mask"),
        (lambda path, leaf: True, r"got <function.*pj.mask\(params, scheme\) makes a mask of"),
    ],
)
def test_masks_that_do_not_fit(mask: Any, message: str) -> None:
    for use in (pj.grad(loss, mask), pj.value_and_grad(loss, mask)):
        with pytest.raises(pj.MaskError, match=message):
            use(PARAMS, X)
    with pytest.raises(pj.MaskError, match=message):
        pj.vjp(loss, mask, PARAMS, X)


def test_integer_leaves_are_frozen_by_a_prefix() -> None:
    grads = pj.grad(loss, True)(PARAMS, X)
    assert grads["step"] is None
    full = jax.grad(loss, allow_int=True)(PARAMS, X)
    np.testing.assert_array_equal(grads["w"], full["w"])


@pytest.mark.parametrize(
    ("cotangent", "message"),
    [
        (jnp.ones((4, 3)), r"shape and dtype of .*, float32\[4,2\], got float32\[4,3\]"),
        (jnp.ones((4, 2), jnp.bfloat16), r"float32\[4,2\], got bfloat16\[4,2\]"),
        ((jnp.ones((4, 2)),), "structure of the function's output"),
    ],
    ids=["shape", "dtype", "structure"],
)  # fmt: skip
def test_cotangents_that_do_not_fit(cotangent: Any, message: str) -> None:
    _, vjp_fn = pj.vjp(lambda p, x: x @ p["w"], MASK, PARAMS, X)
    with pytest.raises(TypeError, match=message):
        vjp_fn(cotangent)


def test_errors_of_the_function_are_its_own() -> None:
    def broken(params: Any, x: jax.Array) -> jax.Array:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pj.grad(broken, MASK)(PARAMS, X)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nans_of_the_function_are_kept(bad: float) -> None:
    # Only what comes from the mask is folded away: a zero that the user wrote is a number.
    def fun(params: Any, x: jax.Array) -> jax.Array:
        h = x @ params["w"] + 0.0 * jnp.sum(x) + jnp.zeros(2)
        return jnp.sum(jnp.tanh(h) * params["b"]) * jnp.zeros(())

    x = X.at[0, 0].set(bad)
    for mask in (MASK, True, {**MASK, "b": False}):
        value, grads = pj.value_and_grad(fun, mask)(PARAMS, x)
        wanted, full = jax.value_and_grad(fun, allow_int=True)(PARAMS, x)
        assert np.isnan(wanted) and np.isnan(value)
        full = pj.pack(full | {"step": PARAMS["step"]}, mask)
        assert np.isnan(full["w"]).any()
        jax.tree.map(np.testing.assert_array_equal, grads, full)


def test_a_nan_in_a_frozen_weight_reaches_only_what_it_reaches_densely() -> None:
    params = {**PARAMS, "w": PARAMS["w"].at[2, 1].set(np.nan)}

    def fun(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x @ params["w"])[:, :1] * params["b"][:1])

    grads = pj.grad(fun, MASK)(params, X)
    full = jax.grad(fun, allow_int=True)(params, X)
    np.testing.assert_array_equal(grads["w"], full["w"][:1])
