"""Scales and shifts of each channel, as one of each."""

import operator
from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
from jax import lax

from pockjax._compat import Jaxpr, JaxprEqn, Literal, Var, dtype_of, is_sharded, shape_of
from pockjax.autodiff import Replacement, computed, replaced, tidied
from pockjax.rewrites._scales import DTYPES, SCALES, is_near

_SHIFTS = ("add", "add_any", "sub")
_PRODUCTS = ("conv_general_dilated", "dot_general")
_FEWER = 16  # times the elements that what is computed for each channel has at most


def with_short_chains(jaxpr: Jaxpr) -> Jaxpr:
    """``(x - mean) * deviation * scale + bias`` as ``x * a + b``.

    That is how a batch norm with frozen statistics is folded, and its gradient's two scales. What
    is computed for the channels is written to memory: XLA would make it part of the loop over all
    elements again. A shift is joined with what follows only where x is a product, and the shift is
    not made of one as the statistics of a batch are: other numbers may be large and far from zero,
    and lose their digits. Scales meet each other before they meet x: where their product leaves
    the range of the dtype, so does the result.

    Args:
        jaxpr: with its jits inlined. What is inside of other operations is left alone.
    """
    chains = _chains(jaxpr)
    if not chains:
        return jaxpr

    def rule(eqn: JaxprEqn) -> JaxprEqn | Replacement:
        chain = chains.get(eqn.outvars[0]) if eqn.outvars else None
        if chain is None:
            return eqn
        return computed(chain.apply, chain.x, *(step.small for step in chain.steps))

    return tidied(replaced(jaxpr, rule))


@dataclass(frozen=True)
class _Step:
    """A scale or a shift of an array.

    Attributes:
        name: of the operation.
        small: the other operand, or what that is a broadcast of.
        axes: the axes of the array that those of ``small`` are.
        shape: of the other operand, with ones where it is the same for all.
    """

    name: str
    small: Any
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_scale(self) -> bool:
        return self.name in SCALES

    @property
    def is_one_number(self) -> bool:
        return prod(self.shape) == 1


@dataclass(frozen=True)
class _Chain:
    """Scales and shifts of an array, one after the other."""

    x: Any
    is_product: bool
    steps: tuple[_Step, ...] = ()

    def takes(self, step: _Step) -> bool:
        """Whether a step can be one with those before."""
        if not self.is_product and not all(s.is_scale for s in self.steps):
            return False
        vectors = [s for s in (*self.steps, step) if not s.is_one_number]
        return len({s.shape for s in vectors}) <= 1

    @property
    def is_long(self) -> bool:
        """Whether fewer steps with a number for each channel would do."""
        vectors = [s.is_scale for s in self.steps if not s.is_one_number]
        return len(vectors) > len(set(vectors))

    def apply(self, x: jax.Array, *smalls: jax.Array) -> jax.Array:
        """The same as one scale and one shift."""
        known: dict[str, jax.Array] = {}
        for step, small in zip(self.steps, smalls, strict=True):
            c = lax.broadcast_in_dim(small, step.shape, step.axes)
            if step.is_scale:
                scaled = operator.truediv if step.name == "div" else operator.mul
                known = {name: scaled(value, c) for name, value in known.items()}
                known.setdefault("scale", scaled(1, c))
            else:
                c = -c if step.name == "sub" else c
                known["shift"] = known["shift"] + c if "shift" in known else c
        known = lax.optimization_barrier(known)
        y = x * known["scale"] if "scale" in known else x
        return y + known["shift"] if "shift" in known else y


def _chains(jaxpr: Jaxpr) -> dict[Var, _Chain]:
    """What is worth to be made shorter, by its result."""
    made: dict[Any, JaxprEqn] = {}
    uses = Counter(a for a in jaxpr.outvars if isinstance(a, Var))
    uses.update(a for eqn in jaxpr.eqns for a in eqn.invars if isinstance(a, Var))
    computed_from_products: set[Any] = set()
    found: dict[Var, _Chain] = {}
    for eqn in jaxpr.eqns:
        made.update((var, eqn) for var in eqn.outvars)
        read = {a for a in eqn.invars if isinstance(a, Var)}
        if eqn.primitive.name in _PRODUCTS or not read.isdisjoint(computed_from_products):
            computed_from_products.update(eqn.outvars)
        if (pair := _step(eqn, made)) is None:
            continue
        x, step = pair
        before = found.get(x)
        if before is not None and uses[x] == 1 and before.takes(step):
            del found[x]
        elif step.is_one_number:
            continue  # which may be moved elsewhere, see `with_small_scales`
        else:
            before = _Chain(x, x in made and made[x].primitive.name in _PRODUCTS)
        known = isinstance(step.small, Literal) or step.small not in computed_from_products
        if not step.is_scale and not known:
            before = replace(before, is_product=False)
        found[eqn.outvars[0]] = replace(before, steps=(*before.steps, step))
    return {out: chain for out, chain in found.items() if chain.is_long}


def _step(eqn: JaxprEqn, made: dict[Any, JaxprEqn]) -> tuple[Any, _Step] | None:
    """What an equation scales or shifts, and how."""
    name = eqn.primitive.name
    if name not in (*SCALES, *_SHIFTS) or is_sharded(eqn):
        return None
    [out] = eqn.outvars
    if len({str(dtype_of(v)) for v in (*eqn.invars, out)} | {*DTYPES}) > len(DTYPES):
        return None
    pairs = [eqn.invars] if name in ("sub", "div") else [eqn.invars, eqn.invars[::-1]]
    for x, c in pairs:
        small, axes, shape = _unbroadcast(c, made, len(shape_of(out)))
        whole = isinstance(x, Var) and shape_of(x) == shape_of(out)
        near = not isinstance(small, Literal) or is_near(small)
        if whole and near and prod(shape) * _FEWER <= prod(shape_of(out)):
            return x, _Step(name, small, axes, shape)
    return None


def _unbroadcast(
    c: Any, made: dict[Any, JaxprEqn], rank: int
) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    """What an operand is a broadcast of, the axes that this has in it, and its shape with ones."""
    axes = tuple(range(rank)) if shape_of(c) else ()
    if isinstance(c, Var) and c in made and made[c].primitive.name == "broadcast_in_dim":
        eqn = made[c]
        if not is_sharded(eqn):
            c, axes = eqn.invars[0], tuple(eqn.params["broadcast_dimensions"])
    sizes = dict(zip(axes, shape_of(c), strict=True))
    return c, axes, tuple(sizes.get(axis, 1) for axis in range(rank))
