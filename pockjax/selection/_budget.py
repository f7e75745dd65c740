"""Budgets: what a training step may take."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

_UNITS: dict[str, Mapping[str, float]] = {
    "bytes": {"B": 1} | {
        f"{prefix}{i}B": base**power
        for i, base in (("", 1000), ("i", 1024))
        for power, prefix in enumerate("kMGT" if base == 1000 else "KMGT", start=1)
    } | {"KB": 1000},
    "seconds": {"s": 1, "ms": 1e-3, "us": 1e-6, "µs": 1e-6},
    "operations": {f"{prefix}FLOP": 1000**power for power, prefix in enumerate(["", *"kMGTP"])},
}  # fmt: skip
_KINDS = {
    "memory": "bytes",
    "extra_memory": "bytes",
    "optimizer": "bytes",
    "latency": "seconds",
    "flops": "operations",
}
_EXAMPLES = {"bytes": "'48MiB'", "seconds": "'20ms'", "operations": "'3GFLOP'"}


class BudgetError(ValueError):
    """A budget that cannot be read, or that nothing keeps."""


@dataclass(frozen=True)
class Limit:
    """An upper bound: an amount, or a fraction of what full backpropagation takes.

    Attributes:
        amount: bytes, seconds or operations; or the fraction.
        of_full: whether it is a fraction.
    """

    amount: float
    of_full: bool = False


@dataclass(frozen=True)
class Budget:
    """What one training step may take: one bound, or several that all hold.

    Each is text with a unit (``"48MiB"``, ``"20ms"``, ``"3GFLOP"``), a number of bytes, seconds or
    operations, or a percentage of what training every parameter takes (``"30%"``). A fraction is
    always written with its %: a number up to 1 is refused, since 0.3 might be meant as either.

    Attributes:
        memory: all that the compiled step needs, as XLA says: arguments (parameters, optimizer
            state, batch), results that share none of their memory, and everything in between.
        extra_memory: of that, what the forward pass alone would not need.
        latency: time of one step, measured on this machine.
        flops: floating-point operations of one step, loops counted as often as they run.
        optimizer: the optimizer's state.

    Raises:
        BudgetError: a bound cannot be read, or there is none.

    >>> Budget(memory="48MiB", latency="20ms").limits["latency"]
    Limit(amount=0.02, of_full=False)
    >>> Budget(memory="30%").limits["memory"]
    Limit(amount=0.3, of_full=True)
    >>> Budget(memory=0.3)
    Traceback (most recent call last):
    pockjax.selection._budget.BudgetError: memory=0.3 might be a fraction or a number of bytes: ...
    """

    memory: float | str | None = None
    extra_memory: float | str | None = None
    latency: float | str | None = None
    flops: float | str | None = None
    optimizer: float | str | None = None

    def __post_init__(self) -> None:
        """Reject what cannot be read."""
        if not self.limits:
            raise BudgetError(f"a budget needs at least one of {', '.join(_KINDS)}")

    @property
    def limits(self) -> dict[str, Limit]:
        """The bounds, by name."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _parsed(name, value) for name, value in given.items() if value is not None}

    def absolute(self, full: Mapping[str, float]) -> dict[str, float]:
        """The bounds in bytes, seconds and operations.

        Args:
            full: what full backpropagation takes, for each bound that is a fraction of it.

        >>> Budget(memory="25%", flops="1kFLOP").absolute({"memory": 400})
        {'memory': 100.0, 'flops': 1000.0}
        """
        return {
            name: limit.amount * full[name] if limit.of_full else limit.amount
            for name, limit in self.limits.items()
        }

    def as_dict(self) -> dict[str, float | str]:
        """The bounds as they were given, for a scheme."""
        return {name: getattr(self, name) for name in self.limits}


def _parsed(name: str, value: float | str) -> Limit:
    kind = _KINDS[name]
    units = _UNITS[kind]
    advice = f"write an amount such as {_EXAMPLES[kind]}, or a percentage of full backpropagation"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.eE+_-]+)\s*([A-Za-zµ%]*)\s*", value)
        try:
            number = float(match[1]) if match else float("nan")
        except ValueError:
            number = float("nan")
        unit = match[2] if match else ""
        unit = unit.removesuffix("s") if kind == "operations" else unit
        if number == number and unit == "%":
            return Limit(_positive(name, value, number) / 100, of_full=True)
        if number == number and unit in units:
            return Limit(_positive(name, value, number) * units[unit])
        raise BudgetError(
            f"{name}={value!r} cannot be read; {advice} (units: {', '.join(units)}, %)"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BudgetError(f"{name}={value!r} is neither a number nor text; {advice}")
    if 0 < value <= 1:
        raise BudgetError(
            f"{name}={value!r} might be a fraction or a number of {kind}: {advice} such as "
            f"'{100 * value:g}%'"
        )
    return Limit(_positive(name, value, float(value)))


def _positive(name: str, value: float | str, number: float) -> float:
    if not 0 < number < float("inf"):
        raise BudgetError(f"{name}={value!r} must be above 0 and finite")
    return number


def amount(name: str, value: float, *, up: bool = False) -> str:
    """An amount of a budget with its unit.

    Args:
        name: of what is bounded.
        value: in bytes, seconds or operations.
        up: round up instead of to the nearest, so that it is no less than ``value``.

    >>> amount("memory", 50331648), amount("latency", 0.02), amount("flops", 3e9)
    ('48 MiB', '20 ms', '3 GFLOP')
    >>> amount("memory", 2**20 + 1), amount("memory", 2**20 + 1, up=True)
    ('1 MiB', '1.001 MiB')
    """
    kind = _KINDS[name]
    units = {unit: size for unit, size in _UNITS[kind].items() if "i" in unit or kind != "bytes"}
    if kind == "seconds":
        units = {"ms": units["ms"]}
    unit = max((u for u in units if units[u] <= value), key=units.__getitem__, default=None)
    if kind == "seconds":
        unit = "ms"
    if unit is None:
        return f"{math.ceil(value) if up else round(value)} {'B' if kind == 'bytes' else 'FLOP'}"
    number = value / units[unit]
    if up and float(f"{number:.4g}") < number:
        number += 10.0 ** (math.floor(math.log10(number)) - 3)
    return f"{number:.4g} {unit}"
