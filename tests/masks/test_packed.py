import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pockjax.masks import MaskError, apply_updates, mask, pack, part, unpack
from tests.masks.strategies import arrays_with_parts


def half(path, leaf):
    """Blocks of kernels, one whole bias, the rest frozen."""
    if path.endswith(("kernel", "weight")):
        return part[1:3, ::2]
    return path.endswith("0/bias")


def arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]


def floats(tree):
    return [leaf for leaf in arrays(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


@given(st.dictionaries(st.sampled_from("ab"), arrays_with_parts(), min_size=1))
def test_round_trip_is_numpy_indexing(drawn):
    params = {name: [x] for name, (x, _, _) in drawn.items()} | {"frozen": np.ones(2)}
    chosen = {name: [p] for name, (_, p, _) in drawn.items()} | {"frozen": False}
    packed = pack(params, chosen)
    assert packed.pop("frozen") is None
    for name, (x, _, oracle) in drawn.items():
        np.testing.assert_array_equal(packed[name][0], x[oracle])

    packed["frozen"] = None
    new = unpack(params, jax.tree.map(jnp.negative, packed), chosen)
    added = apply_updates(params, packed, chosen)
    assert new["frozen"] is added["frozen"] is params["frozen"]
    for name, (x, _, oracle) in drawn.items():
        expected = x.copy()
        expected[oracle] *= -1
        np.testing.assert_array_equal(new[name][0], expected)
        expected = x.copy()
        expected[oracle] *= 2
        np.testing.assert_array_equal(added[name][0], expected)


def test_every_kind_round_trips(params):
    made = mask(params, half)
    packed = pack(params, made)
    assert len(jax.tree.leaves(packed)) == 3
    again = unpack(params, packed, made)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(floats(params), floats(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_optax_works_unmodified(params):
    made = mask(params, half)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.01))
    packed = pack(params, made)
    state = tx.init(packed)
    assert sum(x.size for x in jax.tree.leaves(optax.tree.get(state, "mu"))) == sum(
        x.size for x in jax.tree.leaves(packed)
    )
    new, stepped = params, packed
    for _ in range(3):
        grads = jax.tree.map(jnp.cos, pack(new, made))
        updates, state = tx.update(grads, state, pack(new, made))
        stepped = optax.apply_updates(stepped, updates)
        new = apply_updates(new, updates, made)
    for a, b in zip(jax.tree.leaves(pack(new, made)), jax.tree.leaves(stepped), strict=True):
        np.testing.assert_array_equal(a, b)
    zeros = jax.tree.map(jnp.zeros_like, packed)
    for a, b in zip(
        floats(unpack(new, zeros, made)), floats(unpack(params, zeros, made)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def toy():
    params = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(4), "n": jnp.array(3)}
    return params, mask(params, {"w": part[1:, [3, 0]], "b": True, "n": False})


def test_under_jit_grad_vmap_and_eval_shape(toy):
    params, made = toy
    packed = pack(params, made)

    def loss(packed, params):
        new = unpack(params, packed, made)
        return jnp.sum(new["w"] ** 2) + jnp.sum(new["b"])

    grads = jax.jit(jax.grad(loss))(packed, params)
    np.testing.assert_allclose(grads["w"], 2 * packed["w"])
    np.testing.assert_allclose(grads["b"], jnp.ones(4))
    assert grads["n"] is None

    several = jax.tree.map(lambda x: jnp.stack([x, x + 1]), packed)
    new = jax.vmap(lambda p: apply_updates(params, p, made))(several)
    np.testing.assert_array_equal(
        new["w"][1], apply_updates(params, jax.tree.map(lambda x: x + 1, packed), made)["w"]
    )

    shapes = jax.eval_shape(lambda p: p, params)
    packed_shapes = jax.eval_shape(lambda p: pack(p, made), shapes)
    assert packed_shapes["w"].shape == (2, 2) and packed_shapes["n"] is None
    back = jax.eval_shape(lambda p, q: unpack(p, q, made), shapes, packed_shapes)
    assert jax.tree.map(lambda x: x.shape, back) == jax.tree.map(lambda x: x.shape, params)


def test_traced_indices_select_other_rows_without_retracing():
    traces = 0

    @jax.jit
    def step(table, rows, update):
        nonlocal traces
        traces += 1
        made = {"table": part[rows]}
        packed = pack({"table": table}, made)
        return apply_updates({"table": table}, {"table": packed["table"] * update}, made)["table"]

    table = jnp.arange(10.0).reshape(5, 2)
    for rows in ([4, 0], [1, 2]):
        expected = np.array(table)
        expected[rows] *= 3
        np.testing.assert_array_equal(step(table, jnp.array(rows), 2.0), expected)
    assert traces == 1


@pytest.mark.parametrize("entry", [True, part[1:3], part[[2, 0]]])
def test_dtypes_are_those_of_the_leaves(entry):
    params = {"w": jnp.linspace(0, 1, 4, dtype=jnp.bfloat16)}
    made = {"w": entry}
    packed = pack(params, made)
    update = jnp.full(packed["w"].shape, 1e-3, jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        added = apply_updates(params, {"w": update}, made)
        replaced = unpack(params, {"w": update}, made)
    assert added["w"].dtype == replaced["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(pack(added, made)["w"], optax.apply_updates(packed["w"], update))


def test_numpy_parameters(toy):
    params, made = toy
    numpy_params = jax.tree.map(np.asarray, params)
    packed = pack(numpy_params, made)
    np.testing.assert_array_equal(apply_updates(numpy_params, packed, made)["b"], 2 * np.ones(4))
    assert isinstance(numpy_params["w"], np.ndarray) and numpy_params["w"][1, 0] == 4


@pytest.mark.parametrize(
    ("packed", "problem"),
    [
        ({"b": None, "n": None, "w": jnp.ones((2, 2))}, "trained but not packed: 'b'"),
        (
            {"b": jnp.ones(4), "n": jnp.ones(()), "w": jnp.ones((2, 2))},
            "packed but not trained: 'n'",
        ),
        (
            {"b": jnp.ones(4), "n": None, "w": jnp.ones((2, 3))},
            "packed value of 'w' has shape (2, 3), but the mask trains (2, 2) of its (3, 4)",
        ),
    ],
)
def test_what_does_not_fit_is_named(toy, packed, problem):
    params, made = toy
    for function in (unpack, apply_updates):
        with pytest.raises(MaskError, match=re.escape(problem)):
            function(params, packed, made)
