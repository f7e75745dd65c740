"""Random layers: every way in which the rules let a function use a weight.

A layer maps an activation of shape (2, 3, 4) to one of the same shape, so that layers of any kind
follow each other. Sizes come from a small set, so that the operations of different examples are
often the same and compile once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax

Weights = Mapping[str, jax.Array]
Apply = Callable[[Weights, jax.Array, jax.Array], jax.Array]

SHAPE = (2, 3, 4)
SIZE = prod(SHAPE)


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        kind: what it is, for people who read a failing example.
        shapes: the weights it needs.
        apply: ``apply(weights, h, ids)``, with ids of shape (2, 3) and any value.
        compiled: whether it is one XLA program even in eager mode, where the order of additions
            and the use of fused multiply-adds are XLA's choice.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    apply: Apply
    compiled: bool = False

    def __repr__(self) -> str:
        return f"{self.kind}{dict(self.shapes)}"


def fit(y: jax.Array) -> jax.Array:
    """Folds an array of any shape into an activation; every element counts."""
    flat = lax.reshape(y, (y.size,))
    rows = -(-y.size // SIZE)
    flat = lax.pad(flat, jnp.zeros((), y.dtype), [(0, rows * SIZE - y.size, 0)])
    return jnp.sum(lax.reshape(flat, (rows, *SHAPE)), axis=0)


def weight(weights: Weights, name: str, h: jax.Array) -> jax.Array:
    """A weight as mixed precision reads it: in the dtype of the activations."""
    return weights[name].astype(h.dtype)


def sizes() -> st.SearchStrategy[int]:
    return st.sampled_from([2, 3, 4])


@st.composite
def dots(draw: st.DrawFn) -> Layer:
    """dot_general with any roles of the axes, in any order, the weight on either side."""
    roles = draw(st.lists(st.sampled_from(["contract", "batch", "free"]), min_size=3, max_size=3))
    shared = [axis for axis, role in enumerate(roles) if role != "free"]
    room = 4 - len(shared)
    own = draw(st.lists(sizes(), min_size=0 if shared else 1, max_size=min(room, 2)))
    axes = draw(st.permutations([*(("h", a) for a in shared), *(("w", n) for n in own)]))
    shape = tuple(SHAPE[n] if of == "h" else n for of, n in axes)
    place = {n: i for i, (of, n) in enumerate(axes) if of == "h"}
    contract = draw(st.permutations([a for a in shared if roles[a] == "contract"]))
    batch = draw(st.permutations([a for a in shared if roles[a] == "batch"]))
    left = draw(st.booleans())
    wide = draw(st.booleans())

    def apply(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        w = weight(weights, "w", h)
        ours = [place[a] for a in contract], [place[a] for a in batch]
        (lc, lb), (rc, rb) = (ours, (contract, batch)) if left else ((contract, batch), ours)
        operands = (w, h) if left else (h, w)
        dtype = jnp.promote_types(h.dtype, jnp.float32) if wide else None
        out = lax.dot_general(*operands, ((lc, rc), (lb, rb)), preferred_element_type=dtype)
        return fit(out.astype(h.dtype))

    side = "left" if left else "right"
    return Layer(f"dot_general[{roles}, weight {side}]", {"w": shape}, apply)


@st.composite
def einsums(draw: st.DrawFn) -> Layer:
    """Products as people write them."""
    spec, shape = draw(
        st.sampled_from(
            [
                ("bsd,de->bse", (4, 6)),
                ("bsd,ed->bse", (6, 4)),
                ("de,bsd->ebs", (4, 6)),
                ("bsd,sde->bse", (3, 4, 2)),
                ("bsd,dhk->bshk", (4, 2, 3)),
                ("bsd,hdk->bhsk", (2, 4, 3)),
                ("bsd,bde->bes", (2, 4, 3)),
                ("bsd,d->bs", (4,)),
                ("bsd,bsd->b", (2, 3, 4)),
                ("bsd,e->bsde", (3,)),
            ]
        )
    )

    def apply(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        operands = [h, weight(weights, "w", h)]
        if spec.startswith("de"):
            operands = operands[::-1]
        return fit(jnp.einsum(spec, *operands))

    return Layer(f"einsum[{spec}]", {"w": shape}, apply, compiled=True)


@st.composite
def convolutions(draw: st.DrawFn) -> Layer:
    """Convolutions of one or two dimensions, of any layout."""
    batch, *space, channels = draw(
        st.sampled_from(
            [(2, 3, 4), (1, 6, 4), (1, 12, 2), (4, 3, 2), (2, 2, 3, 2), (1, 3, 2, 4), (1, 4, 3, 2)]
        )
    )
    rank = len(space)

    def each(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(strategy, min_size=rank, max_size=rank))

    often_one = st.sampled_from([1, 1, 2])
    taps, strides = each(st.sampled_from([1, 2, 3])), each(often_one)
    lhs_dilation, rhs_dilation = each(often_one), each(often_one)
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0]))
    batch_groups = draw(st.sampled_from([1] * 9 + [2])) if groups == 1 and batch == 2 else 1
    features = groups * batch_groups * draw(st.sampled_from([1, 2, 3]))
    padding = draw(
        st.one_of(
            st.sampled_from(["VALID"] if max(lhs_dilation) > 1 else ["SAME", "VALID"]),
            st.just(0).map(lambda _: each(st.tuples(st.integers(-1, 2), st.integers(-1, 2)))),
        )
    )
    if padding == "VALID":
        padding = [(0, 0)] * rank
    pads = [(9, 9)] * rank if padding == "SAME" else padding
    for n, k, (low, high), ld, rd in zip(
        space, taps, pads, lhs_dilation, rhs_dilation, strict=True
    ):
        if (n - 1) * ld + 1 + low + high < (k - 1) * rd + 1:
            padding = [(2 * m, 2 * m) for m in taps]
    lhs, rhs, out = (tuple(draw(st.permutations(range(rank + 2)))) for _ in range(3))
    numbers = lax.ConvDimensionNumbers(lhs, rhs, out)

    def laid_out(parts: list[int], spec: tuple[int, ...]) -> tuple[int, ...]:
        shape = [0] * len(spec)
        for size, axis in zip(parts, spec, strict=True):
            shape[axis] = size
        return tuple(shape)

    x_shape = laid_out([batch, channels, *space], lhs)
    w_shape = laid_out([features, channels // groups, *taps], rhs)

    def apply(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        out = lax.conv_general_dilated(
            lax.reshape(h, x_shape),
            weight(weights, "w", h),
            strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            numbers,
            groups,
            batch_groups,
        )
        return fit(out)

    kind = (
        f"conv[x{x_shape}, groups {groups}, {batch_groups}, strides {strides}, padding {padding}, "
        f"dilation {lhs_dilation}, {rhs_dilation}, layout {lhs} {rhs} {out}]"
    )
    return Layer(kind, {"w": w_shape}, apply)


def _take(mode: str) -> Apply:
    def apply(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        rows = jnp.take(weight(weights, "w", h), ids, axis=0, mode=mode, fill_value=0)
        return fit(rows) + h

    return apply


def _index(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    return fit(weight(weights, "w", h)[ids % 5]) + h


def _columns(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    return fit(weight(weights, "w", h)[:, ids]) * h


def _pairs(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    return fit(weight(weights, "w", h)[ids, ids[::-1] % 4]) + h


def _windows(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    w = weight(weights, "w", h)
    cut = jax.vmap(lambda i: lax.dynamic_slice(w, (i, jnp.int32(0)), (2, 4)))(ids.reshape(-1))
    return fit(cut) + h


def _along(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    w = weight(weights, "w", h)
    return fit(jnp.take_along_axis(w, jnp.abs(ids.reshape(3, 2)) % 4, axis=1)) + h


def _unsigned(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    return fit(weight(weights, "w", h)[(jnp.abs(ids) % 5).astype(jnp.uint8)]) + h


def gathers() -> st.SearchStrategy[Layer]:
    """Embedding look-ups in every mode, with ids inside and outside the table."""
    table = {"w": (5, 4)}
    return st.sampled_from(
        [
            Layer("table[ids]", table, _index),
            Layer("take[clip]", table, _take("clip")),
            Layer("take[fill]", table, _take("fill")),
            Layer("take[wrap]", table, _take("wrap")),
            Layer("table[:, ids]", table, _columns),
            Layer("table[ids, ids]", table, _pairs),
            Layer("table[uint8]", table, _unsigned),
            Layer("windows of a table", table, _windows, compiled=True),
            Layer("take_along_axis", {"w": (3, 4)}, _along),
        ]
    )


@st.composite
def elementwise(draw: st.DrawFn) -> Layer:
    """Scales and biases on either side."""
    shape = draw(st.sampled_from([(4,), (1, 4), (3, 1), (3, 4), (2, 1, 4), (2, 3, 4), ()]))
    name, op = draw(
        st.sampled_from(
            [
                ("h * w", lambda h, w: h * w),
                ("w * h", lambda h, w: w * h),
                ("h + w", lambda h, w: h + w),
                ("w + h", lambda h, w: w + h),
                ("h - w", lambda h, w: h - w),
                ("w - h", lambda h, w: w - h),
                ("w / h", lambda h, w: w / (h + 3)),
                ("h / w", lambda h, w: h / (w + 9)),
                ("(1 + w) * h", lambda h, w: (1 + w) * h),
                ("w * w * h", lambda h, w: w * w * h),
                ("h * sum(w)", lambda h, w: jnp.sum(w) * h),
                ("h + exp(w)", lambda h, w: h + jnp.exp(w)),
            ]
        )
    )

    def apply(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        return op(h, weight(weights, "w", h))

    return Layer(name, {"w": shape}, apply)


def _low_rank(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    w, a, b = (weight(weights, name, h) for name in "wab")
    return h @ (w + a @ b)


def _normalised(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    w, g = (weight(weights, name, h) for name in "wg")
    return h @ (g * w / jnp.sqrt(1 + jnp.sum(w * w, axis=0, keepdims=True)))


def _scaled(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    w, g = (weight(weights, name, h) for name in "wg")
    return h @ (w * g) - h @ (2 * w).T


def _attention(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    q, k, v = jnp.split(h @ weight(weights, "qkv", h), 3, axis=-1)
    scores = jnp.einsum("bsd,btd->bst", q, k)
    return jnp.einsum("bst,btd->bsd", jax.nn.softmax(scores), v)


def _split_weight(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    q, k, v = jnp.split(weight(weights, "qkv", h), [4, 7], axis=1)
    return jnp.tanh(h @ q) + fit(h @ k) - fit(h @ v)


def _layer_norm(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
    centred = h - jnp.mean(h, axis=-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 0.1)
    return normed * weight(weights, "g", h) + weight(weights, "b", h)


def combinations() -> st.SearchStrategy[Layer]:
    """Several weights met in one expression."""
    return st.sampled_from(
        [
            Layer("h @ (w + a @ b)", {"w": (4, 4), "a": (4, 2), "b": (2, 4)}, _low_rank),
            Layer("weight normalisation", {"w": (4, 4), "g": (4,)}, _normalised),
            Layer("h @ (w * g)", {"w": (4, 4), "g": (4,)}, _scaled),
            Layer("attention", {"qkv": (4, 12)}, _attention, compiled=True),
            Layer("split weight", {"qkv": (4, 9)}, _split_weight),
            Layer("layer norm", {"g": (4,), "b": (4,)}, _layer_norm),
        ]
    )


def renamed(layer: Layer, prefix: str) -> Layer:
    """The layer with its weights under other names."""

    def apply(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        return layer.apply({name: weights[prefix + name] for name in layer.shapes}, h, ids)

    shapes = {prefix + name: shape for name, shape in layer.shapes.items()}
    return replace(layer, shapes=shapes, apply=apply)
