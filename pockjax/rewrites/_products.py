"""Convolutions as matrix products."""

from itertools import product
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from pockjax.rewrites._convolution import Convolution
from pockjax.rewrites._windows import (
    MOST_TAPS,
    Form,
    at_tap,
    padded,
    placed,
    taps,
    to_out,
    windowed,
)


def dots(conv: Convolution) -> Form | None:
    """One matrix product for each position in the window; a 1x1 convolution is one of them."""
    if conv.batch_groups > 1 or conv.is_depthwise or conv.is_dilated:
        return None
    if prod(conv.window) > MOST_TAPS:
        return None

    def apply(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        x = padded(conv, lhs)
        total = None
        for tap, offset in taps(conv):
            pixels = windowed(conv, x, offset, conv.out_pixels, conv.strides)
            one = contract(conv, pixels, lax.squeeze(at_tap(conv, rhs, tap), conv.rhs_spatial))
            total = one if total is None else total + one
        assert total is not None
        return total

    return apply


def contract(conv: Convolution, pixels: jax.Array, kernel: jax.Array) -> jax.Array:
    """Input features against a kernel of just two axes, in the result's order of axes."""
    out_axis, in_axis = (0, 1) if conv.rhs_spec[0] < conv.rhs_spec[1] else (1, 0)
    feature, groups = conv.lhs_spec[1], conv.feature_groups
    how = {"precision": conv.precision, "preferred_element_type": pixels.dtype}
    if groups == 1:
        y = lax.dot_general(pixels, kernel, (((feature,), (in_axis,)), ((), ())), **how)
    else:
        size, outs = pixels.shape[feature] // groups, kernel.shape[out_axis] // groups
        split = (*pixels.shape[:feature], groups, size, *pixels.shape[feature + 1 :])
        kernel = jnp.transpose(kernel, (in_axis, out_axis)).reshape(-1, groups, outs)
        y = lax.dot_general(
            pixels.reshape(split), kernel, (((feature + 1,), (0,)), ((feature,), (1,))), **how
        )
        y = jnp.moveaxis(y, 0, -2)
        y = y.reshape(*y.shape[:-2], groups * outs)
    # The result's features stand last; back to where the input has them.
    return to_out(conv, jnp.moveaxis(y, -1, feature))


def columns(conv: Convolution) -> Form | None:
    """One matrix product with all positions of the window side by side (im2col)."""
    if conv.is_grouped or conv.is_dilated or not 1 < prod(conv.window) <= MOST_TAPS:
        return None

    def apply(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        x = padded(conv, lhs)
        feature = conv.lhs_spec[1]
        wide = jnp.concatenate(
            [windowed(conv, x, at, conv.out_pixels, conv.strides) for _, at in taps(conv)], feature
        )
        out, into, *spatial = conv.rhs_spec
        kernel = jnp.transpose(conv.forwards(rhs), [*spatial, into, out])
        kernel = kernel.reshape(-1, rhs.shape[out])
        if conv.rhs_spec[0] < conv.rhs_spec[1]:
            kernel = kernel.T
        return contract(conv, wide, kernel)

    return apply


def undilated_dots(conv: Convolution) -> Form | None:
    """The gradient of a strided 1x1 convolution's input: the product first, the zeros after it."""
    if conv.is_grouped or not conv.is_dilated or prod(conv.window) != 1:
        return None

    def apply(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        y = contract(conv, lhs, lax.squeeze(rhs, conv.rhs_spatial))
        config = [(0, 0, 0)] * y.ndim
        strides = [1] * y.ndim
        for axis, (low, high), dilation, stride in zip(
            conv.out_spatial, conv.padding, conv.lhs_dilation, conv.strides, strict=True
        ):
            config[axis], strides[axis] = (low, high, dilation - 1), stride
        y = lax.pad(y, jnp.zeros((), y.dtype), config)
        return lax.slice(y, [0] * y.ndim, y.shape, strides)

    return apply


def gradient_dots(conv: Convolution) -> Form | None:
    """The gradient of a kernel: one matrix product for each position of the result."""
    if conv.is_grouped or conv.is_dilated or prod(conv.out_pixels) > MOST_TAPS:
        return None

    def apply(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        x, rhs = padded(conv, lhs), conv.forwards(rhs)
        pieces = []
        for position in product(*map(range, conv.out_pixels)):
            at = tuple(p * s for p, s in zip(position, conv.strides, strict=True))
            seen = windowed(conv, x, at, conv.window, conv.rhs_dilation)
            pieces.append(_product(conv, seen, rhs))
        return placed(conv, jnp.stack(pieces, -1))

    return apply


def _product(conv: Convolution, seen: jax.Array, rhs: jax.Array) -> jax.Array:
    """What the window sees at one position against the whole kernel: (batch, output feature)."""
    operands = [
        (seen, (conv.lhs_spec[1], *conv.lhs_spatial)),
        (rhs, (conv.rhs_spec[1], *conv.rhs_spatial)),
    ]
    # XLA copies the first operand transposed; let that be the smaller one.
    swap = rhs.shape[conv.rhs_spec[0]] < seen.shape[conv.lhs_spec[0]]
    (a, contract_a), (b, contract_b) = reversed(operands) if swap else operands
    y = lax.dot_general(
        a,
        b,
        ((contract_a, contract_b), ((), ())),
        precision=conv.precision,
        preferred_element_type=a.dtype,
    )
    return y.T if swap else y
