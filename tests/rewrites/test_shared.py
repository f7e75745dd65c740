"""Loops that are read twice are run once: `shared` finds where their results are written."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import pockjax as pj
from pockjax.autodiff import inlined
from pockjax.rewrites._shared import shared
from tests.rewrites.test_rewrite import check, conv, draw

X = jnp.ones((2, 6, 6, 4))
KERNEL = jnp.ones((3, 3, 1, 4))


def end_of(fun):
    """The name of the operation after which the result of a convolution is written, if any."""
    jaxpr = jax.make_jaxpr(lambda x, w: fun(conv(x, w, groups=4)))(X, KERNEL)
    jaxpr = inlined(jaxpr)
    [loop] = [e.outvars[0] for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    ends = shared(jaxpr, [loop])
    return [e.primitive.name for e in jaxpr.eqns if set(e.outvars) & ends]


@pytest.mark.parametrize(
    ("fun", "names"),
    [
        (lambda y: jnp.tanh(y).sum(), []),  # one reader
        (lambda y: (y.sum(0), y.sum(1)), ["conv_general_dilated"]),
        (lambda y: (y, y.sum()), ["conv_general_dilated"]),  # it is itself a result
        (lambda y: (jnp.exp(y).sum(), jnp.sin(y).sum()), ["conv_general_dilated"]),
        (lambda y: ((z := jnp.exp(y + 1)).sum(0), z.sum(1)), ["exp"]),
        # What parts and comes together again is one loop.
        (lambda y: (y * jnp.tanh(y)).sum(), []),
        (lambda y: ((z := y * jnp.tanh(y)).sum(0), z.sum(1)), ["mul"]),
        (lambda y: ((z := y * jnp.tanh(y)).sum(0), z.sum(1), y.sum()), ["conv_general_dilated"]),
        (lambda y: ((z := jax.nn.relu6(y)).sum(0), z.sum(1)), ["custom_jvp_call"]),
        (lambda y: (lax.sort(y)[0], 1.0), []),
        (lambda y: 1.0, []),  # nobody reads it
        (lambda y: (jax.debug.callback(lambda _: None, y), y.sum())[1], ["conv_general_dilated"]),
        (
            lambda y: (jax.debug.callback(lambda _: None, jnp.exp(y)), y.sum())[1],
            ["conv_general_dilated"],
        ),
    ],
)
def test_ends_with_what_all_readers_have_in_common(fun, names):
    assert end_of(fun) == names


def block(params, x):
    y = jax.nn.relu6(conv(x, params["depthwise"], groups=x.shape[-1]) + params["bias"])
    return jnp.sum(conv(y, params["project"]) ** 2)


def test_a_depthwise_convolution_is_computed_once_for_the_forward_and_the_backward_pass():
    params = {"depthwise": draw(3, 3, 1, 32), "bias": draw(32), "project": draw(1, 1, 32, 8)}
    x = draw(4, 16, 16, 32)

    def by_bias(bias, x):
        return jax.value_and_grad(lambda b: block(params | {"bias": b}, x))(bias)

    rewritten = pj.rewrite(by_bias, "cpu", measure=False)
    check(rewritten(params["bias"], x), by_bias(params["bias"], x))
    # With a window of one pixel, all else is the same.
    pixelwise = params | {"depthwise": draw(1, 1, 1, 32)}

    def flops(fun, x):
        costs = jax.jit(fun).lower(params["bias"], x).compile().cost_analysis()
        assert costs is not None
        return costs["flops"]

    def pixel_by_pixel(bias, x):
        return jax.value_and_grad(lambda b: block(pixelwise | {"bias": b}, x))(bias)

    once = 2 * 9 * x.size
    extra = flops(rewritten, x) - flops(pj.rewrite(pixel_by_pixel, "cpu", measure=False), x)
    assert 0.7 * once < extra < 1.3 * once
