"""The gradient of a strided convolution's input, without multiplying the zeros."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax

from pockjax.rewrites._convolution import Convolution
from pockjax.rewrites._windows import Form, assembled


def phases(conv: Convolution, inner: Callable[[Convolution], Form | None]) -> Form | None:
    """The gradient of a strided convolution's input, without the zeros.

    Pixels of the result that differ by a multiple of the dilation see the same positions of the
    window: each such phase is a convolution without dilation, and the phases are interleaved.
    """
    if not conv.is_dilated or any(s != 1 for s in conv.strides):
        return None
    if any(d != 1 for d in conv.rhs_dilation):
        return None
    parts = list(product(*map(range, conv.lhs_dilation)))
    plans = {part: _phase(conv, part) for part in parts}
    forms = {}
    for part, plan in plans.items():
        if plan is not None:
            form = inner(plan[0])
            if form is None:
                return None
            forms[part] = form

    def apply(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        # Each phase is one pixel short, or not; all are padded to the longest and cut in the end.
        longest = [-(-n // d) for n, d in zip(conv.out_pixels, conv.lhs_dilation, strict=True)]
        out = []
        for part in parts:
            plan = plans[part]
            shape = list(conv.out_shape)
            for axis, n in zip(conv.out_spatial, longest, strict=True):
                shape[axis] = n
            if plan is None:
                out.append(jnp.zeros(shape, lhs.dtype))
                continue
            small, first = plan
            start, limit, strides = [0] * rhs.ndim, list(rhs.shape), [1] * rhs.ndim
            for axis, t, d in zip(conv.rhs_spatial, first, conv.lhs_dilation, strict=True):
                k = rhs.shape[axis]
                start[axis] = (k - 1 - t) % d if conv.backwards else t
                limit[axis] = k - t if conv.backwards else k
                strides[axis] = d
            y = forms[part](lhs, lax.slice(rhs, start, limit, strides))
            grow = [(0, n - m, 0) for n, m in zip(shape, y.shape, strict=True)]
            out.append(lax.pad(y, jnp.zeros((), y.dtype), grow) if any(g[1] for g in grow) else y)
        return assembled(conv, out, conv.lhs_dilation)

    return apply


def _phase(conv: Convolution, part: tuple[int, ...]) -> tuple[Convolution, tuple[int, ...]] | None:
    """The convolution of one phase, and the first position of the window that it sees."""
    window, padding, pixels, first = [], [], [], []
    axes = zip(
        part, conv.window, conv.padding, conv.lhs_dilation, conv.pixels, conv.out_pixels,
        strict=True,
    )  # fmt: skip
    for r, k, (low, _), d, n, m in axes:
        # Result r + d·j reads input (r + d·j + t − low) / d where that is whole.
        t = (low - r) % d
        size = len(range(t, k, d))
        count = len(range(r, m, d))
        if size == 0 or count == 0:
            return None
        begins = (r + t - low) // d
        window.append(size)
        pixels.append(count)
        first.append(t)
        padding.append((-begins, begins + count + size - 1 - n))
    rhs_shape, out_shape = list(conv.rhs_shape), list(conv.out_shape)
    for axis, size in zip(conv.rhs_spatial, window, strict=True):
        rhs_shape[axis] = size
    for axis, count in zip(conv.out_spatial, pixels, strict=True):
        out_shape[axis] = count
    small = replace(
        conv,
        rhs_shape=tuple(rhs_shape),
        out_shape=tuple(out_shape),
        padding=tuple(padding),
        lhs_dilation=(1,) * len(part),
    )
    return small, tuple(first)
