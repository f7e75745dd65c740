"""Random views: what may stand between a weight and the product that uses it."""

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax

from tests.autodiff.layers import SHAPE, Layer, Weights, fit, weight

View = tuple[str, Callable[[jax.Array], jax.Array], tuple[int, ...]]


def _factors(size: int) -> list[tuple[int, ...]]:
    """Shapes of a few axes with as many elements."""
    found: list[tuple[int, ...]] = [(size,)]
    for a in (1, 2, 3, 4, 6):
        if size % a == 0:
            found.append((a, size // a))
            found += [(a, b, size // a // b) for b in (1, 2, 3) if (size // a) % b == 0]
    return found


@st.composite
def _reshapes(draw: st.DrawFn, shape: tuple[int, ...]) -> View:
    new = draw(st.sampled_from(_factors(prod(shape))))
    return f"reshape{new}", lambda w: lax.reshape(w, new), new


@st.composite
def _transposes(draw: st.DrawFn, shape: tuple[int, ...]) -> View:
    order = tuple(draw(st.permutations(range(len(shape)))))
    return f"transpose{order}", lambda w: lax.transpose(w, order), tuple(shape[i] for i in order)


@st.composite
def _slices(draw: st.DrawFn, shape: tuple[int, ...]) -> View:
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    limits = [draw(st.integers(a + 1, n)) for a, n in zip(starts, shape, strict=True)]
    strides = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    new = tuple(len(range(a, b, s)) for a, b, s in zip(starts, limits, strides, strict=True))
    return (
        f"slice[{starts}:{limits}:{strides}]",
        lambda w: lax.slice(w, starts, limits, strides),
        new,
    )


@st.composite
def _indexing(draw: st.DrawFn, shape: tuple[int, ...]) -> View:
    i = draw(st.integers(0, shape[0] - 1))
    return f"[{i}]", lambda w: w[i], shape[1:]


@st.composite
def _dynamic(draw: st.DrawFn, shape: tuple[int, ...]) -> View:
    axis = draw(st.integers(0, len(shape) - 1))
    size = draw(st.integers(1, shape[axis]))
    start = draw(st.integers(0, 3))
    new = tuple(size if i == axis else n for i, n in enumerate(shape))
    name = f"dynamic_slice[axis {axis}, {start}+{size}]"
    return name, lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(start), size, axis), new


@st.composite
def _broadcasts(draw: st.DrawFn, shape: tuple[int, ...]) -> View:
    if 1 in shape and draw(st.booleans()):
        new = tuple(3 if n == 1 else n for n in shape)
        return f"broadcast{new}", lambda w: jnp.broadcast_to(w, new), new
    at = draw(st.integers(0, len(shape)))
    new = (*shape[:at], 2, *shape[at:])
    dims = [i for i in range(len(new)) if i != at]
    return f"broadcast{new}", lambda w: lax.broadcast_in_dim(w, new, dims), new


@st.composite
def _axis_views(draw: st.DrawFn, shape: tuple[int, ...]) -> View:
    axis = draw(st.integers(0, len(shape) - 1))
    n = shape[axis]

    def sized(size: int) -> tuple[int, ...]:
        return (*shape[:axis], size, *shape[axis + 1 :])

    cut = draw(st.integers(0, n))
    before = [(int(i == axis), 0) for i in range(len(shape))]
    rest, at = (1, n - cut) if cut < n else (0, n)
    views: list[View] = [
        ("rev", lambda w: lax.rev(w, [axis]), shape),
        ("sum", lambda w: w.sum(axis), shape[:axis] + shape[axis + 1 :]),
        ("average", lambda w: w.sum(axis, keepdims=True) / n, sized(1)),
        ("expand", lambda w: jnp.expand_dims(w, axis), (*shape[:axis], 1, *shape[axis:])),
        (f"roll {cut}", lambda w: jnp.roll(w, cut, axis), shape),
        ("concatenate", lambda w: jnp.concatenate([w, -w, 1 + w], axis), sized(3 * n)),
        ("with ones", lambda w: jnp.concatenate([jnp.ones_like(w), w], axis), sized(2 * n)),
        (f"split {cut}", lambda w: jnp.split(w, [cut], axis)[rest], sized(at)),
        ("pad", lambda w: jnp.pad(w, before), sized(n + 1)),
        ("softmax", lambda w: jax.nn.softmax(w, axis), shape),
    ]
    name, view, new = draw(st.sampled_from(views))
    return f"{name} along {axis}", view, new


def _stripes(w: jax.Array) -> jax.Array:
    return jnp.arange(w.size).reshape(w.shape) % 3 > 0


def _plain_views(shape: tuple[int, ...]) -> st.SearchStrategy[View]:
    return st.sampled_from(
        [
            ("negated", lambda w: -w, shape),
            ("doubled", lambda w: 2 * w, shape),
            ("halved", lambda w: w / 2, shape),
            ("shifted", lambda w: 1 - w, shape),
            ("masked", lambda w: jnp.where(_stripes(w), w, 0), shape),
            ("float32 and back", lambda w: w.astype(jnp.float32).astype(w.dtype), shape),
            ("bfloat16 and back", lambda w: w.astype(jnp.bfloat16).astype(w.dtype), shape),
            ("tanh", jnp.tanh, shape),
            ("stopped", lambda w: w + lax.stop_gradient(w), shape),
        ]
    )


@st.composite
def views(draw: st.DrawFn) -> Layer:
    """A weight seen through a few views, then used in a product, a scale or as it is."""
    shape = draw(st.sampled_from([(4, 6), (2, 3, 4), (3, 4), (12,), (4, 1, 6), (4, 4)]))
    steps: list[View] = []
    now = shape
    for _ in range(draw(st.integers(1, 4))):
        options = [_plain_views(now), _reshapes(now)]
        if now and prod(now) <= 96:
            options += [f(now) for f in (_transposes, _slices, _dynamic, _broadcasts, _axis_views)]
        if len(now) > 1:
            options.append(_indexing(now))
        view = draw(st.one_of(options))
        steps.append(view)
        now = view[2]
    use = draw(st.sampled_from(["product", "scale", "as it is"]))

    def apply(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        w = weight(weights, "w", h)
        for _, view, expected in steps:
            w = view(w)
            assert w.shape == expected, (w.shape, expected)
        common = [(a, b) for a, n in enumerate(w.shape) for b, m in enumerate(SHAPE) if n == m]
        if use == "product" and common and prod(now) <= 96:
            mine, theirs = common[0]
            return fit(lax.dot_general(h, w, (([theirs], [mine]), ([], []))))
        return fit(w) * h if use == "scale" else fit(w) + h

    return Layer(" → ".join([*(name for name, _, _ in steps), use]), {"w": shape}, apply)
