"""What the backward pass keeps from the forward pass, chosen to be as few bytes as possible.

In the joint jaxpr of a value and its gradient, what depends on a cotangent is the backward pass.
What it reads from the forward pass must be kept or computed again. A value that is an elementwise
function or a view of kept ones is nearly free to compute again, so the values to keep are a minimum
cut, weighted in bytes, between what only the forward pass can know and what the backward pass reads
(as in Chen et al. 2016, arXiv:1604.06174, restricted to operations that cost no more than a read).
JAX keeps, for example, both ``tanh(x)`` and ``1 - tanh(x)**2``, and a broadcast of every scale.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from pockjax._compat import Jaxpr, JaxprEqn, Var
from pockjax.autodiff._cheap import is_cheap
from pockjax.autodiff._jaxprs import size_in_bytes, tidied
from pockjax.autodiff._remat import Recomputable, interleaved


@dataclass(frozen=True)
class Cut:
    """Values to keep, and the equations that give the rest back, in order."""

    kept: list[Var]
    recomputed: list[JaxprEqn]


def cheapest_cut(
    eqns: Sequence[JaxprEqn],
    required: Iterable[Var],
    cost: Callable[[Var], int],
    again: Callable[[JaxprEqn], bool] = is_cheap,
) -> Cut:
    """Chooses which values to keep so that ``required`` can be had again, at the least cost.

    Args:
        eqns: the equations that computed them.
        required: values that are read later.
        cost: what keeping a value costs; 0 if it is there anyway.
        again: whether an equation may be computed again.
    """
    makers = {v: eqn for eqn in eqns if again(eqn) for v in eqn.outvars}
    order: dict[Var, int] = {}
    pending = list(dict.fromkeys(required))
    needed = set(pending)
    while pending:
        var = pending.pop()
        if var in order:
            continue
        order[var] = len(order)
        if var in makers:
            pending.extend(a for a in makers[var].invars if isinstance(a, Var))
    if not order:
        return Cut([], [])

    # Node 2i is the value as the forward pass knows it, 2i + 1 as the backward pass reads it.
    source, sink = 2 * len(order), 2 * len(order) + 1
    costs = {v: cost(v) for v in order}
    # Capacities are 32-bit: bytes are counted in units coarse enough for their sum to fit.
    unit = max(1, math.ceil(sum(costs.values()) / 2**29))
    unlimited = 2**30
    edges: dict[tuple[int, int], int] = {}
    for var, i in order.items():
        edges[2 * i, 2 * i + 1] = math.ceil(costs[var] / unit)
        if var in needed:
            edges[2 * i + 1, sink] = unlimited
        if var not in makers:
            edges[source, 2 * i] = unlimited
        else:
            for atom in makers[var].invars:
                if isinstance(atom, Var):
                    edges[2 * order[atom] + 1, 2 * i] = unlimited
    after = _sink_side(edges, source, sink)
    kept = [v for v, i in order.items() if 2 * i + 1 in after and 2 * i not in after]
    lost = {v for v, i in order.items() if 2 * i in after}
    recomputed = [eqn for eqn in eqns if any(v in lost for v in eqn.outvars)]
    return Cut(kept, recomputed)


def _sink_side(edges: dict[tuple[int, int], int], source: int, sink: int) -> set[int]:
    """Nodes after the minimum cut nearest to the sink, which computes the least again."""
    rows, cols = np.array(list(edges), np.int32).T
    capacity = np.array(list(edges.values()), np.int32)
    graph = csr_array((capacity, (rows, cols)), shape=(sink + 1, sink + 1), dtype=np.int32)
    residual = graph - maximum_flow(graph, source, sink).flow
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    backwards = csr_array(residual.T)
    return set(breadth_first_order(backwards, sink, return_predecessors=False).tolist())


@dataclass(frozen=True)
class Split:
    """A joint function cut into its two passes.

    Attributes:
        forward: inputs -> outputs, then the kept values that are not inputs.
        backward: kept values, then the rest of the joint's inputs -> the rest of its outputs.
        kept_inputs: positions of the joint's inputs that the backward pass reads, in order; these
            come before the kept values.
    """

    forward: Jaxpr
    backward: Jaxpr
    kept_inputs: list[int]


def split_passes(jaxpr: Jaxpr, n_forward_in: int, n_forward_out: int, n_free: int) -> Split:
    """Cuts a joint jaxpr into a forward and a backward pass with as few bytes between as possible.

    Args:
        jaxpr: with its jits inlined; maps ``n_forward_in`` inputs and then cotangents to
            ``n_forward_out`` outputs that do not depend on the cotangents, and then gradients.
        n_forward_in: number of inputs of the forward pass.
        n_forward_out: number of outputs of the forward pass.
        n_free: how many of the first inputs are held anyway (the params).
    """
    inputs, seeds = jaxpr.invars[:n_forward_in], jaxpr.invars[n_forward_in:]
    late: set[Var] = set(seeds)
    before: list[JaxprEqn] = []
    after: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        if any(isinstance(a, Var) and a in late for a in eqn.invars):
            late.update(eqn.outvars)
            after.append(eqn)
        else:
            before.append(eqn)
    grads = jaxpr.outvars[n_forward_out:]
    reads = [a for eqn in after for a in eqn.invars] + list(grads)
    required = [a for a in reads if isinstance(a, Var) and a not in late]
    free = set(inputs[:n_free])
    again = Recomputable.of(before).eqns
    cut = cheapest_cut(
        before,
        required,
        lambda v: 0 if v in free else size_in_bytes(v.aval),
        lambda eqn: id(eqn) in again,
    )

    kept_inputs = [i for i, v in enumerate(inputs) if v in set(cut.kept)]
    known = {*inputs, *jaxpr.constvars}
    kept = [v for v in cut.kept if v not in known]
    eqns, outs = interleaved(cut.recomputed, after, {*cut.kept} - free, late, grads)
    debug = jaxpr.debug_info.with_unknown_names()
    forward = jaxpr.replace(
        invars=inputs,
        outvars=[*jaxpr.outvars[:n_forward_out], *kept],
        eqns=before,
        debug_info=debug,
    )
    backward = jaxpr.replace(
        invars=[*(inputs[i] for i in kept_inputs), *kept, *seeds],
        outvars=outs,
        eqns=eqns,
        debug_info=debug,
    )
    return Split(tidied(forward), tidied(backward), kept_inputs)
