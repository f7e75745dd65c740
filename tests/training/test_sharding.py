"""Steps whose parameters or batch were put somewhere: they stay there, and compute the same."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pockjax as pj

PARAMS = {"w": jnp.linspace(-1, 1, 32).reshape(8, 4), "b": jnp.linspace(0, 1, 4)}
X = jnp.linspace(0, 1, 128).reshape(16, 8)
MESH = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
MASKS = {
    "all": True,
    "bias": {"w": False, "b": True},
    "inputs": {"w": pj.part[1:5], "b": True},
    "outputs": {"w": pj.part[:, [3, 0]], "b": pj.part[1:]},
    "traced": {"w": pj.part[jnp.array([5, 2])], "b": pj.part[jnp.array([3, 0])]},
}


def loss(params: Any, x: Any) -> Any:
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def put(tree: Any, **specs: Any) -> Any:
    return {
        name: jax.device_put(x, NamedSharding(MESH, specs.get(name, P())))
        for name, x in tree.items()
    }


def run(params: Any, mask: Any, x: Any, **options: Any) -> Any:
    step = pj.compile(loss, mask, optax.adam(0.1), params, x, **options)
    state = step.init(params)
    for _ in range(2):
        state, _ = step(state, x)
    state = step.reselect(state, mask)
    for _ in range(2):
        state, _ = step(state, x)
    return state


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "specs",
    [{"w": P(None, "d"), "b": P("d")}, {"w": P(None, "d")}, {"w": P("d")}, {}],
    ids=["outputs", "outputs of w", "inputs", "replicated"],
)
def test_parameters_stay_on_their_mesh(specs: Any, mask: str) -> None:
    state = run(put(PARAMS, **specs), MASKS[mask], X)
    chex.assert_trees_all_close(state.params, run(PARAMS, MASKS[mask], X).params, atol=1e-4)
    for name, x in state.params.items():
        assert x.sharding.is_equivalent_to(NamedSharding(MESH, specs.get(name, P())), x.ndim)


def test_the_optimizer_is_sharded_as_what_it_optimizes() -> None:
    mask = {"w": pj.part[1:5], "b": True}
    state = run(put(PARAMS, w=P("d", None), b=P("d")), mask, X)
    moments = state.opt_state[0].mu
    assert moments["b"].sharding.spec == P("d")
    assert moments["w"].sharding.is_fully_replicated  # cut along the axis that is sharded
    state = run(put(PARAMS, w=P(None, "d")), mask, X)
    assert state.opt_state[0].mu["w"].sharding.spec == P(None, "d")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sharded_batch_brings_the_parameters_with_it(accumulate: int) -> None:
    x = jax.device_put(X, NamedSharding(MESH, P("d")))
    state = run(PARAMS, MASKS["inputs"], x, accumulate=accumulate)
    chex.assert_trees_all_close(state.params, run(PARAMS, MASKS["inputs"], X).params, atol=1e-4)
    assert state.params["w"].sharding.mesh.devices.tolist() == MESH.devices.tolist()


def test_shapes_with_shardings_are_enough() -> None:
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(MESH, P())), PARAMS
    )
    step = pj.compile(loss, MASKS["all"], optax.adam(0.1), shapes, X)
    state, _ = step(step.init(PARAMS), X)
    state, _ = step(state, X)
    assert state.params["w"].sharding.device_set == set(MESH.devices.flat)


def test_another_device_than_the_first() -> None:
    device = jax.devices()[-1]
    params, x = jax.device_put((PARAMS, X), device)
    state = run(params, MASKS["traced"], x)
    assert {d for leaf in jax.tree.leaves(state) for d in leaf.devices()} == {device}
    chex.assert_trees_all_close(state.params, run(PARAMS, MASKS["traced"], X).params, atol=1e-4)


@pytest.mark.parametrize("where", ["the usual device", "another device", "a mesh of one"])
def test_convolutions_are_rewritten_wherever_one_device_has_all(where: str) -> None:
    home = {
        "the usual device": jax.devices()[0],
        "another device": jax.devices()[-1],
        "a mesh of one": NamedSharding(
            jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,)), P()
        ),
    }[where]

    def fun(params: Any, x: Any) -> Any:
        names = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=names, feature_group_count=8
        )
        return jnp.mean(x**2)

    params, x = {"w": jnp.linspace(-1, 1, 72).reshape(3, 3, 1, 8)}, jnp.ones((2, 16, 16, 8))
    options: dict[str, Any] = {"rewrites": "guessed"}
    usual = pj.compile(fun, True, optax.sgd(0.1), params, x, **options)
    there = jax.device_put((params, x), home)
    step = pj.compile(fun, True, optax.sgd(0.1), *there, **options)
    forms = [choice.form for choice in usual.report.rewrites]
    assert forms == [choice.form for choice in step.report.rewrites] != []
    state, _ = step(step.init(there[0]), there[1])
    expected, _ = usual(usual.init(params), x)
    chex.assert_trees_all_close(
        jax.device_get(state.params), jax.device_get(expected.params), rtol=1e-5
    )
    assert state.params["w"].devices() == there[0]["w"].devices()
    moved, _ = step(step.init(jax.device_put(params, jax.devices()[2])), there[1])
    assert moved.params["w"].devices() == there[0]["w"].devices()
    predicted = pj.CostModel(fun, optax.sgd(0.1), *there, **options).predict(True)
    assert predicted.memory_bytes == pytest.approx(step.report.predicted_total_bytes, rel=0.01)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_what_a_mesh_leaves_as_it_is_the_log_says(axis_type: Any, caplog: Any) -> None:
    mesh = jax.make_mesh((1 if axis_type is AxisType.Explicit else 2,), ("d",), (axis_type,))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    pj.compile(loss, True, optax.sgd(0.1), params, jax.device_put(X, NamedSharding(mesh, P())))
    assert "on a mesh" in caplog.text
    caplog.clear()
    pj.compile(loss, True, optax.sgd(0.1), PARAMS, X)
    assert "on a mesh" not in caplog.text


def test_costs_are_predicted_inside_a_trace() -> None:
    def predicted(x: jax.Array) -> jax.Array:
        costs = pj.CostModel(loss, optax.sgd(0.1), PARAMS, jax.ShapeDtypeStruct(X.shape, X.dtype))
        assert costs.predict(True).memory_bytes > 0
        return x

    jax.jit(predicted)(X)
