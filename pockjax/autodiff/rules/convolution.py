"""Convolutions of any dimension with a trained kernel: strides, dilation, groups, depthwise."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pockjax._compat import JaxprEqn, bind, primal_of
from pockjax.autodiff._exposed import Context, DenseError, Term, Value, rule, written_out
from pockjax.autodiff.rules.views import _merge, _positions
from pockjax.masks._selection import Selection, canonical, take


@rule("conv_general_dilated")
def _conv_general_dilated(ctx: Context, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    if eqn.params["batch_group_count"] != 1:
        raise DenseError("convolution with batch groups")
    if lhs.terms:
        ctx.note(lhs.terms, eqn, "a trained weight as the input of a convolution")
        lhs = lhs.collapsed()
    [out] = bind(eqn, [lhs.base, rhs.base])
    terms = [_term(ctx, eqn, term, lhs.base, out.shape) for term in rhs.terms]
    return written_out(out, terms, [lhs, rhs])


def _term(ctx: Context, eqn: JaxprEqn, term: Term, x: Any, out_shape: tuple[int, ...]) -> Term:
    """The convolution of the input channels that meet a kernel's block with that block."""
    x, numbers = primal_of(x), eqn.params["dimension_numbers"]
    features = numbers.lhs_spec[1]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    params = dict(eqn.params)
    term, params["padding"] = _tap_window(ctx, eqn, term, spatial)
    groups = eqn.params["feature_group_count"]
    out_selection, in_selection = term.selections[out_axis], term.selections[in_axis]
    if groups == 1:
        x = take(x, in_selection, features)
    else:
        x, params["feature_group_count"] = _grouped_input(
            x, features, groups, out_selection, in_selection,
            term.block.shape[out_axis], term.block.shape[in_axis],
        )  # fmt: skip
    [product] = bind(eqn, [x, term.delta], params)
    selections: list[Selection] = [None] * len(out_shape)
    selections[numbers.out_spec[1]] = out_selection
    return term.moved(product, out_shape, selections)


def _tap_window(
    ctx: Context, eqn: JaxprEqn, term: Term, spatial: list[int]
) -> tuple[Term, tuple[tuple[int, int], ...]]:
    """A window of the kernel's taps is a smaller kernel with less (or negative) padding."""
    padding = list(eqn.params["padding"])
    for i, axis in enumerate(spatial):
        selection = term.selections[axis]
        if selection is None:
            continue
        if isinstance(selection, slice) and selection.step == 1:
            dilation = eqn.params["rhs_dilation"][i]
            below, above = selection.start, term.block.shape[axis] - selection.stop
            low, high = padding[i]
            padding[i] = (low - below * dilation, high - above * dilation)
        else:
            ctx.note([term], eqn, "taps that are not one window")
            term = term.widened(axis)
    return term, tuple(padding)


def _grouped_input(
    x: Any,
    features: int,
    groups: int,
    out_selection: Selection,
    in_selection: Selection,
    outputs: int,
    inputs: int,
) -> tuple[Any, int]:
    """The input channels that meet a block of a grouped kernel, and how many groups they form.

    A grouped kernel has ``outputs`` filters over ``inputs`` channels each; filter ``o`` reads the
    channels of group ``o // (outputs // groups)``.
    """
    per_group = outputs // groups
    if out_selection is None:
        chosen: Any = np.arange(groups)
    else:
        filters = _positions(out_selection, outputs)
        chosen = _whole_groups(filters, per_group)
        if chosen is None:
            # Each chosen filter becomes a group of its own, with its own copy of its input.
            chosen = filters // per_group
    channels: Any = _merge([chosen, in_selection], [groups, inputs])
    if isinstance(channels, np.ndarray) and len(np.unique(channels)) == len(channels):
        return take(x, canonical(channels, x.shape[features]), features), len(chosen)
    # Channels repeat where filters of one group are chosen apart: `take` assumes they do not.
    return jnp.take(x, channels, axis=features, mode="clip"), len(chosen)


def _whole_groups(filters: Any, per_group: int) -> np.ndarray | None:
    """The groups that ``filters`` make up, if static, in order, and equally many of each."""
    if per_group == 1:
        return filters
    if not isinstance(filters, np.ndarray):
        return None
    group = filters // per_group
    changes = np.flatnonzero(np.diff(group)) + 1
    runs = np.split(group, changes)
    if len({len(r) for r in runs}) != 1:
        return None
    return np.array([r[0] for r in runs])
