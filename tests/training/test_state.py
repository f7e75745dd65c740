"""What goes into a step's state and what comes out: arrays, constants, keys, optimizers' needs."""

import pickle
import warnings
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pockjax as pj
from pockjax.training import State

W, X = jnp.linspace(-1, 1, 32).reshape(8, 4), jnp.linspace(0, 1, 128).reshape(16, 8)


def loss(w: Any, x: Any) -> Any:
    return jnp.mean((x @ w) ** 2)


# --- memory ---------------------------------------------------------------------------------------


def assert_runs(step: Any, state: State, *batch: Any) -> State:
    for _ in range(2):
        state, metrics = step(state, *batch)
        assert jnp.isfinite(metrics.loss)
    return state


SAM = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))


@pytest.mark.parametrize("mask", [True, pj.part[:4]])
@pytest.mark.parametrize(
    "tx", [optax.contrib.prodigy(), SAM, optax.chain(optax.clip_by_global_norm(1.0), SAM)]
)
def test_optimizers_that_keep_the_parameters(tx: Any, mask: Any) -> None:
    step = pj.compile(loss, mask, tx, W, X)
    assert_runs(step, step.init(W), X)
    assert_runs(step, step.init(W + 0, donate=True), X)


def test_tied_parameters_can_be_donated() -> None:
    w = W + 0
    step = pj.compile(lambda p, x: loss(p[0] * p[1], x), True, optax.sgd(0.1), (w, w), X)
    assert_runs(step, step.init((w, w), donate=True), X)


def test_selecting_again_shares_no_memory() -> None:
    def mask(*rows: int) -> Any:
        return {"w": pj.part[jnp.array(rows)], "b": True}

    params = {"w": W, "b": jnp.zeros(4)}
    step = pj.compile(
        lambda p, x: jnp.mean((x @ p["w"] + p["b"]) ** 2), mask(0, 1), optax.contrib.prodigy(),
        params, X,
    )  # fmt: skip
    assert_runs(step, step.reselect(assert_runs(step, step.init(params), X), mask(2, 3)), X)


# --- leaves that are no arrays --------------------------------------------------------------------


class _Dropping(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, x: Any, key: Any) -> Any:
        return self.dropout(self.linear(x), key=key)


@pytest.mark.parametrize("inference", [False, True])
def test_flags_of_a_model_stay_what_they_are(inference: bool) -> None:
    key = jax.random.key(0)
    model = _Dropping(eqx.nn.Linear(8, 4, key=key), eqx.nn.Dropout(0.5, inference=inference))

    def loss(model: Any, x: Any, key: Any) -> Any:
        return jnp.mean(jax.vmap(model)(x, jax.random.split(key, len(x))) ** 2)

    step = pj.compile(loss, pj.mask(model, [("linear/.*", "all")]), optax.adam(0.1), model, X, key)
    state, metrics = step(step.init(model), X, key)
    np.testing.assert_allclose(metrics.loss, loss(model, X, key), rtol=1e-5)
    assert state.params.dropout.inference is inference and state.params.dropout.p == 0.5
    assert jax.tree.structure(state.params) == jax.tree.structure(model)
    assert_runs(step, state, X, key)
    assert "trained" in str(step.report)
    with pytest.raises(TypeError, match=f"dropout/inference was compiled for {inference}, got"):
        step.init(eqx.tree_at(lambda m: m.dropout.inference, model, not inference))


def test_leaves_stay_leaves_when_a_state_is_mapped_over() -> None:
    state = State({"w": W, "rate": 0.5}, (), jnp.zeros((), jnp.int32))
    sizes = jax.tree.map(lambda x: x.size, state)
    assert jax.tree.leaves(sizes) == [32, 1]
    assert sizes.params == {"w": 32, "rate": 0.5}
    assert jax.tree.leaves(sizes.replace(step=7)) == [32, 7]
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state)), state)


def test_constants_of_the_batch() -> None:
    def fun(w: Any, x: Any, options: Any, how: str) -> Any:
        y = x @ w if options["train"] else x @ w * 0
        return jnp.mean(y**2) if how == "mean" else jnp.sum(y)

    step = pj.compile(fun, True, optax.sgd(0.0), W, X, {"train": True}, "mean")
    state, metrics = step(step.init(W), X, {"train": True}, "mean")
    np.testing.assert_allclose(metrics.loss, loss(W, X), rtol=1e-5)
    for other in (({"train": False}, "mean"), ({"train": 1}, "mean"), ({"train": X}, "mean")):
        with pytest.raises(TypeError, match="batch argument 1/train was compiled for True, got"):
            step(state, X, *other)
    with pytest.raises(TypeError, match="batch argument 2 was compiled for 'mean', got 'sum'; it"):
        step(state, X, {"train": True}, "sum")
    with pytest.raises(TypeError, match=r"missing \['1/train'\]"):
        step(state, X, {}, "mean")
    with pytest.raises(
        TypeError, match=r"batch argument 0 .*float32\[16, 8\], got float32\[3, 8\]"
    ):
        step(state, X[:3], {"train": True}, "mean")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scale", [2.0, 3, jnp.array(2.0), np.float32(2)])
def test_numbers_of_the_batch_change_from_step_to_step(scale: Any, accumulate: int) -> None:
    seen = []

    def fun(w: Any, x: Any, scale: Any) -> Any:
        seen.append(jnp.result_type(x, scale))
        return loss(w, x) * scale

    half = X.astype(jnp.bfloat16)
    step = pj.compile(
        fun, True, optax.sgd(0.0), W.astype(jnp.bfloat16), half, scale, accumulate=accumulate
    )
    # A Python number takes the dtype of what it meets, as in the function itself.
    assert seen == [jnp.bfloat16 if isinstance(scale, int | float) else jnp.float32]
    state = step.init(W.astype(jnp.bfloat16))
    for factor in (1, 5):
        state, metrics = step(state, half, scale * factor)
        np.testing.assert_allclose(metrics.loss, loss(W, X) * scale * factor, rtol=0.02)


# --- dtypes and keys ------------------------------------------------------------------------------


def test_random_keys_among_the_parameters() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(8, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.dropout(self.linear(x))

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    mask = pj.mask(params, [("linear/.*", "all")])
    step = pj.compile(
        lambda p, x: jnp.mean(nnx.merge(graph, p)(x) ** 2), mask, optax.adam(0.1), params, X
    )
    assert_runs(step, step.init(params), X)


def test_double_precision_of_numpy_is_what_jax_makes_of_it() -> None:
    w, x = np.asarray(W, np.float64), np.asarray(X, np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = pj.compile(loss, True, optax.sgd(0.1), w, x)
        state = step.init(w, donate=True)
    assert state.params.dtype == jnp.float32
    assert_runs(step, state, x)
    with pytest.raises(
        TypeError, match=r"batch argument 0 .*float32\[16, 8\], got float32\[3, 8\]"
    ):
        step(state, x[:3])


def test_keys_of_another_kind() -> None:
    step = pj.compile(
        lambda w, x, key: loss(w, x), True, optax.sgd(0.1), W, X, key=jax.random.key(0)
    )
    with pytest.raises(TypeError, match=r"key was compiled for key<fry>\[\], got uint32\[2\]"):
        step.init(W, key=jax.random.PRNGKey(0))


# --- what comes out of a step ---------------------------------------------------------------------


def test_auxiliary_outputs_must_fit_the_parameters() -> None:
    params = {"w": W, "mean": jnp.zeros(4)}

    def fun(params: Any, x: Any) -> Any:
        out = x @ params["w"]
        return jnp.mean(out**2), {"mean": out.mean(0)}

    def compiled(merge_aux: Any, accumulate: int = 1) -> Any:
        return pj.compile(
            fun, {"w": True, "mean": False}, optax.sgd(0.1), params, X, has_aux=True,
            merge_aux=merge_aux, accumulate=accumulate,
        )  # fmt: skip

    def merged(params: Any, aux: Any) -> Any:
        return {**params, **aux}

    step = compiled(merged)
    assert_runs(step, step.init(params), X)
    with pytest.raises(TypeError, match=r"merge_aux.* mean was float32\[4\], got float32\[2, 4\]"):
        compiled(merged, accumulate=2)
    step = compiled(lambda p, aux: merged(p, jax.tree.map(lambda a: a.mean(0), aux)), accumulate=2)
    state, metrics = step(step.init(params), X)
    assert metrics.aux["mean"].shape == (2, 4)
    chex.assert_trees_all_close(state.params["mean"], (X @ W).mean(0), rtol=1e-5)
    with pytest.raises(TypeError, match=r"merge_aux.*structure.*unexpected \['extra'\]"):
        compiled(lambda p, aux: {**p, "extra": aux["mean"]})
    with pytest.raises(ValueError, match="merge_aux needs .*has_aux=True"):
        pj.compile(loss, True, optax.sgd(0.1), W, X, merge_aux=merged)


def test_an_optimizer_must_keep_the_types_of_its_state() -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, {"count": state["count"] + 0.5}

    tx = optax.GradientTransformation(lambda params: {"count": jnp.zeros((), jnp.int32)}, update)
    with pytest.raises(TypeError, match=r"optimizer.* count was int32\[\], got float32\[\]"):
        pj.compile(loss, True, tx, W, X)


# --- optimizers that ask for more than the gradient -----------------------------------------------


@pytest.mark.parametrize("mask", [True, pj.part[:4]])
@pytest.mark.parametrize(
    "tx",
    [
        optax.polyak_sgd(),
        optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)),
    ],
)
def test_optimizers_that_ask_for_the_loss(tx: Any, mask: Any) -> None:
    step = pj.compile(loss, mask, tx, W, X)
    state, expected, opt_state = step.init(W), W, tx.init(pj.pack(W, mask))
    for _ in range(4):
        state, _ = step(state, X)
        value, grads = pj.value_and_grad(loss, mask)(expected, X)
        packed = pj.pack(expected, mask)
        updates, opt_state = tx.update(grads, opt_state, packed, value=value, grad=grads)
        expected = pj.apply_updates(expected, updates, mask)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-4, atol=1e-6)


def test_optimizers_that_ask_for_the_function() -> None:
    with pytest.raises(TypeError, match="value_fn.*by name value .the loss. and grad"):
        pj.compile(loss, True, optax.lbfgs(), W, X)


# --- trees that are built when they are looked at -------------------------------------------------


class _Deep(nnx.Module):
    def __init__(self, layers: int) -> None:
        self.scales = nnx.List([nnx.Param(jnp.full((2,), 0.5)) for _ in range(layers)])

    def __call__(self, x: Any) -> Any:
        return x * sum(scale[...] for scale in self.scales)


def _deep(layers: int = 3) -> tuple[Any, Any]:
    graph, params = nnx.split(_Deep(layers))
    step = pj.compile(
        lambda p, x: jnp.mean(nnx.merge(graph, p)(x) ** 2), True, optax.adam(0.1), params, W[:, :2]
    )
    return step, step.init(params)


def test_steps_build_no_trees_that_nobody_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    step, state = _deep()
    built = []
    state, _ = step(state, W[:, :2])  # the first takes the trees of init apart
    unflatten = getattr(State, "__getattr__")  # noqa: B009

    def counted(self: State, name: str) -> Any:
        built.append(name)
        return unflatten(self, name)

    monkeypatch.setattr(State, "__getattr__", counted)
    for _ in range(3):
        state, _ = step(state, W[:, :2])
    assert int(state.step) == 4 and not built
    assert len(jax.tree.leaves(state.params)) == 3 and built == ["params"]
    assert state.opt_state is state.opt_state and built == ["params"]


def test_a_state_is_the_same_whether_its_trees_are_built_or_not() -> None:
    step, state = _deep()
    first = jax.tree.structure(state)
    state, _ = step(state, W[:, :2])
    copied = pickle.loads(pickle.dumps(state))
    mapped = jax.tree.map(jnp.copy, state)
    replaced = state.replace(step=state.step)
    for other in (copied, mapped, replaced, state):
        assert jax.tree.structure(other) == first
        chex.assert_trees_all_equal(other, mapped)
    after = [jax.device_get(step(jax.tree.map(jnp.copy, s), W[:, :2])[0].params)
             for s in (copied, mapped, replaced)]  # fmt: skip
    chex.assert_trees_all_equal(*after)


def test_what_is_changed_in_a_built_tree_counts() -> None:
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    step = pj.compile(loss, True, tx, W, X)
    state, _ = step(step.init(W), X)
    before = jnp.copy(state.params)
    state.opt_state.hyperparams["learning_rate"] = jnp.float32(0.0)
    state, _ = step(state, X)
    np.testing.assert_array_equal(state.params, before)


def test_states_that_do_not_fit() -> None:
    step = pj.compile(lambda p, x: loss(p["w"], x), True, optax.sgd(0.1), {"w": W}, X)
    state, _ = step(step.init({"w": W}), X)
    with pytest.raises(TypeError, match=r"state differs in structure .*unexpected \['params/v'\]"):
        step(state.replace(params={**state.params, "v": W}), X)
    with pytest.raises(TypeError, match=r"state params/w was .*float32\[8, 4\], got float32\[4\]"):
        step(state.replace(params={"w": W[0]}), X)
    with pytest.raises(TypeError, match="state differs in structure"):
        step({"w": W}, X)  # pyright: ignore[reportArgumentType]
    with pytest.raises(AttributeError, match="a state has no 'parameters'"):
        _ = getattr(state, "parameters")  # noqa: B009
    assert_runs(step, state, X)
