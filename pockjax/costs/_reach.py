"""Which parameters the backward pass reaches: everything else of the model is forward only."""

from collections.abc import Sequence
from dataclasses import dataclass

from pockjax._compat import Jaxpr, JaxprEqn, Literal, Var, scan_arity, subjaxprs


@dataclass(frozen=True)
class _Flow:
    """What a value depends on.

    ``owners`` are the parameters that a value is made of alone (it is still a weight); None if an
    argument is in it.
    """

    trained: bool
    owners: frozenset[int] | None


def reached_params(jaxpr: Jaxpr, trained: Sequence[bool]) -> set[int]:
    """Positions of the parameters whose operations have a backward pass.

    Args:
        jaxpr: a function of its parameters and then other arguments.
        trained: for each parameter, whether anything of it is trained.
    """
    flows = [_Flow(yes, frozenset([i])) for i, yes in enumerate(trained)]
    flows += [_Flow(False, None)] * (len(jaxpr.invars) - len(flows))
    reached: set[int] = set()
    for out in _walk(jaxpr, flows, reached):
        if out.trained and out.owners:
            reached |= out.owners
    return reached


def _walk(jaxpr: Jaxpr, flows: Sequence[_Flow], reached: set[int]) -> list[_Flow]:
    constant = _Flow(False, frozenset())
    env: dict[Var, _Flow] = dict.fromkeys(jaxpr.constvars, constant)
    env.update(zip(jaxpr.invars, flows, strict=True))

    def read(atom: Var | Literal) -> _Flow:
        return constant if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        outs = _inside(eqn, [read(a) for a in eqn.invars], reached)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _inside(eqn: JaxprEqn, ins: list[_Flow], reached: set[int]) -> list[_Flow]:
    inner = subjaxprs(eqn)
    match eqn.primitive.name:
        case "jit" | "remat2" | "checkpoint" | "custom_jvp_call" | "custom_vjp_call":
            return _walk(inner[0], ins, reached)
        case "cond":
            branches = [_walk(branch, ins[1:], reached) for branch in inner]
            return [_joined(flows) for flows in zip(*branches, strict=True)]
        case "scan":
            n_consts, n_carry = scan_arity(eqn)
            trained = any(flow.trained for flow in ins)
            carry = [_Flow(trained, None)] * n_carry
            outs = _walk(inner[0], [*ins[:n_consts], *carry, *ins[n_consts + n_carry :]], reached)
            return [_Flow(flow.trained or trained, None) for flow in outs]
    joined = _joined(ins)
    if joined.owners is None and joined.trained:
        for flow in ins:
            reached |= flow.owners or frozenset()
    return [joined] * len(eqn.outvars)


def _joined(flows: Sequence[_Flow]) -> _Flow:
    owners = [flow.owners for flow in flows]
    known = [o for o in owners if o is not None]
    return _Flow(
        any(flow.trained for flow in flows),
        frozenset().union(*known) if len(known) == len(owners) else None,
    )
