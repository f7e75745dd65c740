"""In which order XLA runs the operations of a program."""

from collections import deque
from collections.abc import Iterator

from pockjax.costs._buffers import Op, Program, Value

type Node = tuple[Op, list[Value]]
"""An operation that writes something, and what it writes."""


def _nodes(program: Program) -> list[Node]:
    """What is run, in the order of the jaxpr."""
    return [
        (op, written)
        for op in program.ops
        if (written := [v for v in op.makes if v.written]) or op.kind in ("barrier", "result")
    ]


def breadth_first(program: Program) -> list[Node]:
    """First come first served, as XLA's CPU backend runs operations by default."""
    nodes = _nodes(program)
    waiting: list[int] = []
    readers: dict[object, list[int]] = {}
    barrier: int | None = None
    made: set[Value] = set()
    for i, (op, written) in enumerate(nodes):
        needs: list[object] = list(program.sources(op))
        if op.kind == "passed":
            needs.append(barrier)
        waiting.append(len(needs))
        for need in needs:
            readers.setdefault(need, []).append(i)
        made.update(written)
        if op.kind == "barrier":
            barrier = i
    for need, users in readers.items():
        if isinstance(need, Value):
            loops = [i for i in users if nodes[i][0].kind == "loop"]
            others = [i for i in users if nodes[i][0].kind != "loop"]
            readers[need] = [*others, *reversed(loops)]  # in the order of XLA's lists of users
    ready = deque(i for i, n in enumerate(waiting) if n == 0)

    def arrived(what: object) -> None:
        for reader in readers.get(what, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)

    for value in [v for v in readers if isinstance(v, Value) and v not in made]:
        arrived(value)
    order: list[Node] = []
    while ready:
        i = ready.popleft()
        order.append(nodes[i])
        arrived(i)
        for value in nodes[i][1]:
            arrived(value)
    assert len(order) == len(nodes)
    return order


def depth_first(program: Program) -> list[Node]:
    """What is read by an operation right before it, as XLA runs them to save memory.

    Of several operands comes first the one with the most readers among all that it is computed
    from, and then the one with the most bytes.
    """
    nodes = _nodes(program)
    maker = {value: i for i, (_, written) in enumerate(nodes) for value in written}
    needs: list[list[int]] = []
    readers, barrier = [0] * len(nodes), -1
    for i, (op, _) in enumerate(nodes):
        found = dict.fromkeys(maker[v] for v in program.sources(op) if v in maker)
        if op.kind == "passed" and barrier >= 0:
            found[barrier] = None
        if op.kind == "barrier":
            barrier = i
        needs.append(list(found))
        for j in found:
            readers[j] += 1
    shared, size, total = [0] * len(nodes), [0] * len(nodes), 0
    for i, (op, written) in enumerate(nodes):
        own = 0 if op.kind == "passed" else sum(v.bytes for v in written if not v.held)
        total += own
        shared[i] = min(max(readers[i] - 1, 0) + sum(shared[j] for j in needs[i]), len(nodes))
        size[i] = min(own + sum(size[j] for j in needs[i]), total)

    def operands(i: int) -> Iterator[int]:
        return iter(sorted(needs[i], key=lambda j: (-shared[j], -size[j])))

    order: list[Node] = []
    done = [False] * len(nodes)
    for root in (i for i, count in enumerate(readers) if count == 0):
        path = [(root, operands(root))]
        while path:
            i, rest = path[-1]
            below = next((j for j in rest if not done[j]), None)
            if below is not None:
                path.append((below, operands(below)))
                continue
            path.pop()
            if not done[i]:
                done[i] = True
                order.append(nodes[i])
    assert len(order) == len(nodes)
    return order
