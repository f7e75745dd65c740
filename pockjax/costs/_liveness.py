"""The most bytes that are live at once, in the order in which XLA's programs run."""

from collections import deque

from pockjax._compat import Jaxpr
from pockjax.costs._buffers import Op, Program, Value

_ALIGNMENT = 64


def peak_bytes(jaxpr: Jaxpr, results_held: bool = True) -> int:
    """Bytes of the arrays between arguments and results when they are most.

    Args:
        jaxpr: of the whole program.
        results_held: whether the results have memory of their own.
    """
    program = Program(jaxpr, results_held)
    order = breadth_first(program)
    # A value that passes a barrier, or is written over an operand, is in its operand's memory.
    place: dict[Value, Value] = {}

    def home(value: Value) -> Value:
        while value in place:
            value = place[value]
        return value

    last: dict[Value, int] = {}
    for i, (op, _) in enumerate(order):
        if op.kind == "passed":
            place[op.makes[0]] = op.reads[0]
        for value in program.sources(op):
            last[home(value)] = i
    live = peak = 0
    born: set[Value] = set()
    until: dict[int, list[Value]] = {}
    for i, (op, makes) in enumerate(order):
        for value in () if op.kind == "passed" else makes:
            if value.held:
                continue
            host = _overwritten(program, op, value, i, last, home, born)
            if host is not None:
                place[value] = host
                last[host] = max(last[host], last.get(value, i))
                until.setdefault(last[host], []).append(host)
                continue
            born.add(value)
            live += _aligned(value.bytes)
            until.setdefault(last.get(value, i), []).append(value)
        peak = max(peak, live + op.inner_bytes)
        for value in until.pop(i, []):
            if value in born and last.get(value, i) <= i:
                born.discard(value)
                live -= _aligned(value.bytes)
    return peak


def _overwritten(program, op: Op, value: Value, now: int, last, home, born):  # noqa: ANN001
    """An operand that is read here for the last time and whose memory the result can have."""
    if op.kind == "loop" and not op.is_elementwise and op.name != "dynamic_update_slice":
        return None
    if op.kind != "loop" and not op.name.startswith("scatter") and op.name != "scan":
        return None
    for source in map(home, program.sources(op)):
        same = source.bytes == value.bytes and source.shape == value.shape
        if same and source in born and last[source] == now:
            return source
    return None


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def breadth_first(program: Program) -> list[tuple[Op, list[Value]]]:
    """Operations that write something, first come first served, as XLA's CPU backend runs them."""
    nodes = [
        (op, written)
        for op in program.ops
        if (written := [v for v in op.makes if v.written]) or op.kind in ("barrier", "result")
    ]
    maker = {v: i for i, (_, written) in enumerate(nodes) for v in written}
    for i, (op, _) in enumerate(nodes):
        if op.kind == "barrier":
            barrier = i
            continue
        if op.kind == "passed":
            pass
    waiting: list[int] = []
    readers: dict[object, list[int]] = {}
    barrier: int | None = None
    for i, (op, _) in enumerate(nodes):
        needs: set[object] = set(program.sources(op))
        if op.kind == "passed":
            needs.add(barrier)
        waiting.append(len(needs))
        for need in needs:
            readers.setdefault(need, []).append(i)
        if op.kind == "barrier":
            barrier = i
    ready: deque[int] = deque()

    def arrived(what: object) -> None:
        for reader in readers.get(what, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)

    first = [i for i, n in enumerate(waiting) if n == 0]
    for value in dict.fromkeys(v for need in list(readers) if isinstance(need, Value) and need not in maker for v in [need]):
        arrived(value)
    ready.extend(i for i in first if i not in ready)
    order: list[tuple[Op, list[Value]]] = []
    while ready:
        i = ready.popleft()
        order.append(nodes[i])
        arrived(i)
        for value in nodes[i][1]:
            arrived(value)
    assert len(order) == len(nodes)
    return order
