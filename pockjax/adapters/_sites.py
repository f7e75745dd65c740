"""Where an adapter goes: the product of activations with a weight, and how the weight got there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pockjax._compat import JaxprEqn, bind, dtype_of, shape_of

_UNCHANGED = frozenset("copy copy_p name pvary sharding_constraint stop_gradient".split())
_MOVED = frozenset("reshape transpose squeeze expand_dims broadcast_in_dim rev".split())


@dataclass(frozen=True)
class Made:
    """Of which parameters a value is made that does not depend on the arguments.

    Attributes:
        leaf: position of the parameter, of several the largest; None of constants, or of several
            parameters that are as large as each other.
        moves: how the parameter's elements were moved: operations, and None where a loop takes one
            layer of a stack; None if it is not just the parameter's elements.
        stack: sizes of the axes of layers that loops have taken off.
        leaves: positions of all parameters that are in it.
    """

    leaf: int | None = None
    moves: tuple[JaxprEqn | None, ...] | None = ()
    stack: tuple[int, ...] = ()
    leaves: frozenset[int] = frozenset()

    @classmethod
    def of_param(cls, leaf: int) -> "Made":
        """A parameter itself."""
        return cls(leaf, (), (), frozenset([leaf]))

    def after(self, eqn: JaxprEqn) -> "Made":
        """The same after an operation on it alone."""
        name, before, out = eqn.primitive.name, eqn.invars[0], eqn.outvars[0]
        floating = all(jnp.issubdtype(dtype_of(v), jnp.floating) for v in (before, out))
        unchanged = name in _UNCHANGED or (name == "convert_element_type" and floating)
        if self.moves is None or unchanged:
            return self
        same_size = math.prod(shape_of(before)) == math.prod(shape_of(out))
        moves = (*self.moves, eqn) if name in _MOVED and same_size else None
        return replace(self, moves=moves)

    def layer(self, length: int) -> "Made":
        """What one turn of a loop over the first axis reads."""
        moves = None if self.moves is None else (*self.moves, None)
        return replace(self, moves=moves, stack=(*self.stack, length))


def made_of(eqn: JaxprEqn, found: Sequence[Made], sizes: Sequence[int]) -> Made:
    """What an operation makes of such values; ``sizes`` are those of all parameters."""
    leaves = frozenset[int]().union(*(made.leaves for made in found))
    if not leaves:
        return Made()
    if len(found) == 1:
        return found[0].after(eqn)
    most = max(sizes[leaf] for leaf in leaves)
    largest = [leaf for leaf in leaves if sizes[leaf] == most]
    stacks = {made.stack for made in found if made.leaf in largest}
    if len(largest) > 1 or len(stacks) != 1:
        return Made(None, None, (), leaves)
    return Made(largest[0], None, stacks.pop(), leaves)


@dataclass(frozen=True)
class Site:
    """A product of activations with a weight.

    Axes are those of the product's operand, which layers of a stack have each for themselves.

    Attributes:
        shape: of the operand.
        dtype: of the operand.
        batch: axes that the operands have in common.
        contracted: axes that are summed over; of a convolution, the taps too.
        free: axes of the output channels.
        made: of what the operand is made.
    """

    shape: tuple[int, ...]
    dtype: Any
    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    free: tuple[int, ...]
    made: Made

    @classmethod
    def of(cls, eqn: JaxprEqn, operand: int, made: Made) -> "Site | None":
        """The site of an operation; None if it is no product that an adapter can stand beside."""
        var, name = eqn.invars[operand], eqn.primitive.name
        shape, dtype = shape_of(var), dtype_of(var)
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        if name == "dot_general":
            contracted, batch = eqn.params["dimension_numbers"]
            taken = {*contracted[operand], *batch[operand]}
            free = tuple(d for d in range(len(shape)) if d not in taken)
            return cls(shape, dtype, batch[operand], tuple(sorted(contracted[operand])), free, made)
        groups = ("feature_group_count", "batch_group_count")
        if name == "conv_general_dilated" and all(eqn.params[group] == 1 for group in groups):
            out, *others = eqn.params["dimension_numbers"].rhs_spec
            if operand == 1:
                return cls(shape, dtype, (), tuple(sorted(others)), (out,), made)
        return None

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of some axes."""
        return tuple(self.shape[d] for d in axes)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two factors of an adapter, stacked layers first."""
        first = (*self.made.stack, *self.sizes(self.batch))
        return (*first, *self.sizes(self.contracted), rank), (*first, rank, *self.sizes(self.free))

    def like(self, other: "Site") -> bool:
        """Whether one adapter serves both."""

        def place(site: "Site") -> Any:
            moves = site.made.moves
            names = None if moves is None else [
                m and (m.primitive.name, str(sorted(m.params.items(), key=str))) for m in moves
            ]  # fmt: skip
            axes = site.batch, site.contracted, site.free
            return site.shape, axes, site.made.stack, names

        return place(self) == place(other)

    def product(self, eqn: JaxprEqn, operand: int, x: Any, a: Any, b: Any) -> jax.Array:
        """The product of activations with the two factors, laid out as the operation's result."""
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        if eqn.primitive.name == "dot_general":
            return self._of_dot(eqn, operand, x, a, b)
        return self._of_convolution(eqn, x, a, b)

    def _of_dot(self, eqn: JaxprEqn, operand: int, x: Any, a: Any, b: Any) -> jax.Array:
        contracted, batch = eqn.params["dimension_numbers"]
        side, n, precision = 1 - operand, len(self.batch), eqn.params["precision"]
        of_batch = tuple(range(n))
        inner = tuple(n + self.contracted.index(d) for d in contracted[operand])
        low = lax.dot_general(
            x, a, ((contracted[side], inner), (batch[side], of_batch)), precision=precision
        )
        last = low.ndim - 1
        out = lax.dot_general(
            low, b, (((last,), (n,)), (of_batch, of_batch)), precision=precision
        )  # batch, the activations' axes, the weight's
        if operand == 1:
            return out
        free = range(last, out.ndim)
        return lax.transpose(out, (*of_batch, *free, *range(n, last)))

    def _of_convolution(self, eqn: JaxprEqn, x: Any, a: Any, b: Any) -> jax.Array:
        [out] = self.free
        kernel = jnp.moveaxis(a, -1, out)
        low = eqn.primitive.bind(x, kernel, **eqn.params)
        channel = eqn.params["dimension_numbers"].out_spec[1]
        made = lax.dot_general(
            low, b, (((channel,), (0,)), ((), ())), precision=eqn.params["precision"]
        )
        return jnp.moveaxis(made, -1, channel)

    def weight(self, a: Any, b: Any, param: Any) -> jax.Array:
        """What the two factors add to the parameter, in its own layout.

        Raises:
            ValueError: the operand is not just the parameter's elements.
        """
        if self.made.moves is None:
            raise ValueError("it is computed with before it meets the activations")
        axes = (*self.batch, *self.contracted, *self.free)
        n = len(self.batch)

        def of_layer(a: Any, b: Any) -> Any:
            factors = lambda a, b: jnp.tensordot(a, b, 1)  # noqa: E731
            for _ in range(n):
                factors = jax.vmap(factors)
            return jnp.transpose(factors(a, b), [axes.index(d) for d in range(len(axes))])

        for _ in self.made.stack:
            of_layer = jax.vmap(of_layer)
        aval = jax.ShapeDtypeStruct(jnp.shape(param), a.dtype)
        # Moves of elements are permutations: the transpose undoes them.
        [found] = jax.linear_transpose(lambda w: _moved(w, self.made.moves or ()), aval)(
            of_layer(a, b)
        )
        return found


def _moved(w: Any, moves: Sequence[JaxprEqn | None]) -> Any:
    for i, move in enumerate(moves):
        if move is None:
            return jax.vmap(lambda layer, rest=moves[i + 1 :]: _moved(layer, rest))(w)
        [w] = bind(move, [w], differentiated=False)
    return w
