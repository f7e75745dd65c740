"""The start of a function, before anything that is trained: moved as it is.

To trace it once more for each mask would take most of the time where little is trained.
"""

from typing import Any

from pockjax._compat import Jaxpr, JaxprEqn, Var, new_var
from pockjax.autodiff._jaxprs import renamed


def before_trained(jaxpr: Jaxpr, trained: set[int]) -> tuple[Jaxpr, Jaxpr]:
    """The operations before the first that reads a trained input, and the others.

    Effects, such as that of making a mutable array, are not moved.

    Returns:
        inputs -> results; and inputs, then these results -> outputs.
    """
    changing = {jaxpr.invars[i] for i in trained}
    count = next(
        (
            k for k, eqn in enumerate(jaxpr.eqns)
            if eqn.effects
            or any(a in changing for a in eqn.invars if isinstance(a, Var))
        ),
        len(jaxpr.eqns),
    )  # fmt: skip
    front, rest = jaxpr.eqns[:count], jaxpr.eqns[count:]
    read = {a for a in [*(a for eqn in rest for a in eqn.invars), *jaxpr.outvars]
            if isinstance(a, Var)}  # fmt: skip
    made = [v for eqn in front for v in eqn.outvars if v in read]
    debug_info = jaxpr.debug_info.with_unknown_names()
    before = jaxpr.replace(eqns=front, outvars=made, debug_info=debug_info)
    after = jaxpr.replace(eqns=rest, invars=[*jaxpr.invars, *made], debug_info=debug_info)
    return before, after


def weights_alone(jaxpr: Jaxpr, n_params: int) -> list[bool]:
    """Of each result, whether it is computed from parameters and constants alone."""
    varying = set(jaxpr.invars[n_params:])
    for eqn in jaxpr.eqns:
        if any(a in varying for a in eqn.invars if isinstance(a, Var)):
            varying.update(eqn.outvars)
    return [v not in varying for v in jaxpr.outvars]


def joined(before: Jaxpr, jaxpr: Jaxpr, n_inputs: int) -> Jaxpr:
    """A function of inputs, then the results of ``before``, then others, without these results."""
    inputs, others = jaxpr.invars[:n_inputs], jaxpr.invars[n_inputs + len(before.outvars) :]
    names: dict[Var, Any] = dict(zip(before.invars, inputs, strict=False))
    names.update((v, v) for v in before.constvars)
    # Equations with effects name their variables there too: those of the rest stay as they are.
    results = dict(zip(before.outvars, jaxpr.invars[n_inputs:], strict=False))
    eqns: list[JaxprEqn] = []
    for eqn in before.eqns:
        outs = [results.get(v, new_var(v.aval)) for v in eqn.outvars]
        eqns.append(eqn.replace(invars=renamed(eqn.invars, names), outvars=outs))
        names.update(zip(eqn.outvars, outs, strict=True))
    return jaxpr.replace(
        constvars=[*before.constvars, *jaxpr.constvars],
        consts=[*before.consts, *jaxpr.consts],
        invars=[*inputs, *others],
        eqns=[*eqns, *jaxpr.eqns],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
