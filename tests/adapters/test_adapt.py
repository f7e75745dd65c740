"""An adapted function is the function at its merged weights, for every function."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import pockjax as pj
from pockjax.selection import Search
from tests.autodiff.oracle import QUICK
from tests.autodiff.programs import FAMILIES, programs
from tests.autodiff.test_exact import SLOW_TO_DRAW

_FAMILIES = ["products", "convolutions", "wrapped", "scans", "all"]


def trained(params: pj.AdaptedParams, seed: int = 0) -> pj.AdaptedParams:
    """The same with factors that are not zero."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype)  # noqa: E731
    return params._replace(adapters=jax.tree.map(draw, params.adapters))


def quick(fun: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(fun, compiler_options=QUICK)


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", _FAMILIES)
@settings(suppress_health_check=SLOW_TO_DRAW, deadline=None)
@given(data=st.data())
def test_an_adapted_program_is_the_program_with_merged_weights(
    family: str, data: st.DataObject
) -> None:
    p = data.draw(programs(FAMILIES[family], dtypes=("float64",)))
    loss: Callable[..., Any] = (lambda *args: p.fun(*args)[0]) if p.has_aux else p.fun
    with p.precision():
        params, *args = p.inputs()
        try:
            adapted, both = pj.adapt(loss, params, *args, rank=1, alpha=2)
        except ValueError as error:
            assert "no weight can have an adapter" in str(error)
            return
        close(quick(adapted)(both, *args), quick(loss)(params, *args), 1e-9)
        both = trained(both)
        try:
            merged = adapted.merge(both)
        except ValueError as error:
            assert "computed with before" in str(error)
            quick(adapted)(both, *args)
            return
        close(quick(adapted)(both, *args), quick(loss)(merged, *args), 1e-9)
        grads = jax.grad(lambda a: adapted(both._replace(adapters=a), *args))(both.adapters)
        through = jax.grad(lambda a: loss(adapted.merge(both._replace(adapters=a)), *args))
        if "2*" not in repr(p) and "custom" not in repr(p):  # whose derivatives are made up
            close(grads, through(both.adapters), 1e-8)


def attention(params: Any, x: jax.Array) -> jax.Array:
    """Heads, a product of which the weight comes first, and a weight that is read twice."""
    q, k, v = (jnp.einsum("bsd,dhe->bhse", x, params[name]) for name in "qkv")
    mixed = jnp.einsum("bhst,bhte->bshe", jax.nn.softmax(q @ k.swapaxes(-1, -2)), v)
    out = jnp.einsum("hed,bshe->bsd", params["o"], mixed)
    experts = jnp.einsum("ebd,edf->ebf", jnp.stack([out[:, 0], out[:, 1]]), params["experts"])
    return jnp.mean((experts.sum(0) @ params["shared"]) @ params["shared"])


def attention_params() -> Any:
    shapes = {"q": (16, 2, 8), "k": (16, 2, 8), "v": (16, 2, 8), "o": (2, 8, 16),
              "experts": (2, 16, 12), "shared": (12, 12)}  # fmt: skip
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for name, s in shapes.items()}


def test_heads_experts_and_a_shared_weight() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 5, 16))
    adapted, params = pj.adapt(attention, attention_params(), x, rank=2)
    shapes = jax.tree.map(jnp.shape, params.adapters)
    assert shapes["q"] == {"a": (16, 2), "b": (2, 2, 8)}
    assert shapes["o"] == {"a": (2, 8, 2), "b": (2, 16)}
    assert shapes["experts"] == {"a": (2, 16, 2), "b": (2, 2, 12)}
    assert not adapted.left_out
    params = trained(params)
    close(adapted(params, x), attention(adapted.merge(params), x))


def stacked(params: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, own: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ own["w"] + own["b"]), None

    h, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
    return jnp.mean(h @ params["head"])


def stacked_params() -> Any:
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)  # noqa: E731
    return {"layers": {"w": draw(4, 16, 16), "b": draw(4, 16)}, "head": draw(16, 12)}


def test_stacked_layers_have_units_of_their_own() -> None:
    x = jax.random.normal(jax.random.key(0), (6, 16))
    adapted, params = pj.adapt(stacked, stacked_params(), x, rank=2)
    assert params.adapters["layers/w"]["a"].shape == (4, 16, 2)
    params = trained(params)
    close(adapted(params, x), stacked(adapted.merge(params), x))
    units = [u for u in pj.units(adapted, params, x) if u.kind == "adapter"]
    assert [u.group for u in units] == [*(f"params/layers/w[{k}]" for k in range(4)), "params/head"]
    mask = pj.union(params, units[2:3])
    value, grads = jax.jit(pj.value_and_grad(adapted, mask))(params, x)
    dense = jax.grad(adapted)(params, x)
    close(grads.adapters["layers/w"]["a"][0], dense.adapters["layers/w"]["a"][2])
    assert grads.params["head"] is None


def test_convolutions_and_grouped_ones() -> None:
    params = {"conv": jnp.ones((3, 3, 8, 16)) / 9, "depthwise": jnp.ones((3, 3, 1, 16)) / 9}
    params["up"] = jax.random.normal(jax.random.key(1), (3, 3, 16, 8)) / 9

    def model(params: Any, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        h = lax.conv_general_dilated(x, params["conv"], (2, 2), "SAME", dimension_numbers=numbers)
        h = lax.conv_general_dilated(
            h, params["depthwise"], (1, 1), "SAME", dimension_numbers=numbers,
            feature_group_count=16,
        )  # fmt: skip
        return lax.conv_transpose(h, params["up"], (2, 2), "SAME", dimension_numbers=numbers)

    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 8))
    adapted, both = pj.adapt(model, params, x, rank=2)
    assert adapted.left_out == {"depthwise": "it is read by conv_general_dilated"}
    both = trained(both)
    close(adapted(both, x), model(adapted.merge(both), x))


def test_libraries() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 4, 16))
    graph, state = nnx.split(nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0)))
    call = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    adapted, params = pj.adapt(call, state, x, rank=2)
    assert set(params.adapters) == {f"{name}/kernel" for name in ("query", "key", "value", "out")}
    params = trained(params)
    close(adapted(params, x), call(adapted.merge(params), x))

    module = eqx.nn.MLP(16, 8, 32, 2, key=jax.random.key(1))
    apply = lambda module, x: jax.vmap(jax.vmap(module))(x)  # noqa: E731
    adapted, params = pj.adapt(apply, module, x, rank=2)
    assert len(params.adapters) == 3
    params = trained(params)
    close(adapted(params, x), apply(adapted.merge(params), x))


def test_a_quantised_weight_is_adapted_and_not_merged() -> None:
    params = {"q": jnp.arange(-64, 64, dtype=jnp.int8).reshape(16, 8), "scale": jnp.ones(8) / 64}

    def model(params: Any, x: jax.Array) -> jax.Array:
        return x @ (params["q"].astype(jnp.float32) * params["scale"])

    x = jax.random.normal(jax.random.key(0), (3, 16))
    adapted, both = pj.adapt(model, params, x, rank=2)
    a, b = both.adapters["q"]["a"], jnp.ones((2, 8))
    assert a.dtype == jnp.float32
    both = both._replace(adapters={"q": {"a": a, "b": b}})
    close(adapted(both, x), model(params, x) + x @ a @ b)
    with pytest.raises(ValueError, match="adapter of 'q' cannot be merged"):
        adapted.merge(both)


def test_what_is_left_out_is_said() -> None:
    params = {"tied": jnp.ones((32, 16)), "other": jnp.ones((16, 16)), "small": jnp.ones((16, 2))}

    def model(params: Any, ids: jax.Array) -> Any:
        h = params["tied"][ids] @ params["other"]
        return h @ params["tied"].T, h @ params["small"]

    ids = jnp.arange(4)
    adapted, both = pj.adapt(model, params, ids, rank=4)
    assert set(both.adapters) == {"other"}
    assert adapted.left_out == {
        "tied": "it is read by gather",
        "small": "an adapter of rank 4 would be no smaller",
    }
    adapted, both = pj.adapt(model, params, ids, rank=1, among=[("small", "all")])
    assert set(both.adapters) == {"small"}
    with pytest.raises(ValueError, match="'tied': it is read by gather"):
        pj.adapt(model, params, ids, rank=4, among=[("tied", "all")])
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        pj.adapt(model, params, ids, rank=0)


def test_another_function_than_the_adapted_one_is_refused() -> None:
    x = jnp.ones((2, 16))
    adapted, params = pj.adapt(lambda p, x: x @ p["w"], {"w": jnp.ones((16, 32))}, x, rank=2)
    wide = pj.AdaptedParams({"w": jnp.ones((16, 8))}, params.adapters)
    with pytest.raises(ValueError, match="reads 'w' in another way"):
        adapted(wide, x)


W = {"w": jnp.ones((3, 16, 16)) / 16}
SQUARE = {"w": jnp.eye(16), "v": jnp.ones((16, 16)) / 4}


def unrolled(p: Any, x: jax.Array) -> jax.Array:
    for w in p["w"]:
        x = jnp.tanh(x @ w)
    return x


def split(p: Any, x: jax.Array) -> Any:
    q, k = jnp.split(p["v"], 2, axis=1)
    return x @ q, x @ k


def two_layouts(p: Any, x: jax.Array) -> jax.Array:
    w = jnp.exp(p["w"])
    return x @ w @ w.T


def of_both(p: Any, x: jax.Array) -> jax.Array:
    return x @ (p["w"] * p["v"])


def decayed(p: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(x @ p["w"] @ p["v"]) + sum(jnp.sum(w**2) for w in p.values())


def returned(p: Any, x: jax.Array) -> Any:
    return x @ p["w"], p["w"]


def deciding(p: Any, x: jax.Array) -> jax.Array:
    return lax.cond(jnp.sum(p["w"]) > 17, lambda h: 2 * h, lambda h: h, x @ p["w"])


def chosen(p: Any, x: jax.Array) -> jax.Array:
    return x @ lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: p["v"])


def scanned_alone(p: Any, x: jax.Array) -> Any:
    return x @ p["w"][0], lax.map(lambda w: jnp.sum(w**2), p["w"])


def carried(p: Any, x: jax.Array) -> jax.Array:
    w, _ = lax.scan(lambda w, _: (w / 2, None), p["w"], length=3)
    return x @ w + x @ p["w"]


@pytest.mark.parametrize(
    ("fun", "params", "why"),
    [
        (unrolled, W, "in different ways"),
        (split, SQUARE, "in different ways"),
        (two_layouts, SQUARE, "in different ways"),
        (of_both, SQUARE, "together with parameters that are as large"),
        (decayed, SQUARE, "it is read by add"),
        (returned, SQUARE, "in a result that the arguments do not decide"),
        (deciding, SQUARE, "it decides about a branch"),
        (chosen, SQUARE, "it leaves a cond without activations"),
        (scanned_alone, W, "it leaves a scan without activations"),
        (carried, SQUARE, "it is carried by a loop"),
    ],
)
def test_a_weight_that_counts_elsewhere_too_gets_no_adapter(
    fun: Any, params: Any, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        pj.adapt(fun, params, jnp.ones((3, 16)), rank=1)


def test_barriers_and_stopped_gradients_change_no_weight() -> None:
    def model(p: Any, x: jax.Array) -> jax.Array:
        w, v, x = lax.optimization_barrier((p["w"], p["v"], x))
        return x @ lax.stop_gradient(w) @ v.astype(jnp.bfloat16).astype(jnp.float32)

    x = jax.random.normal(jax.random.key(0), (3, 16))
    adapted, both = pj.adapt(model, SQUARE, x, rank=1)
    both = trained(both)
    assert set(both.adapters) == {"w", "v"}
    close(adapted(both, x), model(adapted.merge(both), x), 2e-2)


def test_integers_are_not_merged() -> None:
    params = {"q": jnp.arange(-128, 128, dtype=jnp.int8).reshape(16, 16), "scale": jnp.ones(16)}
    model = lambda p, x: (x @ p["q"].astype(x.dtype)) * p["scale"]  # noqa: E731
    adapted, both = pj.adapt(model, params, jnp.ones((3, 16)), rank=1)
    with pytest.raises(ValueError, match="'q' cannot be merged: it is computed with"):
        adapted.merge(trained(both))


def test_a_call_that_reads_a_weight_in_another_way_is_refused() -> None:
    def model(p: Any, x: jax.Array, flip: bool = False) -> jax.Array:
        return x @ (p["w"].T if flip else p["w"])

    x = jnp.ones((3, 16))
    adapted, both = pj.adapt(model, SQUARE, x, rank=1)
    close(adapted(both, x[:2]), model(SQUARE, x[:2]))
    with pytest.raises(ValueError, match="reads 'w' in another way"):
        adapted(both, x, flip=True)
    chain = lambda p, x: jnp.einsum("bi,ij,jk->bk", x, p["w"], p["v"])  # noqa: E731
    adapted, both = pj.adapt(chain, SQUARE, x, rank=1)
    with pytest.raises(ValueError, match="adapt it with arguments like these"):
        adapted(both, jnp.ones((4096, 16)))  # w @ v comes first


def test_parameters_that_do_not_fit_are_refused() -> None:
    x = jnp.ones((3, 16))
    model = lambda p, x: x @ p["w"]  # noqa: E731
    adapted, both = pj.adapt(model, SQUARE, x, rank=1)
    plain: Any = SQUARE
    with pytest.raises(TypeError, match="takes AdaptedParams, got dict"):
        adapted(plain, x)
    with pytest.raises(ValueError, match="'z' is no weight with an adapter"):
        adapted(both._replace(adapters={"z": both.adapters["w"]}), x)
    with pytest.raises(ValueError, match="'w' is no weight with an adapter of factors a and b"):
        adapted(both._replace(adapters={"w": {"a": jnp.ones((16, 1))}}), x)
    with pytest.raises(ValueError, match=r"has shapes \(16, 2\) and \(1, 16\)"):
        wrong = {"w": {"a": jnp.ones((16, 2)), "b": jnp.ones((1, 16))}}
        adapted(both._replace(adapters=wrong), x)
    with pytest.raises(ValueError, match="two parameters are called 'a/b'"):
        twice = {"a": {"b": jnp.ones((16, 16))}, "a/b": jnp.ones((16, 16))}
        pj.adapt(lambda p, x: x @ p["a"]["b"] @ p["a/b"], twice, x)


def test_parameters_that_are_one_array() -> None:
    x = jnp.ones((3, 16))
    adapted, both = pj.adapt(lambda w, x: x @ w, jnp.eye(16), x, rank=1)
    groups = {unit.kind: unit.group for unit in pj.units(adapted, both, x)}
    assert groups == {"weight": "params", "adapter": "params"}


def test_transforms() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 5, 16))
    adapted, params = pj.adapt(attention, attention_params(), x, rank=2)
    params = trained(params)
    each = jax.vmap(adapted, (None, 0))(params, x[:, None])
    close(each, jnp.stack([adapted(params, one[None]) for one in x]))
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params.adapters)
    found = jax.vmap(lambda a: adapted(params._replace(adapters=a), x))(many)
    close(found[0], adapted(params, x))


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["first"])
    h = jnp.tanh(h @ params["second"] + params["bias"])
    return jnp.mean((h @ params["last"] - y) ** 2)


def problem() -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)  # noqa: E731
    params = {"first": draw(32, 64), "second": draw(64, 64), "bias": draw(64), "last": draw(64, 4)}
    return params, [(draw(16, 32), draw(16, 4)) for _ in range(4)]


def test_a_compiled_step_trains_adapters_and_nothing_else() -> None:
    params, batches = problem()
    adapted, both = pj.adapt(loss, params, *batches[0], rank=2)
    tx = optax.adam(1e-2)
    mask = pj.mask(both, [("adapters/.*", "all")])
    step = pj.compile(adapted, mask, tx, both, *batches[0])
    state, plain, opt = step.init(both), both.adapters, tx.init(both.adapters)
    for batch in batches:
        state, _ = step(state, *batch)
        grads = jax.grad(lambda a, b=batch: adapted(both._replace(adapters=a), *b))(plain)
        updates, opt = tx.update(grads, opt, plain)
        plain = optax.apply_updates(plain, updates)
    close(state.params.adapters, plain)
    close(state.params.params, params, 0)
    start, end = (loss(p, *batches[0]) for p in (params, adapted.merge(state.params)))
    assert end < start


@pytest.mark.parametrize("criterion", ["taylor", "gradnorm", "snr", "finetune"])
def test_adapters_are_measured_beside_weights(criterion: str) -> None:
    params, batches = problem()
    adapted, both = pj.adapt(loss, params, *batches[0], rank=2)
    units = pj.units(adapted, both, *batches[0])
    assert [u.name for u in units if u.kind == "adapter"] == [
        "params/first adapter", "params/second adapter", "params/last adapter"
    ]  # fmt: skip
    for unit in units:
        if unit.kind == "adapter":
            assert any(u.kind == "weight" and u.group == unit.group for u in units)
    sens = pj.sensitivity(adapted, both, batches, criterion, units=units, steps=3)
    adapters = [x for u, x in zip(units, sens.mean, strict=True) if u.kind == "adapter"]
    assert all(np.isfinite(adapters)) and any(x > 0 for x in adapters)


def test_a_search_chooses_a_weight_or_its_adapter() -> None:
    params, batches = problem()
    adapted, both = pj.adapt(loss, params, *batches[0], rank=2)
    units = pj.units(adapted, both, *batches[0])
    for favoured in ("adapter", "weight"):
        worth = np.array([[2.0 if unit.kind == favoured else 1.0 for unit in units]])
        search = Search(adapted, both, batches[0], pj.Sensitivity(units, worth, "made up"))
        found = search.find(pj.Budget(memory="200%"))
        chosen = {unit.group: unit.kind for unit in found.units}
        assert len(chosen) == len(found.units)
        weights = {f"params/{name}" for name in ("first", "second", "last")}
        assert {group: kind for group, kind in chosen.items() if group in weights} == (
            dict.fromkeys(weights, favoured)
        )
        assert pj.mask(both, found.scheme) == found.mask


@pytest.mark.parametrize("criterion", ["fisher", "magnitude"])
def test_criteria_that_read_values_refuse_adapters(criterion: str) -> None:
    params, batches = problem()
    adapted, both = pj.adapt(loss, params, *batches[0], rank=2)
    with pytest.raises(ValueError, match="says nothing of 'params/first adapter'"):
        pj.sensitivity(adapted, both, batches, criterion, steps=2)
