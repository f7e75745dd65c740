"""Units: the things that can be chosen to be trained."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from pockjax._paths import flatten_with_paths
from pockjax.adapters import AdaptedParams
from pockjax.autodiff import inlined, is_array, trace
from pockjax.masks import Part, named_entries
from pockjax.masks import mask as make_mask
from pockjax.masks._resolve import is_trainable
from pockjax.selection._consumers import Consumer, consumers
from pockjax.selection._entries import as_entry, joined, within

PyTree = Any
Axis = Literal["in", "out", "heads"]
Entries = tuple[tuple[str, bool | Part], ...]


@dataclass(frozen=True)
class Unit:
    """One thing that can be trained; one choice among those of its group.

    Attributes:
        name: unique, and the same from run to run: ``"blocks/3/expand/kernel in 0.5"``.
        group: units of one group exclude each other: one weight at several ratios of its
            channels, or the biases of the last one, two, three, … layers.
        kind: ``"weight"``, ``"bias"`` or ``"adapter"``.
        entries: path and what is trained of it: True or a `Part`.
        depth: position of the first operation that reads any of it, counted from the input: the
            backward pass has to reach that far.
        ratio: which part of its arrays is trained.
        axis: the axis of the array along which its channels were chosen; None if all of it is
            trained.
        grain: how many channels along that axis belong together, such as those of a head.
        macs: multiplications and additions of its products in the forward pass; 0 of biases.
        depthwise: whether it is a depthwise kernel, whose training contributes next to nothing.
        stacked: axes of the array along which layers are stacked; the unit is of one layer.
    """

    name: str
    group: str
    kind: str
    entries: Entries
    depth: int
    ratio: float = 1.0
    axis: int | None = None
    grain: int = 1
    macs: int = 0
    depthwise: bool = False
    stacked: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Model:
    """The parameters of a function, and where each meets its activations.

    Attributes:
        shapes: path and shape of each parameter that might be trained.
        consumers: by path.
        left_out: why some have no unit, by path.
    """

    shapes: dict[str, tuple[int, ...]]
    consumers: tuple[tuple[str, Consumer], ...]
    left_out: dict[str, str]

    @classmethod
    def of(cls, fun: Callable[..., Any], params: PyTree, *batch: Any, among: Any = None) -> "Model":
        """Traces a function; the arguments are those of `units`."""
        primal = trace(fun, params, batch, scalar=False)
        named = [(path, x) for path, x in flatten_with_paths(params)[0] if is_array(x)]
        statistics = _batch_statistics(params)
        allowed: Sequence[Any] = [True] * len(named)
        if among is not None:
            entries = dict(named_entries(make_mask(params, among)))
            allowed = [entries[path] is not False for path, _ in named]
            statistics = frozenset()
        left_out: dict[str, str] = {}
        followed: list[int] = []
        for i, ((path, leaf), yes) in enumerate(zip(named, allowed, strict=True)):
            if not is_trainable(leaf):
                continue
            if path in statistics:
                left_out[path] = "statistics of batches, which no gradient trains"
            elif not yes:
                left_out[path] = "not among those asked for"
            else:
                followed.append(i)
        found = consumers(inlined(primal.jaxpr), len(named), followed)
        met = {c.leaf for c in found}
        left_out |= {
            named[i][0]: "it never meets the activations" for i in followed if i not in met
        }
        shapes = {named[i][0]: tuple(named[i][1].shape) for i in met}
        return cls(shapes, tuple((named[c.leaf][0], c) for c in found), left_out)


def units(
    fun: Callable[..., Any],
    params: PyTree,
    *batch: Any,
    ratios: Sequence[float] = (1, 1 / 2, 1 / 4, 1 / 8),
    axes: Sequence[Axis] = ("in",),
    biases: Literal["cumulative", "each", "none"] = "cumulative",
    norms: bool = True,
    among: Any = None,
) -> tuple[Unit, ...]:
    """What of a model can be chosen to be trained, found from its jaxpr.

    Each weight is a group of units: all of it, and its first channels at each ratio. Biases, and
    the scales of normalisations with them, are one more group: those of the last 1, 2, 3, …
    layers, as in PockEngine (Zhu et al., MICRO 2023, arXiv:2310.17752). A layer is where
    activations meet a weight; what it is called, and which library made it, does not matter. Of
    weights stacked along a first axis that `jax.lax.scan` goes over, each layer has its own units.
    Of a function that `adapt` has given adapters, each adapter is one more choice in the group of
    its weight.

    Args:
        fun: ``fun(params, *batch)``, a loss or a model; it is traced once and not run.
        params: arrays or shapes.
        *batch: the other arguments, arrays or shapes.
        ratios: of the channels of each weight.
        axes: which channels: ``"in"`` are input channels (and the rows of tables), ``"out"`` output
            channels, ``"heads"`` whole heads of the attention, for weights whose input or output
            is cut into heads. A part of the input channels saves memory, since only their
            activations are kept; one of the output channels does not.
        biases: ``"cumulative"``; ``"each"`` for those of each layer alone; ``"none"``.
        norms: whether the scales of normalisations go with the biases.
        among: what may be trained, in any form that `pockjax.mask` takes; default everything but
            Flax's batch statistics.

    Returns:
        The units, weights first, from the input to the output. A weight of which no part can be
        differentiated alone (it goes through a nonlinear function first) has one unit, all of it.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}
    >>> model = lambda params, x: x @ params["w"] + params["b"]
    >>> for unit in units(model, params, jnp.ones((2, 8)), ratios=[1, 0.5]):
    ...     print(unit.name, unit.entries)
    w (('w', True),)
    w in 0.5 (('w', part[:4]),)
    biases of the last 1 (('b', True),)
    """
    model = Model.of(fun, params, *batch, among=among)
    adapters = _of_adapters(model) if isinstance(params, AdaptedParams) else {}
    found = []
    for path, consumer in model.consumers:
        if isinstance(params, AdaptedParams) and path.startswith("adapters/"):
            found += adapters.pop(_adapter_of(path, consumer), [])
        else:
            found += _of_weight(model, path, consumer, ratios, axes)
    if biases not in ("cumulative", "each", "none"):
        raise ValueError(f"biases must be 'cumulative', 'each' or 'none', got {biases!r}")
    kinds = ("bias", "scale") if norms else ("bias",)
    layers: dict[int, list[tuple[str, Consumer]]] = {}
    for path, consumer in model.consumers:
        if consumer.kind in kinds:
            layers.setdefault(consumer.layer, []).append((path, consumer))
    if biases == "each":
        found += [_biases_of(model, layers[k], f"biases {layers[k][0][0]}") for k in sorted(layers)]
    if biases == "cumulative":
        last: list[tuple[str, Consumer]] = []
        for count, k in enumerate(sorted(layers, reverse=True), start=1):
            last = [*layers[k], *last]
            try:
                unit = _biases_of(model, last, f"biases of the last {count}", group="biases")
            except ValueError:  # layers stacked twice over: a part of them is no block of the array
                continue
            found.append(unit)
    return tuple(found)


def left_out(
    fun: Callable[..., Any], params: PyTree, *batch: Any, among: Any = None
) -> dict[str, str]:
    """Parameters of floating dtype that are in no unit, and why, by path.

    Args:
        fun: as for `units`.
        params: as for `units`.
        *batch: as for `units`.
        among: as for `units`.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((8, 4)), "unused": jnp.zeros(4)}
    >>> left_out(lambda p, x: x @ p["w"], params, jnp.ones((2, 8)))
    {'unused': 'it never meets the activations'}
    """
    return Model.of(fun, params, *batch, among=among).left_out


def union(params: PyTree, chosen: Iterable[Unit]) -> PyTree:
    """The mask that trains some units and nothing else.

    Args:
        params: the parameters, or their shapes.
        chosen: units, no two of which train the same elements. What they train of one array has
            to be a block of it: of weights stacked along an axis, each chosen layer must have the
            same channels.

    Returns:
        A mask of the structure of ``params``.

    Raises:
        ValueError: two units train the same elements, or what is trained of an array is no block.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    >>> union(params, [Unit("b", "biases", "bias", (("b", True),), 0)])
    {'b': True, 'w': False}
    """
    shapes = {p: tuple(x.shape) for p, x in flatten_with_paths(params)[0] if is_array(x)}
    entries: dict[str, list[bool | Part]] = {}
    for unit in chosen:
        for path, entry in unit.entries:
            entries.setdefault(path, []).append(entry)
    for path in entries.keys() - shapes.keys():
        raise ValueError(f"'{path}' is in a chosen unit, but not among the parameters")
    joint = {path: joined(path, shapes[path], given) for path, given in entries.items()}
    return make_mask(params, lambda path, leaf: joint.get(path, False))


def _of_weight(
    model: Model, path: str, consumer: Consumer, ratios: Sequence[float], axes: Sequence[Axis]
) -> Iterable[Unit]:
    if consumer.kind != "weight":
        return
    shape = model.shapes[path]
    name = _layer_name(path, consumer)
    found: set[tuple[int, ...]] = set()
    for kind in axes:
        axis, grain = _axis_and_grain(consumer, shape, kind)
        for ratio in sorted(set(ratios), reverse=True):
            if not 0 < ratio <= 1:
                raise ValueError(f"a ratio must be above 0 and at most 1, got {ratio}")
            if axis is None and ratio < 1:
                continue
            chosen = within(shape, consumer.rows)
            share = 1.0
            if ratio < 1 and axis is not None:
                count = grain * max(1, round(ratio * shape[axis] / grain))
                chosen[axis], share = chosen[axis][:count], count / shape[axis]
            key = tuple(map(len, chosen))
            if key in found:
                continue
            found.add(key)
            yield Unit(
                name=name if share == 1 else f"{name} {kind} {ratio:g}",
                group=name,
                kind="weight",
                entries=((path, as_entry(chosen, shape)),),
                depth=consumer.depth,
                ratio=share,
                axis=axis if share < 1 else None,
                grain=grain,
                macs=consumer.macs,
                depthwise=consumer.depthwise,
                stacked=tuple(axis for axis, _ in consumer.rows),
            )


def _adapter_of(path: str, consumer: Consumer) -> str:
    """Name of the weight beside which a factor of an adapter is."""
    weight = path.removeprefix("adapters/").rpartition("/")[0]
    return _layer_name(f"params/{weight}".rstrip("/"), consumer)


def _of_adapters(model: Model) -> dict[str, list[Unit]]:
    """By name of the weight, its adapter: both factors, in the weight's group."""
    factors: dict[str, list[tuple[str, Consumer]]] = {}
    for path, consumer in model.consumers:
        if path.startswith("adapters/"):
            factors.setdefault(_adapter_of(path, consumer), []).append((path, consumer))

    def unit(weight: str, members: list[tuple[str, Consumer]]) -> Unit:
        rows = {path: within(model.shapes[path], consumer.rows) for path, consumer in members}
        return Unit(
            name=f"{weight} adapter",
            group=weight,
            kind="adapter",
            entries=tuple((path, as_entry(rows[path], model.shapes[path])) for path in rows),
            depth=min(consumer.depth for _, consumer in members),
            macs=sum(consumer.macs for _, consumer in members),
            stacked=tuple(axis for axis, _ in members[0][1].rows),
        )

    return {weight: [unit(weight, members)] for weight, members in factors.items()}


def _axis_and_grain(
    consumer: Consumer, shape: tuple[int, ...], kind: Axis
) -> tuple[int | None, int]:
    """The axis along which channels are chosen, if there is one, and how many belong together."""
    if kind not in ("in", "out", "heads"):
        raise ValueError(f"axes must be among 'in', 'out' and 'heads', got {kind!r}")
    if consumer.whole:
        return None, 1
    grain = dict(consumer.grain)
    if kind == "heads":
        if not consumer.heads:
            return None, 1
        axis, count = consumer.heads[0]
        size = shape[axis] // count if shape[axis] % count == 0 else shape[axis]
        return axis, math.lcm(size, grain.get(axis, 1))
    # Depthwise kernels have no input channels of their own: theirs are the output's.
    owners = consumer.outs if kind == "out" or consumer.depthwise else consumer.ins
    if not owners:
        return None, 1
    axis = max(owners, key=lambda d: shape[d])
    return axis, grain.get(axis, 1)


def _biases_of(
    model: Model, members: Sequence[tuple[str, Consumer]], name: str, group: str | None = None
) -> Unit:
    rows: dict[str, list[bool | Part]] = {}
    for path, consumer in members:
        shape = model.shapes[path]
        chosen = within(shape, consumer.rows)
        rows.setdefault(path, []).append(as_entry(chosen, shape))
    return Unit(
        name=name,
        group=group or name,
        kind="bias",
        entries=tuple((p, joined(p, model.shapes[p], given)) for p, given in rows.items()),
        depth=min(c.depth for _, c in members),
    )


def _layer_name(path: str, consumer: Consumer) -> str:
    return path + "".join(f"[{row}]" for _, row in consumer.rows)


def _batch_statistics(params: PyTree) -> frozenset[str]:
    """Paths of Flax's batch statistics, of linen (a collection) and NNX (a type of variable)."""
    if isinstance(params, AdaptedParams):
        return frozenset(f"params/{path}" for path in _batch_statistics(params.params))
    found = [p for p, _ in flatten_with_paths(params)[0] if p.split("/")[0] == "batch_stats"]
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None:
        is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        marked = jax.tree.map(
            lambda v: (
                jax.tree.map(lambda _: isinstance(v, nnx.BatchStat), v) if is_variable(v) else False
            ),
            params,
            is_leaf=is_variable,
        )
        found += [path for path, yes in flatten_with_paths(marked)[0] if yes]
    return frozenset(found)
