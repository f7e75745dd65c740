"""When each parameter is written: as soon as its gradient is there and nobody reads it any more.

XLA is free to order a step as it likes as long as results are the same, and it copies a donated
parameter that it cannot prove to be read before it is written. Optimization barriers settle both:
the update of a parameter is tied to the backward pass at the place where its gradient is complete
and its last reader is done; the backward pass goes on from there. Gradients of layers that are
updated already then take no memory any more (as in LOMO, Lv et al. 2023, arXiv:2306.09782, and
PockEngine, arXiv:2310.17752). What an optimizer computes from all gradients together, such as
a global norm, joins the parameters that depend on it, and those wait for each other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jax.numpy as jnp
from jax import lax

from pockjax._compat import Jaxpr, JaxprEqn, Literal, Var, dtype_of, eval_jaxpr
from pockjax.autodiff import size_in_bytes

_SMALL = 0.01  # of all trained parameters' bytes: what is less is written with what comes next

_VIEWS = frozenset(
    """
    broadcast_in_dim convert_element_type copy copy_p dynamic_slice expand_dims reshape rev slice
    squeeze stop_gradient transpose
    """.split()
)


@dataclass
class Group:
    """Parameters that an optimizer updates together, because one's update needs all gradients.

    Attributes:
        eqns: equations of the update that depend on these gradients.
        params: positions of the parameters that they write.
        grads: positions of the gradients that they read.
    """

    eqns: list[JaxprEqn]
    params: list[int]
    grads: list[int]


def groups_of(update: Jaxpr, n_params: int, n_grads: int) -> list[Group]:
    """The independent parts of an optimizer's update.

    Args:
        update: parameters, gradients, and whatever else -> parameters, and whatever else; with its
            jits inlined.
        n_params: number of parameter arrays.
        n_grads: number of gradients.
    """
    owner: dict[Var, int] = {}  # of what depends on a gradient: the group it began in
    parent = list(range(n_grads))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    grads = update.invars[n_params : n_params + n_grads]
    owner.update((v, i) for i, v in enumerate(grads))
    dependent: list[tuple[JaxprEqn, int]] = []
    for eqn in update.eqns:
        roots = [root(owner[a]) for a in _variables(eqn.invars) if a in owner]
        if not roots:
            continue
        for other in roots[1:]:
            parent[root(other)] = roots[0]
        owner.update((v, roots[0]) for v in eqn.outvars)
        dependent.append((eqn, roots[0]))
    found: dict[int, Group] = {}
    for i in range(n_grads):
        found.setdefault(root(i), Group([], [], [])).grads.append(i)
    for eqn, i in dependent:
        found[root(i)].eqns.append(eqn)
    for i, atom in enumerate(update.outvars[:n_params]):
        if isinstance(atom, Var) and atom in owner:
            found[root(owner[atom])].params.append(i)
    return list(found.values())


class Schedule:
    """A gradient and an update as one program, in an order that frees gradients early."""

    def __init__(self, gradient: Jaxpr, update: Jaxpr, n_params: int, n_grads: int, early: bool):
        """Decides the order.

        Args:
            gradient: parameters, other inputs, and the loss's cotangent -> other outputs, and then
                the gradients; with its jits inlined.
            update: parameters, gradients, the gradient's other outputs, and other inputs -> the
                parameters, and other outputs; with its jits inlined.
            n_params: number of parameter arrays.
            n_grads: number of gradients.
            early: write parameters within the backward pass; otherwise all of them after it.
        """
        self._gradient, self._update = gradient, update
        self._n_params = n_params
        n_forward = len(gradient.outvars) - n_grads
        self._forward, self._grads = gradient.outvars[:n_forward], gradient.outvars[n_forward:]
        end = len(gradient.eqns)
        ready = [
            (self._ready(group) if early else end, group)
            for group in groups_of(update, n_params, n_grads)
        ]
        whole = sum(map(self._size, (group for _, group in ready)))
        self._flushes: dict[int, list[Group]] = {}
        waiting: list[Group] = []
        for position, group in sorted(ready, key=lambda pair: pair[0]):
            waiting.append(group)
            if position < end and sum(map(self._size, waiting)) >= _SMALL * whole:
                self._flushes.setdefault(position, []).extend(waiting)
                waiting = []
        if waiting or not self._flushes:
            self._flushes.setdefault(end, []).extend(waiting)

    @property
    def is_early(self) -> bool:
        """Whether any parameter is written before the backward pass has ended."""
        return min(self._flushes) < len(self._gradient.eqns)

    def _size(self, group: Group) -> int:
        """Bytes of what a group writes."""
        return sum(size_in_bytes(self._gradient.invars[i].aval) for i in group.params)

    def _ready(self, group: Group) -> int:
        """How many equations of the gradient have to be done before a group can be updated."""
        made = {a for a in self._forward if isinstance(a, Var)}
        made.update(a for i in group.grads if isinstance(a := self._grads[i], Var))
        read = {self._gradient.invars[i] for i in group.params}
        last = 0
        for position, eqn in enumerate(self._gradient.eqns, 1):
            if not read.isdisjoint(_variables(eqn.invars)):
                last = position
                if eqn.primitive.name in _VIEWS:
                    read.update(eqn.outvars)
                elif eqn.primitive.name == "optimization_barrier":
                    pairs = zip(eqn.invars, eqn.outvars, strict=True)
                    read.update(v for a, v in pairs if isinstance(a, Var) and a in read)
            if not made.isdisjoint(eqn.outvars):
                last = position
        return last

    def run(self, inputs: Sequence[Any], others: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Computes the gradient and updates.

        Args:
            inputs: those of the gradient.
            others: those of the update that are neither parameters nor the gradient's outputs.

        Returns:
            The gradient's outputs that are not gradients, and the update's outputs.
        """
        gradient, update, n = self._gradient, self._update, self._n_params
        before = _Values(gradient, inputs)
        first = n + len(self._grads) + len(self._forward)
        after = _Values(update, [*inputs[:n], *[None] * (first - n), *others])
        late = _descendants(gradient, gradient.invars[-1])
        done, written = 0, []
        for position, groups in sorted(self._flushes.items()):
            before.evaluate(gradient.eqns[done:position])
            done = position
            ahead = set(chain(*(_variables(eqn.invars) for eqn in gradient.eqns[done:])))
            live = [v for v in before.known if v in late and v in ahead]
            params = [update.invars[i] for g in groups for i in g.params]
            grads = [i for g in groups for i in g.grads]
            # What the backward pass goes on with waits for these gradients; these parameters for
            # their readers; and all of it until the parameters before them have been written.
            # Without this order XLA copies each parameter, or holds every gradient to the end.
            held = [before.read([self._grads[i] for i in grads]), before.read(live)]
            tied = lax.optimization_barrier((after.read(params), *held, after.read(written)))
            after.known.update(zip(params, tied[0], strict=True))
            after.known.update(zip([update.invars[n + i] for i in grads], tied[1], strict=True))
            before.known.update(zip(live, tied[2], strict=True))
            after.known.update(zip(written, tied[3], strict=True))
            outs = update.invars[n + len(self._grads) : first]
            after.known.update(zip(outs, before.read(self._forward), strict=True))
            after.evaluate_for(list(chain(*(g.eqns for g in groups))))
            made = set(chain(*(eqn.outvars for g in groups for eqn in g.eqns)))
            written = [v for v in dict.fromkeys(_variables(update.outvars)) if v in made]
        before.evaluate(gradient.eqns[done:])
        after.evaluate_for(update.eqns)
        return before.read(self._forward), after.read(update.outvars)


class _Values:
    """What is known of a jaxpr's variables, evaluated piece by piece."""

    def __init__(self, jaxpr: Jaxpr, inputs: Sequence[Any]):
        self._jaxpr = jaxpr
        self._makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.known: dict[Var, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        self.known.update(zip(jaxpr.constvars, jaxpr.consts, strict=True))

    def read(self, atoms: Iterable[Any]) -> list[Any]:
        """The values of variables and literals."""
        return [jnp.asarray(a.val, dtype_of(a)) if isinstance(a, Literal) else self.known[a]
                for a in atoms]  # fmt: skip

    def evaluate(self, eqns: Sequence[JaxprEqn]) -> None:
        """Evaluates equations whose operands are known."""
        outs = list(chain(*(eqn.outvars for eqn in eqns)))
        reads = dict.fromkeys(chain(*(_variables(eqn.invars) for eqn in eqns)))
        ins = [v for v in reads if v in self.known]
        piece = self._jaxpr.replace(
            constvars=[], consts=[], invars=ins, outvars=outs, eqns=list(eqns),
            debug_info=self._jaxpr.debug_info.with_unknown_names(),
        )  # fmt: skip
        values = eval_jaxpr(piece, [], *(self.known[v] for v in ins))
        self.known.update(zip(outs, values, strict=True))

    def evaluate_for(self, eqns: Sequence[JaxprEqn]) -> None:
        """Evaluates equations, and first what they read that is not known yet."""
        wanted: set[int] = set()
        pending = [eqn for eqn in eqns if any(v not in self.known for v in eqn.outvars)]
        while pending:
            eqn = pending.pop()
            if id(eqn) not in wanted:
                wanted.add(id(eqn))
                unknown = (a for a in _variables(eqn.invars) if a not in self.known)
                pending.extend(self._makers[a] for a in unknown)
        self.evaluate([eqn for eqn in self._jaxpr.eqns if id(eqn) in wanted])


def _descendants(jaxpr: Jaxpr, var: Var) -> set[Var]:
    """What depends on an input."""
    found = {var}
    for eqn in jaxpr.eqns:
        if not found.isdisjoint(_variables(eqn.invars)):
            found.update(eqn.outvars)
    return found


def _variables(atoms: Iterable[Any]) -> list[Var]:
    return [a for a in atoms if isinstance(a, Var)]
