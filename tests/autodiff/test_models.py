"""Parameters as the libraries hold them, and arguments of every kind."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pockjax as pj

PyTree = Any
X = jnp.linspace(-1, 1, 12).reshape(4, 3)
Y = jnp.array([0, 1, 1, 0])


def cross_entropy(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def assert_packed(grads: PyTree, full: PyTree, mask: PyTree) -> None:
    """Asserts that ``grads`` is ``full``, packed."""
    wanted = pj.pack(full, mask)
    assert jax.tree.structure(grads) == jax.tree.structure(wanted)
    assert jax.tree.leaves(grads), "nothing is trained"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, wanted)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2)(x)


def test_linen_variables_with_batch_statistics_and_dropout() -> None:
    model = LinenModel()
    variables = model.init(jax.random.key(0), X, train=False)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    mask = {
        "Dense_0": {"kernel": pj.part[:, ::2], "bias": False},
        "BatchNorm_0": {"scale": pj.part[:3], "bias": True},
        "Dense_1": {"kernel": pj.part[[5, 0]], "bias": True},
    }

    def loss(params: PyTree, rest: PyTree, key: jax.Array) -> Any:
        logits, updates = model.apply(
            {"params": params, **rest},
            X,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return cross_entropy(logits), updates

    args = (params, rest, jax.random.key(1))
    (value, updates), grads = jax.jit(pj.value_and_grad(loss, mask, has_aux=True))(*args)
    (wanted, wanted_updates), full = jax.jit(jax.value_and_grad(loss, has_aux=True))(*args)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, wanted_updates)
    assert_packed(grads, full, mask)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 3, rngs=rngs)
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 4, (3,), rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x + self.embed(Y))
        return self.last(self.norm(self.conv(nnx.gelu(x)[None])[0]))


@pytest.mark.parametrize("transform", ["value_and_grad", "vjp"])
def test_nnx_state(transform: str) -> None:
    graph, params, rest = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)
    mask = {
        "embed": {"embedding": pj.part[1:]},
        "first": {"kernel": pj.part[:, 2:6], "bias": pj.part[2:6]},
        "conv": {"kernel": pj.part[..., :4, 1:3], "bias": False},
        "norm": True,
        "last": {"kernel": pj.part[[3, 1]], "bias": False},
    }

    def loss(params: PyTree, rest: PyTree, x: jax.Array) -> jax.Array:
        return cross_entropy(nnx.merge(graph, params, rest)(x))

    def by_vjp(params: PyTree, rest: PyTree, x: jax.Array) -> Any:
        value, vjp_fn = pj.vjp(loss, mask, params, rest, x)
        return value, vjp_fn(jnp.ones_like(value))

    fun = by_vjp if transform == "vjp" else pj.value_and_grad(loss, mask)
    value, grads = jax.jit(fun)(params, rest, X)
    wanted, full = jax.jit(jax.value_and_grad(loss))(params, rest, X)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert_packed(grads, full, mask)


def test_an_equinox_module_with_its_functions_as_leaves() -> None:
    model = eqx.nn.MLP(3, 2, 8, depth=2, key=jax.random.key(0))
    assert any(callable(leaf) for leaf in jax.tree.leaves(model))
    frozen = jax.tree.map(lambda _: False, model)
    mask = eqx.tree_at(
        lambda m: (m.layers[0].weight, m.layers[1].bias, m.layers[2].weight),
        frozen,
        (pj.part[:4], pj.part[[6, 1]], pj.part[:, 3:5]),
    )

    def loss(model: Any, x: jax.Array) -> jax.Array:
        return cross_entropy(jax.vmap(model)(x))

    value, grads = pj.value_and_grad(loss, mask)(model, X)
    wanted, full = eqx.filter_value_and_grad(loss)(model, X)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    # Equinox leaves None where there is no gradient, and pack wants the structure of the model.
    assert_packed(grads, eqx.combine(full, model), mask)


def plain(params: PyTree, x: jax.Array, *, scale: Any = 1.0) -> jax.Array:
    return cross_entropy(jnp.tanh(x @ params["w"]) * scale + params["b"])


PLAIN = {"w": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.zeros(2)}
PLAIN_MASK = {"w": pj.part[:, 1:], "b": False}


def test_arguments_of_any_kind() -> None:
    def loss(params: Any, x: Any, scale: Any, none: Any, config: Any, key: Any, name: str) -> Any:
        noise = jax.random.normal(key, (2,)) * config["noise"]
        assert none is None and name == "a name"
        assert isinstance(scale, float) and isinstance(config["depth"], int)
        for _ in range(config["depth"]):
            x = jnp.sin(x)
        return plain(params, x, scale=scale) + jnp.sum(noise * params["b"])

    args = (X, 2.0, None, {"noise": np.float32(0.5), "depth": 2}, jax.random.key(3), "a name")
    grads = pj.grad(loss, PLAIN_MASK)(PLAIN, *args)
    assert_packed(grads, jax.grad(loss)(PLAIN, *args), PLAIN_MASK)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_arguments_by_name(transform: Any) -> None:
    full = jax.grad(plain)(PLAIN, X, scale=2.0)
    assert_packed(transform(pj.grad(plain, PLAIN_MASK))(PLAIN, X, scale=2.0), full, PLAIN_MASK)
    fun = transform(pj.value_and_grad(plain, PLAIN_MASK))
    value, grads = fun(PLAIN, scale=jnp.array(2.0), x=X)
    np.testing.assert_allclose(value, plain(PLAIN, X, scale=2.0), rtol=1e-6)
    assert_packed(grads, full, PLAIN_MASK)


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_keys_as_arguments_under_jit(key: jax.Array) -> None:
    def loss(params: PyTree, x: jax.Array, key: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return plain(params, jnp.where(keep, x, 0))

    grads = jax.jit(pj.grad(loss, PLAIN_MASK))(PLAIN, X, key)
    assert_packed(grads, jax.grad(loss)(PLAIN, X, key), PLAIN_MASK)


def test_numpy_parameters() -> None:
    params = jax.tree.map(np.asarray, PLAIN)
    grads = pj.grad(plain, PLAIN_MASK)(params, np.asarray(X))
    assert all(isinstance(g, jax.Array) for g in jax.tree.leaves(grads))
    assert_packed(grads, jax.grad(plain)(PLAIN, X), PLAIN_MASK)


def test_parameters_that_are_not_arrays_are_frozen() -> None:
    params = {**PLAIN, "scale": 3.0, "name": "model", "none": None}

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        assert params["name"] == "model"
        return plain(params, x, scale=params["scale"])

    mask = {**PLAIN_MASK, "scale": False, "name": False}
    grads = pj.grad(loss, mask)(params, X)
    full = jax.grad(lambda p: loss({**params, **p}, X))(PLAIN)
    assert grads["scale"] is None and grads["name"] is None
    assert_packed({k: grads[k] for k in PLAIN}, full, PLAIN_MASK)


def test_complex_parameters() -> None:
    params = {"w": PLAIN["w"] + 1j * PLAIN["w"] ** 2, "b": PLAIN["b"]}

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(jnp.sin(x @ params["w"])) ** 2) + jnp.sum(jnp.real(params["w"]) ** 3)

    grads = pj.grad(loss, PLAIN_MASK)(params, X)
    assert_packed(grads, jax.grad(loss)(params, X), PLAIN_MASK)


def test_aux_may_be_any_tree() -> None:
    def loss(params: PyTree, x: jax.Array) -> Any:
        aux = {"none": None, "count": 3, "weight": params["w"], "flags": (x > 0, jnp.arange(2))}
        return plain(params, x), aux

    (_, aux), _ = pj.value_and_grad(loss, PLAIN_MASK, has_aux=True)(PLAIN, X)
    _, wanted = loss(PLAIN, X)
    assert jax.tree.structure(aux) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, aux, wanted)


def test_nothing_to_train() -> None:
    value, grads = pj.value_and_grad(plain, False)(PLAIN, X)
    assert grads == {"w": None, "b": None}
    np.testing.assert_allclose(value, plain(PLAIN, X), rtol=1e-6)


def test_constants_come_back_as_arrays() -> None:
    def loss(params: PyTree, x: jax.Array) -> Any:
        return 3.0 + 0 * params["s"], {"count": 1, "half": np.float16(0.5)}

    mask = {"s": True, "w": pj.part[:1]}
    params = {"s": jnp.float32(2), "w": jnp.ones(3)}
    (_, aux), grads = pj.value_and_grad(loss, mask, has_aux=True)(params, X)
    value, constant = pj.value_and_grad(lambda params: 3.0, mask)(params)
    identity = pj.grad(lambda params: params["s"], mask)(params)
    out, vjp_fn, _ = pj.vjp(lambda params: (params["s"], 1), mask, params, has_aux=True)
    found = (value, aux, grads, constant, identity, out, vjp_fn(jnp.ones(())))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    assert aux["count"].dtype == jnp.int32 and aux["half"].dtype == jnp.float16
    assert value.dtype == jnp.float32 and float(identity["s"]) == 1.0
