"""Gradients of max pooling as comparisons."""

from itertools import product
from math import ceil, prod

import jax
import jax.numpy as jnp
from jax import lax

from pockjax._compat import Jaxpr, JaxprEqn, Literal, dtype_of, is_sharded, shape_of
from pockjax.autodiff import replaced_where
from pockjax.rewrites._windows import MOST_TAPS, interleaved


def without_selecting_scatters(jaxpr: Jaxpr) -> Jaxpr:
    """Gradients of max and min pooling from the place of what each window chose.

    XLA for the CPU finds where that was by a reduction of five arrays, and scatters one number
    after the other: over ten times slower for ResNet-50's
    first layer (``python -m experiments.rewrites``). Here a loop compares the
    positions of the window, and the pixels that see the same positions read from there what was
    chosen.

    Args:
        jaxpr: with its jits inlined. What is inside of other operations is left alone.
    """
    return replaced_where(jaxpr, _is_small_pool, _pooled_back)


def _is_small_pool(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "select_and_scatter_add":
        return False
    known = eqn.params["select_prim"].name in ("ge", "le")
    real = all(jnp.issubdtype(dtype_of(a), jnp.floating) for a in eqn.invars)
    known &= not is_sharded(eqn) and not any(isinstance(a, Literal) for a in eqn.invars)
    some = all(prod(shape_of(a)) for a in eqn.invars)
    return real and known and some and prod(eqn.params["window_dimensions"]) <= MOST_TAPS


def _pooled_back(eqn: JaxprEqn, ct: jax.Array, x: jax.Array) -> jax.Array:
    """The cotangents at the pixels that were chosen."""
    window, strides = eqn.params["window_dimensions"], eqn.params["window_strides"]
    padding = eqn.params["padding"]
    taps = list(product(*map(range, window)))
    chosen = _chosen(eqn, x, taps, ct.shape)
    # Pixel p of the padded input is seen at position t by window (p - t) / stride.
    sizes = [n + low + high for n, (low, high) in zip(x.shape, padding, strict=True)]
    count = [ceil(n / s) for n, s in zip(sizes, strides, strict=True)]
    before = [(w - 1) // s for w, s in zip(window, strides, strict=True)]
    grow = [(b, max(0, n - m), 0) for b, n, m in zip(before, count, ct.shape, strict=True)]
    chosen, ct = (lax.pad(a, jnp.zeros((), a.dtype), grow) for a in (chosen, ct))
    parts = []
    for part in product(*map(range, strides)):
        total = jnp.zeros(count, ct.dtype)
        for number, tap in enumerate(taps):
            steps = [divmod(t - p, s) for t, p, s in zip(tap, part, strides, strict=True)]
            if any(rest for _, rest in steps):
                continue
            start = [b - back for b, (back, _) in zip(before, steps, strict=True)]
            limit = [a + n for a, n in zip(start, count, strict=True)]
            here = lax.slice(chosen, start, limit) == number
            total = total + jnp.where(here, lax.slice(ct, start, limit), 0)
        parts.append(total)
    whole = interleaved(parts, strides)
    start = [low for low, _ in padding]
    return lax.slice(whole, start, [a + n for a, n in zip(start, x.shape, strict=True)])


def _chosen(
    eqn: JaxprEqn, x: jax.Array, taps: list[tuple[int, ...]], shape: tuple[int, ...]
) -> jax.Array:
    """The number of the position that each window chose, the first of equals.

    Padding may be chosen too, as XLA does where nothing is greater than minus infinity.
    """
    strides, keeps = eqn.params["window_strides"], eqn.params["select_prim"]
    last = jnp.inf if keeps.name == "le" else -jnp.inf
    wide = lax.pad(x, jnp.array(last, x.dtype), [(*p, 0) for p in eqn.params["padding"]])
    best = chosen = None
    for number, tap in enumerate(taps):
        limit = [t + (n - 1) * s + 1 for t, n, s in zip(tap, shape, strides, strict=True)]
        seen = lax.slice(wide, tap, limit, strides)
        if best is None or chosen is None:
            best, chosen = seen, jnp.zeros(shape, jnp.int32)
            continue
        kept = keeps.bind(best, seen)
        best, chosen = jnp.where(kept, best, seen), jnp.where(kept, chosen, number)
    assert chosen is not None
    return chosen
