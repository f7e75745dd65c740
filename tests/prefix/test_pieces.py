"""The frozen front computed in pieces equals the whole, or is refused."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import pockjax as pj
from pockjax._compat import eval_jaxpr
from pockjax.autodiff import trace
from pockjax.prefix import MixedExamples, in_pieces

B, T, C = 4, 3, 6
W = jnp.asarray(np.random.default_rng(0).normal(size=(C, C)), jnp.float32)
TABLE = jnp.asarray(np.random.default_rng(1).normal(size=(5, C)), jnp.float32)
KERNEL = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3, 2, 4)), jnp.float32)
MASK = jnp.tril(jnp.ones((T, T), bool))

APART: dict[str, Callable[[jax.Array], jax.Array]] = {
    "elementwise": lambda x: jnp.tanh(x) * 2 + jnp.where(x > 0, x, 0.5),
    "product": lambda x: x @ W,
    "product from the right": lambda x: jnp.einsum("cd,btd->bct", W, x),
    "product of examples": lambda x: jnp.einsum("btc,bsc->bts", x, x) @ x,
    "attention": lambda x: (
        jax.nn.softmax(jnp.where(MASK, x @ jnp.swapaxes(x, 1, 2), -1e9), axis=-1) @ x
    ),
    "convolution": lambda x: lax.conv_general_dilated(
        x.reshape(B, T, 3, 2), KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "convolution, batch last": lambda x: jnp.moveaxis(
        lax.conv_general_dilated(
            jnp.moveaxis(x.reshape(B, T, 3, 2), 0, 3), KERNEL, (1, 1), "SAME",
            dimension_numbers=("HWCN", "HWIO", "HWNC"),
        ), 2, 0,
    ),
    "normalisation": lambda x: (
        (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1)
    ),
    "pooling": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "VALID"),
    "joined axes": lambda x: (x.reshape(B * T, C) @ W).reshape(B, T, C),
    "joined axes, halved": lambda x: jnp.sin(x.reshape(B * T, 2, 3)).sum(1).reshape(B, T * 3),
    "transposed": lambda x: jnp.transpose(jnp.transpose(x, (2, 0, 1)) + 1, (1, 2, 0)),
    "sliced": lambda x: jnp.concatenate([x[:, 1:], jnp.zeros((B, 2, C))], axis=1),
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0))),
    "reversed": lambda x: x[:, ::-1],
    "cumulative": lambda x: jnp.cumsum(x, axis=1),
    "gelu and relu6": lambda x: jax.nn.gelu(x) + jax.nn.relu6(x),
    "embedding": lambda x: TABLE[(jnp.abs(x[..., 0]) * 10).astype(jnp.int32) % 5],
    "positions": lambda x: x + jnp.broadcast_to(jnp.sin(TABLE[:T]), (B, T, C)),
    "a constant of every shape": lambda x: x * (jnp.broadcast_to(W[0], (B, T, C)) + 1),
    "largest": lambda x: jnp.argmax(x, -1).astype(jnp.float32)[..., None] + x.max(1, keepdims=True),
    "sorted": lambda x: jnp.sort(x, axis=1),
    "split": lambda x: jnp.split(x, 2, axis=2)[1],
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.tanh(x @ W))(x),
}  # fmt: skip

MIXED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "batch normalisation": lambda x: (x - x.mean(0)) / (x.std(0) + 1),
    "reversed examples": lambda x: x[::-1],
    "shifted examples": lambda x: jnp.roll(x, 1, axis=0),
    "products between examples": lambda x: jnp.einsum("btc,dtc->bd", x, x),
    "sum of examples, broadcast": lambda x: jnp.broadcast_to(x.sum(0), (B, T, C)) + x,
    "cumulative over examples": lambda x: jnp.cumsum(x, axis=0),
    "soft maximum over examples": lambda x: jax.nn.softmax(x, axis=0),
    "examples as features": lambda x: x.reshape(B, T * C).T @ jnp.ones((B, B)),
    "examples out of order": lambda x: jnp.transpose(x, (1, 0, 2)).reshape(B, T, C),
    "a constant for each example": lambda x: x + jnp.arange(B, dtype=x.dtype)[:, None, None],
    "first example": lambda x: x + x[:1],
    "sorted examples": lambda x: jnp.sort(x, axis=0),
}


def problem(front: Callable[[jax.Array], jax.Array]) -> tuple[Any, jax.Array, Any]:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        seen = front(x * params["front"]).reshape(B, -1)
        few = seen @ jnp.sin(jnp.arange(2.0 * seen.shape[1])).reshape(-1, 2)  # cheap to keep
        return jnp.mean(jnp.sin(params["head"] * few).sum(-1) * y)

    x = jnp.asarray(np.random.default_rng(3).normal(size=(B, T, C)), jnp.float32)
    return loss, x, {"front": jnp.float32(1.5), "head": jnp.float32(0.7)}


def values(primal: Any, *arrays: Any) -> list[Any]:
    return eval_jaxpr(primal.jaxpr, primal.jaxpr.consts, *arrays)


@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize("name", APART)
def test_equals_the_whole(name: str, pieces: int) -> None:
    loss, x, params = problem(APART[name])
    y = jnp.arange(1.0, B + 1)
    primal = trace(loss, params, (x, y))
    pieced, front = in_pieces(primal, [False, True], pieces)
    assert "scan" in {eqn.primitive.name for eqn in pieced.jaxpr.eqns}
    assert len(front.outvars) >= 1
    arrays = [params["front"], params["head"], x, y]
    # The sine of sums in the tens, which another number of rows may add up in another order.
    np.testing.assert_allclose(values(pieced, *arrays), values(primal, *arrays), rtol=1e-4)


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_examples_is_refused(name: str) -> None:
    loss, x, params = problem(MIXED[name])
    with pytest.raises(MixedExamples):
        in_pieces(trace(loss, params, (x, jnp.ones(B))), [False, True], 2)


@given(st.lists(st.sampled_from([n for n in APART if n not in ("sliced", "pooling")]), max_size=5),
       st.sampled_from([2, 4]))  # fmt: skip
def test_chains_of_operations_equal_the_whole(names: list[str], pieces: int) -> None:
    def front(x: jax.Array) -> jax.Array:
        for name in names:
            x = jnp.resize(jnp.sin(APART[name](x)).reshape(B, -1)[:, : T * C // 2], (B, T * C // 2))
            x = jnp.concatenate([x, x + 1], axis=1).reshape(B, T, C)
        return jnp.cos(x @ W)

    loss, x, params = problem(front)
    primal = trace(loss, params, (x, jnp.ones(B)))
    arrays = [params["front"], params["head"], x, jnp.ones(B)]
    try:
        pieced, _ = in_pieces(primal, [False, True], pieces)
    except MixedExamples:
        return  # jnp.resize may be written in a way that no rule is known for
    np.testing.assert_allclose(values(pieced, *arrays), values(primal, *arrays), rtol=1e-4)


@pytest.mark.parametrize("pieces", [3, 8])
def test_the_batch_must_be_cut_into_equal_pieces(pieces: int) -> None:
    loss, x, params = problem(APART["product"])
    with pytest.raises(MixedExamples, match="equal pieces"):
        in_pieces(trace(loss, params, (x, jnp.ones(B))), [False, True], pieces)


def network(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for w in params["front"]:
        x = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.sort(x, axis=1)  # or all layers and the mean would be computed in one go
    return jnp.mean((x.mean((1, 2)) @ params["head"] - y) ** 2)


def wide() -> tuple[Any, Any, tuple[Any, Any]]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (3, 3, 4, 32), (3, 3, 32, 8)
    front = [0.1 * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=False)]
    params = {"front": front, "head": jax.random.normal(keys[2], (8, 2))}
    batch = jax.random.normal(keys[0], (8, 16, 16, 4)), jnp.ones((8, 2))
    return params, {"front": False, "head": True}, batch


@pytest.mark.parametrize("updates", ["early", "late"])
@pytest.mark.parametrize("residuals", ["kept", "xla", "auto"])
def test_a_step_in_pieces_takes_less_memory_and_gives_the_same(
    residuals: Any, updates: Any
) -> None:
    params, mask, batch = wide()
    found = {}
    for pieces in (1, 2, 4):
        step = pj.compile(
            network, mask, optax.adam(0.1), params, *batch, front_pieces=pieces, rewrites="none",
            residuals=residuals, updates=updates,
        )  # fmt: skip
        state, metrics = step(step.init(params), *batch)
        assert step.report.front_pieces == pieces
        assert (f"in {pieces} pieces" in str(step.report)) == (pieces > 1)
        found[pieces] = (step.report, state.params, metrics.loss)
    whole = found[1]
    for pieces in (2, 4):
        report, trained, loss = found[pieces]
        np.testing.assert_allclose(loss, whole[2], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), trained, whole[1])
        assert report.compiled.temp_bytes < 1.1 * whole[0].compiled.temp_bytes / pieces + 2**14
        assert report.flops == pytest.approx(whole[0].flops, rel=0.01)
        assert report.full == whole[0].full


def test_pieces_of_microbatches_and_of_several_steps() -> None:
    params, mask, batch = wide()
    whole, step = (
        pj.compile(
            network,
            mask,
            optax.sgd(0.1),
            params,
            *batch,
            accumulate=2,
            front_pieces=pieces,
            rewrites="guessed",  # which forms are measured as the fastest changes what memory is
        )  # fmt: skip
        for pieces in (1, 4)
    )
    assert step.report.front_pieces == 4
    two = tuple(jnp.stack([x, 2 * x]) for x in batch)
    expected, _ = whole.many(whole.init(params), *two)
    state, _ = step.many(step.init(params), *two)
    np.testing.assert_allclose(state.params["head"], expected.params["head"], rtol=1e-5)


def test_in_pieces_on_whatever_device() -> None:
    params, mask, batch = wide()
    options: dict[str, Any] = {"front_pieces": 4, "rewrites": "none"}
    usual = pj.compile(network, mask, optax.adam(0.1), params, *batch, **options)
    for device in (jax.devices()[0], jax.devices()[-1]):
        there = jax.device_put((params, *batch), device)
        step = pj.compile(network, mask, optax.adam(0.1), *there, **options)
        assert step.report.front_pieces == usual.report.front_pieces > 1
        assert step.report.compiled.temp_bytes == usual.report.compiled.temp_bytes
        state, metrics = step(step.init(there[0]), *there[1:])
        _, expected = usual(usual.init(params), *batch)
        np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)
        assert state.step.devices() == {device}


def test_not_in_pieces_where_that_saves_nothing() -> None:
    params, _, batch = wide()
    everything = pj.compile(network, True, optax.sgd(0.1), params, *batch, front_pieces=4)
    assert everything.report.front_pieces == 1
    with pytest.raises(ValueError, match="front_pieces must be a positive integer, got 0"):
        pj.compile(network, True, optax.sgd(0.1), params, *batch, front_pieces=0)


def test_the_cost_model_predicts_a_step_in_pieces() -> None:
    params, mask, batch = wide()
    for pieces in (1, 4):
        costs = pj.CostModel(
            network, optax.adam(0.1), params, *batch, front_pieces=pieces, rewrites="none"
        )
        report = costs.compile(mask).report
        assert report.front_pieces == pieces
        assert costs.predict(mask).memory_bytes == pytest.approx(
            report.compiled.total_bytes, rel=0.1
        )


FRONTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "positions in order of size": lambda x: jnp.argsort(x, axis=1).astype(jnp.float32),
    "several arrays sorted": lambda x: lax.sort(
        (x, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)), dimension=1, num_keys=1
    )[1].astype(jnp.float32),
}


@pytest.mark.parametrize("name", FRONTS)
def test_fronts_without_a_rule_stay_whole(name: str) -> None:
    x, params = (
        jax.random.normal(jax.random.key(1), (16, 8, 16)),
        {"w": jnp.ones((16, 64)), "s": 2.0},
    )

    def loss(params: Any, x: jax.Array) -> jax.Array:
        places = FRONTS[name](jnp.tanh(x @ params["w"]).sum(-1))
        return jnp.sum(jnp.sin(places * 0.1 * params["s"]))

    step = pj.compile(loss, {"w": False, "s": True}, optax.sgd(0.1), params, x)
    assert step.report.front_pieces == 1
    _, metrics = step(step.init(params), x)
    np.testing.assert_allclose(metrics.loss, loss(params, x), rtol=1e-5)


def test_a_batch_of_no_examples() -> None:
    params, mask, _ = wide()
    batch = jnp.zeros((0, 16, 16, 4)), jnp.zeros((0, 2))
    step = pj.compile(network, mask, optax.sgd(0.1), params, *batch)
    assert step.report.front_pieces == 1


def test_a_step_that_cannot_be_predicted_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no such rule")

    monkeypatch.setattr("pockjax.training._forecast.best_order", fail)
    monkeypatch.setattr("pockjax.training._program.best_order", fail)
    monkeypatch.setattr("pockjax.training._report.predict_temp_bytes", fail)
    params, mask, batch = wide()
    with caplog.at_level("WARNING", "pockjax"):
        step = pj.compile(network, mask, optax.sgd(0.1), params, *batch)
    assert step.report.front_pieces == 1 and "no such rule" in caplog.text
    assert step.report.predicted_total_bytes is None and "Predicted: nothing" in str(step.report)
