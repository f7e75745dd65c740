"""scan over stacked layers: split into runs of layers with the same mask.

A frozen run before the first trained layer leaves no residuals and has no backward pass, and the
first trained layer is peeled off where its input is frozen: inside a loop it would pay for a
cotangent that nobody needs (the loop's carry is one fixpoint for all its iterations).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax import lax

from pockjax._compat import JaxprEqn, scan_arity
from pockjax.autodiff._expose import expose
from pockjax.autodiff._exposed import Context, DenseError, Term, Value, derived, rule
from pockjax.masks._selection import Block


@dataclass(frozen=True)
class _Run:
    """Consecutive layers that train the same blocks.

    ``rows`` says, for each term of the stacked inputs, at which row of its delta the run begins;
    None where the run does not train it.
    """

    start: int
    stop: int
    rows: tuple[int | None, ...]

    @property
    def length(self) -> int:
        return self.stop - self.start


@rule("scan")
def _scan(ctx: Context, eqn: JaxprEqn, *values: Value) -> list[Value]:
    if not eqn.params["length"]:
        raise DenseError("a loop of no iterations")
    n_consts, n_carry = scan_arity(eqn)
    consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
    for value in carry:
        ctx.note(value.terms, eqn, "a trained weight as the carry of a loop")
    carry = [v.collapsed() for v in carry]
    stacked = [_with_static_layers(ctx, eqn, v) for v in values[n_consts + n_carry :]]
    reverse = eqn.params["reverse"]
    runs = _runs(stacked, eqn.params["length"])
    outs: list[tuple[int, list[Any]]] = []
    for whole in reversed(runs) if reverse else runs:
        for run in _peeled(whole, carry, stacked, reverse):
            layers = _layers(run, stacked)
            apply = _apply_once if run.length == 1 else _apply_scan
            carry, ys = apply(ctx, eqn, run, consts, carry, layers)
            outs.append((run.start, ys))
    pieces = [ys for _, ys in sorted(outs, key=lambda item: item[0])]
    joined = [p[0] if len(p) == 1 else lax.concatenate(p, 0) for p in zip(*pieces, strict=True)]
    return carry + derived([*consts, *carry, *stacked], joined)


def _with_static_layers(ctx: Context, eqn: JaxprEqn, value: Value) -> Value:
    """Traced layer indices cannot say where to split the loop: they train a block of each layer."""

    def known(term: Term) -> Term:
        if isinstance(term.selections[0], slice | np.ndarray | None):
            return term
        ctx.note([term], eqn, "traced indices along the layers of a loop")
        return term.widened(0)

    return replace(value, terms=tuple(map(known, value.terms)))


def _runs(stacked: Sequence[Value], length: int) -> list[_Run]:
    columns = [_rows(term, length) for value in stacked for term in value.terms]
    rows = [tuple(column[layer] for column in columns) for layer in range(length)]
    runs, start = [], 0
    for layer in range(1, length + 1):
        following = tuple(None if row is None else row + 1 for row in rows[layer - 1])
        if layer == length or rows[layer] != following:
            runs.append(_Run(start, layer, rows[start]))
            start = layer
    return runs


def _rows(term: Term, length: int) -> list[int | None]:
    """For each layer, the row of the term's delta that trains it."""
    rows: list[int | None] = [None] * length
    selection = term.selections[0]
    if selection is None:
        layers: Any = range(length)
    elif isinstance(selection, slice):
        layers = range(selection.start, selection.stop, selection.step)
    else:
        layers = np.asarray(selection).tolist()
    for row, layer in enumerate(layers):
        rows[layer] = row
    return rows


def _peeled(
    run: _Run, carry: Sequence[Value], stacked: Sequence[Value], reverse: bool
) -> list[_Run]:
    """The run in order of execution, its first layer alone if only that one's input is frozen."""
    trained = any(r is not None for r in run.rows) or any(v.live and v.weight for v in stacked)
    if run.length == 1 or not trained or any(v.trained for v in carry):
        return [run]
    cut = run.stop - 1 if reverse else run.start + 1
    rows = tuple(None if r is None else r + cut - run.start for r in run.rows)
    pieces = [_Run(run.start, cut, run.rows), _Run(cut, run.stop, rows)]
    return pieces[::-1] if reverse else pieces


def _layers(run: _Run, stacked: Sequence[Value]) -> list[Value]:
    """The stacked inputs with only the terms that the run trains, cut to the run's rows."""
    rows, layers = iter(run.rows), []
    for value in stacked:
        terms = []
        for term in value.terms:
            row = next(rows)
            if row is not None:
                delta = lax.slice_in_dim(term.delta, row, row + run.length)
                block = Block(term.block.shape[1:], term.selections[1:])
                terms.append(Term(delta, block, term.path))
        layers.append(replace(value, terms=tuple(terms)))
    return layers


def _apply_once(
    ctx: Context,
    eqn: JaxprEqn,
    run: _Run,
    consts: Sequence[Value],
    carry: Sequence[Value],
    layers: Sequence[Value],
) -> tuple[list[Value], list[Any]]:
    """One iteration, in line."""

    def squeezed(value: Value) -> Value:
        base = lax.index_in_dim(value.base, run.start, keepdims=False)
        terms = [replace(t, delta=lax.squeeze(t.delta, [0])) for t in value.terms]
        return replace(value, base=base, terms=tuple(terms))

    outs = expose(ctx, eqn.params["jaxpr"], [*consts, *carry, *map(squeezed, layers)])
    outs = [v.collapsed() for v in outs]
    ys = [lax.expand_dims(v.base, [0]) for v in outs[len(carry) :]]
    return outs[: len(carry)], ys


def _apply_scan(
    ctx: Context,
    eqn: JaxprEqn,
    run: _Run,
    consts: Sequence[Value],
    carry: Sequence[Value],
    layers: Sequence[Value],
) -> tuple[list[Value], list[Any]]:
    """The run's iterations, as a loop."""
    whole = run.length == eqn.params["length"]
    # Frozen weights are read where they stand: cutting the run out of the stack would copy them.
    indexed = [v.weight and not v.live and not whole for v in layers]
    cut = [
        v.base if whole else lax.slice_in_dim(v.base, run.start, run.stop)
        for v, by_index in zip(layers, indexed, strict=True)
        if not by_index
    ]
    deltas = [t.delta for v in layers for t in v.terms]
    live = any(v.trained for v in [*consts, *carry, *layers])

    def body(carried: list[Any], xs: Any) -> tuple[list[Any], list[Any]]:
        layer, bases, rows = xs[0], iter(xs[1]), iter(xs[2])
        values = []
        for value, by_index in zip(layers, indexed, strict=True):
            base = (
                lax.dynamic_index_in_dim(value.base, layer, keepdims=False)
                if by_index
                else next(bases)
            )
            terms = tuple(replace(t, delta=next(rows)) for t in value.terms)
            values.append(replace(value, base=base, terms=terms))
        inputs = [Value(base, live=live) for base in carried]
        outs = [v.dense() for v in expose(ctx, eqn.params["jaxpr"], [*consts, *inputs, *values])]
        return outs[: len(carry)], outs[len(carry) :]

    finals, ys = lax.scan(
        body,
        [v.base for v in carry],
        (np.arange(run.start, run.stop, dtype=np.int32), cut, deltas),
        length=run.length,
        reverse=eqn.params["reverse"],
        unroll=min(int(eqn.params["unroll"]), run.length),
    )
    return derived([*consts, *carry, *layers], finals), ys
