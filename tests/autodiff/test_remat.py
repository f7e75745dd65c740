"""Rematerialisation: the same gradients from fewer kept bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pockjax as pj
from experiments import networks
from pockjax.autodiff import differentiate, trace
from pockjax.autodiff._jaxprs import evaluated, inlined, size_in_bytes

_LAYERS = 2


def _problem(kind: str):
    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (2, 8, 16))
    if kind == "convolutions":
        params = networks.conv_params(key, [3, 8, 8, 8, 4])
        x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
        return params, x, lambda params, x: jnp.mean(networks.conv_net(params, x) ** 2)
    scanned = kind == "scanned"
    params = networks.transformer_params(key, _LAYERS, 16, 32, scanned=scanned)
    return params, x, lambda params, x: jnp.mean(networks.transformer(params, x, 2) ** 2)


def _gradient(joint, inputs):
    """The gradient by the two passes, and the bytes handed from one to the other."""
    passes, n = joint.passes, joint.n_forward_out

    @jax.jit
    def gradient(*inputs):
        outs = evaluated(passes.forward, passes.forward.consts, *inputs)
        # Nothing of the forward pass can be reused, or its operations fused with it.
        held = jax.lax.optimization_barrier([*(inputs[i] for i in passes.kept_inputs), *outs[n:]])
        seed = jnp.ones((), jnp.float32)
        return evaluated(passes.backward, passes.backward.consts, *held, seed)

    return gradient(*inputs), sum(size_in_bytes(a) for a in passes.forward.out_avals[n:])


def _check_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _mask(params, draw_train):
    return jax.tree.map(lambda leaf: draw_train(leaf), params)


@st.composite
def _plans(draw, n: int):
    places = sorted(draw(st.sets(st.integers(0, n), min_size=2, max_size=8)))
    spans = list(zip(places, places[1:], strict=False))
    chosen = draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans)))
    return tuple(span for span, yes in zip(spans, chosen, strict=True) if yes)


@pytest.mark.parametrize("kind", ["transformer", "scanned", "convolutions"])
@settings(max_examples=3)
@given(data=st.data())
def test_any_plan_gives_the_same_gradient(kind, data):
    params, x, loss = _problem(kind)
    choices = st.sampled_from([True, True, False, pj.part[:1]])
    mask = _mask(params, lambda leaf: data.draw(choices))
    primal = trace(loss, params, [x])
    plan = data.draw(_plans(len(inlined(primal.jaxpr).eqns)))
    inputs = [*primal.params.arrays, x]
    if not any(entry is not False for entry in jax.tree.leaves(mask)):
        return
    expected, _ = _gradient(differentiate(primal, mask), inputs)
    found, _ = _gradient(differentiate(primal.rematerialised(plan), mask), inputs)
    _check_same(found, expected)


@pytest.mark.parametrize("kind", ["transformer", "scanned"])
def test_the_best_plan_keeps_fewer_bytes(kind):
    params, x, loss = _problem(kind)
    primal = trace(loss, params, [x])
    inputs = [*primal.params.arrays, x]
    plan = primal.best_plan(True)
    expected, before = _gradient(differentiate(primal, True), inputs)
    found, after = _gradient(differentiate(primal.rematerialised(plan), True), inputs)
    assert plan and after < 0.7 * before
    _check_same(found, expected)


def test_nothing_below_the_first_trained_layer_is_computed_again():
    params, x, loss = _problem("transformer")
    mask = [False, True]
    primal = trace(loss, params, [x])
    plan = primal.best_plan(mask)
    n = len(inlined(primal.jaxpr).eqns)
    assert plan[0][0] > 0.4 * n and plan[-1][1] == n
    backward = differentiate(primal.rematerialised(plan), mask).passes.backward
    whole = differentiate(primal.rematerialised(primal.best_plan(True)), mask).passes.backward
    # A plan for everything computes nothing more again: the frozen layers have no backward pass.
    count = sum(eqn.primitive.name == "dot_general" for eqn in backward.eqns)
    assert count == sum(eqn.primitive.name == "dot_general" for eqn in whole.eqns)


def test_blocks_are_computed_again_in_the_order_of_the_backward_pass():
    params, x, loss = _problem("transformer")
    primal = trace(loss, params, [x])
    joint = differentiate(primal.rematerialised(primal.best_plan(True)), True)
    names = [eqn.primitive.name for eqn in joint.passes.backward.eqns]
    ties = [i for i, name in enumerate(names) if name == "optimization_barrier"]
    assert len(ties) >= _LAYERS
    # Between two ties there is work of the backward pass, not recomputation alone.
    assert all(b - a > 5 for a, b in zip(ties, ties[1:], strict=False))


def test_a_value_alive_over_many_blocks_is_kept_once():
    def loss(params, x):
        long, y = jnp.tanh(x @ params["first"]) @ params["first"], x
        for w in params["rest"]:
            y = jnp.tanh(y @ w) @ w
        return jnp.mean((y + long) ** 2 + long @ params["last"])

    keys = jax.random.split(jax.random.key(0), 5)
    square = [jax.random.normal(key, (8, 8)) for key in keys]
    params = {"first": square[0], "last": square[1], "rest": square[2:]}
    x = jax.random.normal(jax.random.key(1), (16, 8))
    primal = trace(loss, params, [x])
    n = len(inlined(primal.jaxpr).eqns)
    every = tuple((i, i + 1) for i in range(n))
    inputs = [*primal.params.arrays, x]
    expected, _ = _gradient(differentiate(primal, True), inputs)
    found, kept = _gradient(differentiate(primal.rematerialised(every), True), inputs)
    made = [v for eqn in inlined(primal.jaxpr).eqns for v in eqn.outvars]
    assert kept <= sum(size_in_bytes(v.aval) for v in made)
    _check_same(found, expected)


@pytest.mark.parametrize("plan", [((3, 3),), ((5, 9), (7, 12)), ((0, 10**6),), ((1, 2, 3),)])
def test_plans_that_do_not_fit(plan):
    params, x, loss = _problem("transformer")
    with pytest.raises(ValueError, match=r"a plan is spans \(start, stop\)"):
        pj.compile(loss, True, optax.sgd(0.1), params, x, remat=plan)


def test_a_compiled_step_needs_less_memory_and_trains_the_same():
    params = networks.transformer_params(jax.random.key(0), 4, 32, 128)
    x = jax.random.normal(jax.random.key(1), (4, 32, 32))

    def loss(params, x):
        return jnp.mean((networks.transformer(params, x, 4) - 1) ** 2)

    tx = optax.sgd(0.01)
    plain, again = (pj.compile(loss, True, tx, params, x, remat=remat) for remat in (False, True))
    assert not plain.remat and again.remat
    assert again.report.compiled.temp_bytes < 0.6 * plain.report.compiled.temp_bytes
    assert plain.report.flops < again.report.flops < 1.5 * plain.report.flops
    assert again.report.full == plain.report.full
    states = [step.init(params) for step in (plain, again)]
    for _ in range(3):
        states = [step(state, x)[0] for step, state in zip((plain, again), states, strict=True)]
    for a, b in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_xla_may_not_undo_it():
    params, x, loss = _problem("transformer")
    with pytest.raises(ValueError, match="remat needs residuals='kept'"):
        pj.compile(loss, True, optax.sgd(0.1), params, x, remat=True, residuals="xla")
