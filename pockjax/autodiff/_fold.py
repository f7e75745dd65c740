"""Fold: remove from a jaxpr what is known to be zero, then what is then dead.

XLA removes no product with a constant zero (it would lose a NaN), so the terms that `expose` wrote
out are removed here, where it is known that they are not merely zero-valued but absent. Only zeros
that come from the given inputs are folded: a user's own ``x * 0.0`` keeps its NaN. A primitive
without a rule gets its zeros as an array: that costs time, never correctness.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pockjax._compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    cast_to_aval,
    dce_jaxpr,
    dtype_of,
    scan_arity,
    subjaxprs,
    type_context,
    with_subjaxprs,
    zeros_like_aval,
)
from pockjax.autodiff._jaxprs import Atom, spliced


def fold(
    jaxpr: Jaxpr, zeros: Sequence[bool], used: Sequence[bool] | None = None
) -> tuple[Jaxpr, list[bool]]:
    """Removes the products, sums and loops of inputs that are identically zero.

    Args:
        jaxpr: a closed jaxpr.
        zeros: for each input, whether it is identically zero.
        used: for each output, whether anybody reads it; default all.

    Returns:
        The same function with the same inputs and only the used outputs, and for each of *all*
        outputs whether it is identically zero.
    """
    folded, zero_outs = _Folder().fold(jaxpr, tuple(zeros))
    return dce_jaxpr(folded, [True] * len(zero_outs) if used is None else used), zero_outs


class _Zero:
    """The value of a variable that is identically zero."""


_ZERO = _Zero()

_SPREADING = ("broadcast_in_dim", "pvary")
_FILLING = ("scatter-add", "pad")
Known = Var | Literal | _Zero


class _Folder:
    """One pass over a jaxpr and the jaxprs inside it, each folded once per set of zeros."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, tuple[bool, ...]], tuple[Jaxpr, list[bool]]] = {}

    def fold(self, jaxpr: Jaxpr, zeros: tuple[bool, ...]) -> tuple[Jaxpr, list[bool]]:
        """The folded jaxpr, of the same signature, and which outputs are zero."""
        key = (id(jaxpr), zeros)
        if key not in self._done:
            self._done[key] = self._fold(jaxpr, zeros)
        return self._done[key]

    def _fold(self, jaxpr: Jaxpr, zeros: tuple[bool, ...]) -> tuple[Jaxpr, list[bool]]:
        if not any(zeros):
            return jaxpr, [False] * len(jaxpr.outvars)
        env: dict[Var, Known] = {}
        eqns: list[JaxprEqn] = []
        # Literal zeros, which blocks are scattered into or padded with; zero only with their block.
        blank: set[Var] = set()
        for var, zero in zip(jaxpr.invars, zeros, strict=True):
            if zero:
                env[var] = _ZERO

        def read(atom: Var | Literal) -> Known:
            return atom if isinstance(atom, Literal) else env.get(atom, atom)

        def is_blank(known: Known) -> bool:
            return _is_literal_zero(known) or (isinstance(known, Var) and known in blank)

        def array(atom: Var | Literal) -> Var | Literal:
            """The atom as an operand: a zero becomes an array of zeros."""
            known = read(atom)
            return _zero_array(atom.aval, eqns) if isinstance(known, _Zero) else known

        for eqn in jaxpr.eqns:
            ins: list[Any] = [read(atom) for atom in eqn.invars]
            zero_ins = [isinstance(known, _Zero) for known in ins]
            if not any(zero_ins):
                if eqn.primitive.name in _SPREADING and is_blank(ins[0]):
                    blank.add(eqn.outvars[0])
                eqns.append(eqn.replace(invars=ins) if ins != eqn.invars else eqn)
                continue
            if eqn.primitive.name in _FILLING:
                zero_ins = [a or is_blank(b) for a, b in zip(zero_ins, ins, strict=True)]
            rule = _RULES.get(eqn.primitive.name)
            outs = None if rule is None else rule(eqn, ins, zero_ins)
            if outs is not None:
                for var, known in zip(eqn.outvars, outs, strict=True):
                    if isinstance(known, _Zero | Literal) or known.aval == var.aval:
                        env[var] = known
                    else:
                        env[var] = _converted(known, var.aval, eqns)
                continue
            params, zero_outs = self._inside(eqn, zero_ins)
            eqns.append(eqn.replace(invars=[array(atom) for atom in eqn.invars], params=params))
            for i, zero in enumerate(zero_outs):
                if zero:
                    env[eqn.outvars[i]] = _ZERO
        known_outs = [read(atom) for atom in jaxpr.outvars]
        outvars = [array(atom) for atom in jaxpr.outvars]
        folded = jaxpr.replace(eqns=eqns, outvars=outvars)
        return folded, [isinstance(known, _Zero) for known in known_outs]

    def _inside(self, eqn: JaxprEqn, zeros: list[bool]) -> tuple[dict[str, Any], list[bool]]:
        """Folds the functions inside an equation, whose own signature stays as it is."""
        unknown = [False] * len(eqn.outvars)
        match eqn.primitive.name:
            case "jit" | "remat2" | "checkpoint" | "shard_map":
                inner, zero_outs = self.fold(_only_jaxpr(eqn), tuple(zeros))
                return with_subjaxprs(eqn, [inner]), zero_outs
            case "scan":
                return self._scan(eqn, zeros)
            case "cond":
                folded = [self.fold(branch, tuple(zeros[1:])) for branch in subjaxprs(eqn)]
                params = with_subjaxprs(eqn, [branch for branch, _ in folded])
                return params, [all(z) for z in zip(*(z for _, z in folded), strict=True)]
            case _:
                return eqn.params, unknown

    def _scan(self, eqn: JaxprEqn, zeros: list[bool]) -> tuple[dict[str, Any], list[bool]]:
        """A carry is zero if it starts as zero and the body, given that, keeps it zero."""
        n_consts, n_carry = scan_arity(eqn)
        carry = slice(n_consts, n_consts + n_carry)
        zeros = list(zeros)
        while True:
            inner, zero_outs = self.fold(_only_jaxpr(eqn), tuple(zeros))
            kept = [a and b for a, b in zip(zeros[carry], zero_outs[:n_carry], strict=True)]
            if kept == zeros[carry]:
                return with_subjaxprs(eqn, [inner]), kept + zero_outs[n_carry:]
            zeros[carry] = kept


def _only_jaxpr(eqn: JaxprEqn) -> Jaxpr:
    [jaxpr] = subjaxprs(eqn)
    return jaxpr


@cache
def _zero_template(aval: Any) -> Jaxpr:
    with type_context(aval):
        return jax.make_jaxpr(lambda: zeros_like_aval(aval))()


def _zero_array(aval: Any, eqns: list[JaxprEqn]) -> Atom:
    [zeros] = spliced(_zero_template(aval), [], eqns)
    return zeros


def _converted(known: Var, aval: Any, eqns: list[JaxprEqn]) -> Atom:
    """``known`` as type ``aval``: what a sum with it does beside adding."""
    with type_context(aval):
        template = jax.make_jaxpr(lambda x: cast_to_aval(x, aval))(known.aval)
    [converted] = spliced(template, [known], eqns)
    return converted


Rule = Callable[[JaxprEqn, list[Any], list[bool]], "list[Known] | None"]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


@_rule("mul", "dot_general", "conv_general_dilated")
def _any_zero(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    return [_ZERO]


@_rule(
    "neg", "transpose", "reshape", "broadcast_in_dim", "reduce_sum", "convert_element_type",
    "slice", "dynamic_slice", "squeeze", "expand_dims", "rev", "copy", "copy_p",
    "reduce_precision", "cumsum", "real", "imag", "pvary", "psum", "psum_invariant", "psum2",
    "all_gather", "all_gather_invariant", "reduce_scatter", "all_to_all", "ppermute", "pcast",
    "sharding_constraint", "reshard", "div", "name", "optimization_barrier", "split",
)  # fmt: skip
def _linear(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    if eqn.primitive.name in ("psum", "optimization_barrier", "psum2", "psum_invariant"):
        return [_ZERO for _ in eqn.outvars] if all(zeros) else None
    return [_ZERO for _ in eqn.outvars] if zeros[0] else None


@_rule("add", "add_any")
def _add(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    return [ins[1]] if zeros[0] else [ins[0]]


@_rule("sub")
def _sub(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    if all(zeros):
        return [_ZERO]
    return [ins[0]] if zeros[1] else None


@_rule("select_n")
def _select(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    return [_ZERO] if all(zeros[1:]) else None


@_rule("concatenate", "max", "min")
def _all_zero(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    return [_ZERO] if all(zeros) else None


@_rule("pad")
def _pad(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    return [_ZERO] if all(zeros) else None


@_rule("gather")
def _gather(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    mode = lax.GatherScatterMode.from_any(eqn.params["mode"])
    filled = mode == lax.GatherScatterMode.FILL_OR_DROP and eqn.params["fill_value"] != 0
    return [_ZERO] if zeros[0] and not filled else None


@_rule("scatter-add")
def _scatter_add(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    if not zeros[2]:
        return None
    return [_ZERO] if zeros[0] else [ins[0]]


@_rule("scatter")
def _scatter(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    return [_ZERO] if zeros[0] and zeros[2] else None


@_rule("dynamic_update_slice")
def _update(eqn: JaxprEqn, ins: list[Known], zeros: list[bool]) -> list[Known] | None:
    return [_ZERO] if zeros[0] and zeros[1] else None


def _is_literal_zero(known: Known) -> bool:
    if not isinstance(known, Literal) or not jnp.issubdtype(dtype_of(known), jnp.number):
        return False
    return bool(known.val == 0)
