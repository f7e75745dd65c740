"""Attention without axes of size one."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pockjax._compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    array_type,
    dtype_of,
    is_sharded,
    new_var,
    shape_of,
)
from pockjax.autodiff import ELEMENTWISE, spliced

Shape = tuple[int, ...]

_UNARY = ELEMENTWISE | {"stop_gradient", "copy", "copy_p", "name"}
_MOVES = ("transpose", "broadcast_in_dim", "reshape", "squeeze", "expand_dims")
_REDUCTIONS = frozenset(f"reduce_{name}" for name in ("sum", "max", "min", "prod", "and", "or"))


def without_unit_axes(jaxpr: Jaxpr) -> Jaxpr:
    """Products of batches of matrices without axes of size one, and what is computed from them.

    `jax.vmap` over a single group of heads leaves such axes in attention, as in
    `jax.nn.dot_product_attention`. XLA for the CPU hands a product, the softmax of it, and the next
    product to YNNPACK as one operation if it does not meet any; scores are then never written.

    Args:
        jaxpr: with its jits inlined. What is inside of other operations is left alone.
    """
    if not any(_is_wide(eqn) for eqn in jaxpr.eqns):
        return jaxpr
    work = _Thinning()
    for eqn in jaxpr.eqns:
        work.add(eqn)
    return jaxpr.replace(eqns=work.eqns, outvars=[work.whole(a) for a in jaxpr.outvars])


class _Thinning:
    """Equations rewritten one after the other.

    Attributes:
        eqns: the equations so far.
        instead: for a variable that no equation computes any more, one without its unit axes.
    """

    def __init__(self) -> None:
        self.eqns: list[JaxprEqn] = []
        self.instead: dict[Any, Any] = {}
        self._reshaped: dict[tuple[Any, Shape], Any] = {}

    def add(self, eqn: JaxprEqn) -> None:
        """Append an equation, without unit axes if it computes with what has none any more."""
        met = any(self._is_thin(a) for a in eqn.invars) or _is_wide(eqn) or _widens(eqn)
        if met and not is_sharded(eqn) and not eqn.effects:
            if eqn.primitive.name == "optimization_barrier":
                self._through(eqn)
                return
            thin = _RULES.get(eqn.primitive.name)
            out = None if thin is None else thin(self, eqn)
            if out is not None:
                self.instead[eqn.outvars[0]] = out
                return
        self.eqns.append(eqn.replace(invars=[self.whole(a) for a in eqn.invars]))

    def whole(self, atom: Any) -> Any:
        """An atom as it was."""
        return atom if self._now(atom) is atom else self.shaped(self._now(atom), shape_of(atom))

    def thin(self, atom: Any) -> Any:
        """An atom without its unit axes."""
        return self.shaped(self._now(atom), _without(shape_of(atom)))

    def emit(self, eqn: JaxprEqn, operands: Sequence[Any], **params: Any) -> Any:
        """Append an equation with other operands and parameters; its result, without unit axes."""
        [out] = eqn.outvars
        new = new_var(array_type(_without(shape_of(out)), out.aval))
        params = {**eqn.params, **params}
        self.eqns.append(eqn.replace(invars=[*operands], outvars=[new], params=params))
        return new

    def shaped(self, atom: Any, shape: Shape) -> Any:
        """An atom of another shape, by one reshape however often it is asked for."""
        if shape_of(atom) == shape:
            return atom
        if (atom, shape) not in self._reshaped:
            made = spliced(_reshaping(atom.aval, shape), [atom], self.eqns)
            [self._reshaped[atom, shape]] = made
        return self._reshaped[atom, shape]

    def spread(self, atom: Any, shape: Shape, invert: bool = False) -> Any:
        """An operand of a function of elements, whose axes of size one may stand for longer ones.

        Args:
            atom: the operand.
            shape: of the function's result.
            invert: take one over each element, before there are more of them.
        """
        was, thin = shape_of(atom), self.thin(atom)
        if not was or (shape_of(thin) == _without(shape) and not invert):
            return thin
        where = _positions(shape)
        axes = tuple(where[i] for i, n in enumerate(was) if n != 1)
        [out] = spliced(_spreading(thin.aval, _without(shape), axes, invert), [thin], self.eqns)
        return out

    def _is_thin(self, atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in self.instead and 1 in shape_of(atom)

    def _now(self, atom: Any) -> Any:
        return atom if isinstance(atom, Literal) else self.instead.get(atom, atom)

    def _through(self, eqn: JaxprEqn) -> None:
        operands = [self.thin(a) if self._is_thin(a) else self.whole(a) for a in eqn.invars]
        outs = []
        for was, now, operand in zip(eqn.invars, eqn.outvars, operands, strict=True):
            new = now
            if self._is_thin(was):
                new = self.instead[now] = new_var(operand.aval)
            outs.append(new)
        self.eqns.append(eqn.replace(invars=operands, outvars=outs))


def _is_wide(eqn: JaxprEqn) -> bool:
    """Whether it is a product of batches of matrices with unit axes."""
    if eqn.primitive.name != "dot_general" or is_sharded(eqn):
        return False
    _, (batch, _) = eqn.params["dimension_numbers"]
    return bool(batch) and any(1 in shape_of(a) for a in eqn.invars)


def _widens(eqn: JaxprEqn) -> bool:
    """Whether it only moves elements, to where there are unit axes."""
    return eqn.primitive.name in _MOVES and 1 in shape_of(eqn.outvars[0])


def _without(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def _positions(shape: Shape) -> dict[int, int]:
    """Where each axis stands among those that are not of size one."""
    kept = [axis for axis, n in enumerate(shape) if n != 1]
    return {axis: place for place, axis in enumerate(kept)}


def _elementwise(work: _Thinning, eqn: JaxprEqn) -> Any:
    shape = shape_of(eqn.outvars[0])
    return work.emit(eqn, [work.spread(a, shape) for a in eqn.invars])


def _quotient(work: _Thinning, eqn: JaxprEqn) -> Any:
    """Divisors that are spread are inverted first; XLA does so where one is read only once."""
    (x, by), shape = eqn.invars, shape_of(eqn.outvars[0])
    whole = shape_of(by) in ((), shape) or not jnp.issubdtype(dtype_of(by), jnp.floating)
    if whole:
        return _elementwise(work, eqn)
    operands = [work.spread(x, shape), work.spread(by, shape, invert=True)]
    [out] = spliced(_multiplying(*(a.aval for a in operands)), operands, work.eqns)
    return out


def _transpose(work: _Thinning, eqn: JaxprEqn) -> Any:
    [x] = eqn.invars
    axes = _positions(shape_of(x))
    order = tuple(axes[a] for a in eqn.params["permutation"] if a in axes)
    if order == tuple(range(len(order))):
        return work.thin(x)
    return work.emit(eqn, [work.thin(x)], permutation=order)


def _broadcast(work: _Thinning, eqn: JaxprEqn) -> Any:
    if len(eqn.invars) != 1:
        return None
    [x], whole = eqn.invars, shape_of(eqn.outvars[0])
    axes, shape = _positions(whole), _without(whole)
    pairs = zip(shape_of(x), eqn.params["broadcast_dimensions"], strict=True)
    dims = tuple(axes[d] for n, d in pairs if n != 1)
    if not isinstance(x, Literal) and _without(shape_of(x)) == shape:
        return work.thin(x)
    return work.emit(eqn, [work.thin(x)], shape=shape, broadcast_dimensions=dims)


def _reshape(work: _Thinning, eqn: JaxprEqn) -> Any:
    if len(eqn.invars) != 1 or eqn.params.get("dimensions") is not None:
        return None
    [x], shape = eqn.invars, _without(shape_of(eqn.outvars[0]))
    return work.shaped(work.thin(x), shape)


def _reduction(work: _Thinning, eqn: JaxprEqn) -> Any:
    [x] = eqn.invars
    axes = _positions(shape_of(x))
    over = tuple(axes[int(a)] for a in eqn.params["axes"] if int(a) in axes)
    if not over:
        return work.thin(x)
    return work.emit(eqn, [work.thin(x)], axes=over)


def _product(work: _Thinning, eqn: JaxprEqn) -> Any:
    axes = [_positions(shape_of(a)) for a in eqn.invars]

    def kept(numbers: Any) -> Any:
        return tuple(
            tuple(where[a] for a in given if a in where)
            for where, given in zip(axes, numbers, strict=True)
        )

    contract, batch = eqn.params["dimension_numbers"]
    return work.emit(
        eqn,
        [work.thin(a) for a in eqn.invars],
        dimension_numbers=(kept(contract), kept(batch)),
    )


_RULES: dict[str, Callable[[_Thinning, JaxprEqn], Any]] = {
    **dict.fromkeys(_UNARY, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict(zip(_MOVES, (_transpose, _broadcast, _reshape, _reshape, _reshape), strict=True)),
    "div": _quotient,
    "dot_general": _product,
}


@lru_cache(maxsize=4096)
def _reshaping(aval: Any, shape: Shape) -> Jaxpr:
    return jax.make_jaxpr(lambda x: lax.reshape(x, shape))(aval)


@lru_cache(maxsize=4096)
def _spreading(aval: Any, shape: Shape, axes: tuple[int, ...], invert: bool) -> Jaxpr:
    def spread(x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(1 / x if invert else x, shape, axes)

    return jax.make_jaxpr(spread)(aval)


@lru_cache(maxsize=4096)
def _multiplying(*avals: Any) -> Jaxpr:
    return jax.make_jaxpr(lax.mul)(*avals)
