"""3x3 convolutions with 16 products for each 2x2 pixels of the result, instead of 36.

Winograd's minimal filtering F(2x2, 3x3), in the arrangement of Lavin and Gray (arXiv:1509.09308):
tiles of 4x4 pixels of the input, which overlap by two, and the kernel are each turned into 16
matrices; the result's tiles of 2x2 pixels come from the 16 products of those. Rounding errors are a
few times those of the convolution. Each matrix is an array of its own, so that XLA fuses sums into
loops that read and write each pixel once.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import jax
import jax.numpy as jnp
from jax import lax

from pockjax.rewrites._convolution import Convolution
from pockjax.rewrites._products import contract
from pockjax.rewrites._windows import Form, assembled, at_tap, padded, windowed

Sums = Callable[[list[jax.Array]], list[jax.Array]]

TILE, STEP = 4, 2


def winograd(conv: Convolution, *, together: bool) -> Form | None:
    """A convolution whose window is 3x3, or the gradient of its input.

    Args:
        conv: the convolution.
        together: whether the products are one of a batch of matrices, or 16; which is faster
            depends on the library that computes them.
    """
    if not _is_plain(conv) or conv.window != (3, 3):
        return None
    whole, count = _in_tiles(conv, conv.out_pixels)

    def apply(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        x = padded(whole, lhs)
        pixels = _grid(TILE, lambda at: windowed(whole, x, at, count, (STEP, STEP)))
        kernel = _grid(3, lambda tap: lax.squeeze(at_tap(conv, rhs, tap), conv.rhs_spatial))
        pixels, kernel = _both(_of_pixels, pixels), _both(_of_kernel, kernel)
        pairs = [*zip(chain(*pixels), chain(*kernel), strict=True)]
        if together:
            stacked = (jnp.stack(arrays) for arrays in zip(*pairs, strict=True))
            flat = list(jax.vmap(lambda p, k: contract(conv, p, k))(*stacked))
        else:
            flat = [contract(conv, p, k) for p, k in pairs]
        products = [flat[i : i + TILE] for i in range(0, len(flat), TILE)]
        parts = [*chain(*_both(_to_result, products))]
        return assembled(conv, parts, (STEP, STEP))

    return apply


def _is_plain(conv: Convolution) -> bool:
    spread = (*conv.strides, *conv.lhs_dilation, *conv.rhs_dilation)
    wide = conv.dtype in ("float32", "float64")  # what is rounded is larger than the result
    return wide and not conv.is_grouped and len(conv.window) == 2 and set(spread) == {1}


def _in_tiles(conv: Convolution, pixels: tuple[int, ...]) -> tuple[Convolution, tuple[int, ...]]:
    """The convolution with its input padded to whole tiles, and how many tiles there are."""
    count = tuple(-(-n // STEP) for n in pixels)
    more = (STEP * c - n for c, n in zip(count, pixels, strict=True))
    padding = ((low, high + m) for (low, high), m in zip(conv.padding, more, strict=True))
    return replace(conv, padding=tuple(padding)), count


def _grid(size: int, at: Callable[[tuple[int, int]], jax.Array]) -> list[list[jax.Array]]:
    return [[at((i, j)) for j in range(size)] for i in range(size)]


def _both(sums: Sums, grid: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """Sums along the rows of a grid of arrays, and then along its columns."""
    rows = [sums(row) for row in grid]
    columns = [sums(list(column)) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _of_pixels(d: list[jax.Array]) -> list[jax.Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _of_kernel(g: list[jax.Array]) -> list[jax.Array]:
    ends, middle = 0.5 * (g[0] + g[2]), 0.5 * g[1]
    return [g[0], ends + middle, ends - middle, g[2]]


def _to_result(m: list[jax.Array]) -> list[jax.Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
