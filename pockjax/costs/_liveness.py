"""The memory of a program's arrays: from when to when XLA needs each, and where it puts it."""

from dataclasses import dataclass

import numpy as np

from pockjax._compat import Jaxpr
from pockjax.costs._buffers import Op, Program, Value
from pockjax.costs._order import Node, breadth_first, depth_first

_ALIGNMENT = 64
_IN_PLACE = ("dynamic_update_slice", "scan", "scatter-add", "scatter", "sort")


@dataclass
class Interval:
    """Memory of an array, or of several that are written over each other.

    Attributes:
        bytes: its size.
        start: position of the operation that writes it.
        end: position of the last operation that reads it.
    """

    bytes: int
    start: int
    end: int


def peak_bytes(jaxpr: Jaxpr, results_held: bool = True, depth: bool = False) -> int:
    """Bytes of the arrays between arguments and results.

    Args:
        jaxpr: of the whole program.
        results_held: whether the results have memory of their own.
        depth: whether operations are run depth first instead of breadth first.
    """
    program = Program(jaxpr, results_held, depth)
    order = depth_first(program) if depth else breadth_first(program)
    return packed_bytes(intervals(program, order))


def intervals(program: Program, order: list[Node]) -> list[Interval]:
    """When the memory of each array is in use."""
    home: dict[Value, Interval] = {}
    found: list[Interval] = []
    last: dict[Value, int] = {}
    for i, (op, _) in enumerate(order):
        for value in program.sources(op):
            last[value] = i
    # What passes a barrier is the same array.
    for op, _ in reversed(order):
        if op.kind == "passed":
            [made], [read] = op.makes, op.reads
            last[read] = max(last[read], last.get(made, 0))
    for i, (op, makes) in enumerate(order):
        sources = program.sources(op)
        for value in makes:
            if value.held:
                continue
            if op.kind == "passed":
                if op.reads[0] in home:
                    home[value] = home[op.reads[0]]
                continue
            host = _overwritten(op, value, sources, i, home)
            if host is None:
                host = Interval(value.bytes, i, i)
                found.append(host)
            host.end = max(host.end, last.get(value, i))
            home[value] = host
        if op.inner_bytes:
            found.append(Interval(op.inner_bytes, i, i))
    return found


def _overwritten(
    op: Op, value: Value, sources: list[Value], now: int, home: dict[Value, Interval]
) -> Interval | None:
    """An operand that is read here for the last time and whose memory the result can have."""
    if not (op.is_elementwise or op.name in _IN_PLACE):
        return None
    for source in sources:
        host = home.get(source)
        if host and host.bytes == value.bytes and host.end <= now and source.shape == value.shape:
            return host
    return None


def packed_bytes(found: list[Interval]) -> int:
    """The memory that intervals take when the largest is placed first, each where it fits best."""
    if not found:
        return 0
    by_size = sorted(found, key=lambda x: (-x.bytes, x.start))
    by_time = sorted(found, key=lambda x: (x.start - x.end, -x.bytes, x.start))
    return min(_packed(by_size), _packed(by_time))


def _packed(order: list[Interval]) -> int:
    n = len(order)
    start, end = np.array([x.start for x in order]), np.array([x.end for x in order])
    size = np.array([-(-x.bytes // _ALIGNMENT) * _ALIGNMENT for x in order])
    offset = np.zeros(n, np.int64)
    for i in range(n):
        beside = np.flatnonzero((start[:i] <= end[i]) & (start[i] <= end[:i]))
        if len(beside):
            beside = beside[np.argsort(offset[beside], kind="stable")]
            tops = np.maximum.accumulate(offset[beside] + size[beside])
            below = np.concatenate([[0], tops])
            gaps = offset[beside] - below[:-1]
            fits = np.flatnonzero(gaps >= size[i])
            offset[i] = below[fits[np.argmin(gaps[fits])]] if len(fits) else tops[-1]
    return int((offset + size).max())
