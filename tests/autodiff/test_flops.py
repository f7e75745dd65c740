"""Work follows the mask: a slice of a gradient costs a slice, in what XLA compiles.

The analytic minimum is the forward pass, the cotangent down to the output of the first trained
layer, and of every trained weight's gradient the trained part.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pockjax as pj
from pockjax.autodiff import _fold
from tests.autodiff.counting import compiled_cost, traced_flops

PyTree = Any
Record = Callable[[str, object], None]

TOLERANCE = 0.02


def report(record: Record, what: str, found: float, minimum: float) -> None:
    """Prints the figure, keeps it in the test report, and checks it."""
    record(what, {"flops": found, "minimum": minimum})
    print(f"{what}: {found / 1e6:.2f} MFLOP, minimum {minimum / 1e6:.2f} ({found / minimum:.4f})")
    # Fewer would mean that the count, and so the test, is wrong.
    assert 1 - TOLERANCE <= found / minimum <= 1 + TOLERANCE


def shapes(*sizes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {f"w{i}": jax.ShapeDtypeStruct(size, jnp.float32) for i, size in enumerate(sizes)}


# --- dense layers --------------------------------------------------------------------------------

BATCH, WIDTH, DEPTH = 256, 512, 3
DENSE = 2 * BATCH * WIDTH * WIDTH
X = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
MLP = shapes(*[(WIDTH, WIDTH)] * DEPTH)


def mlp(params: PyTree, x: jax.Array) -> jax.Array:
    for i in range(DEPTH):
        x = jax.nn.relu(x @ params[f"w{i}"])
    return jnp.sum(x)


def only(params: PyTree, **trained: Any) -> PyTree:
    return {name: trained.get(name, False) for name in params}


def minimum_of_stack(layer_flops: float, depth: int, fractions: dict[int, float]) -> float:
    """Forward passes, input gradients above the first trained layer, parts of weight gradients."""
    return layer_flops * (depth + (depth - 1 - min(fractions)) + sum(fractions.values()))


SCATTERED = np.random.default_rng(0).permutation(WIDTH)[: WIDTH // 4]

DENSE_MASKS: dict[str, tuple[dict[int, Any], dict[int, float]]] = {
    "outputs of the last": ({2: pj.part[:, :64]}, {2: 1 / 8}),
    "inputs of the last": ({2: pj.part[:128]}, {2: 1 / 4}),
    "outputs of the middle": ({1: pj.part[:, 128:256]}, {1: 1 / 4}),
    "inputs of the first": ({0: pj.part[-64:]}, {0: 1 / 8}),
    "every second output": ({1: pj.part[:, ::2]}, {1: 1 / 2}),
    "a block": ({1: pj.part[:256, 256:]}, {1: 1 / 4}),
    "scattered inputs": ({1: pj.part[SCATTERED]}, {1: 1 / 4}),
    "scattered outputs": ({1: pj.part[:, SCATTERED]}, {1: 1 / 4}),
    "traced outputs": ({1: pj.part[:, jnp.asarray(SCATTERED)]}, {1: 1 / 4}),
    "traced inputs": ({2: pj.part[jnp.asarray(SCATTERED)]}, {2: 1 / 4}),
    "parts of two layers": ({0: pj.part[:, :64], 2: pj.part[:256]}, {0: 1 / 8, 2: 1 / 2}),
    "a part and a leaf": ({1: pj.part[:, :64], 2: True}, {1: 1 / 8, 2: 1}),
}


def named(parts: dict[int, Any]) -> dict[str, Any]:
    return {f"w{i}": p for i, p in parts.items()}


@pytest.mark.parametrize("name", DENSE_MASKS)
def test_dense(name: str, record_property: Record) -> None:
    parts, fractions = DENSE_MASKS[name]
    mask = only(MLP, **named(parts))
    found = compiled_cost(pj.value_and_grad(mlp, mask), MLP, X).flops
    report(record_property, f"dense, {name}", found, minimum_of_stack(DENSE, DEPTH, fractions))


def test_a_missing_fold_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, fractions = DENSE_MASKS["outputs of the middle"]
    monkeypatch.setattr(_fold, "_RULES", {})
    found = compiled_cost(pj.value_and_grad(mlp, only(MLP, **named(parts))), MLP, X).flops
    assert found > (1 + TOLERANCE) * minimum_of_stack(DENSE, DEPTH, fractions)


def transposed_mlp(params: PyTree, x: jax.Array) -> jax.Array:
    """The same through views: weights stored transposed, in heads, in half precision."""
    x = jax.nn.relu(x @ params["w0"].T)
    x = jax.nn.relu(jnp.einsum("bd,dhk->bhk", x, params["w1"].reshape(WIDTH, 8, WIDTH // 8)))
    x = x.reshape(BATCH, WIDTH)
    return jnp.sum(x @ (params["w2"] * 0.5))


VIEW_MASKS: dict[str, tuple[dict[int, Any], dict[int, float]]] = {
    "transposed": ({0: pj.part[:128]}, {0: 1 / 4}),
    "whole heads": ({1: pj.part[:, 64:192]}, {1: 1 / 4}),
    "scaled": ({2: pj.part[:, :128]}, {2: 1 / 4}),
}


@pytest.mark.parametrize("name", VIEW_MASKS)
def test_views(name: str, record_property: Record) -> None:
    parts, fractions = VIEW_MASKS[name]
    mask = only(MLP, **named(parts))
    found = compiled_cost(pj.value_and_grad(transposed_mlp, mask), MLP, X).flops
    report(record_property, f"views, {name}", found, minimum_of_stack(DENSE, DEPTH, fractions))


# --- convolutions --------------------------------------------------------------------------------

CHANNELS, IMAGE = 64, 20
CONVS = shapes(*[(3, 3, CHANNELS, CHANNELS)] * DEPTH)
IMAGES = jax.ShapeDtypeStruct((4, IMAGE, IMAGE, CHANNELS), jnp.float32)


def convolutions(params: PyTree, x: jax.Array) -> jax.Array:
    for i in range(DEPTH):
        x = lax.conv_general_dilated(
            x, params[f"w{i}"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
    return jnp.sum(x)


CONV_MASKS: dict[str, tuple[dict[int, Any], dict[int, float]]] = {
    "outputs": ({1: pj.part[..., :16]}, {1: 1 / 4}),
    "inputs": ({1: pj.part[:, :, :16]}, {1: 1 / 4}),
    "a block": ({1: pj.part[:, :, 32:, :32]}, {1: 1 / 4}),
    "scattered outputs": ({2: pj.part[..., [40, 3, 8, 61, 22, 17, 9, 33]]}, {2: 1 / 8}),
    "traced inputs": ({2: pj.part[:, :, jnp.array([5, 60, 31, 2])]}, {2: 1 / 16}),
    "the centre taps": ({1: pj.part[1:2, 1:2]}, {1: 1 / 9}),
    "parts of all": (
        {i: pj.part[..., : 8 * (i + 1)] for i in range(3)},
        {0: 1 / 8, 1: 1 / 4, 2: 3 / 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONV_MASKS)
def test_convolution(name: str, record_property: Record) -> None:
    parts, fractions = CONV_MASKS[name]
    mask = only(CONVS, **named(parts))
    sizes = [IMAGE - 2 * (i + 1) for i in range(DEPTH)]
    layer = [2 * 4 * n * n * 9 * CHANNELS**2 for n in sizes]
    minimum = sum(layer) + sum(layer[min(fractions) + 1 :])
    minimum += sum(layer[i] * fraction for i, fraction in fractions.items())
    found = compiled_cost(pj.value_and_grad(convolutions, mask), CONVS, IMAGES).flops
    report(record_property, f"convolution, {name}", found, minimum)


# --- loops over stacked layers -------------------------------------------------------------------

LAYERS = 6
STACK = {"w": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)}


def stacked(params: PyTree, x: jax.Array, *, reverse: bool = False) -> jax.Array:
    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jax.nn.relu(h @ w), None

    return jnp.sum(lax.scan(layer, x, params["w"], reverse=reverse)[0])


SCAN_MASKS: dict[str, tuple[Any, dict[int, float]]] = {
    "last two": (pj.part[4:], {4: 1, 5: 1}),
    "the middle": (pj.part[2:4], {2: 1, 3: 1}),
    "every second": (pj.part[1::2], {1: 1, 3: 1, 5: 1}),
    "chosen": (pj.part[[5, 2]], {2: 1, 5: 1}),
    "outputs of all": (pj.part[:, :, :128], {i: 1 / 4 for i in range(6)}),
    "inputs of all": (pj.part[:, :64], {i: 1 / 8 for i in range(6)}),
    "a block of the last three": (pj.part[3:, :256, 256:], {i: 1 / 4 for i in (3, 4, 5)}),
    "scattered outputs of two": (pj.part[1:3, :, SCATTERED], {1: 1 / 4, 2: 1 / 4}),
    "traced outputs of all": (pj.part[..., jnp.asarray(SCATTERED)], {i: 1 / 4 for i in range(6)}),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", SCAN_MASKS)
def test_scan(name: str, reverse: bool, record_property: Record) -> None:
    part, fractions = SCAN_MASKS[name]
    if reverse:
        # The first layer to run is the last of the stack.
        depth = {LAYERS - 1 - i: f for i, f in fractions.items()}
    else:
        depth = fractions

    def fun(params: PyTree, x: jax.Array) -> jax.Array:
        return stacked(params, x, reverse=reverse)

    found = traced_flops(pj.value_and_grad(fun, {"w": part}), STACK, X)
    report(record_property, f"scan, {name}", found, minimum_of_stack(DENSE, LAYERS, depth))


def test_a_scan_compiles_to_what_was_traced() -> None:
    # The traced count is of what is compiled: unrolled, XLA counts the same.
    def unrolled(params: PyTree, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jax.nn.relu(h @ w), None

        return jnp.sum(lax.scan(layer, x, params["w"], unroll=LAYERS)[0])

    grad = pj.value_and_grad(unrolled, {"w": pj.part[4:, :, :128]})
    found = compiled_cost(grad, STACK, X).flops
    minimum = minimum_of_stack(DENSE, LAYERS, {4: 1 / 4, 5: 1 / 4})
    assert found == pytest.approx(minimum, rel=TOLERANCE)


# --- whole leaves: no more than the sub-tree differentiated by hand ------------------------------


def block(params: PyTree, x: jax.Array) -> jax.Array:
    """A transformer block and a half."""
    for name in ("a", "b"):
        p = params[name]
        q, k, v = (jnp.einsum("sd,dhk->hsk", x, p[key]) for key in "qkv")
        weights = jax.nn.softmax(jnp.einsum("hsk,htk->hst", q, k))
        x = x + jnp.einsum("hst,htk,hkd->sd", weights, v, p["o"])
        x = p["scale"] * x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        x = x + jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]
    return jnp.sum(x * x)


def block_params() -> PyTree:
    one = {
        "q": (128, 4, 32), "k": (128, 4, 32), "v": (128, 4, 32), "o": (4, 32, 128),
        "scale": (128,), "up": (128, 512), "bias": (512,), "down": (512, 128),
    }  # fmt: skip
    return {
        name: {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in one.items()} for name in "ab"
    }


def leaf_mask(params: PyTree, *names: str) -> PyTree:
    return jax.tree.map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/") in names, params
    )


PARITY: dict[str, tuple[Any, PyTree, Any, tuple[str, ...]]] = {
    "dense, last": (mlp, MLP, X, ("w2",)),
    "dense, first and last": (mlp, MLP, X, ("w0", "w2")),
    "dense, all": (mlp, MLP, X, ("w0", "w1", "w2")),
    "convolution, middle": (convolutions, CONVS, IMAGES, ("w1",)),
    "scan": (stacked, STACK, X, ("w",)),
    "transformer, biases": (block, block_params(), (64, 128), ("a/bias", "b/bias", "b/scale")),
    "transformer, one matrix": (block, block_params(), (64, 128), ("b/down",)),
    "transformer, attention": (block, block_params(), (64, 128), ("a/q", "b/v", "b/o")),
}


@pytest.mark.parametrize("name", PARITY)
def test_whole_leaves_cost_no_more_than_the_subtree(name: str, record_property: Record) -> None:
    fun, params, x, names = PARITY[name]
    x = jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple) else x
    mask = leaf_mask(params, *names)

    def by_hand(params: PyTree, x: jax.Array) -> Any:
        def of_trained(trained: PyTree) -> jax.Array:
            return fun(pj.unpack(params, trained, mask), x)

        return jax.value_and_grad(of_trained)(pj.pack(params, mask))

    ours = compiled_cost(pj.value_and_grad(fun, mask), params, x)
    theirs = compiled_cost(by_hand, params, x)
    record_property(name, {"ours": asdict(ours), "by hand": asdict(theirs)})
    print(f"{name}: ours {ours}, by hand {theirs}")
    assert ours.flops <= theirs.flops
    assert ours.temp_bytes <= theirs.temp_bytes
