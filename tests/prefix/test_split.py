"""The frozen front and the rest, one after the other, are the function."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pockjax as pj
from pockjax import models
from pockjax.models.bert import BertConfig
from tests.models.made import made


def check(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.5, shape), jnp.float32)


def mlp(params, x, y):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean((x @ params[-1]["w"] + params[-1]["b"] - y) ** 2)


WIDTHS = [3, 8, 6, 5, 2]
PARAMS = [
    {"w": draw(a, b, seed=i), "b": draw(b, seed=10 + i)}
    for i, (a, b) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False))
]
X, Y = draw(4, 3, seed=20), draw(4, 2, seed=21)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([True, False, pj.part[:2]]), min_size=8, max_size=8))
def test_any_mask(entries):
    mask = [{"w": w, "b": b} for w, b in zip(entries[::2], entries[1::2], strict=True)]
    prefix, suffix = pj.split(mlp, mask)
    features = prefix(PARAMS, X, Y)
    check(suffix(PARAMS, features), mlp(PARAMS, X, Y))
    # The front reads nothing that is trained, and the rest nothing that it would not train.
    trained = [entry is not False for layer in mask for entry in (layer["b"], layer["w"])]
    assert not any(trained[i] for i in features.plan.frozen)
    if any(trained):
        expected = pj.grad(mlp, mask)(PARAMS, X, Y)
        check(pj.grad(suffix, mask)(PARAMS, features), expected)


@pytest.mark.parametrize(
    ("mask", "widths"),
    [
        ([False, False, False, True], [5]),
        # A bias stands after the product with a frozen weight.
        ([False, {"w": False, "b": True}, True, True], [6]),
        ([False, {"w": pj.part[:, :2], "b": False}, True, True], [8]),
        ([True, False, False, False], []),
    ],
)
def test_where_it_is_cut(mask, widths):
    prefix, _ = pj.split(mlp, mask)
    features = prefix(PARAMS, X, Y)
    assert [x.shape for x in features.computed] == [(4, width) for width in widths]
    assert features.nbytes == sum(4 * 4 * width for width in widths)
    # The inputs are passed on only where nothing is computed from them first.
    assert [x.shape for x in features.passed] == ([(4, 2)] if widths else [(4, 3), (4, 2)])


def test_under_jit_and_in_a_step():
    mask = [False, False, {"w": pj.part[:3], "b": True}, True]
    prefix, suffix = pj.split(mlp, mask)
    features = jax.jit(prefix)(PARAMS, X, Y)
    check(jax.jit(suffix)(PARAMS, features), mlp(PARAMS, X, Y))
    tx = optax.adam(0.1)
    plain = pj.compile(mlp, mask, tx, PARAMS, X, Y)
    cached = pj.compile(suffix, mask, tx, PARAMS, features)
    one, other = plain.init(PARAMS), cached.init(PARAMS)
    for _ in range(3):
        one, _ = plain(one, X, Y)
        other, metrics = cached(other, features)
    check(other.params, one.params)
    assert cached.report.predicted.flops < plain.report.predicted.flops


def test_arguments_can_be_given_again():
    mask = [False, False, False, True]
    prefix, suffix = pj.split(mlp, mask)
    features = prefix(PARAMS, X, Y)
    check(suffix(PARAMS, features, None, 2 * Y), mlp(PARAMS, X, 2 * Y))
    with pytest.raises(TypeError, match="takes 2 arguments, 3 were given"):
        suffix(PARAMS, features, None, Y, Y)
    with pytest.raises(TypeError, match="argument 1 was"):
        suffix(PARAMS, features, None, {"y": Y})


def test_random_numbers_are_drawn_by_the_rest():
    def fun(params, x, key):
        x = jnp.tanh(x @ params["a"])
        x = x * jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.sum(x @ params["b"] @ params["c"])

    params = {"a": draw(3, 5), "b": draw(5, 4), "c": draw(4, 2)}
    prefix, suffix = pj.split(fun, {"a": False, "b": False, "c": True})
    for key, other in [
        (jax.random.key(0), jax.random.key(1)),
        (jax.random.PRNGKey(0), jax.random.PRNGKey(1)),
    ]:
        features = prefix(params, X, key)
        assert [x.shape for x in features.computed] == [(4, 5)]
        check(suffix(params, features), fun(params, X, key))
        check(suffix(params, features, None, other), fun(params, X, other))


def test_any_output_and_static_arguments():
    def fun(params, x, mode):
        y = jnp.tanh(x @ params["a"])
        return {"y": y @ params["b"], "x": x, "mode": mode == "plain", "front": y}

    params = {"a": draw(3, 5), "b": draw(5, 2)}
    prefix, suffix = pj.split(fun, {"a": False, "b": True})
    for mode in ("plain", "other"):
        check(suffix(params, prefix(params, X, mode)), fun(params, X, mode))


def test_scan_is_not_cut():
    def fun(params, x):
        x = jnp.tanh(x @ params["first"])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.sum(x)

    params = {"first": draw(3, 4), "layers": draw(5, 4, 4)}
    prefix, suffix = pj.split(fun, {"first": False, "layers": pj.part[3:]})
    features = prefix(params, X)
    assert [x.shape for x in features.computed] == [(4, 4)]
    check(suffix(params, features), fun(params, X))


def test_no_mask_for_these_params():
    prefix, _ = pj.split(mlp, [True])
    with pytest.raises(pj.MaskError):
        prefix(PARAMS, X, Y)


def classification(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, *batch):
        *inputs, labels = batch
        logits = nnx.merge(graph, params, rest)(*inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, params


def test_mobile_network():
    """Only the block before the first trained kernel is handed over, a few channels wide."""
    loss, params = classification(
        made(lambda: models.load("mobilenet_v2-w0.35", weights=None, classes=4))
    )
    mask = pj.mask(params, [("blocks/1[1-6]/expand/conv/kernel", "all"), ("classifier/.*", "all")])
    prefix, suffix = pj.split(loss, mask)
    images, labels = draw(2, 32, 32, 3), jnp.array([1, 3])
    features = jax.jit(prefix)(params, images, labels)
    [computed] = features.computed
    assert computed.shape == (2, 2, 2, 32)
    gradient = jax.jit(pj.value_and_grad(suffix, mask))(params, features)
    expected = jax.jit(pj.value_and_grad(loss, mask))(params, images, labels)
    check(gradient, expected)


def test_encoder():
    config = BertConfig(
        vocabulary=30, width=8, layers=4, heads=2, ffn_width=12, positions=16, classes=3
    )
    loss, params = classification(made(lambda: models.Bert(config, rngs=nnx.Rngs(0))))
    mask = pj.mask(params, [("layers/[23]/ffn/up/kernel", "all"), ("classifier/.*", "all")])
    prefix, suffix = pj.split(loss, mask)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 6)))
    valid, labels = jnp.arange(6) < jnp.array([[6], [3]]), jnp.array([0, 2])
    features = prefix(params, tokens, valid, labels)
    # The residual stream, once, and the number of each text's tokens.
    assert sorted(x.shape for x in features.computed) == [(2, 1), (2, 6, 8)]
    check(
        pj.value_and_grad(suffix, mask)(params, features),
        pj.value_and_grad(loss, mask)(params, tokens, valid, labels),
    )


def test_what_the_front_read_cannot_be_given_again():
    params = {"front": jnp.ones((3, 2)), "head": jnp.ones((2, 1))}

    def loss(params, x, scale, y):
        return jnp.sum((jnp.tanh(x @ params["front"]) * scale @ params["head"] - y) ** 2)

    mask = {"front": False, "head": True}
    prefix, suffix = pj.split(loss, mask)
    x, y = jnp.ones((4, 3)), jnp.ones((4, 1))
    features = prefix(params, x, jnp.ones(()), y)
    with pytest.raises(ValueError, match="argument 0 is read by the frozen front"):
        suffix(params, features, 2 * x)
    other = suffix(params, features, None, None, 2 * y)
    np.testing.assert_allclose(other, loss(params, x, 1.0, 2 * y), rtol=1e-6)
