"""Which results to write to memory, because more than one operation reads them."""

from collections.abc import Iterable, Sequence

from pockjax._compat import Jaxpr, JaxprEqn, Var, shape_of
from pockjax.autodiff import is_elementwise


def shared(jaxpr: Jaxpr, loops: Iterable[Var]) -> set[Var]:
    """Where loops over the elements of an array should end, so that none is run twice.

    XLA writes an elementwise operation into the loop of each operation that reads it, and with it
    what comes before: a depthwise convolution as multiply-adds is computed once for the product
    that follows, and again for the derivative of the activation between. What all its readers
    have in common, the last value that everything else comes from, is better written once.

    Args:
        jaxpr: whose results are meant.
        loops: what is computed by expensive loops.
    """
    made = {var: place for place, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    readers: dict[Var, int] = {}
    for atom in [a for eqn in jaxpr.eqns for a in _operands(eqn)] + jaxpr.outvars:
        if isinstance(atom, Var):
            readers[atom] = readers.get(atom, 0) + 1
    ends = [_end(var, jaxpr.eqns[made[var] + 1 :], readers) for var in loops]
    return {end for end in ends if readers.get(end, 0) > 1}


def _end(start: Var, eqns: Sequence[JaxprEqn], readers: dict[Var, int]) -> Var:
    """The last value of which all that comes from ``start`` is a function of its elements."""
    end, waiting = start, {start: readers.get(start, 0)}
    for eqn in eqns:
        read = _operands(eqn) & waiting.keys()
        if not read:
            continue
        if len(eqn.outvars) != 1 or not is_elementwise(eqn):
            break
        [out] = eqn.outvars
        if shape_of(out) != shape_of(start):
            break
        for var in read:
            waiting[var] -= 1
        waiting[out] = readers.get(out, 0)
        waiting = {var: number for var, number in waiting.items() if number}
        if len(waiting) == 1:
            [end] = waiting
        elif not waiting:
            break
    return end


def _operands(eqn: JaxprEqn) -> set[Var]:
    return {atom for atom in eqn.invars if isinstance(atom, Var)}
