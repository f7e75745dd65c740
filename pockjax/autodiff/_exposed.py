"""The values an exposing interpreter carries: an array and the δ-terms hidden in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from pockjax._compat import JaxprEqn, bind
from pockjax.masks._selection import Block, Selection, canonical, embed


@dataclass(frozen=True, eq=False)
class Term:
    """A trained block inside an array: ``scatter(delta, block)``, where delta is zero.

    Attributes:
        delta: the block's values, of shape ``block.packed_shape``.
        block: which elements of the carrying array they stand for.
        path: the parameter they come from, for reports.
    """

    delta: jax.Array
    block: Block
    path: str

    @property
    def selections(self) -> tuple[Selection, ...]:
        """One selection per axis."""
        return self.block.selections

    def moved(
        self, delta: jax.Array, shape: Sequence[int], selections: Sequence[Selection]
    ) -> "Term":
        """The same trained block, as a block of another array."""
        pairs = zip(selections, shape, strict=True)
        block = Block(tuple(shape), tuple(canonical(sel, size) for sel, size in pairs))
        return Term(delta, block, self.path)

    def widened(self, axis: int) -> "Term":
        """The same term with ``axis`` no longer restricted: larger, equal."""
        selection = self.selections[axis]
        if selection is None:
            return self
        shape = self.block.shape
        delta = embed(self.delta, selection, axis, shape[axis])
        selections = list(self.selections)
        selections[axis] = None
        return self.moved(delta, shape, selections)

    def dense(self) -> jax.Array:
        """The term as an array of the carrying array's shape."""
        return self.block.embed(self.delta)


@dataclass(frozen=True, eq=False)
class Value:
    """An array of the function being transformed: ``base + Σ scatter(term)``.

    Attributes:
        base: what the function computes; read whole, so the forward pass copies no weight.
        terms: the trained blocks it still carries, not yet written out.
        live: whether ``base`` depends on anything trained.
        weight: whether it depends on parameters and constants alone. Terms stay with weights (so
            that ``x @ (scale * w)`` is one sparse product) and are written out where they meet
            activations.
    """

    base: Any
    terms: tuple[Term, ...] = ()
    live: bool = False
    weight: bool = False

    @property
    def trained(self) -> bool:
        """Whether anything trained is in it: the backward pass must reach it."""
        return self.live or bool(self.terms)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the array."""
        return self.base.ndim

    def dense(self) -> jax.Array:
        """The array itself, with the terms added: differentiating it is dense, and exact."""
        out = self.base
        for term in self.terms:
            # Not lax.add: jnp.add is linearized once for all arrays of the same shape.
            out = jnp.add(out, term.dense())
        return out

    def collapsed(self) -> "Value":
        """The same value carrying no terms."""
        return replace(self, base=self.dense(), terms=(), live=True) if self.terms else self


@dataclass(frozen=True)
class Fallback:
    """A place where the gradient of a part is computed wider than asked, then sliced.

    Attributes:
        path: the parameter.
        primitive: the operation that has no sparse rule for this part.
        reason: why, in words.
        shape: shape of the array whose gradient is computed densely.
    """

    path: str
    primitive: str
    reason: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} (at {self.primitive}, shape {self.shape})"


class DenseError(Exception):
    """Raised by a rule that cannot carry a term; the interpreter goes dense instead."""


@dataclass
class Context:
    """What one exposure gathers while it runs."""

    fallbacks: list[Fallback] = field(default_factory=list)

    def note(self, terms: Sequence[Term], eqn: JaxprEqn, reason: str) -> None:
        """Records that ``terms`` go dense at ``eqn``."""
        for term in terms:
            fallback = Fallback(term.path, eqn.primitive.name, reason, term.block.shape)
            if fallback not in self.fallbacks:
                self.fallbacks.append(fallback)


Rule = Callable[..., "list[Value] | Value"]
_RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers the exposing rule of some primitives, by name.

    A rule is called as ``rule(ctx, eqn, *values)`` when one of the values carries terms. It returns
    the outputs' values and raises `DenseError` where it cannot carry a term.
    """

    def register(function: Rule) -> Rule:
        for name in primitives:
            _RULES[name] = function
        return function

    return register


def rule_for(eqn: JaxprEqn) -> Rule | None:
    """The rule of an equation's primitive, if there is one."""
    return _RULES.get(eqn.primitive.name)


def derived(values: Sequence[Value], outs: Sequence[Any]) -> list[Value]:
    """Plain values computed from ``values``."""
    live = any(v.trained for v in values)
    weight = all(v.weight for v in values)
    return [Value(out, (), live, weight) for out in outs]


def bind_plain(eqn: JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Evaluates ``eqn`` on values that carry no terms."""
    live = any(v.live for v in values)
    return derived(values, bind(eqn, [v.base for v in values], differentiated=live))


def bind_dense(ctx: Context, eqn: JaxprEqn, values: Sequence[Value], reason: str) -> list[Value]:
    """Evaluates ``eqn`` densely: always right, never sparse, and said in the report."""
    ctx.note([t for v in values for t in v.terms], eqn, reason)
    return bind_plain(eqn, [v.collapsed() for v in values])


def carrying(base: Any, terms: Sequence[Term], operands: Sequence[Value]) -> Value:
    """A value computed from ``operands`` whose trained blocks have been moved to ``terms``.

    Blocks without elements, of arrays without elements, are dropped: there is no gradient of them.
    """
    live = any(v.live for v in operands)
    kept = tuple(t for t in terms if t.delta.size)
    return Value(base, kept, live, all(v.weight for v in operands))


def written_out(base: Any, terms: Sequence[Term], operands: Sequence[Value]) -> Value:
    """The same with the terms added for good, as a product that used a trained weight is."""
    return carrying(base, terms, operands).collapsed()
