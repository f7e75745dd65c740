"""Scales at the smaller side of matrix products."""

from collections import Counter
from math import prod
from typing import Any

from pockjax._compat import Jaxpr, JaxprEqn, Literal, Var, dtype_of, is_sharded, new_var, shape_of

SCALES = ("mul", "div")
DTYPES = ("float32", "float64")  # to which a few more roundings do not matter
_FAR = 1e4  # from one; such a scale may be there to keep a product within range


def with_small_scales(jaxpr: Jaxpr) -> Jaxpr:
    """Numbers multiplied to a product's operand or to its result, whichever is smaller.

    ``(a @ b) * 0.5`` becomes ``(a * 0.5) @ b``, and ``(a * 0.5) @ b`` becomes ``(a @ b) * 0.5``,
    where that multiplies fewer elements, and the number is within a factor of 10,000 of one: others
    may have been put where they are to keep a product within range. In attention the scores are the
    largest arrays, and XLA for the CPU has them written where they are scaled.

    Args:
        jaxpr: with its jits inlined. What is inside of other operations is left alone.
    """
    plan = _Plan(jaxpr)
    if not plan.before and not plan.after:
        return jaxpr
    eqns: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        if eqn in plan:
            continue
        if eqn.primitive.name != "dot_general":
            eqns.append(eqn)
            continue
        [out] = eqn.outvars
        late, operands = [], list(eqn.invars)
        for i, a in enumerate(eqn.invars):
            if (scale := plan.of(a)) is not None:
                late.append(scale)
                operands[i] = _scaled(scale)
        if (scale := plan.before.get(out)) is not None:
            i = _smaller(eqn)
            small = new_var(operands[i].aval)
            eqns.append(_applied(scale, operands[i], small))
            operands[i] = small
            [out] = scale.outvars
        steps = [*(new_var(out.aval) for _ in late), out]
        eqns.append(eqn.replace(invars=operands, outvars=[steps[0]]))
        for scale, raw, done in zip(late, steps, steps[1:], strict=False):
            eqns.append(_applied(scale, raw, done))
    return jaxpr.replace(eqns=eqns)


class _Plan:
    """Which scales move.

    Attributes:
        before: by the result of a product, the scale that its smaller operand gets instead.
        after: by the result of a scale that only products read, the scale that theirs get instead.
    """

    def __init__(self, jaxpr: Jaxpr):
        products = [eqn for eqn in jaxpr.eqns if _is_product(eqn)]
        made = {eqn.outvars[0]: eqn for eqn in products}
        uses = Counter(a for a in jaxpr.outvars if isinstance(a, Var))
        uses.update(a for eqn in jaxpr.eqns for a in eqn.invars if isinstance(a, Var))
        read: dict[Var, list[JaxprEqn]] = {}
        for eqn in products:
            for a in eqn.invars:
                if isinstance(a, Var):
                    read.setdefault(a, []).append(eqn)
        self.before: dict[Var, JaxprEqn] = {}
        self.after: dict[Var, JaxprEqn] = {}
        for scale in jaxpr.eqns:
            x = _scaled(scale)
            if x is None:
                continue
            [out] = scale.outvars
            size, product, readers = prod(shape_of(out)), made.get(x), read.get(out, [])
            if product is not None and uses[x] == 1:
                if prod(shape_of(product.invars[_smaller(product)])) < size:
                    self.before[x] = scale
            elif readers and len(readers) == uses[out]:
                if sum(prod(shape_of(p.outvars[0])) for p in readers) < size:
                    self.after[out] = scale
        self._moved = {id(scale) for scale in (*self.before.values(), *self.after.values())}

    def __contains__(self, eqn: JaxprEqn) -> bool:
        return id(eqn) in self._moved

    def of(self, atom: Any) -> JaxprEqn | None:
        """The scale that an operand of a product is the result of, if it moves behind that."""
        return None if isinstance(atom, Literal) else self.after.get(atom)


def _is_product(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "dot_general" or is_sharded(eqn):
        return False
    return len({str(dtype_of(v)) for v in (*eqn.invars, *eqn.outvars)}) == 1


def _scaled(eqn: JaxprEqn) -> Any:
    """What an equation multiplies with one number, or divides by it; None if it does not."""
    if eqn.primitive.name not in SCALES or is_sharded(eqn):
        return None
    x, number = eqn.invars
    if eqn.primitive.name == "mul" and isinstance(x, Literal):
        x, number = number, x
    if not isinstance(number, Literal) or isinstance(x, Literal):
        return None
    return x if is_near(number) and str(dtype_of(x)) in DTYPES else None


def is_near(number: Literal) -> bool:
    """Whether a scale is near enough to one to be moved."""
    return bool(1 / _FAR <= abs(number.val) <= _FAR)


def _smaller(product: JaxprEqn) -> int:
    left, right = (prod(shape_of(a)) for a in product.invars)
    return 0 if left <= right else 1


def _applied(scale: JaxprEqn, x: Any, out: Any) -> JaxprEqn:
    """The same scale of something else."""
    was = _scaled(scale)
    return scale.replace(invars=[x if a is was else a for a in scale.invars], outvars=[out])
