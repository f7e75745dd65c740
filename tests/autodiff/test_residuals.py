"""What `pj.vjp` holds for the backward pass is the analytic minimum, in bytes.

The formulas count float32 as 4 bytes and a truth value as 1. ``E`` is the number of elements of an
activation. What is held is counted beyond the parameters, which are there anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pockjax as pj
from experiments.networks import (
    conv_net,
    conv_params,
    mlp,
    mlp_params,
    transformer,
    transformer_params,
)
from tests.autodiff.oracle import QUICK

BATCH = 16
WIDTHS = [24, 64, 48, 32, 8]
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": jax.nn.gelu}


def held(vjp_fn: Any, params: Any) -> list[jax.Array]:
    """What ``vjp_fn`` keeps alive beyond the parameters."""
    known = {id(leaf) for leaf in jax.tree.leaves(params)}
    return [leaf for leaf in jax.tree.leaves(vjp_fn) if id(leaf) not in known]


def held_bytes(fun: Callable[..., Any], mask: Any, params: Any, *args: Any) -> int:
    """Bytes held; on the way checks that the gradient is right and that no constant is held."""

    def both(params: Any, *args: Any) -> Any:
        out, vjp_fn = pj.vjp(fun, mask, params, *args)
        seed = jax.random.normal(jax.random.key(9), out.shape, out.dtype)
        wanted_out, dense_vjp = jax.vjp(lambda params: fun(params, *args), params)
        wanted = pj.pack(dense_vjp(seed)[0], mask)
        return held(vjp_fn, params), (out, vjp_fn(seed)), (wanted_out, wanted)

    compiled = jax.jit(both, compiler_options=QUICK)
    kept, found, wanted = compiled(params, *args)
    # One scale for all: a key's bias has a gradient of zero, but for rounding.
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    chex.assert_trees_all_close(found, wanted, rtol=0, atol=1e-5 * scale)
    for leaf in kept:
        assert leaf.size == 1 or np.ptp(np.asarray(leaf, np.float32)) > 0, f"constant {leaf.shape}"
    return sum(leaf.nbytes for leaf in kept)


def frozen(count: int) -> list[Any]:
    return [{"kernel": False, "bias": False} for _ in range(count)]


# --- dense and convolutional networks -------------------------------------------------------------


def stack_minimum(
    elements: Sequence[int], channels: Sequence[float], first: int, activation: str
) -> int:
    """The fewest bytes for a chain of products with an activation function between them.

    A layer of which k of n input channels are trained takes k/n of its input; one of which only
    outputs or biases are trained takes it whole or not at all. Every activation function from the
    first trained layer upwards takes what its derivative needs: relu which elements are positive
    (1 byte each), tanh its value and gelu its argument (4 bytes each). The input of the next layer
    follows from these: from tanh's value, from gelu's argument. For relu it does not; there either
    k channels and the signs are kept or, where that is no less, the argument.

    Args:
        elements: number of elements of each layer's input.
        channels: which share of each layer's input channels a trained kernel needs.
        first: the first layer that trains anything.
        activation: which function stands between the layers.
    """
    total = 4 * elements[first] * channels[first]
    for size, share in list(zip(elements, channels, strict=True))[first + 1 :]:
        signs = 4 * size * share + size if activation == "relu" else 4 * size
        total += min(signs, 4 * size)
    return int(total)


def kernel(index: Any) -> dict[str, Any]:
    return {"kernel": index, "bias": False}


STACKS: dict[str, tuple[list[Any], list[float], int]] = {
    # name: mask of four layers, share of input channels each kernel needs, first trained layer
    "a quarter of the inputs of one layer": (
        [*frozen(1), kernel(pj.part[..., :16, :]), *frozen(2)], [0, 0.25, 0, 0], 1,
    ),
    "inputs by index": (
        [*frozen(2), kernel(pj.part[..., [3, 0, 17], :]), *frozen(1)], [0, 0, 3 / 48, 0], 2,
    ),
    "inputs by traced index": (
        [*frozen(2), kernel(pj.part[..., jnp.array([3, 0, 17]), :]), *frozen(1)],
        [0, 0, 3 / 48, 0], 2,
    ),
    "inputs of the first layer": ([kernel(pj.part[..., :6, :]), *frozen(3)], [0.25, 0, 0, 0], 0),
    "inputs of every layer": (
        [kernel(pj.part[..., :n, :]) for n in (6, 16, 12, 8)], [0.25] * 4, 0,
    ),
    "outputs": ([*frozen(1), kernel(pj.part[..., :4]), *frozen(2)], [0, 1, 0, 0], 1),
    "a block": ([*frozen(1), kernel(pj.part[..., :32, 8:16]), *frozen(2)], [0, 0.5, 0, 0], 1),
    "a kernel": ([*frozen(1), kernel(True), *frozen(2)], [0, 1, 0, 0], 1),
    "the last layer": ([*frozen(3), True], [0, 0, 0, 1], 3),
    "the last bias": ([*frozen(3), {"kernel": False, "bias": True}], [0, 0, 0, 0], 3),
    "biases": ([{"kernel": False, "bias": True}] * 4, [0, 0, 0, 0], 0),
    "part of a bias": (
        [*frozen(1), {"kernel": False, "bias": pj.part[:4]}, *frozen(2)], [0, 0, 0, 0], 1,
    ),
    "biases and a quarter of the inputs": (
        [{"kernel": False, "bias": True}] * 2
        + [{"kernel": pj.part[..., :12, :], "bias": True}, {"kernel": False, "bias": True}],
        [0, 0, 0.25, 0], 0,
    ),
    "everything": ([True] * 4, [1, 1, 1, 1], 0),
}  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("case", STACKS)
def test_mlp(case: str, activation: str) -> None:
    mask, channels, first = STACKS[case]
    params = mlp_params(jax.random.key(0), WIDTHS)
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTHS[0]))

    def fun(params: Any, x: jax.Array) -> jax.Array:
        return mlp(params, x, ACTIVATIONS[activation])

    minimum = stack_minimum([BATCH * n for n in WIDTHS[:-1]], channels, first, activation)
    assert held_bytes(fun, mask, params, x) == pytest.approx(minimum, rel=0.05, abs=16)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("case", [name for name in STACKS if "input" in name or "out" in name])
def test_conv_net(case: str, activation: str) -> None:
    mask, channels, first = STACKS[case]
    params = conv_params(jax.random.key(0), WIDTHS)
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, WIDTHS[0]))

    def fun(params: Any, x: jax.Array) -> jax.Array:
        return conv_net(params, x, ACTIVATIONS[activation])

    minimum = stack_minimum([2 * 5 * 5 * n for n in WIDTHS[:-1]], channels, first, activation)
    assert held_bytes(fun, mask, params, x) == pytest.approx(minimum, rel=0.05, abs=16)


def test_depthwise_convolution() -> None:
    """Training k of n filters of a depthwise convolution takes k channels of its input."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 32))
    w = jax.random.normal(jax.random.key(1), (3, 3, 1, 32))

    def fun(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=32,
        )  # fmt: skip

    assert held_bytes(fun, pj.part[..., 4:12], w, x) == 2 * 6 * 6 * 8 * 4


def test_embedding() -> None:
    """Training rows or features of a table takes the ids, 4 bytes each, and no activation."""
    table = jax.random.normal(jax.random.key(0), (50, 16))
    ids = jax.random.randint(jax.random.key(1), (8, 12), 0, 50)

    def fun(table: jax.Array, ids: jax.Array) -> jax.Array:
        return table[ids]

    assert held_bytes(fun, pj.part[10:20], table, ids) <= ids.nbytes + 64
    assert held_bytes(fun, pj.part[:, :4], table, ids) <= ids.nbytes + 64


def test_mixed_precision() -> None:
    """Where products read bfloat16, k channels of bfloat16 are kept: 2 bytes an element."""
    params = mlp_params(jax.random.key(0), [32, 64, 16])
    x = jax.random.normal(jax.random.key(1), (BATCH, 32))

    def fun(params: Any, x: jax.Array) -> jax.Array:
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        return mlp(half, x.astype(jnp.bfloat16))

    _, vjp_fn = pj.vjp(fun, [*frozen(1), kernel(pj.part[:16])], params, x)
    assert sum(leaf.nbytes for leaf in held(vjp_fn, params)) == BATCH * 16 * 2


def test_constants_count() -> None:
    """A batch that the function closes over is kept as little as one that is passed."""
    params = mlp_params(jax.random.key(0), WIDTHS)
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTHS[0]))
    mask = [kernel(pj.part[:6]), *frozen(3)]
    _, vjp_fn = pj.vjp(lambda params: mlp(params, x, jnp.tanh), mask, params)
    elements = [BATCH * n for n in WIDTHS[:-1]]
    minimum = stack_minimum(elements, [0.25, 0, 0, 0], 0, "tanh")
    assert sum(leaf.nbytes for leaf in held(vjp_fn, params)) == minimum


# --- transformers ---------------------------------------------------------------------------------

LAYERS, TOKENS, WIDTH, HEADS, FFN = 4, 24, 48, 4, 96


def block_minimum(*, attention: bool, output: float) -> int:
    """The fewest bytes for one transformer block through which a gradient passes.

    Each of the two normalizations takes its normalized input and a number per token; what follows
    them (the inputs of query, key, value and up) is an elementwise function of that. Attention
    takes query, key, value and the probabilities. The feed-forward layers take gelu's argument,
    from which the input of down follows. Only the input of the output projection, a product of two
    activations, is kept for that projection's own sake: as many channels as are trained.

    Args:
        attention: whether anything up to the attention's input is trained.
        output: share of the trained input channels of the output projection.
    """
    tokens = BATCH * TOKENS
    total = tokens * WIDTH * output  # the input of the output projection
    total += tokens * WIDTH + tokens + tokens * FFN  # normalized, its scale, gelu's argument
    if attention:
        total += tokens * WIDTH + tokens  # normalized, its scale
        total += 3 * tokens * WIDTH + BATCH * HEADS * TOKENS**2  # q, k, v and probabilities
    return int(4 * total)


def transformer_bytes(rules: Any, scanned: bool) -> int:
    params = transformer_params(jax.random.key(0), LAYERS, WIDTH, FFN, scanned=scanned)
    x = jax.random.normal(jax.random.key(1), (BATCH, TOKENS, WIDTH))

    def fun(params: Any, x: jax.Array) -> jax.Array:
        return transformer(params, x, HEADS)

    return held_bytes(fun, rules(params), params, x)


def by_rules(rules: Any) -> Callable[[Any], Any]:
    return lambda params: pj.mask(params, rules)


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
class TestTransformer:
    def test_everything(self, scanned: bool) -> None:
        """Every block pays for all, the output projection's whole input included."""
        minimum = LAYERS * block_minimum(attention=True, output=1)
        assert transformer_bytes(lambda _: True, scanned) == pytest.approx(minimum, rel=0.05)

    def test_biases(self, scanned: bool) -> None:
        """Every block pays for all but the input of its output projection.

        The first block's first normalization has no backward pass; in a loop it is one with the
        others, which the tolerance covers.
        """
        minimum = LAYERS * block_minimum(attention=True, output=0) - 4 * BATCH * TOKENS * WIDTH
        biases = by_rules([(".*/bias", "all")])
        slack = 4 * BATCH * TOKENS * WIDTH if scanned else 0
        found = transformer_bytes(biases, scanned)
        assert found - slack == pytest.approx(minimum, rel=0.05)

    def test_input_channels_of_up(self, scanned: bool) -> None:
        """In the first block a quarter of the input of up and gelu's argument; in the others all.

        There the input of up follows from what the normalization takes.
        """
        first = 4 * BATCH * TOKENS * (WIDTH // 4 + FFN)
        minimum = first + (LAYERS - 1) * block_minimum(attention=True, output=0)
        found = transformer_bytes(by_rules([(".*up/kernel", {"in": 0.25})]), scanned)
        assert found == pytest.approx(minimum, rel=0.05)

    def test_input_channels_of_output(self, scanned: bool) -> None:
        """Each block keeps a quarter of the input of its output projection; the first no more.

        Above it, the first block pays for its second normalization and its gelu.
        """
        first = block_minimum(attention=False, output=0.25)
        minimum = first + (LAYERS - 1) * block_minimum(attention=True, output=0.25)
        found = transformer_bytes(by_rules([(".*output/kernel", {"in": 0.25})]), scanned)
        assert found == pytest.approx(minimum, rel=0.05)

    def test_last_layer(self, scanned: bool) -> None:
        """Nothing below the first trained layer: a quarter of an input, gelu's argument."""
        last = pj.part[-1:, :12] if scanned else pj.part[:12]
        pattern = "up/kernel" if scanned else f"{LAYERS - 1}/up/kernel"
        minimum = 4 * BATCH * TOKENS * (WIDTH // 4 + FFN)
        found = transformer_bytes(by_rules([(pattern, last)]), scanned)
        assert found == pytest.approx(minimum, rel=0.05)


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_remat_is_kept(scanned: bool) -> None:
    """Under `jax.checkpoint` each block keeps its input alone."""
    params = transformer_params(jax.random.key(0), LAYERS, WIDTH, FFN, scanned=scanned)
    x = jax.random.normal(jax.random.key(1), (BATCH, TOKENS, WIDTH))

    @jax.checkpoint
    def block(layer: Any, x: jax.Array) -> jax.Array:
        return transformer([layer], x, HEADS)

    def fun(params: Any, x: jax.Array) -> jax.Array:
        if not scanned:
            for layer in params:
                x = block(layer, x)
            return x
        return jax.lax.scan(lambda x, layer: (block(layer, x), None), x, params)[0]

    found = held_bytes(fun, pj.mask(params, [(".*up/kernel", {"in": 0.25})]), params, x)
    assert found <= 1.05 * LAYERS * x.nbytes


# --- loops whose bodies are rebuilt ---------------------------------------------------------------


def assert_vjp_is_dense(fun: Callable[..., Any], mask: Any, params: Any, *args: Any) -> None:
    held_bytes(lambda *args: fun(*args)[None], mask, params, *args)


def test_loops_of_one_cached_body() -> None:
    """A jitted layer called twice is one jaxpr, so both of its loops have the same variables."""
    offsets = jnp.arange(4.0)

    @jax.jit
    def layer(w: jax.Array, xs: jax.Array) -> jax.Array:
        def step(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = jnp.sin(w * x + offsets)
            return carry + y.sum(), y

        return jax.lax.scan(step, jnp.zeros(()), xs)[1]

    def fun(params: Any, xs: jax.Array) -> jax.Array:
        ys = layer(params["b"], layer(params["a"], xs))
        return jnp.sum(params["scale"] * ys**2)

    keys = jax.random.split(jax.random.key(0), 4)
    params = {name: jax.random.normal(k, (4,)) for name, k in zip("ab", keys, strict=False)}
    params["scale"] = jnp.ones(4)
    xs = jax.random.normal(keys[2], (6, 4))
    for trained in ({"scale"}, {"a"}, {"b", "scale"}):
        mask = {name: name in trained for name in params}
        assert_vjp_is_dense(fun, mask, params, xs)


@pytest.mark.parametrize("reverse", [False, True])
def test_loops_that_hand_a_value_through(reverse: bool) -> None:
    """A loss summed up over the layers has a cotangent that every layer hands on unchanged."""

    def fun(params: Any, x: jax.Array) -> jax.Array:
        def layer(carry: Any, weights: Any) -> Any:
            x, total, scale = carry
            x = jnp.tanh(x @ weights[0]) * jnp.sin(x + weights[1])
            return (x, total + scale * jnp.sin(x).sum(), scale), (weights[1], x)

        start = (x, 0.0, params["scale"])
        layers = (params["w"], params["b"])
        (x, total, scale), (biases, xs) = jax.lax.scan(layer, start, layers, reverse=reverse)
        return total * 2 + x.sum() + scale * biases.sum() + jnp.sum(xs**2)

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (5, 8, 8)) * 0.3,
        "b": jax.random.normal(keys[1], (5, 8)),
        "scale": jnp.ones(()),
    }
    x = jax.random.normal(keys[2], (3, 8))
    for weights in (pj.part[2:], pj.part[:, :4], True):
        for biases in (False, True):
            mask = {"w": weights, "b": biases, "scale": biases}
            assert_vjp_is_dense(fun, mask, params, x)
