"""Which arrays of a jaxpr an XLA program for a CPU writes to memory, and from which others.

XLA fuses elementwise functions and views into what reads them. Of the rules of its fusion passes,
those are followed here that decide about large arrays:

* products, loops, scatters and what they read are written to memory; so are results and whatever
  goes through an optimization barrier;
* a function of one large array is computed anew for each reader that it can be fused into, even
  where it is also written; a function of several is written once if any reader asks for it;
* an expensive function is written where several operations would compute it, or one would for each
  element of a larger array;
* a reduction takes in what no one else reads;
* operands of products are transposed first where the axes are in no order that a product takes.
"""

import math
from collections.abc import Callable

from pockjax._compat import Jaxpr, JaxprEqn, scan_arity, subjaxprs
from pockjax.costs._operations import EXPENSIVE, SPREAD, Bytes, Op, Operations, Value

# YNNPACK has no such functions: reductions of them are loops, which repeat numbers themselves.
_CHOOSING = frozenset("and eq ge gt le lt ne not or select_n xor".split())
_OF_PRODUCTS = frozenset(["reduce_sum", "reduce_max", "reduce_min"])
"""Reductions that take products in."""
_MOST_USERS = 3  # for which a function is computed anew


class Program:
    """The operations of a jaxpr, and which of their results are written.

    Attributes:
        ops: in the order of the jaxpr.
        arguments: arrays that are there from the beginning.
    """

    def __init__(
        self,
        jaxpr: Jaxpr,
        bytes_of: Callable[[Jaxpr, bool, int], Bytes],
        results_held: bool = True,
        slices: int = 0,
    ):
        """Follows a jaxpr.

        Args:
            jaxpr: of the whole program.
            bytes_of: the arrays of a program within it, given what follows here.
            results_held: whether results have memory of their own, as those written over donated
                arguments have.
            slices: how many of the last arguments are slices of larger arrays.
        """

        def inner_bytes(eqn: JaxprEqn) -> Bytes:
            scan = eqn.primitive.name == "scan"
            kept = sum(scan_arity(eqn)) if scan else 0
            found = [
                bytes_of(body, not scan, len(body.invars) - kept if scan else 0)
                for body in subjaxprs(eqn)
            ]
            breadth, depth = zip((0, 0), *found, strict=True)
            return max(breadth), max(depth)

        operations = Operations(jaxpr, results_held, inner_bytes, slices)
        self.ops, self.arguments = operations.ops, operations.arguments
        self._known: dict[Op, tuple[Value, ...]] = {}
        self._readers: dict[Value, set[Op]] = {}
        for op in reversed(self.ops):
            self._decide(op)
        for op in self.ops:  # one after the other, for chains longer than Python's stack
            self._sources_of(op)

    def _decide(self, op: Op) -> None:
        users = [u for v in op.makes for u in v.users]
        # A reduction takes in what nobody else reads.
        by = {u if u.kind == "reduce" else u.reduced for u in users}
        reduced = by.pop() if len(by) == 1 else None
        op.factor = any(u.factor or u.name == "dot_general" for u in users)
        op.clamps = _is_clamp(op) or any(u.clamps for u in users)
        if op.kind == "loop" and op.name != "select_n":
            moves = not op.is_elementwise and op.name not in SPREAD | {"pad"}
            op.reduced = None if moves and op.factor else reduced
        elif op.name == "dot_general" and not op.clamps:
            op.reduced = reduced if reduced and reduced.name in _OF_PRODUCTS else None
        for value in op.makes:
            self._readers[value] = self._in_the_end(value)
            value.written = op.reduced is None and (op.kind != "loop" or self._is_written(value))

    def _in_the_end(self, value: Value) -> set[Op]:
        """The operations that read a value, themselves or through others that they compute."""
        found: set[Op] = set()
        for user in value.users:
            fusible = user.kind == "loop" and user.reduced is None
            if not fusible or any(v.written for v in user.makes):
                found.add(user)
            for made in user.makes if fusible else ():
                if made.written:
                    found |= {u for u in made.users if self.is_fused(made, u)}
                else:
                    found |= self._readers[made]
        return found

    def _is_written(self, value: Value) -> bool:
        assert value.op is not None
        name, users = value.op.name, value.users
        if any(u.kind in ("whole", "barrier", "result", "passed") for u in users):
            return True
        taken = [u for u in users if u.kind == "reduce" or u.reduced]
        if name in SPREAD:  # what others read too stays outside of a reduction
            return any(u.name not in _CHOOSING for u in taken)
        if taken and (len(users) > 1 or name == "select_n"):
            return True
        if len(users) > _MOST_USERS or any(_is_once(value, u) for u in users):
            return True
        return name in EXPENSIVE and len(self._readers[value]) > 1

    def sources(self, op: Op) -> list[Value]:
        """The written arrays that an operation reads, itself or through what is fused into it."""
        return list(self._sources_of(op))

    def _sources_of(self, op: Op) -> tuple[Value, ...]:
        if op not in self._known:
            found: dict[Value, None] = {}
            for value in op.reads:
                if value.op is not None and self.is_fused(value, op):
                    found.update(dict.fromkeys(self._sources_of(value.op)))
                else:
                    found[value] = None
            self._known[op] = tuple(found)
        return self._known[op]

    def is_fused(self, value: Value, reader: Op) -> bool:
        """Whether a reader computes one of its operands itself."""
        if reader.kind not in ("loop", "reduce") and reader.reduced is None or value.op is None:
            return False
        if not value.written:
            return True
        if value.op.kind != "loop" or _is_once(value, reader):
            return False
        # What is written for somebody else is still computed anew by those it can be fused into.
        few = len(value.users) <= _MOST_USERS or value.op.name in SPREAD
        again = value.op.name not in EXPENSIVE and few
        loop = reader.kind == "loop" and reader.reduced is None
        return loop and again and _is_unary(value.op, value)


def _is_clamp(op: Op) -> bool:
    """Whether it bounds from both sides, as `jnp.clip` and relu6 do; YNNPACK has no such thing."""
    if op.name == "clamp":
        return True
    other = {"min": "max", "max": "min"}.get(op.name)
    return any(v.op is not None and v.op.name == other for v in op.reads)


def _is_once(value: Value, reader: Op) -> bool:
    """Whether it is a number that takes too much to be computed for each element of a reader."""
    return value.op is not None and value.op.expensive and not value.shape and reader.name in SPREAD


def _is_unary(op: Op, value: Value) -> bool:
    """Whether computing it anew reads no more than one array of its size, or no more bytes."""
    size = math.prod(value.shape)
    reads = [
        r
        for v in op.reads
        for r in (v.op.reads if v.op is not None and v.op.name in SPREAD else [v])
    ]
    sizes = [math.prod(v.shape) for v in reads]
    return sum(n >= size for n in sizes) <= 1 or sum(sizes) <= size
