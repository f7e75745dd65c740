"""Where each parameter meets the activations: found from the jaxpr, for any model.

Parameters are followed through casts, views and arithmetic among themselves (a folded batch norm,
say) to the first operation that takes them together with what depends on the batch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pockjax._compat import Jaxpr, JaxprEqn, Var, scan_arity, shape_of, subjaxprs
from pockjax._compat import Literal as JaxprLiteral
from pockjax.autodiff import reshape_groups
from pockjax.costs import count_flops
from pockjax.selection._flows import (
    CONSTANT,
    Flow,
    Trail,
    activation_of,
    among_weights,
    axis_size,
    joined,
    layer_of,
    opaque,
    owned,
)  # fmt: skip

Kind = Literal["weight", "bias", "scale"]


@dataclass(frozen=True)
class Consumer:
    """An operation at which a parameter meets the activations.

    Attributes:
        leaf: position of the parameter among the arrays of the params.
        rows: axes along which layers are stacked, and which of them this is.
        kind: a product's weight (or a table's rows), something added, or a factor for each channel.
        depth: position of the operation among all such, counted from the input.
        layer: position of the latest weight up to here, among all weights.
        ins: axes of the parameter along which its input channels lie (a table's rows); the axis
            for which parts are made first.
        outs: those along which its output channels lie.
        grain: for an axis, the number of positions that must be trained together.
        heads: for an axis, into how many heads it is cut before or after the product.
        macs: multiplications and additions of the operation.
        depthwise: whether it is a convolution with one input channel for each group.
        whole: whether only the whole parameter can be trained without a dense gradient.
    """

    leaf: int
    rows: tuple[tuple[int, int], ...]
    kind: Kind
    depth: int
    layer: int
    ins: tuple[int, ...] = ()
    outs: tuple[int, ...] = ()
    grain: tuple[tuple[int, int], ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    macs: int = 0
    depthwise: bool = False
    whole: bool = False


_NESTED = frozenset("jit remat2 checkpoint closed_call core_call".split())
_OPAQUE_CALLS = frozenset("custom_jvp_call custom_vjp_call shard_map".split())


@dataclass
class _Walk:
    """One walk over a jaxpr, and what it has found."""

    found: list[Consumer] = field(default_factory=list)
    depth: int = 0
    weights: int = 0
    silent: bool = False

    def run(self, jaxpr: Jaxpr, flows: Sequence[Flow]) -> list[Flow]:
        env: dict[Var, Flow] = dict.fromkeys(jaxpr.constvars, CONSTANT)
        env.update(zip(jaxpr.invars, flows, strict=True))

        def read(atom: Any) -> Flow:
            return CONSTANT if isinstance(atom, JaxprLiteral) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self.equation(jaxpr, eqn, [read(a) for a in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def equation(self, jaxpr: Jaxpr, eqn: JaxprEqn, ins: list[Flow]) -> list[Flow]:
        name, inner = eqn.primitive.name, subjaxprs(eqn)
        if name in _NESTED and len(inner) == 1:
            return self.run(inner[0], ins)
        if name in _OPAQUE_CALLS and len(inner[0].invars) == len(ins):
            return self.run(inner[0], [opaque(flow) for flow in ins])
        if name == "cond":
            branches = [self.run(branch, ins[1:]) for branch in inner]
            return [joined(flows) for flows in zip(*branches, strict=True)]
        if name == "scan":
            return self.scan(eqn, ins)
        if inner and not name.startswith(("reduce", "cum", "sort", "scatter")):
            # A loop of unknown length, or a call that nothing is known of.
            for flow in ins:
                self.meet(jaxpr, eqn, [opaque(flow)])
            return [Flow(True)] * len(eqn.outvars)
        if not any(flow.activation for flow in ins):
            return among_weights(eqn, ins)
        ids = self.meet(jaxpr, eqn, ins)
        if eqn.primitive.name == "reshape":
            self.note_split(ins[0], shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]))
        return [activation_of(eqn, v, ins, ids) for v in eqn.outvars]

    def scan(self, eqn: JaxprEqn, ins: list[Flow]) -> list[Flow]:
        [body], (n_consts, n_carry) = subjaxprs(eqn), scan_arity(eqn)
        consts, carry = ins[:n_consts], [opaque(f) for f in ins[n_consts : n_consts + n_carry]]
        stacked, length = ins[n_consts + n_carry :], eqn.params["length"]
        layers = [0]
        if any(flow.trails for flow in stacked):
            layers = list(range(length))
            if eqn.params["reverse"]:
                layers.reverse()
        elif not self.silent:
            # What the loop's later turns make of the carry decides what meets it in the first.
            turn = _Walk(silent=True).run(body, [*consts, *carry, *map(layer_of, stacked)])
            carry = [joined(pair) for pair in zip(carry, turn, strict=False)]
        outs: list[Flow] = []
        for layer in layers:
            outs = self.run(body, [*consts, *carry, *(layer_of(f, layer) for f in stacked)])
            carry = [joined(pair) for pair in zip(carry, outs[:n_carry], strict=True)]
        later = [opaque(replace(f, channels=(), merged=())) for f in outs[n_carry:]]
        return [*carry, *later]

    def meet(self, jaxpr: Jaxpr, eqn: JaxprEqn, ins: list[Flow]) -> list[int]:
        """Notes the parameters that an operation reads; returns which notes are new."""
        ids: list[int] = []
        if self.silent or not any(flow.trails for flow in ins):
            return ids
        met = [
            _consumer(eqn, operand, trail, ins)
            for operand, flow in enumerate(ins)
            for trail in flow.trails
        ]
        is_layer = any(consumer.kind == "weight" for consumer in met)
        layer = self.weights if is_layer else max(self.weights - 1, 0)
        for consumer in met:
            macs = count_flops(jaxpr.replace(eqns=[eqn])) // 2 if consumer.kind == "weight" else 0
            ids.append(len(self.found))
            self.found.append(replace(consumer, depth=self.depth, layer=layer, macs=macs))
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            self.note_heads(eqn, ins, ids)
        self.depth += 1
        self.weights += is_layer
        return ids

    def note_heads(self, eqn: JaxprEqn, ins: list[Flow], ids: list[int]) -> None:
        """Heads that were merged into the channels which a product contracts."""
        if eqn.primitive.name != "dot_general":
            return
        contract, _ = eqn.params["dimension_numbers"]
        side = next(i for i, flow in enumerate(ins) if flow.activation)
        counts = [ins[side].merged[d] for d in contract[side] if ins[side].merged]
        for i in ids:
            consumer = self.found[i]
            if consumer.kind == "weight" and counts[:1] > [1] and len(consumer.ins) == 1:
                heads = ((consumer.ins[0], counts[0]),)
                self.found[i] = replace(consumer, heads=consumer.heads + heads)

    def note_split(self, flow: Flow, shape: tuple[int, ...], out: tuple[int, ...]) -> None:
        """Channels that are cut into heads after the product that made them."""
        if self.silent or not flow.channels:
            return
        for ins, outs in reshape_groups(shape, out):
            for i in flow.channels[ins[0]] if len(ins) == 1 and len(outs) > 1 else ():
                consumer = self.found[i]
                if len(consumer.outs) == 1 and consumer.outs[0] not in dict(consumer.heads):
                    heads = ((consumer.outs[0], out[outs[0]]),)
                    self.found[i] = replace(consumer, heads=consumer.heads + heads)


def consumers(jaxpr: Jaxpr, n_params: int, candidates: Iterable[int]) -> list[Consumer]:
    """Where parameters meet activations, in the order of the operations.

    Args:
        jaxpr: a function of its parameters and then other arguments.
        n_params: number of the parameters.
        candidates: which of them to follow.

    Returns:
        One for each parameter (and layer, if it is a stack of them): the first that is met. Of a
        parameter that is met again, only what holds for all its meetings is said.
    """
    shapes = [shape_of(v) for v in jaxpr.invars]
    wanted = set(candidates)
    flows = [CONSTANT] * n_params + [
        Flow(True, (), (frozenset(),) * len(s), (1,) * len(s)) for s in shapes[n_params:]
    ]
    for i in wanted:
        flows[i] = Flow(False, (Trail(i, tuple(frozenset([d]) for d in range(len(shapes[i])))),))
    walk = _Walk()
    walk.run(jaxpr, flows)
    unstacked = {c.leaf for c in walk.found if not c.rows}
    merged: dict[tuple[int, Any], Consumer] = {}
    for consumer in walk.found:
        if consumer.leaf in unstacked:
            whole = consumer.whole or bool(consumer.rows)
            consumer = replace(consumer, rows=(), whole=whole)
        long = [n for d, n in enumerate(shapes[consumer.leaf]) if n > 1]
        if len(long) - len(consumer.rows) > 1 and consumer.kind != "weight":
            # A table of positions, say, of which one row or all are added.
            consumer = replace(consumer, kind="weight", whole=not consumer.ins)
        key = (consumer.leaf, consumer.rows)
        merged[key] = _both(merged[key], consumer) if key in merged else consumer
    return sorted(merged.values(), key=lambda c: c.depth)


def _both(first: Consumer, later: Consumer) -> Consumer:
    grain = dict(first.grain)
    for axis, n in later.grain:
        grain[axis] = math.lcm(grain.get(axis, 1), n)
    heads = dict(later.heads) | dict(first.heads)
    kind = "weight" if "weight" in (first.kind, later.kind) else first.kind
    return replace(
        first,
        kind=kind,
        ins=first.ins or later.ins,
        outs=first.outs or later.outs,
        grain=tuple(sorted(grain.items())),
        heads=tuple(sorted(heads.items())),
        macs=first.macs + later.macs,
        whole=first.whole or later.whole,
    )


def _consumer(eqn: JaxprEqn, operand: int, trail: Trail, ins: list[Flow]) -> Consumer:
    """What an operation is to a parameter; depth and layer are filled in later."""
    name, shape = eqn.primitive.name, shape_of(eqn.invars[operand])
    unfollowed = Consumer(trail.leaf, trail.rows, "weight", 0, 0, whole=True)
    if name in ("add", "sub", "add_any", "mul", "div", "max", "min") and not (
        name == "div" and operand == 1
    ):
        kind: Kind = "scale" if name in ("mul", "div") else "bias"
        if trail.axes is None:
            sizes = [n for n in shape if n > 1]
            return replace(unfollowed, kind=kind if len(sizes) <= 1 else "weight")
        own = [(d, min(a)) for d, a in enumerate(trail.axes) if a and shape[d] > 1]
        if name in ("max", "min"):
            return replace(unfollowed, kind=kind if len(own) <= 1 else "weight")
        if len(own) <= 1:
            return replace(unfollowed, kind=kind, whole=False, outs=tuple(a for _, a in own))
        # A table of positions, say.
        rows, *rest = dict.fromkeys(a for _, a in own)
        return replace(unfollowed, whole=False, ins=(rows,), outs=tuple(rest), grain=trail.grain)
    if trail.axes is None:
        return unfollowed
    known = replace(unfollowed, whole=False, grain=trail.grain)
    if name == "gather" and operand == 0:
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        looked_up = [d for d in numbers.start_index_map if sizes[d] == 1]
        if numbers.operand_batching_dims or len(looked_up) != len(numbers.start_index_map):
            return unfollowed
        rest = [d for d in range(len(shape)) if d not in looked_up]
        return replace(known, ins=owned(trail, looked_up), outs=owned(trail, rest))
    if name == "dot_general":
        contract, batch = eqn.params["dimension_numbers"]
        if ins[1 - operand].trails and not ins[1 - operand].activation:
            return unfollowed
        mine = set(contract[operand])
        free = [d for d in range(len(shape)) if d not in mine and d not in batch[operand]]
        into, out = owned(trail, contract[operand]), owned(trail, free)
        if not into and len(out) <= 1:  # a factor that was folded into the weight
            return replace(known, kind="scale", outs=out)
        out = tuple(a for a in out if a not in into)
        heads = ((out[0], axis_size(trail, shape, out[0])),) if len(out) > 1 else ()
        return replace(known, ins=into, outs=out, heads=heads)
    if name == "conv_general_dilated" and operand == 1 and eqn.params["batch_group_count"] == 1:
        numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
        out_axis, in_axis, *taps = numbers.rhs_spec
        into, out = owned(trail, [in_axis]), owned(trail, [out_axis])
        if not into and not owned(trail, taps):
            return replace(known, kind="scale", outs=out)
        depthwise = groups > 1 and shape[in_axis] == 1
        return replace(known, ins=into, outs=out, depthwise=depthwise)
    return unfollowed
