"""Reading a convolution's input through its window, one position at a time."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax

from pockjax.rewrites._convolution import Convolution

Form = Callable[[jax.Array, jax.Array], jax.Array]
"""A function of a convolution's input and kernel that equals the convolution."""

MOST_TAPS = 121
"""Terms of a form at most; the window of a gradient is a whole image: minutes to compile."""


def padded(conv: Convolution, lhs: jax.Array) -> jax.Array:
    """The input with its padding, of which some may be negative, but without dilation."""
    if not any(low or high for low, high in conv.padding):
        return lhs
    config = [(0, 0, 0)] * lhs.ndim
    for axis, (low, high) in zip(conv.lhs_spatial, conv.padding, strict=True):
        config[axis] = (low, high, 0)
    return lax.pad(lhs, jnp.zeros((), lhs.dtype), config)


def windowed(
    conv: Convolution,
    x: jax.Array,
    offset: tuple[int, ...],
    count: tuple[int, ...],
    step: tuple[int, ...],
) -> jax.Array:
    """``count`` pixels of the padded input along each spatial axis, ``step`` apart."""
    start, limit, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
    for axis, first, n, s in zip(conv.lhs_spatial, offset, count, step, strict=True):
        start[axis], limit[axis], strides[axis] = first, first + (n - 1) * s + 1, s
    return lax.slice(x, start, limit, strides)


def taps(conv: Convolution) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each position in the window, and where it begins to read in the padded input."""
    for tap in product(*map(range, conv.window)):
        yield tap, tuple(t * d for t, d in zip(tap, conv.rhs_dilation, strict=True))


def at_tap(conv: Convolution, rhs: jax.Array, tap: tuple[int, ...]) -> jax.Array:
    """The kernel at one position, its spatial axes of size one."""
    start, limit = [0] * rhs.ndim, list(rhs.shape)
    for axis, t in zip(conv.rhs_spatial, tap, strict=True):
        t = rhs.shape[axis] - 1 - t if conv.backwards else t
        start[axis], limit[axis] = t, t + 1
    return lax.slice(rhs, start, limit)


def to_out(conv: Convolution, x: jax.Array) -> jax.Array:
    """From the input's order of axes to the result's."""
    order = dict(zip(conv.out_spec, conv.lhs_spec, strict=True))
    return jnp.transpose(x, [order[axis] for axis in range(x.ndim)])


def placed(conv: Convolution, y: jax.Array) -> jax.Array:
    """(batch, feature, position) in the result's order of axes."""
    batch, features = y.shape[:2]
    y = y.reshape(batch, features, *conv.out_pixels)
    where = {axis: i for i, axis in enumerate(conv.out_spec)}
    return jnp.transpose(y, [where[axis] for axis in range(y.ndim)])


def interleaved(parts: list[jax.Array], every: Sequence[int]) -> jax.Array:
    """Arrays put together, elements of each ``every`` so many apart along each axis.

    Args:
        parts: of one shape; there is one for each index below ``every``, in order.
        every: how far apart, for each axis.
    """
    y = jnp.stack(parts).reshape(*every, *parts[0].shape)
    rank = len(every)
    y = jnp.transpose(y, [i for axis in range(rank) for i in (rank + axis, axis)])
    return y.reshape([n * s for n, s in zip(parts[0].shape, every, strict=True)])


def assembled(conv: Convolution, parts: list[jax.Array], every: Sequence[int]) -> jax.Array:
    """Parts of a convolution's result, whose pixels are ``every`` so many apart, put together."""
    steps = [1] * len(conv.out_shape)
    for axis, step in zip(conv.out_spatial, every, strict=True):
        steps[axis] = step
    return lax.slice(interleaved(parts, steps), [0] * len(steps), conv.out_shape)
