"""The memory of a program's arrays: from when to when XLA needs each, and where it puts it."""

from dataclasses import dataclass

import numpy as np

from pockjax._compat import Jaxpr
from pockjax.costs._buffers import Program
from pockjax.costs._operations import Bytes, Op, Value
from pockjax.costs._order import Node, breadth_first, depth_first, numbers

_ALIGNMENT = 64
_IN_PLACE = ("dynamic_update_slice", "scan", "scatter-add", "scatter", "sort")


@dataclass(eq=False)
class Interval:
    """Memory of an array, or of several that are written over each other.

    XLA counts time in events: each array that is given memory, and each that loses it, is one.

    Attributes:
        bytes: its size.
        number: of the first array, in the order of the graph.
        start: when the first array is given memory.
        first_end: when the first array is last read.
        end: when the last array is.
        last: position of the operation that reads the last array last.
    """

    bytes: int
    number: int
    start: int
    first_end: int | None = None
    end: int = 0
    last: int = 0

    def ends(self, time: int) -> None:
        """Sets when the present array is last read."""
        self.end = time
        self.first_end = time if self.first_end is None else self.first_end


def peak_bytes(jaxpr: Jaxpr, results_held: bool = True, slices: int = 0) -> Bytes:
    """Bytes of the arrays between arguments and results, run breadth first and depth first.

    Args:
        jaxpr: of the whole program.
        results_held: whether the results have memory of their own.
        slices: how many of the last arguments are slices of larger arrays, as those of a loop are.
    """
    program = Program(jaxpr, peak_bytes, results_held, slices)
    number = numbers(program, program.sources)
    breadth, depth = (
        packed_bytes(_intervals(program, order(program), number, which))
        for which, order in enumerate((breadth_first, depth_first))
    )
    return breadth, depth


def _intervals(
    program: Program, order: list[Node], number: dict[Op, int], which: int
) -> list[Interval]:
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
    ending: dict[int, list[Interval]] = {}
    time = 0
    for i, (op, makes) in enumerate(order):
        sources = program.sources(op)
        for value in sorted(makes, key=lambda v: (last.get(v, i), number[op])):
            if value.held or _before_result(value):
                continue
            if op.kind == "passed":
                if op.reads[0] in home:
                    home[value] = home[op.reads[0]]
                continue
            host = _overwritten(op, value, sources, i, home)
            if host is None:
                host = Interval(value.bytes, number[op], time)
                found.append(host)
            else:
                ending[i].remove(host)
                host.ends(time)
                time += 1
            time += 1
            host.last = last.get(value, i)
            ending.setdefault(host.last, []).append(host)
            home[value] = host
        if inner := op.inner_bytes[which]:
            found.append(Interval(inner, number[op], time, time, time, i))
            time += 1
        for host in sorted(ending.get(i, ()), key=lambda x: x.start):
            host.ends(time)
            time += 1
    return found


def _before_result(value: Value) -> bool:
    """Whether it is a number that has the place of the result that is computed from it."""
    return not value.shape and all(
        u.is_elementwise and all(v.held for v in u.makes) for u in value.users
    )


def _overwritten(
    op: Op, value: Value, sources: list[Value], now: int, home: dict[Value, Interval]
) -> Interval | None:
    """An operand that is read here for the last time and whose memory the result can have."""
    if not (op.is_elementwise or op.name in _IN_PLACE):
        return None
    for source in sources:
        host = home.get(source)
        if host and host.bytes == value.bytes and host.last <= now and source.shape == value.shape:
            return host
    return None


def packed_bytes(found: list[Interval]) -> int:
    """The memory that intervals take in the better of XLA's two orders of placing them.

    Each is placed where it fits best: the largest first, or the longest.
    """
    if not found:
        return 0
    assert all(x.first_end is not None for x in found)
    by_size = sorted(found, key=lambda x: (-x.bytes, x.start - (x.first_end or 0), x.number))
    by_time = sorted(found, key=lambda x: (x.start - x.end, -x.bytes, x.number))
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
