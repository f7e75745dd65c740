"""Expose: evaluate a jaxpr with every trained block written out as a term of its own.

Where the function computes ``x @ w``, the exposed function computes
``x @ w + scatter(x[sel] @ delta)``, with delta an input that is zero. Its derivative with respect
to delta is the gradient of the block, and nothing but ``x[sel]`` is needed for it.
"""

from collections.abc import Sequence

from pockjax._compat import Jaxpr, JaxprEqn, Literal, Var, eqn_context
from pockjax.autodiff._exposed import (
    Context,
    DenseError,
    Value,
    bind_dense,
    bind_plain,
    rule_for,
)


def expose(ctx: Context, jaxpr: Jaxpr, inputs: Sequence[Value]) -> list[Value]:
    """Evaluates ``jaxpr`` on values that may carry terms.

    Args:
        ctx: gathers what happens on the way.
        jaxpr: the function, closed.
        inputs: one value for each of its inputs.

    Returns:
        One value for each output; outputs may still carry terms.
    """
    env: dict[Var, Value] = {}
    env.update(zip(jaxpr.constvars, (Value(c, weight=True) for c in jaxpr.consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Var | Literal) -> Value:
        return Value(atom.val, weight=True) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with eqn_context(eqn):
            outs = _evaluate(ctx, eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(ctx: Context, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    if not any(v.terms for v in values):
        return bind_plain(eqn, values)
    rule = rule_for(eqn)
    if rule is None:
        return bind_dense(ctx, eqn, values, "no sparse rule for this operation")
    try:
        outs = rule(ctx, eqn, *values)
    except DenseError as error:
        return bind_dense(ctx, eqn, values, str(error))
    return [outs] if isinstance(outs, Value) else outs
