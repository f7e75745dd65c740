"""In which order XLA runs the operations of a program."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from pockjax.costs._buffers import Program
from pockjax.costs._operations import Op, Value

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
    needs: list[Sequence[Op | Value]] = [
        (op.barrier,) if op.barrier is not None else program.sources(op) for op, _ in nodes
    ]
    readers = _readers(program, nodes, needs)
    waiting = [len(found) for found in needs]
    ready: deque[int] = deque()

    def arrived(what: Op | Value) -> None:
        for reader in readers.get(what, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)

    from_nothing = [i for i, n in enumerate(waiting) if n == 0]
    made = {what for op, written in nodes for what in (op, *written)}
    for what in dict.fromkeys([*program.arguments, *readers]):
        if what not in made:
            arrived(what)
    ready.extend(from_nothing)
    order: list[Node] = []
    while ready:
        op, written = nodes[ready.popleft()]
        order.append((op, written))
        for what in (op, *written):
            arrived(what)
    assert len(order) == len(nodes)
    return order


def depth_first(program: Program) -> list[Node]:
    """What is read by an operation right before it, as XLA runs them to save memory.

    Of several operands comes first the one with the most readers among all that it is computed
    from, and then the one with the most bytes.
    """
    nodes = _nodes(program)
    maker = {what: i for i, (op, written) in enumerate(nodes) for what in (op, *written)}
    needs: list[list[int]] = []
    readers = [0] * len(nodes)
    for op, _ in nodes:
        found = program.sources(op) if op.barrier is None else [op.barrier]
        needs.append(list(dict.fromkeys(maker[what] for what in found if what in maker)))
        for j in needs[-1]:
            readers[j] += 1
    shared, size, total = [0] * len(nodes), [0] * len(nodes), 0
    for i, (op, written) in enumerate(nodes):
        own = 0 if op.barrier is not None else sum(v.bytes for v in written if not v.held)
        total += own
        shared[i] = min(max(readers[i] - 1, 0) + sum(shared[j] for j in needs[i]), len(nodes))
        size[i] = min(own + sum(size[j] for j in needs[i]), total)

    def operands(i: int) -> Iterator[int]:
        return iter(sorted(needs[i], key=lambda j: (-shared[j], -size[j])))

    roots = [i for i, count in enumerate(readers) if count == 0]
    return [nodes[i] for i in _post_order(roots, operands)]


def numbers(program: Program, reads: Callable[[Op], Sequence[Value]]) -> dict[Op, int]:
    """The operations in the order in which XLA numbers them: after what they read."""

    def operands(op: Op) -> Iterator[Op]:
        return iter([v.op for v in reads(op) if v.op is not None])

    return {op: i for i, op in enumerate(_post_order(reversed(program.ops), operands))}


def _post_order[T](roots: Iterable[T], operands: Callable[[T], Iterator[T]]) -> list[T]:
    """Everything that is needed for the roots, each after its operands."""
    order: dict[T, None] = {}
    seen: set[T] = set()
    for root in roots:
        path = [] if root in seen else [(root, operands(root))]
        while path:
            one, rest = path[-1]
            seen.add(one)
            below = next((other for other in rest if other not in seen), None)
            if below is not None:
                path.append((below, operands(below)))
            else:
                order[path.pop()[0]] = None
    return list(order)


def _readers(
    program: Program, nodes: Sequence[Node], needs: Sequence[Sequence[Op | Value]]
) -> dict[Op | Value, list[int]]:
    """Which nodes need what, in the order of XLA's lists of users."""
    order = numbers(program, lambda op: op.operands)
    users = _users(program, order)
    found: dict[Op | Value, list[int]] = {}
    for i, what in ((i, what) for i, all_of_it in enumerate(needs) for what in all_of_it):
        found.setdefault(what, []).append(i)
    for what, readers in found.items():
        if isinstance(what, Value):
            place = {op: i for i, op in enumerate(users.get(what, ()))}
            readers.sort(key=lambda i: place.get(nodes[i][0], len(place)))
        else:
            readers.sort(key=lambda i: order[nodes[i][0]])
    return found


def _users(program: Program, order: dict[Op, int]) -> dict[Value, list[Op]]:
    """What reads each array in the end, in the order of XLA's lists of users.

    XLA fuses into the last operation first, and of what that one reads, the last first. An
    operation that computes another anew becomes the last user of what the other reads; where the
    other is gone, its place goes to the last user.
    """
    found = {
        value: sorted(value.users, key=lambda op: order[op])
        for op in program.ops
        for value in (*op.reads, *op.makes)
    }

    def leave(value: Value, op: Op) -> None:
        leaving = [(value, op)]
        while leaving:
            value, op = leaving.pop()
            users = found[value]
            if op not in users:
                continue
            users[users.index(op)] = users[-1]
            users.pop()
            if not users and value.op is not None and value.op.kind == "loop":
                leaving += [(other, value.op) for other in reversed(value.op.reads)]

    for op in sorted(order, key=lambda op: -order[op]):
        if not any(v.written for v in op.makes):
            continue
        reads = dict.fromkeys(op.reads)
        while fused := [(order[v.op], v) for v in reads if v.op and program.is_fused(v, op)]:
            value = max(fused, key=lambda pair: pair[0])[1]
            del reads[value]
            assert value.op is not None
            for other in value.op.reads:
                if other not in reads:
                    reads[other] = None
                    found[other].append(op)
            leave(value, op)
    return found
