"""Depthwise convolutions as elementwise loops."""

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


def multiply_adds(conv: Convolution) -> Form | None:
    """A depthwise convolution as shifted multiply-adds, one for each position in the window."""
    if not conv.is_depthwise or conv.is_dilated or prod(conv.window) > MOST_TAPS:
        return None

    def apply(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        x = padded(conv, lhs)
        feature, (out, *_) = conv.lhs_spec[1], conv.rhs_spec
        multiplier = rhs.shape[out] // lhs.shape[feature]
        if multiplier > 1:
            x = jnp.repeat(x, multiplier, feature)
        shape = [1] * x.ndim
        shape[feature] = rhs.shape[out]
        total = None
        for tap, offset in taps(conv):
            pixels = windowed(conv, x, offset, conv.out_pixels, conv.strides)
            term = pixels * at_tap(conv, rhs, tap).reshape(shape)
            total = term if total is None else total + term
        assert total is not None
        return to_out(conv, total)

    return apply


def row_blocks(conv: Convolution) -> Form | None:
    """The gradient of a depthwise convolution's kernel, a few rows of an image at a time.

    There is one accumulator of a row's size for each position of the window, and a block of rows
    stays in the cache while all of them are added to; only the sums of the accumulators are
    reductions. XLA's own reductions over leading axes are slow on CPU.
    """
    two_axes = len(conv.window) == 2
    if not (two_axes and conv.is_depthwise_gradient) or conv.is_dilated:
        return None
    if prod(conv.out_pixels) > MOST_TAPS:
        return None
    height, width = conv.window
    rows = max(n for n in range(1, 9) if height % n == 0)

    def apply(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        # (images, rows, columns, channels), which is how they lie in memory where channels do last.
        x = jnp.transpose(padded(conv, lhs), [*conv.lhs_spec[1:], conv.lhs_spec[0]])
        ct = jnp.transpose(conv.forwards(rhs), [*conv.rhs_spec[1:], conv.rhs_spec[0]])
        images, channels = x.shape[0], x.shape[3]
        (down, right), (dy, dx) = conv.rhs_dilation, conv.strides
        outs = list(product(*map(range, conv.out_pixels)))
        depth = (rows - 1) * down + (conv.out_pixels[0] - 1) * dy + 1
        wide = (width - 1) * right + 1

        def add(
            totals: tuple[jax.Array, ...], block: jax.Array
        ) -> tuple[tuple[jax.Array, ...], None]:
            image, first = block // (height // rows), block % (height // rows) * rows
            seen = lax.dynamic_slice(
                x, (image, first * down, 0, 0), (1, depth, x.shape[2], channels)
            )[0]
            given = lax.dynamic_slice(ct, (image, first, 0, 0), (1, rows, width, channels))[0]
            new = []
            for total, (i, j) in zip(totals, outs, strict=True):
                for r in range(rows):
                    row = r * down + i * dy
                    part = lax.slice(
                        seen, (row, j * dx, 0), (row + 1, j * dx + wide, channels), (1, right, 1)
                    )
                    total = total + part[0] * given[r]
                new.append(total)
            return tuple(new), None

        start = tuple(jnp.zeros((width, channels), lhs.dtype) for _ in outs)
        totals, _ = lax.scan(add, start, jnp.arange(images * (height // rows)))
        y = jnp.stack([total.sum(0) for total in totals], -1)
        return placed(conv, y[None])

    return apply
