"""A compiled step: what it computes, what it compiles, what it writes in place."""

import re
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pockjax as pj
from experiments import networks
from pockjax.costs import CompiledCost

WIDTH, BATCH = 16, 8


def mlp_params(seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(key, (WIDTH, WIDTH), dtype) / 4,
            "bias": jnp.zeros(WIDTH, dtype),
        }
        for i, key in enumerate(keys)
    }


def mlp_loss(params: Any, x: Any, y: Any) -> Any:
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - y) ** 2)


MASK = {
    "layer0": False,
    "layer1": {"kernel": pj.part[:4], "bias": True},
    "layer2": {"kernel": pj.part[:, [1, 5, 2]], "bias": pj.part[8:]},
}


def batch(seed: int = 1, size: int = BATCH) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (size, WIDTH)), jax.random.normal(keys[1], (size, WIDTH))


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
}


@pytest.mark.parametrize("residuals", ["kept", "xla"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_dense_gradient_packed_and_stepped_by_hand(name: str, residuals: Any) -> None:
    tx, params, (x, y) = OPTIMIZERS[name], mlp_params(), batch()
    step = pj.compile(mlp_loss, MASK, tx, params, x, y, residuals=residuals)
    state = step.init(params)

    @jax.jit
    def by_hand(params: Any, opt_state: Any) -> Any:
        loss, dense = jax.value_and_grad(mlp_loss)(params, x, y)
        updates, opt_state = tx.update(pj.pack(dense, MASK), opt_state, pj.pack(params, MASK))
        trained = optax.apply_updates(pj.pack(params, MASK), updates)
        return loss, pj.unpack(params, trained, MASK), opt_state

    opt_state = tx.init(pj.pack(params, MASK))
    expected = params
    for _ in range(4):
        loss, expected, opt_state = by_hand(expected, opt_state)
        state, metrics = step(state, x, y)
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.opt_state, opt_state, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal(state.params["layer0"], params["layer0"])
    assert int(state.step) == 4


class _Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, 8, rngs=rngs)
        self.down = nnx.Linear(8, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(jnp.tanh(self.up(x)))


def nnx_model() -> Any:
    graph, params = nnx.split(_Net(nnx.Rngs(0)), nnx.Param)
    return params, lambda p, x, y: jnp.mean((nnx.merge(graph, p)(x) - y) ** 2)


def linen_model() -> Any:
    model = nn.Sequential([nn.Dense(8), jnp.tanh, nn.Dense(WIDTH)])
    params = model.init(jax.random.key(0), jnp.ones((1, WIDTH)))
    return params, lambda p, x, y: jnp.mean((model.apply(p, x) - y) ** 2)


def equinox_model() -> Any:
    model = eqx.nn.MLP(WIDTH, WIDTH, 8, depth=1, key=jax.random.key(0))
    return model, lambda p, x, y: jnp.mean((jax.vmap(p)(x) - y) ** 2)


@pytest.mark.parametrize("model", [nnx_model, linen_model, equinox_model])
def test_trains_models_of_every_library(model: Any) -> None:
    params, loss = model()
    x, y = batch()
    mask = pj.mask(params, [(".*bias", "all"), (".*(kernel|weight)", {"axis": 0, "first": 4})])
    step = pj.compile(loss, mask, optax.adam(1e-2), params, x, y)
    state = step.init(params)
    losses = []
    for _ in range(20):
        state, metrics = step(state, x, y)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0]
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    frozen = jax.tree.map(
        lambda new, old: None if new is None else jnp.abs(new - old).max(),
        pj.pack(state.params, mask),
        pj.pack(params, mask),
    )
    assert min(jax.tree.leaves(frozen)) > 0


def test_traces_once_and_compiles_once_whatever_changes() -> None:
    params, (x, y) = mlp_params(), batch()
    fun = chex.assert_max_traces(mlp_loss, n=1)
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)

    def mask(*indices: int) -> Any:
        return {**MASK, "layer1": {"kernel": pj.part[jnp.array(indices)], "bias": False}}

    step = pj.compile(fun, mask(0, 1, 2), tx, params, x, y)
    state = step.init(params)
    with _counting_compiles() as compiles:
        state, _ = step(state, x, y)
        before = state.params["layer1"]["kernel"].copy()
        state = step.reselect(state, mask(5, 9, 7))
        state.opt_state.hyperparams["learning_rate"] = jnp.asarray(0.5)
        compiles.clear()
        state, _ = step(state, x, y)
        state, _ = step(state, x, y)
    assert compiles == []
    changed = np.abs(state.params["layer1"]["kernel"] - before).max(axis=1) > 0
    assert sorted(np.flatnonzero(changed)) == [5, 7, 9]
    assert np.abs(state.params["layer1"]["kernel"] - before)[5].max() > 0.1
    assert "kept for the backward pass" in str(step.report)


class _counting_compiles:
    """Names of the events by which JAX says that it compiled something."""

    def __enter__(self) -> list[str]:
        self.events: list[str] = []
        self.listener = lambda event, *_, **__: (
            self.events.append(event) if "backend_compile" in event else None
        )
        jax.monitoring.register_event_duration_secs_listener(self.listener)
        return self.events

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self.listener)


def test_compiling_is_one_compilation() -> None:
    params, (x, y) = mlp_params(), batch()
    with _counting_compiles() as compiles:
        pj.compile(mlp_loss, MASK, optax.sgd(0.1), params, x, y)
    assert len(compiles) == 1


def test_updates_in_place_without_copying_a_parameter() -> None:
    width = 257  # a shape that nothing else in the program has
    params = {"w": jnp.ones((width, width)) / width, "v": jnp.ones((width, width)) / width}
    x = jnp.ones((4, width))

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"]) ** 2)

    mask = {"w": pj.part[:32], "v": pj.part[:, :16]}
    step = pj.compile(loss, mask, optax.adam(1e-3), params, x)
    memory = step.report.compiled
    opt_state = step.init(params).opt_state
    carried = sum(a.nbytes for a in jax.tree.leaves((params, opt_state)))
    assert memory.alias_bytes >= carried
    copies = re.findall(
        rf"f32\[{width},{width}\]\S* (?:copy|copy-start)\(", step.compiled.as_text()
    )
    assert copies == []


def test_optimizer_state_is_of_the_trained_parts_alone() -> None:
    params, (x, y) = mlp_params(), batch()
    step = pj.compile(mlp_loss, MASK, optax.adamw(1e-3), params, x, y)
    trained = 4 * WIDTH + WIDTH + WIDTH * 3 + 8
    assert step.report.optimizer_bytes == 2 * 4 * trained + 4
    assert sum(a.nbytes for a in jax.tree.leaves(step.init(params).opt_state)) == (
        step.report.optimizer_bytes
    )


@pytest.mark.parametrize("residuals", ["kept", "xla"])
def test_accumulation_equals_the_whole_batch(residuals: Any) -> None:
    params, (x, y) = mlp_params(), batch(size=12)
    whole = pj.compile(mlp_loss, MASK, optax.sgd(0.1), params, x, y)
    parts = pj.compile(
        lambda *args: (mlp_loss(*args), {"seen": args[1].sum()}),
        MASK, optax.sgd(0.1), params, x, y, has_aux=True, accumulate=3, residuals=residuals,
    )  # fmt: skip
    one, metrics = whole(whole.init(params), x, y)
    three, summed = parts(parts.init(params), x, y)
    chex.assert_trees_all_close(one.params, three.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, summed.loss, rtol=1e-5)
    np.testing.assert_allclose(summed.aux["seen"], x.reshape(3, 4, WIDTH).sum((1, 2)), rtol=1e-4)


def test_key_differs_from_step_to_step_and_is_reproducible() -> None:
    params, (x, y) = mlp_params(), batch()

    def loss(params: Any, x: Any, y: Any, key: Any) -> Any:
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return mlp_loss(params, jnp.where(kept, x, 0), y), kept

    step = pj.compile(loss, MASK, optax.sgd(0.0), params, x, y, has_aux=True, key=jax.random.key(3))

    def run(state: Any) -> list[np.ndarray]:
        masks = []
        for _ in range(3):
            state, metrics = step(state, x, y)
            masks.append(np.asarray(metrics.aux))
        return masks

    first, again = run(step.init(params)), run(step.init(params))
    other = run(step.init(params, key=jax.random.key(4)))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])


def test_batch_statistics_are_written_back() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(8)(x))
            return nn.Dense(WIDTH)(nn.relu(x))

    model, (x, y) = Net(), batch()
    variables = model.init(jax.random.key(0), x)

    def loss(variables: Any, x: Any, y: Any) -> Any:
        out, changed = model.apply(variables, x, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), changed["batch_stats"]

    step = pj.compile(
        loss, {"params": True, "batch_stats": False}, optax.sgd(0.1), variables, x, y,
        has_aux=True, merge_aux=lambda variables, stats: {**variables, "batch_stats": stats},
    )  # fmt: skip
    state, metrics = step(step.init(variables), x, y)
    _, expected = model.apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_close(state.params["batch_stats"], expected["batch_stats"], rtol=1e-5)
    chex.assert_trees_all_close(metrics.aux, expected["batch_stats"], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_keep_their_dtype(dtype: Any) -> None:
    params, (x, y) = mlp_params(dtype=dtype), batch()
    step = pj.compile(mlp_loss, MASK, optax.adam(1e-2), params, x.astype(dtype), y.astype(dtype))
    state, metrics = step(step.init(params), x.astype(dtype), y.astype(dtype))
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    assert jnp.isfinite(metrics.loss)


def test_the_users_parameters_survive_unless_given_away() -> None:
    params, (x, y) = mlp_params(), batch()
    step = pj.compile(mlp_loss, MASK, optax.sgd(0.1), params, x, y)
    step(step.init(params), x, y)
    assert jnp.isfinite(params["layer0"]["kernel"]).all()
    step(step.init(params, donate=True), x, y)
    assert params["layer0"]["kernel"].is_deleted()


def test_shapes_are_enough_to_compile() -> None:
    params, (x, y) = mlp_params(), batch()
    shapes = jax.eval_shape(lambda: (params, x, y))
    step = pj.compile(mlp_loss, MASK, optax.sgd(0.1), *shapes)
    _, metrics = step(step.init(params), x, y)
    np.testing.assert_allclose(metrics.loss, mlp_loss(params, x, y), rtol=1e-5)


def test_errors_name_what_is_wrong() -> None:
    params, (x, y) = mlp_params(), batch()
    mask = {**MASK, "layer1": {"kernel": pj.part[jnp.array([0, 1])], "bias": False}}
    step = pj.compile(mlp_loss, mask, optax.sgd(0.1), params, x, y)
    state = step.init(params)
    with pytest.raises(
        TypeError, match=r"batch argument 1 .*float32\[8, 16\], got float32\[3, 16\]"
    ):
        step(state, x, y[:3])
    with pytest.raises(TypeError, match=r"parameter layer1/bias .*\[16\], got float32\[5\]"):
        step.init({**params, "layer1": {**params["layer1"], "bias": jnp.zeros(5)}})
    with pytest.raises(TypeError, match="layer2"):
        step.init({"layer0": params["layer0"], "layer1": params["layer1"]})
    with pytest.raises(pj.MaskError, match="traced"):
        step.reselect(state, MASK)
    with pytest.raises(pj.MaskError, match="layer1/kernel"):
        step.reselect(
            state, {**MASK, "layer1": {"kernel": pj.part[jnp.array([0, 99])], "bias": False}}
        )
    with pytest.raises(ValueError, match=r"batch argument 0 of shape \(8, 16\).*3 microbatches"):
        pj.compile(mlp_loss, MASK, optax.sgd(0.1), params, x, y, accumulate=3)
    with pytest.raises(ValueError, match="residuals must be one of 'auto', 'kept', 'xla'"):
        pj.compile(mlp_loss, MASK, optax.sgd(0.1), params, x, y, residuals="all")  # type: ignore
    with pytest.raises(TypeError, match="scalar"):
        pj.compile(lambda p, x, y: x, MASK, optax.sgd(0.1), params, x, y)
    with pytest.raises(TypeError, match="without one"):
        step.init(params, key=jax.random.key(0))


def chain_of_layers(width: int, depth: int) -> tuple[Any, Any, Any]:
    params = [jnp.eye(width) * 0.9 for _ in range(depth)]

    def loss(params: Any, x: Any) -> Any:
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    return loss, params, jnp.ones((2, width))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_gradients_are_freed_before_the_backward_pass_ends(name: str) -> None:
    width, depth = 256, 8
    loss, params, x = chain_of_layers(width, depth)
    steps = {
        updates: pj.compile(loss, True, OPTIMIZERS[name], params, x, updates=updates)  # type: ignore
        for updates in ("early", "late")
    }
    temp = {updates: step.report.compiled.temp_bytes for updates, step in steps.items()}
    one = 4 * width * width
    assert temp["late"] > depth * one > 4 * one > temp["early"]
    assert steps["early"].report.compiled.alias_bytes == steps["late"].report.compiled.alias_bytes
    states = {updates: step.init(params) for updates, step in steps.items()}
    for _ in range(3):
        states = {updates: steps[updates](state, x)[0] for updates, state in states.items()}
    chex.assert_trees_all_close(states["early"], states["late"], rtol=1e-6)


def test_what_needs_all_gradients_waits_for_them() -> None:
    loss, params, x = chain_of_layers(256, 4)
    temp = {
        name: pj.compile(loss, True, OPTIMIZERS[name], params, x).report.compiled.temp_bytes
        for name in ("clipped", "adamw")
    }
    assert temp["clipped"] > 4 * 4 * 256**2 > temp["adamw"]


def plain_step_bytes(loss: Any, mask: Any, params: Any, *batch: Any) -> int:
    """Compiled bytes of plain JAX's descent on the leaves that are trained."""

    def merged(trained: Any, frozen: Any) -> Any:
        return jax.tree.map(
            lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda a: a is None
        )

    def step(trained: Any, frozen: Any, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(lambda t: loss(merged(t, frozen), *batch))(trained)
        return jax.tree.map(lambda a, g: a - 0.1 * g, trained, grads), value

    trained = jax.tree.map(lambda a, yes: a if yes else None, params, mask)
    frozen = jax.tree.map(lambda a, yes: None if yes else a, params, mask)
    compiled = jax.jit(step, donate_argnums=0).lower(trained, frozen, *batch).compile()
    return CompiledCost.of(compiled).total_bytes


def small_networks() -> dict[str, Any]:
    key = jax.random.key(0)
    dense = networks.mlp_params(key, [64, 128, 128, 8])
    images = networks.conv_params(key, [8, 16, 16, 8])
    return {
        "dense": (lambda p, x: jnp.mean(networks.mlp(p, x) ** 2), dense, jnp.ones((64, 64))),
        "convolutions": (
            lambda p, x: jnp.mean(networks.conv_net(p, x) ** 2), images, jnp.ones((4, 16, 16, 8)),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("trained", ["last", "biases", "all"])
@pytest.mark.parametrize("name", ["dense", "convolutions"])
def test_takes_no_more_memory_than_plain_jax(name: str, trained: str) -> None:
    loss, params, x = small_networks()[name]
    mask = jax.tree.map(lambda _: trained == "all", params)
    for layer in mask:
        layer["bias"] |= trained == "biases"
    if trained == "last":
        mask[-1] = {"kernel": True, "bias": True}
    step = pj.compile(loss, mask, optax.sgd(0.1), params, x, rewrites="guessed")
    # The step's counter, and what XLA aligns.
    assert step.report.compiled.total_bytes <= plain_step_bytes(loss, mask, params, x) + 1024
