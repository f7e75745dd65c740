"""Random functions and masks: layers of every kind, wrapped, chained, and trained in part."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from pockjax.masks import Part, part
from tests.autodiff.layers import (
    SHAPE,
    Apply,
    Layer,
    Weights,
    combinations,
    convolutions,
    dots,
    einsums,
    elementwise,
    gathers,
    renamed,
)
from tests.autodiff.views import views

PyTree = Any


def plain_layers() -> st.SearchStrategy[Layer]:
    """Layers that are not functions of functions."""
    return st.one_of(
        dots(), einsums(), convolutions(), gathers(), elementwise(), views(), combinations()
    )


# --- functions of functions ---------------------------------------------------------------------


def _jitted(apply: Apply) -> Apply:
    return jax.jit(apply)


def _remat(policy: Any) -> Any:
    return lambda apply: jax.checkpoint(apply, policy=policy)


def _custom_jvp(apply: Apply) -> Apply:
    @jax.custom_jvp
    def call(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        return apply(weights, h, ids)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        weights, h, ids = primals
        d_weights, d_h, _ = tangents
        out, tangent = jax.jvp(lambda w, h: apply(w, h, ids), (weights, h), (d_weights, d_h))
        return out, 2 * tangent

    return call


def _custom_vjp(apply: Apply) -> Apply:
    @jax.custom_vjp
    def call(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        return apply(weights, h, ids)

    def forward(weights: Weights, h: jax.Array, ids: jax.Array) -> Any:
        out, pull = jax.vjp(lambda w, h: apply(w, h, ids), weights, h)
        return out, (pull, ids)

    def backward(residuals: Any, cotangent: jax.Array) -> Any:
        pull, ids = residuals
        return (*pull(2 * cotangent), np.zeros(ids.shape, jax.dtypes.float0))

    call.defvjp(forward, backward)
    return call


def _cond(apply: Apply) -> Apply:
    def call(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        return lax.cond(ids[0, 0] > 2, apply, lambda w, h, ids: 2 * h, weights, h, ids)

    return call


def _switch(apply: Apply) -> Apply:
    def call(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        branches = [apply, lambda w, h, ids: h, lambda w, h, ids: apply(w, -h, ids)]
        return lax.switch(ids[0, 0] % 3, branches, weights, h, ids)

    return call


def _inner_grad(apply: Apply) -> Apply:
    """A gradient inside the function, as in a gradient penalty or one step of meta-learning."""

    def call(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        return h - jax.grad(lambda h: jnp.sum(jnp.sin(apply(weights, h, ids))))(h)

    return call


def _inner_step(apply: Apply) -> Apply:
    def call(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        steps = jax.grad(lambda w: jnp.sum(jnp.sin(apply(w, h, ids))))(weights)
        return apply(jax.tree.map(lambda w, s: w - s / 8, weights, steps), h, ids)

    return call


def _vmapped(apply: Apply) -> Apply:
    def call(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.vmap(apply, (None, 0, None))(weights, jnp.stack([h, 2 * h]), ids).sum(0)

    return call


def _twice(apply: Apply) -> Apply:
    def call(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        return apply(weights, jnp.sin(apply(weights, h, ids)), ids)

    return call


_POLICIES = jax.checkpoint_policies

WRAPPERS = {
    "jit": (_jitted, True),
    "remat": (_remat(None), False),
    "remat(dots)": (_remat(_POLICIES.dots_saveable), False),
    "remat(everything)": (_remat(_POLICIES.everything_saveable), False),
    "custom_jvp": (_custom_jvp, False),
    "custom_vjp": (_custom_vjp, False),
    "cond": (_cond, True),
    "switch": (_switch, True),
    "inner grad": (_inner_grad, False),
    "inner step": (_inner_step, False),
    "vmap": (_vmapped, False),
    "twice": (_twice, False),
}


def reverse_only(layer: Layer) -> bool:
    """Whether a layer has no forward-mode derivative."""
    return "custom_vjp" in layer.kind


@st.composite
def wrapped_layers(draw: st.DrawFn, inner: st.SearchStrategy[Layer]) -> Layer:
    """A layer inside a function of functions."""
    layer = draw(inner)
    name = draw(st.sampled_from(sorted(WRAPPERS)))
    wrap, compiled = WRAPPERS[name]
    kind = f"{name}({layer.kind})"
    return Layer(kind, layer.shapes, wrap(layer.apply), layer.compiled or compiled)


@st.composite
def scans(draw: st.DrawFn, inner: st.SearchStrategy[Layer]) -> Layer:
    """A loop over stacked layers, with weights that are constants or carried too."""
    layer = draw(inner)
    shared = draw(st.one_of(st.none(), inner))
    length = draw(st.sampled_from([1, 2, 3, 4]))
    reverse = draw(st.booleans())
    unroll = draw(st.sampled_from([1, 1, 2]))
    stacks_outputs = draw(st.booleans())
    carries_weight = draw(st.sampled_from([False, False, True]))
    with_xs = draw(st.booleans())
    shapes = {f"stack_{k}": (length, *shape) for k, shape in layer.shapes.items()}
    if shared is not None:
        shapes |= {f"shared_{k}": shape for k, shape in shared.shapes.items()}
    if carries_weight:
        shapes["carried"] = (4,)

    def apply(weights: Weights, h: jax.Array, ids: jax.Array) -> jax.Array:
        stacked = {k: weights[f"stack_{k}"] for k in layer.shapes}
        state = weights["carried"].astype(h.dtype) if carries_weight else jnp.zeros(4, h.dtype)
        xs = jnp.linspace(0, 1, length).astype(h.dtype) if with_xs else None

        def body(carry: Any, inputs: Any) -> Any:
            h, state = carry
            own, x = inputs
            h = jnp.sin(layer.apply(own, h, ids))
            if shared is not None:
                own = {k: weights[f"shared_{k}"] for k in shared.shapes}
                h = jnp.sin(shared.apply(own, h, ids))
            if x is not None:
                h = h + x
            return (h + state, state / 2), h if stacks_outputs else None

        carry = (h, state)
        (h, state), ys = lax.scan(
            body, carry, (stacked, xs), length=length, reverse=reverse, unroll=unroll
        )
        return h + state if ys is None else h + state + jnp.sum(ys, axis=0)

    kind = f"scan[{length}, reverse {reverse}, unroll {unroll}, ys {stacks_outputs}]({layer.kind}"
    kind += f", shared {shared.kind})" if shared is not None else ")"
    return Layer(kind, shapes, apply, compiled=True)


def layers() -> st.SearchStrategy[Layer]:
    """Layers of every kind."""
    plain = plain_layers()
    wrapped = wrapped_layers(plain)
    return st.one_of(
        plain, plain, wrapped, scans(plain), wrapped_layers(scans(plain)), scans(wrapped)
    )


FAMILIES: dict[str, st.SearchStrategy[Layer]] = {
    "products": st.one_of(dots(), dots(), einsums()),
    "convolutions": convolutions(),
    "gathers": gathers(),
    "elementwise": st.one_of(elementwise(), combinations()),
    "views": views(),
    "wrapped": wrapped_layers(plain_layers()),
    "scans": scans(plain_layers()),
    "all": layers(),
}


# --- functions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A function, its parameters and what of them is trained.

    ``fun(params, x, ids)`` returns a scalar, and with ``has_aux`` auxiliary outputs as well.
    """

    layers: tuple[Layer, ...]
    order: tuple[int, ...]
    regularised: tuple[str, ...]
    has_aux: bool
    params: dict[str, np.ndarray]
    x: np.ndarray
    ids: np.ndarray
    mask: dict[str, bool | Part]

    def precision(self) -> AbstractContextManager[Any]:
        """The setting to use the program in: 64 bits are not JAX's default."""
        dtypes = [self.x.dtype, *(p.dtype for p in self.params.values())]
        return jax.enable_x64(np.dtype(np.float64) in dtypes)

    def inputs(self) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        """The arguments of ``fun``."""
        return jax.tree.map(jnp.asarray, (self.params, self.x, self.ids))

    @property
    def compiled(self) -> bool:
        """Whether even the eager value is the result of whole XLA programs."""
        return any(layer.compiled for layer in self.layers)

    def fun(self, params: Mapping[str, jax.Array], x: jax.Array, ids: jax.Array) -> Any:
        h = x
        for i in self.order:
            h = jnp.sin(self.layers[i].apply(params, h, ids))
        # jnp.mean is one program of its own in eager mode, and not bit-equal to its operations.
        loss = jnp.sum(h * h) / h.size
        for name in self.regularised:
            loss = loss + jnp.sum(jnp.square(params[name])).astype(loss.dtype) / 8
        if not self.has_aux:
            return loss
        return loss, {"h": h, "weights": [params[name] for name in sorted(params)], "none": None}

    def __repr__(self) -> str:
        chain = ", ".join(f"layers[{i}]" for i in self.order)
        lines = [f"\n  layers[{i}] = {layer}" for i, layer in enumerate(self.layers)]
        dtypes = {name: str(p.dtype) for name, p in self.params.items()}
        return (
            f"Program({chain}; x {self.x.dtype}, ids {self.ids.tolist()}, params {dtypes}, "
            f"regularised {self.regularised}, aux {self.has_aux}, mask {self.mask}{''.join(lines)})"
        )


@st.composite
def indices(draw: st.DrawFn, size: int) -> Any:
    """One index of a Part along an axis."""
    kind = draw(st.sampled_from(["all", "all", "slice", "back", "int", "list", "bools", "traced"]))
    match kind:
        case "all":
            return slice(None)
        case "int":
            return draw(st.integers(-size, size - 1))
        case "slice":
            start = draw(st.integers(0, size - 1))
            stop = draw(st.integers(start + 1, size))
            return slice(start, stop, draw(st.sampled_from([None, 1, 2])))
        case "back":
            return slice(None, None, draw(st.sampled_from([-1, -2])))
        case "bools":
            chosen = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
            return np.array(chosen)
    chosen = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    if kind == "list":
        return [i - size if draw(st.booleans()) else i for i in chosen]
    return jnp.array(chosen, draw(st.sampled_from(["int32", "int8", "uint8"])))


@st.composite
def masks(draw: st.DrawFn, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, bool | Part]:
    """What is trained of each array: all, nothing, or a block."""
    mask: dict[str, bool | Part] = {}
    for name, shape in shapes.items():
        kind = draw(st.sampled_from(["part", "part", "whole", "frozen"]))
        if kind == "part" and prod(shape) > 1:
            mask[name] = part[tuple(draw(indices(n)) for n in shape)]
        else:
            mask[name] = kind != "frozen"
    return mask


@st.composite
def programs(
    draw: st.DrawFn,
    layer: st.SearchStrategy[Layer],
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float64"),
    max_layers: int = 2,
) -> Program:
    """Functions of a few layers, some used twice, in one dtype or in mixed precision."""
    chosen = draw(st.lists(layer, min_size=1, max_size=max_layers))
    chosen = tuple(renamed(part_, f"{i}_") for i, part_ in enumerate(chosen))
    order = list(range(len(chosen)))
    if draw(st.sampled_from([False, False, True])):
        order.append(draw(st.sampled_from(order)))
    shapes = {name: shape for each in chosen for name, shape in each.shapes.items()}
    shapes["unused"] = (2, 2)
    dtype = draw(st.sampled_from(dtypes))
    mixed = draw(st.sampled_from([False, False, True]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))

    def array(shape: tuple[int, ...]) -> np.ndarray:
        own = draw(st.sampled_from(dtypes)) if mixed else dtype
        return np.asarray(rng.normal(size=shape) / 2, jnp.dtype(own))

    names = sorted(shapes)
    return Program(
        layers=chosen,
        order=tuple(order),
        regularised=tuple(name for name in names if draw(st.integers(0, 7)) == 0),
        has_aux=draw(st.booleans()),
        params={name: array(shapes[name]) for name in names},
        x=np.asarray(rng.normal(size=SHAPE), jnp.dtype(dtype)),
        ids=np.asarray(rng.integers(-7, 9, SHAPE[:2]), np.int32),
        mask=draw(masks(shapes)),
    )
