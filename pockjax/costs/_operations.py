"""A jaxpr as operations on arrays, as XLA has them when it begins to fuse."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pockjax._compat import Jaxpr, JaxprEqn, Literal, Var, dtype_of, shape_of, subjaxprs
from pockjax.autodiff import CALLS, ELEMENTWISE, size_in_bytes

EXPENSIVE = frozenset(
    "cbrt cos digamma erf erf_inv erfc exp exp2 expm1 lgamma log log1p logistic pow rsqrt sin sqrt "
    "tan tanh gather".split()
)
"""Functions that XLA does not compute anew for several readers."""
SPREAD = frozenset(["broadcast_in_dim", "iota"])
"""Operations whose results repeat few numbers."""
_VIEWS = frozenset(
    "reshape squeeze expand_dims copy copy_p stop_gradient name sharding_constraint pvary pcast "
    "reshard".split()
)
_MAYBE_VIEWS = frozenset(
    "convert_element_type rev transpose broadcast_in_dim slice pad dynamic_slice concatenate "
    "reduce_sum reduce_max stack".split()
)
_ELEMENTWISE = ELEMENTWISE | {"bitcast_convert_type"}
_INDEXED = frozenset(
    """
    broadcast_in_dim concatenate dynamic_slice dynamic_update_slice empty2 full gather iota pad rev
    slice split stack transpose
    """.split()
)


type Bytes = tuple[int, int]
"""Of a program run breadth first, and depth first."""


@dataclass(eq=False)
class Value:
    """An array of the program.

    Attributes:
        bytes: its size.
        shape: its shape.
        op: what makes it; None for arguments and constants.
        users: what reads it.
        held: whether it is there anyway: an argument, or written over one.
        written: whether it is ever in memory.
    """

    bytes: int
    shape: tuple[int, ...]
    op: "Op | None" = None
    users: list["Op"] = field(default_factory=list)
    held: bool = False
    written: bool = False


@dataclass(eq=False)
class Op:
    """An operation of the program.

    Attributes:
        name: of its primitive.
        kind: ``"loop"`` can be fused into others, ``"reduce"`` others into it, ``"whole"`` neither;
            ``"barrier"`` and ``"result"`` read what must have been written.
        reads: its operands.
        makes: its results.
        inner_bytes: of arrays that live while it runs, in either order of what is inside.
        barrier: the one that it passes.
        expensive: whether it, or what can be fused into it, is.
        reduced: the reduction that takes it in, if one does.
        clamps: whether there are bounds from both sides between it and that reduction.
        factor: whether there is a product between them.
    """

    name: str
    kind: str
    reads: list[Value]
    makes: list[Value]
    inner_bytes: Bytes = (0, 0)
    barrier: "Op | None" = None
    expensive: bool = False
    reduced: "Op | None" = None
    clamps: bool = False
    factor: bool = False

    @property
    def operands(self) -> list[Value]:
        """What must have been written before it."""
        return self.reads if self.barrier is None else self.barrier.reads

    @property
    def is_elementwise(self) -> bool:
        """Whether each element depends on the same element of its operands."""
        return self.name in _ELEMENTWISE


class Operations:
    """Follows a jaxpr through its nested calls.

    Attributes:
        ops: in the order of the jaxpr; the last one reads the results.
        arguments: arrays that are there from the beginning.
    """

    def __init__(
        self,
        jaxpr: Jaxpr,
        results_held: bool,
        inner_bytes: Callable[[JaxprEqn], Bytes],
        slices: int = 0,
    ):
        """Follows it.

        Args:
            jaxpr: of the whole program.
            results_held: whether results have memory of their own, as those written over donated
                arguments have.
            inner_bytes: of the arrays that live while an operation with jaxprs of its own runs.
            slices: how many of the last arguments are slices of larger arrays.
        """
        self.ops: list[Op] = []
        self._inner_bytes = inner_bytes
        self._numbers: dict[Var, Any] = {}
        self._spreads: dict[tuple[Any, ...], Value] = {}
        self.arguments = [self._argument(v) for v in jaxpr.invars]
        whole = len(self.arguments) - slices
        sliced = [self._sliced(v) for v in self.arguments[whole:]]
        outs = self._follow(jaxpr, [*self.arguments[:whole], *sliced])
        results = [v for v in outs if v is not None]
        for value in results:
            value.held = value.held or results_held
        for op in reversed(self.ops):  # what passes a barrier is the same array
            if op.kind == "passed":
                op.reads[0].held = op.reads[0].held or op.makes[0].held
        self._add("result", "result", results, [])
        self._drop_dead()

    def _drop_dead(self) -> None:
        """Leaves out what no result depends on."""
        alive: list[Op] = []
        passed: set[Op | None] = set()
        for op in reversed(self.ops):
            ends = op.kind == "result" or (op.kind == "whole" and not op.makes)
            if ends or op in passed or any(v.users for v in op.makes):
                alive.append(op)
                passed.add(op.barrier)
            else:
                for value in op.reads:
                    value.users.remove(op)
        self.ops = alive[::-1]

    def _argument(self, var: Var) -> Value:
        return Value(size_in_bytes(var.aval), shape_of(var), held=True, written=True)

    def _sliced(self, array: Value) -> Value:
        out = Value(array.bytes, array.shape)
        self._add("dynamic_slice", "loop", [array], [out])
        return out

    def _follow(self, jaxpr: Jaxpr, args: Sequence[Value | None]) -> list[Value | None]:
        env: dict[Var, Value | None] = dict(zip(jaxpr.invars, args, strict=True))
        # Constants are part of the program's code.
        env.update({v: self._argument(v) for v in jaxpr.constvars})

        def read(atom: Any) -> Value | None:
            return None if isinstance(atom, Literal) else env[atom]

        turned = _read_by_products(jaxpr)
        for eqn in jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            name = eqn.primitive.name
            if name == "broadcast_in_dim" and len(ins) == 1 and not _is_view(eqn, ins):
                [atom], [out] = eqn.invars, eqn.outvars
                axes = eqn.params["broadcast_dimensions"]
                env[out] = self._spread(atom, ins[0], shape_of(out), axes)
                continue
            if _is_view(eqn, ins) or (name == "transpose" and eqn.outvars[0] in turned):
                env[eqn.outvars[0]] = ins[0]
                continue
            if name in CALLS and (inner := subjaxprs(eqn)):
                self._numbers.update(
                    (v, self._number(atom))
                    for v, atom, value in zip(inner[0].invars, eqn.invars, ins, strict=True)
                    if value is None
                )
                env.update(zip(eqn.outvars, self._follow(inner[0], ins), strict=True))
                continue
            outs = [Value(size_in_bytes(v.aval), shape_of(v)) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))
            self._emit(eqn, ins, outs)
        return [read(atom) for atom in jaxpr.outvars]

    def _emit(self, eqn: JaxprEqn, ins: list[Value | None], outs: list[Value]) -> None:
        name = eqn.primitive.name
        known = [v for v in ins if v is not None]
        if name == "optimization_barrier":
            barrier = self._add(name, "barrier", known, [])
            passed = [out for out, v in zip(outs, ins, strict=True) if v is not None]
            for value, out in zip(known, passed, strict=True):
                out.held = value.held
                self._add("passed", "passed", [value], [out]).barrier = barrier
            return
        if name == "dot_general":
            known = [self._copied(v, p) for v, p in zip(ins, _dot_copies(eqn), strict=True) if v]
        elif name == "conv_general_dilated":
            lhs, rhs, out = _conv_copies(eqn)
            if _is_swapped(eqn) and (kernel := ins[1]) is not None:
                size = dtype_of(eqn.invars[1]).itemsize
                ins[1] = self._loop("rev", [kernel], kernel.shape, size)
            known = [self._copied(v, p) for v, p in zip(ins, (lhs, rhs), strict=True) if v]
            if out:
                made = [Value(v.bytes, v.shape) for v in outs]
                self._add(name, "whole", known, made)
                self._add("transpose", "loop", made, outs)
                return
        elif name in ("select_and_scatter_add", "select_and_gather_add"):
            # Expanded into the search for each window's greatest element, its position axis by
            # axis, and a scatter.
            source = known[-1]
            places = [self._loop("iota", [], source.shape, 4) for _ in source.shape]
            found = [Value(4 * math.prod(known[0].shape), known[0].shape) for _ in places]
            self._add("reduce_window", "whole", [source, *places], found)
            known = [self._loop("concatenate", found, (len(found), *known[0].shape), 4), known[0]]
        if name == "erfc" and outs[0].shape:  # has two forms, for small and large numbers
            size = dtype_of(eqn.invars[0]).itemsize
            known = [self._loop("exp", known, outs[0].shape, size) for _ in range(3)]
            name = "select_n"
        elif name == "one_minus_square" and outs[0].shape:
            size = dtype_of(eqn.invars[0]).itemsize
            known.append(self._constant(1.0, outs[0].shape, size))
            known = [self._loop(half, known, outs[0].shape, size) for half in ("add", "sub")]
            name = "mul"
        elif name in _ELEMENTWISE and outs[0].shape:
            known = self._repeated(eqn, ins, outs[0].shape)
        kind = "loop" if name in _ELEMENTWISE | _INDEXED else "whole"
        if name.startswith(("reduce_", "arg")) and not name.startswith("reduce_window"):
            kind = "reduce" if name != "reduce_precision" else "loop"
        inner = self._inner_bytes(eqn) if kind == "whole" else (0, 0)
        self._add(name, kind, known, outs, inner)

    def _loop(self, name: str, reads: list[Value], shape: tuple[int, ...], itemsize: int) -> Value:
        out = Value(itemsize * math.prod(shape), shape)
        self._add(name, "loop", reads, [out])
        return out

    def _repeated(
        self, eqn: JaxprEqn, ins: list[Value | None], shape: tuple[int, ...]
    ) -> list[Value]:
        """Operands, repeated explicitly where the equation repeats them; XLA has each once."""
        found = []
        for atom, value in zip(eqn.invars, ins, strict=True):
            if shape_of(atom) != shape:
                value = self._spread(atom, value, shape, range(len(shape_of(atom))))
            if value is not None:
                found.append(value)
        return found

    def _spread(
        self, atom: Any, value: Value | None, shape: tuple[int, ...], axes: Iterable[int]
    ) -> Value:
        """An array, or a number, along the axes where it is repeated."""
        itemsize = dtype_of(atom).itemsize
        if value is None:
            return self._constant(self._number(atom), shape, itemsize)
        own = tuple(a for a, n in zip(axes, shape_of(atom), strict=True) if n != 1)
        key = (value, shape, itemsize, own)
        if key not in self._spreads:
            self._spreads[key] = self._loop("broadcast_in_dim", [value], shape, itemsize)
        return self._spreads[key]

    def _number(self, atom: Any) -> Any:
        """The number that a literal is, or that was handed to a nested call; else its variable."""
        if isinstance(atom, Literal):
            return np.asarray(atom.val).item()
        return self._numbers.get(atom, atom)

    def _constant(self, number: Any, shape: tuple[int, ...], itemsize: int) -> Value:
        """An array of one number."""
        key = (number, shape, itemsize)
        if key not in self._spreads:
            self._spreads[key] = self._loop("broadcast_in_dim", [], shape, itemsize)
        return self._spreads[key]

    def _copied(self, value: Value, needed: bool) -> Value:
        """A transposed copy, if one is needed."""
        if not needed:
            return value
        out = Value(value.bytes, ())
        self._add("transpose", "loop", [value], [out])
        return out

    def _add(
        self, name: str, kind: str, reads: list[Value], makes: list[Value], inner: Bytes = (0, 0)
    ) -> Op:
        op = Op(name, kind, list(dict.fromkeys(reads)), makes, inner)
        makers = [v.op for v in op.reads if v.op is not None and v.op.kind == "loop"]
        op.expensive = name in EXPENSIVE or any(maker.expensive for maker in makers)
        for value in op.reads:
            value.users.append(op)
        for value in makes:
            value.op = op
        self.ops.append(op)
        return op


def _read_by_products(jaxpr: Jaxpr) -> set[Var]:
    """Matrices that nothing but products read, which take them either way round."""
    found: set[Var] = set()
    others = {v for v in jaxpr.outvars if isinstance(v, Var)}
    for eqn in jaxpr.eqns:
        product = eqn.primitive.name == "dot_general"
        for atom in eqn.invars:
            if isinstance(atom, Var):
                (found if product and len(shape_of(atom)) == 2 else others).add(atom)
    return found - others


def _is_view(eqn: JaxprEqn, ins: Sequence[Value | None]) -> bool:
    """Whether the result is the operand's memory read in another shape."""
    name = eqn.primitive.name
    if name in _VIEWS:
        return True
    if name not in _MAYBE_VIEWS or not ins or ins[0] is None:
        return False
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    match name:
        case "convert_element_type":
            return dtype_of(eqn.invars[0]) == dtype_of(eqn.outvars[0])
        case "rev":
            return all(before[axis] == 1 for axis in eqn.params["dimensions"])
        case "transpose":
            made_by = ins[0].op
            flat = len(before) == 2 and made_by is not None and made_by.name == "dot_general"
            return flat or _in_order(eqn.params["permutation"], before)
        case "broadcast_in_dim":
            return math.prod(before) == math.prod(after)
        case "reduce_sum" | "reduce_max" | "stack":
            return math.prod(before) == math.prod(after)
    return before == after and len(ins) - ins.count(None) == 1


def _in_order(axes: Iterable[int], shape: Sequence[int]) -> bool:
    kept = [a for a in axes if shape[a] != 1]
    return kept == sorted(kept)


def _dot_copies(eqn: JaxprEqn) -> tuple[bool, bool]:
    """Whether the operands of a product are transposed before it."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    found = []
    for side, (atom, contract, batch) in enumerate(
        zip(eqn.invars, (lc, rc), (lb, rb), strict=True)
    ):
        shape = shape_of(atom)
        free = [a for a in range(len(shape)) if a not in contract and a not in batch]
        inner = (*free, *contract) if side == 0 else (*contract, *free)
        if not _in_order((*batch, *inner), shape):
            # One contracted and one free axis may stand either way round.
            one = (
                sum(shape[a] != 1 for a in contract) <= 1 and sum(shape[a] != 1 for a in free) <= 1
            )
            swapped = (*contract, *free) if side == 0 else (*free, *contract)
            found.append(not (one and _in_order((*batch, *swapped), shape)))
        else:
            found.append(False)
    return found[0], found[1]


def _is_swapped(eqn: JaxprEqn) -> bool:
    """Whether images and kernel change places, as they do where the kernel is the larger."""
    numbers = eqn.params["dimension_numbers"]
    images, kernel = (shape_of(v) for v in eqn.invars)
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    window = math.prod(kernel[a] for a in numbers.rhs_spec[2:])
    return groups == 1 and window > math.prod(images[a] for a in numbers.lhs_spec[2:])


def _conv_copies(eqn: JaxprEqn) -> tuple[bool, bool, bool]:
    """Whether images, kernel and result of a convolution are transposed."""
    numbers = eqn.params["dimension_numbers"]

    def copied(spec: Sequence[int], atom: Any, kernel: bool) -> bool:
        first, second, *space = spec
        order = (*space, second, first) if kernel else (first, *space, second)
        return not _in_order(order, shape_of(atom))

    return (
        copied(numbers.lhs_spec, eqn.invars[0], False),
        copied(numbers.rhs_spec, eqn.invars[1], True),
        copied(numbers.out_spec, eqn.outvars[0], False),
    )
