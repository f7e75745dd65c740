"""Jaxpr to jaxpr: convolutions in their fastest form, products as XLA's libraries like them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps
from typing import Any

import jax
from jax import lax

from pockjax._compat import (
    Jaxpr,
    JaxprEqn,
    Var,
    bind,
    eqn_context,
    eval_jaxpr,
    is_sharded,
    subjaxprs,
    with_subjaxprs,
)
from pockjax.autodiff import Arrays, Replacement, computed, inlined, replaced
from pockjax.rewrites._candidates import LOOPS
from pockjax.rewrites._chains import with_short_chains
from pockjax.rewrites._choice import Choice, choose
from pockjax.rewrites._convolution import Convolution
from pockjax.rewrites._operands import with_flat_products, with_small_transposes
from pockjax.rewrites._pools import without_selecting_scatters
from pockjax.rewrites._scales import with_small_scales
from pockjax.rewrites._scatters import without_row_scatters
from pockjax.rewrites._shared import shared
from pockjax.rewrites._unit_axes import without_unit_axes
from pockjax.rewrites._windows import Form

BACKENDS = ("cpu",)
"""Where there is something to gain; for other backends functions are left as they are."""

# What runs where it stands. The body of a shard_map has types of its own, and the rules of custom
# derivatives are no jaxprs yet: those are left alone.
_ENTERED = {
    "jit",
    "scan",
    "while",
    "cond",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "closed_call",
}

_STEPS: tuple[Callable[[Jaxpr], Jaxpr], ...] = (
    inlined,
    without_row_scatters,
    without_selecting_scatters,
    with_short_chains,
    without_unit_axes,
    with_small_scales,
    with_small_transposes,
)
"""What is done for every function; convolutions come after, in one of several forms each."""


def rewrite[**P, R](
    fun: Callable[P, R],
    platform: str | None = None,
    *,
    measure: bool = True,
    memory: int | None = None,
) -> Callable[P, R]:
    """An equal function that is faster on this backend.

    On a CPU, XLA computes depthwise convolutions, and the gradients of many others, tens of times
    slower than the machine can (jax#23713, jax#13800). Here each convolution takes the fastest of
    several equal forms: matrix products, shifted multiply-adds, blocks of rows, Winograd's
    filtering (arXiv:1509.09308). Attention and the gradient of a cross entropy are brought to where
    XLA computes them without writing what is read just once. Results differ by rounding; that of
    Winograd's filtering is a few times as large.

    It is a transform like any other, under jit, vmap, grad and scan, and is best used last:
    ``pj.rewrite(jax.grad(loss))`` finds the gradient's operations too, which
    ``jax.grad(pj.rewrite(loss))`` has no part in.

    `pockjax.compile` does this by itself.

    Args:
        fun: any function of pytrees of arrays; other arguments are passed on as they are.
        platform: ``"cpu"``, ``"cuda"``, …: what it will run on; default JAX's backend. Only for
            the CPU is there anything to rewrite.
        measure: time the forms of each new kind of convolution once on this machine, which takes
            a second or so for each; the timings are kept in the cache folder, `$POCKJAX_CACHE`.
            Otherwise the form is guessed.
        memory: bytes that one form's intermediate arrays may take; by default four times the bytes
            of its arguments and result.

    >>> import jax.numpy as jnp
    >>> blur = lambda x, w: jax.lax.conv_general_dilated(
    ...     x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=8
    ... )
    >>> x, w = jnp.ones((1, 16, 16, 8)), jnp.ones((3, 3, 1, 8))
    >>> bool(jnp.allclose(rewrite(blur)(x, w), blur(x, w)))
    True
    >>> "conv" in str(jax.make_jaxpr(rewrite(blur))(x, w))
    False
    """
    platform = jax.default_backend() if platform is None else platform
    if platform not in BACKENDS:
        return fun

    @wraps(fun)
    def rewritten(*args: P.args, **kwargs: P.kwargs) -> R:
        return Rewriter(measure, memory).run(fun, *args, **kwargs)

    return rewritten


@dataclass
class Rewriter:
    """Rewrites jaxprs and keeps account of what it chose.

    Attributes:
        measure: whether forms are timed.
        memory: bytes that a form's intermediate arrays may take.
        choices: one for each convolution that was met.
    """

    measure: bool = True
    memory: int | None = None
    choices: list[Choice] = field(default_factory=list)

    def run(self, fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Trace a function, rewrite it, and evaluate what came out."""
        given = Arrays.of((args, kwargs))

        def flat(*arrays: Any) -> Any:
            args, kwargs = given.tree(arrays)
            return fun(*args, **kwargs)

        jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*given.arrays)
        jaxpr = self.rewritten(jaxpr)
        outs = eval_jaxpr(jaxpr, jaxpr.consts, *given.arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    def rewritten(self, jaxpr: Jaxpr) -> Jaxpr:
        """The same function, its convolutions in the form chosen for each."""
        # Effects name the variables of mutable arrays; such functions stay as they are.
        has_effects = any(eqn.effects for eqn in jaxpr.eqns)
        for step in () if has_effects else _STEPS:
            jaxpr = step(jaxpr)
        forms = self._forms(jaxpr)
        ends = shared(jaxpr, [var for var, found in forms.items() if found.name in LOOPS])
        reverses: dict[Any, JaxprEqn] = {}  # by their results

        def rule(eqn: JaxprEqn) -> JaxprEqn | Replacement:
            if eqn.primitive.name in _ENTERED and (inner := subjaxprs(eqn)):
                bodies = [self.rewritten(body) for body in inner]
                eqn = eqn.replace(params=with_subjaxprs(eqn, bodies))
            if len(eqn.outvars) != 1:
                return eqn
            [out] = eqn.outvars
            if eqn.primitive.name == "rev":
                reverses[out] = eqn
            now = forms[out].instead_of(eqn, reverses) if out in forms else eqn
            return _written(now) if out in ends else now

        jaxpr = replaced(jaxpr, rule)
        return jaxpr if has_effects else with_flat_products(jaxpr)

    def _forms(self, jaxpr: Jaxpr) -> dict[Var, "_Chosen"]:
        """What to compute instead of convolutions, by their results."""
        reverses: dict[Any, JaxprEqn] = {
            eqn.outvars[0]: eqn for eqn in jaxpr.eqns if eqn.primitive.name == "rev"
        }
        found = {}
        for eqn in jaxpr.eqns:
            conv = None if is_sharded(eqn) else Convolution.of(eqn)
            if conv is None:
                continue
            if (rev := reverses.get(eqn.invars[1])) is not None:
                backwards = sorted(rev.params["dimensions"]) == sorted(conv.rhs_spatial)
                conv = replace(conv, backwards=backwards)
            choice, form = choose(conv, measure=self.measure, memory=self.memory)
            self.choices.append(choice)
            if not choice.is_original:
                found[eqn.outvars[0]] = _Chosen(choice.form, conv.backwards, form)
        return found


@dataclass(frozen=True)
class _Chosen:
    """A form to compute instead of a convolution.

    Attributes:
        name: of the form.
        backwards: whether it reads the kernel before that is reversed.
        form: a function of the input and the kernel.
    """

    name: str
    backwards: bool
    form: Form

    def instead_of(self, eqn: JaxprEqn, reverses: Mapping[Any, JaxprEqn]) -> Replacement:
        """The form, applied to the operands of a convolution."""
        x, kernel = eqn.invars
        if self.backwards:
            [kernel] = reverses[kernel].invars
        settings = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
        return _traced(self.form, (x.aval, kernel.aval), settings), (x, kernel)


def _written(now: JaxprEqn | Replacement) -> Replacement:
    """The same, with a result that is written to memory and read from there."""

    def fun(*args: jax.Array) -> jax.Array:
        if isinstance(now, JaxprEqn):
            with eqn_context(now):
                [out] = bind(now, args, differentiated=False)
        else:
            [out] = eval_jaxpr(now[0], (), *args)
        return lax.optimization_barrier(out)

    return computed(fun, *(now.invars if isinstance(now, JaxprEqn) else now[1]))


@lru_cache(maxsize=4096)
def _traced(form: Form, avals: tuple[Any, ...], settings: tuple[Any, ...]) -> Jaxpr:
    """A form's operations; networks repeat their layers, and a search rewrites the same ones."""
    del settings  # under which it is traced: another key
    return jax.make_jaxpr(form)(*avals)
