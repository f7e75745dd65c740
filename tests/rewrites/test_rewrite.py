"""`pj.rewrite` gives an equal function, under every transform, and leaves the rest alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pockjax as pj
from pockjax.rewrites import Choice, _rewrite
from pockjax.rewrites._candidates import ORIGINAL, candidates
from tests.rewrites.convolutions import convolutions

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv(x, w, stride=1, groups=1):
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=DIMENSIONS, feature_group_count=groups
    )


def network(params, x):
    """An inverted bottleneck: 1x1, depthwise with a stride, 1x1."""
    x = jnp.tanh(conv(x, params["expand"]))
    x = jnp.tanh(conv(x, params["depthwise"], 2, x.shape[-1]))
    return conv(x, params["project"])


def loss(params, x):
    return jnp.sum(network(params, x) ** 2)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.5, shape), jnp.float32)


PARAMS = {
    "expand": draw(1, 1, 3, 8, seed=1),
    "depthwise": draw(3, 3, 1, 8, seed=2),
    "project": draw(1, 1, 8, 4, seed=3),
}
X = draw(2, 7, 7, 3)


def rewrite(fun):
    return pj.rewrite(fun, "cpu", measure=False)


def check(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected
    )


def test_no_convolution_is_left():
    for fun in (loss, jax.grad(loss)):
        assert convolutions(jax.make_jaxpr(fun)(PARAMS, X))
        assert not convolutions(jax.make_jaxpr(rewrite(fun))(PARAMS, X))


@pytest.mark.parametrize("jit", [False, True])
def test_value_and_gradient(jit):
    fun = rewrite(jax.value_and_grad(loss))
    check((jax.jit(fun) if jit else fun)(PARAMS, X), jax.value_and_grad(loss)(PARAMS, X))


@pytest.mark.parametrize(
    "transform",
    [
        jax.grad,
        lambda f: jax.jit(jax.grad(f, 1)),
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: lambda p, x: jax.jvp(f, (p, x), (p, x)),
        lambda f: jax.grad(lambda p, x: jnp.sum(jax.grad(f, 1)(p, x) ** 2)),
        lambda f: jax.checkpoint(f),
        lambda f: lambda p, x: lax.map(lambda one: f(p, one), x),
    ],
    ids=["grad", "jit", "vmap", "jvp", "second order", "checkpoint", "map"],
)
def test_transforms_of_the_rewritten(transform):
    x = jnp.stack([X, X + 1])

    def fun(params, x):
        return loss(params, x.reshape(-1, *X.shape[1:]))

    check(transform(rewrite(fun))(PARAMS, x), transform(fun)(PARAMS, x))


def test_bodies_are_entered():
    def fun(params, x):
        def body(carry, one):
            y = jax.checkpoint(jax.jit(network))(params, one)
            y = lax.cond(carry > 0, lambda: y, lambda: conv(y, jnp.ones((1, 1, 4, 4))))
            return carry + y.sum(), y

        total, ys = lax.scan(body, 0.0, x)
        ys = lax.fori_loop(0, 2, lambda _, y: conv(y, jnp.ones((3, 3, 1, 4)), 1, 4), ys[0])
        return total + ys.sum()

    x = jnp.stack([X, X + 1])
    assert not convolutions(jax.make_jaxpr(rewrite(fun))(PARAMS, x))
    check(rewrite(fun)(PARAMS, x), fun(PARAMS, x))
    gradient = jax.grad(fun)
    check(jax.jit(rewrite(gradient))(PARAMS, x), gradient(PARAMS, x))


def test_the_gradient_of_an_input_reads_its_kernel_backwards(monkeypatch):
    """No reversed copy of the kernel is made, in whichever form it is computed."""
    met = []

    def first_of_ours(conv, *, measure, memory):
        forms = {k: f for k, f in candidates(conv).items() if k != ORIGINAL}
        met.append(conv)
        return Choice("", next(iter(forms)), {}), next(iter(forms.values()))

    monkeypatch.setattr(_rewrite, "choose", first_of_ours)
    w, x, ct = draw(3, 3, 4, 5), draw(2, 7, 7, 4, seed=1), draw(2, 7, 7, 5, seed=2)

    def gradient(x, w, ct):
        return jax.vjp(lambda x: conv(x, w), x)[1](ct)[0]

    check(rewrite(gradient)(x, w, ct), gradient(x, w, ct))
    assert [conv.backwards for conv in met] == [False, True]
    # Turned about one axis alone, it is no such kernel.
    check(rewrite(lambda x, w: conv(x, lax.rev(w, (0,))))(x, w), conv(x, jnp.flip(w, 0)))
    assert not met[-1].backwards


def test_custom_derivatives_are_kept():
    @jax.custom_vjp
    def doubled(x, w):
        return conv(x, w)

    doubled.defvjp(lambda x, w: (conv(x, w), w), lambda w, ct: (2 * conv(ct, w.swapaxes(2, 3)), w))
    w = draw(1, 1, 3, 3)

    def fun(x):
        return jnp.sum(doubled(x, w))

    check(jax.grad(rewrite(fun))(X), jax.grad(fun)(X))
    check(rewrite(jax.grad(fun))(X), jax.grad(fun)(X))


def test_what_is_not_known_is_left():
    """Complex numbers, mixed types, no spatial axes, and other platforms."""
    w = PARAMS["expand"]

    def mixed(x, w):
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=DIMENSIONS, preferred_element_type=jnp.float32
        )

    for fun, args in [
        (conv, (X.astype(jnp.complex64), w.astype(jnp.complex64))),
        (mixed, (X.astype(jnp.bfloat16), w.astype(jnp.bfloat16))),
        (
            lambda x, w: lax.conv_general_dilated(
                x, w, (), (), dimension_numbers=("NC", "IO", "NC")
            ),
            (jnp.ones((2, 3)), jnp.ones((3, 4))),
        ),
    ]:
        assert str(jax.make_jaxpr(rewrite(fun))(*args)) == str(jax.make_jaxpr(fun)(*args))
    assert pj.rewrite(loss, "cuda") is loss


def test_arguments_that_are_no_arrays():
    def fun(x, w, *, mode, scale=2.0, unused=None):
        assert mode == "same" and unused is None
        return scale * conv(x, w)

    check(rewrite(fun)(X, PARAMS["expand"], mode="same"), 2 * conv(X, PARAMS["expand"]))


def test_structure_of_the_result():
    def fun(x):
        return {"y": (conv(x, PARAMS["expand"]), None), "x": x}

    found = rewrite(fun)(X)
    assert jax.tree.structure(found) == jax.tree.structure(fun(X))
    check(found, fun(X))
