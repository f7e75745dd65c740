"""Bytes: of trees, of executables, and predicted before compiling."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import strategies as st
from jax import lax

import pockjax as pj
from pockjax.autodiff import inlined
from pockjax.costs import CompiledCost, best_order, predict_temp_bytes, tree_bytes
from pockjax.training._program import _MEMORY_ORDER, Options, Program
from tests.autodiff.programs import FAMILIES, programs
from tests.autodiff.test_exact import check_all


def test_tree_bytes() -> None:
    tree = {
        "w": jnp.ones((2, 3), jnp.bfloat16),
        "shape": jax.ShapeDtypeStruct((5,), jnp.int32),
        "none": None,
        "name": "text",
    }
    assert tree_bytes(tree) == 12 + 20


def test_compiled_cost_of_a_donating_function() -> None:
    compiled = jax.jit(lambda x, y: (x + 1, y @ y), donate_argnums=0).lower(
        jnp.ones(256), jnp.ones((64, 64))
    ).compile()  # fmt: skip
    cost = CompiledCost.of(compiled)
    assert cost.alias_bytes == 1024
    assert cost.total_bytes == (
        cost.argument_bytes + cost.output_bytes - cost.alias_bytes + cost.temp_bytes
    )
    assert cost.as_dict()["total_bytes"] == cost.total_bytes


WIDTH, BATCH, LAYERS = 128, 256, 6


def layers() -> list[Any]:
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return [{"w": jax.random.normal(k, (WIDTH, WIDTH)) / 12, "b": jnp.zeros(WIDTH)} for k in keys]


MASKS = {
    "everything": True,
    "biases": [{"w": False, "b": True}] * LAYERS,
    "input channels": [{"w": pj.part[:8], "b": False}] * LAYERS,
    "last two": [{"w": i >= LAYERS - 2, "b": False} for i in range(LAYERS)],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_predicted_memory_is_near_the_compiled(mask: str, activation: Any) -> None:
    def loss(params: Any, x: Any) -> Any:
        for layer in params:
            x = activation(x @ layer["w"] + layer["b"])
        return jnp.mean(x**2)

    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    report = pj.compile(loss, MASKS[mask], optax.sgd(0.1), layers(), x).report
    assert report.temp_bytes is not None
    print(f"{mask}: {report.temp_bytes} predicted, {report.compiled.temp_bytes} compiled")
    assert 0.7 < report.temp_bytes / report.compiled.temp_bytes < 1.3


def test_numbers_handed_to_nested_calls() -> None:
    """A literal may be an operand of a jit within a loop's body."""
    params = {"w": jnp.ones((3, 8)), "b": jnp.zeros((3, 8))}

    def loss(params, x):
        def layer(x, p):
            return 2.0 * jnp.tanh(x * p["w"] + p["b"]), None

        return jnp.sum(lax.scan(layer, x, params)[0] ** 2)

    mask = {"w": pj.part[:, :4], "b": False}
    step = pj.compile(loss, mask, optax.sgd(0.1), params, jnp.ones((4, 8)), residuals="xla")
    assert step.report.temp_bytes


def test_numbers_in_other_shapes_and_from_nested_calls() -> None:
    """Their value is not followed, so they are told apart by where they come from."""
    params, x = {"w": jnp.ones((16, 16))}, jnp.ones((8, 16))

    def reshaped(params, x):
        two = lax.reshape(jnp.float32(2), (1, 1))
        return jnp.sum(jnp.broadcast_to(two, (8, 16)) * (x @ params["w"]))

    def returned(params, x):
        y, two = jax.checkpoint(lambda x: (jnp.sin(x), 2.0))(x)
        return jnp.sum((y @ params["w"]) * jnp.full((8, 16), two))

    for loss in (reshaped, returned):
        step = pj.compile(loss, {"w": pj.part[:, :4]}, optax.sgd(0.1), params, x)
        assert step.report.temp_bytes is not None


def test_chains_longer_than_the_stack() -> None:
    def chain(x, w):
        y = x
        for _ in range(1200):
            y = jnp.tanh(y * w) + x
        return y

    jaxpr = jax.make_jaxpr(chain)(jnp.ones(8), jnp.ones(8))
    assert predict_temp_bytes(jaxpr) >= 0


@pytest.mark.parametrize("bounded", [True, False])
def test_a_product_is_written_before_bounds_from_both_sides(bounded: bool) -> None:
    """As in relu6; with one bound, product and mean are computed in one go."""
    x, w = jnp.ones((512, 64)), jnp.ones((64, 256))

    def mean(x, w):
        y = jnp.maximum(x @ w, 0.0)
        return jnp.mean(jnp.minimum(y, 6.0) if bounded else y, axis=0)

    compiled = CompiledCost.of(jax.jit(mean).lower(x, w).compile()).temp_bytes
    assert predict_temp_bytes(jax.make_jaxpr(mean)(x, w)) == pytest.approx(
        compiled, rel=0.1, abs=2048
    )


def of_a_small_image(x, w):
    """Its kernel is the larger, so XLA swaps them and turns the kernel around."""
    dims = ("NHWC", "HWIO", "NHWC")
    return jnp.sum(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims) ** 2)


def of_an_embedding(table, tokens):
    """The zeros into which rows are added are written before all else."""

    def loss(table):
        x = jnp.tanh(table[tokens])
        for _ in range(3):
            x = jnp.tanh(x @ x.T @ x)
        return jnp.sum(x)

    return jnp.sum(lax.optimization_barrier(jax.grad(loss)(table)) ** 2)


def of_gelu(x, w):
    """Two readers of erfc: its forms for small and large numbers are written apart."""
    y = lax.erfc(x @ w)
    return jnp.sum(lax.optimization_barrier(y[:, :128])), y @ w.T


def of_tanh(x, w):
    """Both factors of the gradient are computed from a hyperbolic tangent that is not written."""
    y = x @ w
    return jnp.tanh(y) * (1 - jnp.tanh(y) ** 2) @ w.T


def of_moved_rows(x, w):
    """Products of what is moved about are written, and so is what they read."""
    return jnp.mean((jnp.concatenate([x, x], 1) @ w) ** 2)


def of_the_greatest(x, w):
    """No reduction but sums, maxima and minima takes a product in."""
    return jnp.argmax(x @ w, axis=1)


def of_what_is_used(x, w):
    """What is computed for nothing takes no memory."""
    unused = jnp.tanh(x @ w) @ w
    assert unused.shape
    return jnp.sum(x, axis=0)


def of_sums_of_sums(x: Any, w: Any) -> Any:
    """Who reads an array last is changed by fusion: it decides what is run first."""
    first = 2 * x + 1
    second = 2 * (x + first)
    product = second @ w
    return jnp.sum(first + second), jnp.sum(product), jnp.sum(product * product)


PROGRAMS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "used": (of_what_is_used, (jnp.ones((512, 256)), jnp.ones((256, 256)))),
    "moved rows": (of_moved_rows, (jnp.ones((512, 256)), jnp.ones((512, 256)))),
    "greatest": (of_the_greatest, (jnp.ones((512, 256)), jnp.ones((256, 256)))),
    "small image": (of_a_small_image, (jnp.ones((8, 2, 2, 128)), jnp.ones((3, 3, 128, 128)))),
    "embedding": (of_an_embedding, (jnp.ones((5000, 32)), jnp.zeros(64, jnp.int32))),
    "gelu": (of_gelu, (jnp.ones((512, 64)), jnp.ones((64, 256)))),
    "sums": (of_sums_of_sums, (jnp.ones((512, 128)), jnp.ones((128, 128)))),
    "tanh": (of_tanh, (jnp.ones((512, 64)), jnp.ones((64, 256)))),
}


@pytest.mark.parametrize("depth_first", [False, True], ids=["breadth first", "depth first"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_predicted_memory_of_a_program(name: str, depth_first: bool) -> None:
    function, args = PROGRAMS[name]
    lowered = jax.jit(function).lower(*args)
    compiled = lowered.compile(compiler_options=_MEMORY_ORDER if depth_first else None)
    predicted = predict_temp_bytes(inlined(jax.make_jaxpr(function)(*args)), depth_first)
    assert predicted == pytest.approx(CompiledCost.of(compiled).temp_bytes, rel=0.02, abs=4096)


@pytest.mark.parametrize("family", ["all", "scans", "wrapped"])
def test_gradients_of_any_function_can_be_predicted(family: str) -> None:
    def check(data: st.DataObject) -> None:
        p = data.draw(programs(FAMILIES[family]))
        with p.precision():
            gradient = pj.value_and_grad(p.fun, p.mask, has_aux=p.has_aux)
            jaxpr = inlined(jax.make_jaxpr(gradient)(*p.inputs()))
        breadth = predict_temp_bytes(jaxpr)
        assert (breadth >= 0) and best_order(jaxpr)[1] <= breadth

    check_all(check, 10)


@pytest.mark.parametrize("depth_first", [False, True], ids=["breadth first", "depth first"])
@pytest.mark.parametrize("lowest", range(LAYERS))
def test_arrays_are_placed_as_xla_places_them(lowest: int, depth_first: bool) -> None:
    """Arrays of one size, where it depends on the order of placing them how much is lost."""

    def loss(params: Any, x: Any) -> Any:
        for layer in params:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return jnp.mean(x**2)

    mask = [{"w": i == lowest + 1, "b": i >= lowest} for i in range(LAYERS)]
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    update = Options(rewrites="none").update(loss, mask, optax.sgd(0.1), layers(), (x,))
    _, executable = Program(True, True, None, depth_first).compiled(update)
    step = jax.make_jaxpr(update.step(True, True))(update.example_state, *update.batch)
    predicted = predict_temp_bytes(inlined(step), depth_first)
    assert predicted == pytest.approx(CompiledCost.of(executable).temp_bytes, rel=0.02, abs=4096)


def test_arrays_of_one_size_are_placed_by_how_long_they_live() -> None:
    """Three arrays where two would do."""

    def loss(params: Any, x: Any) -> Any:
        for i, layer in enumerate(params):
            x = x @ layer["w"] + layer["b"]
            x = jax.nn.relu(x) if i < LAYERS - 1 else x
        return jnp.mean(x**2)

    mask = [{"w": False, "b": i == LAYERS - 1} for i in range(LAYERS)]
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    update = Options(rewrites="none").update(loss, mask, optax.adam(1e-3), layers(), (x,))
    _, executable = Program(True, True, None, False).compiled(update)
    step = jax.make_jaxpr(update.step(True, True))(update.example_state, *update.batch)
    compiled = CompiledCost.of(executable).temp_bytes
    assert predict_temp_bytes(inlined(step)) == pytest.approx(compiled, rel=0.02)
