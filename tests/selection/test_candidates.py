"""Run-time masks: what is simulated is what is compiled, by one program for all units."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import pockjax as pj
from pockjax._paths import flatten_with_paths
from pockjax.masks import Block, resolve
from pockjax.selection import Unit, choose_channels, union, units
from pockjax.selection._candidates import Program, Trial
from pockjax.selection._demand import on_demand
from tests.selection.problems import all_units, batches, closeness, loss, params

PyTree = Any
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.03, weight_decay=0.1),
    "clipped lamb": optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(0.1)),
}


def trial(found: tuple[Unit, ...], **options: Any) -> Trial:
    given: dict[str, Any] = {
        "fun": loss,
        "evaluate": None,
        "params": params(),
        "tx": optax.sgd(0.1),
        "beside": (),
        "candidates": tuple(unit.entries for unit in found),
        "training": (tuple(batches()[:5]),),
        "held_out": tuple(batches()[5:]),
    }
    return Trial(**(given | options))


def compiled(given: Trial, mask: PyTree) -> PyTree:
    """The parameters after the same steps of a step that was compiled for this mask."""
    first = given.training[0][0]
    step = pj.compile(given.fun, mask, given.tx, given.params, *first, rewrites="guessed")
    state = step.init(given.params)
    for batch in given.training[0]:
        state, _ = step(state, *batch)
    return state.params


def assert_same(got: PyTree, wanted: PyTree, before: PyTree, mask: PyTree) -> None:
    """Equal to rounding, moved where trained, and to the bit as before where frozen."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), got, wanted)
    entries, _, _ = resolve(before, mask)
    moved = False
    for entry, a, b in zip(entries, jax.tree.leaves(got), jax.tree.leaves(before), strict=True):
        trained = np.full(np.shape(a), entry is True)
        if isinstance(entry, Block):
            trained = np.asarray(entry.set(trained, np.ones(entry.packed_shape, bool)))
        np.testing.assert_array_equal(np.asarray(a)[~trained], np.asarray(b)[~trained])
        moved |= bool(np.any(np.asarray(a)[trained] != np.asarray(b)[trained]))
    assert moved


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_what_the_compiled_step_trains(name: str) -> None:
    found = all_units(axes=("in", "out"), ratios=(1, 0.5))
    given = trial(found, tx=OPTIMIZERS[name])
    program = Program(given)
    for k in (4, len(found) - 2):
        mask = union(given.params, [found[k]])
        assert_same(program.trained(0, k), compiled(given, mask), given.params, mask)


def test_chosen_channels_are_trained_as_compiled() -> None:
    generator = np.random.default_rng(3)
    worth = {path: generator.random(x.shape) for path, x in flatten_with_paths(params())[0]}
    found = choose_channels(all_units(ratios=(0.5,), biases="none"), worth)
    given = trial(found)
    program = Program(given)
    for k, unit in enumerate(found):
        [(path, part)] = unit.entries
        rows = np.sort(np.argsort(-worth[path].sum(axis=1))[: len(worth[path]) // 2])
        assert part == pj.Part.from_block(pj.part[rows].resolve(worth[path].shape))
        mask = union(given.params, [unit])
        assert_same(program.trained(0, k), compiled(given, mask), given.params, mask)


def test_what_is_trained_beside_each_unit() -> None:
    found = all_units(ratios=(0.5,))
    beside = (("c/kernel", True), ("c/bias", True))
    given = trial(found, beside=beside)
    program = Program(given)
    first = next(k for k, unit in enumerate(found) if unit.group == "a/kernel")
    mask = {
        "a": {"kernel": pj.part[:3], "bias": False},
        "b": False,
        "c": True,
    }
    mask = pj.mask(given.params, mask)
    assert_same(program.trained(0, first), compiled(given, mask), given.params, mask)
    nothing = pj.mask(given.params, {"a": False, "b": False, "c": True})
    assert_same(program.trained(0, -1), compiled(given, nothing), given.params, nothing)


def conv_loss(params: PyTree, x: jax.Array) -> jax.Array:
    def conv(x: jax.Array, w: jax.Array, groups: int = 1) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    x = jax.nn.relu(conv(x, params["expand"]))
    x = jax.nn.relu(conv(x, params["depthwise"], 8))
    x, _ = lax.scan(lambda x, w: (x + jnp.tanh(conv(x, w)), None), x, params["stack"])
    return jnp.mean(x**2)


def test_convolutions_and_stacked_layers() -> None:
    generator = np.random.default_rng(0)
    shapes = {"expand": (1, 1, 4, 8), "depthwise": (3, 3, 1, 8), "stack": (3, 1, 1, 8, 8)}
    weights = {k: generator.normal(0, 0.4, s).astype(np.float32) for k, s in shapes.items()}
    data = [(generator.normal(size=(2, 5, 5, 4)).astype(np.float32),) for _ in range(3)]
    found = units(conv_loss, weights, *data[0], ratios=(1, 0.5))
    given = trial(
        found, fun=conv_loss, params=weights, training=(tuple(data),), held_out=(data[0],)
    )
    program = Program(given)
    by_name = {unit.name: k for k, unit in enumerate(found)}
    for name in ("expand in 0.5", "depthwise", "stack[1] in 0.5"):
        mask = union(weights, [found[by_name[name]]])
        assert_same(program.trained(0, by_name[name]), compiled(given, mask), weights, mask)


def test_scores_are_those_of_the_trained_parameters() -> None:
    found = all_units(ratios=(1,))
    for evaluate, worth in ((None, lambda *a: -loss(*a)), (closeness, closeness)):
        program = Program(trial(found, evaluate=evaluate))
        scores = program.scores(0, [-1, 1])
        for score, k in zip(scores, (-1, 1), strict=True):
            trained = params() if k < 0 else program.trained(0, k)
            wanted = np.mean([worth(trained, *batch) for batch in program.trial.held_out])
            np.testing.assert_allclose(score, wanted, rtol=1e-5)


def test_side_by_side_or_one_by_one() -> None:
    found = all_units(ratios=(1, 0.5))
    everyone = list(range(-1, len(found)))
    alone = Program(trial(found, vectorized=1)).scores(0, everyone)
    together = Program(trial(found, vectorized=3)).scores(0, everyone)
    np.testing.assert_allclose(alone, together, rtol=1e-5)


def test_the_frozen_front_is_left_out_of_the_program() -> None:
    last = tuple(unit for unit in all_units(ratios=(1,)) if unit.group == "c/kernel")
    program = Program(trial(last))
    [features] = program._training(0).computed
    assert features.shape == (5, 4, 8)  # what the second layer gives
    assert "tanh" not in str(jax.make_jaxpr(program._split_loss[1])(params(), jax.tree.map(
        lambda x: x[0], program._training(0))))  # fmt: skip


def test_only_what_is_wanted_is_computed() -> None:
    def backward(x: jax.Array) -> list[jax.Array]:
        last = x @ x
        x = x @ jnp.eye(3)
        middle = x @ x
        x = x @ jnp.eye(3)
        return [last, middle, x @ x]

    jaxpr = jax.make_jaxpr(backward)(jnp.ones(3))
    run = jax.jit(on_demand(jaxpr, stages=3))
    x = jnp.arange(3.0)
    for wanted in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]):
        outs = run(jnp.array(wanted, bool), [x])
        np.testing.assert_array_equal(outs, 5.0 * np.array(wanted))
    # All products are inside branches: none is computed whatever is wanted.
    outer = jax.make_jaxpr(on_demand(jaxpr, stages=3))(jnp.ones(3, bool), [x])
    assert not any(eqn.primitive.name == "dot_general" for eqn in outer.eqns)
