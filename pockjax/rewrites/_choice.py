"""Which form of a convolution is the fastest here: timed once, and remembered on disk."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pockjax.rewrites._candidates import ORIGINAL, candidates
from pockjax.rewrites._convolution import Convolution
from pockjax.rewrites._timing import in_turn, remember, remembered
from pockjax.rewrites._windows import Form

_SECONDS = 0.02  # of running, for each form
_CLEARLY = 0.8  # of the guess's time, for another form to be taken
_ROOM = 4  # times the bytes of arguments and result that intermediate arrays may take
_NO_MATTER = 4 * 2**20  # bytes of intermediate arrays that any form may have
_WORTH_TIMING = 500_000  # products; below that, any form is quick

_log = logging.getLogger("pockjax")


@dataclass(frozen=True)
class Timing:
    """What one form took when it was tried.

    Attributes:
        seconds: the fastest run.
        temp_bytes: its intermediate arrays.
    """

    seconds: float
    temp_bytes: int


@dataclass(frozen=True)
class Choice:
    """How one convolution is computed.

    Attributes:
        operation: what it is, in words.
        form: the name of the form that was taken; "convolution" is XLA's own.
        timings: what each form took; empty if none was timed.
    """

    operation: str
    form: str
    timings: dict[str, Timing]

    @property
    def is_original(self) -> bool:
        """Whether it is left as it was asked for."""
        return self.form == ORIGINAL

    @property
    def speedup(self) -> float | None:
        """How many times faster than XLA's own, if both were timed."""
        if self.form not in self.timings or ORIGINAL not in self.timings:
            return None
        return self.timings[ORIGINAL].seconds / self.timings[self.form].seconds


def choose(conv: Convolution, *, measure: bool, memory: int | None) -> tuple[Choice, Form]:
    """The fastest form whose intermediate arrays are small enough.

    Args:
        conv: the convolution.
        measure: time the forms, unless that was done before; else the likeliest is taken.
        memory: bytes that a form's intermediate arrays may take; XLA's own form may take what it
            takes. None for four times the bytes of the arguments and the result, or a few
            megabytes.
    """
    forms = candidates(conv)
    timings: dict[str, Timing] = {}
    if measure and len(forms) > 1 and conv.products >= _WORTH_TIMING:
        timings = _timings(conv)
    name = next(iter(forms))
    if timings:
        shapes = (conv.lhs_shape, conv.rhs_shape, conv.out_shape)
        arrays = sum(map(prod, shapes)) * jnp.dtype(conv.dtype).itemsize
        original = timings[ORIGINAL].temp_bytes
        limit = max(_ROOM * arrays, _NO_MATTER) if memory is None else memory
        limit = max(limit, original)
        allowed = {name: t for name, t in timings.items() if t.temp_bytes <= limit}
        best = min(allowed, key=lambda name: timings[name].seconds)
        # A form is timed alone; what it can be fused with only the guess takes into account.
        if name not in allowed or timings[best].seconds < _CLEARLY * timings[name].seconds:
            name = best
    return Choice(describe(conv), name, timings), forms[name]


def describe(conv: Convolution) -> str:
    """A convolution in words.

    >>> import jax.numpy as jnp
    >>> from jax import lax, make_jaxpr
    >>> fun = lambda x, w: lax.conv(x, w, (1, 1), "SAME")
    >>> jaxpr = make_jaxpr(fun)(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3)))
    >>> describe(Convolution.of(jaxpr.eqns[0]))
    '8x8x3 -> 8x8x4, window 3x3, batch 1, float32'
    """
    batch, feature = (conv.lhs_shape[a] for a in conv.lhs_spec[:2])
    outs = conv.out_shape[conv.out_spec[1]]

    def sizes(values: tuple[int, ...]) -> str:
        return "x".join(map(str, values))

    words = f"{sizes((*conv.pixels, feature))} -> {sizes((*conv.out_pixels, outs))}"
    words += f", window {sizes(conv.window)}"
    for name, values in (("strides", conv.strides), ("dilation", conv.lhs_dilation)):
        if any(v != 1 for v in values):
            words += f", {name} {sizes(values)}"
    if conv.is_grouped:
        words += f", {max(conv.feature_groups, conv.batch_groups)} groups"
    words += ", kernel backwards" * conv.backwards
    return f"{words}, batch {batch}, {conv.dtype}"


@lru_cache(maxsize=4096)
def _timings(conv: Convolution) -> dict[str, Timing]:
    forms = candidates(conv)
    what = [asdict(conv), list(forms)]
    known = _read(remembered("rewrites", what), forms)
    if known is not None:
        return known
    _log.info("timing %d forms of %s", len(forms), describe(conv))
    timings = _measure(conv, forms)
    content = {name: asdict(timing) for name, timing in timings.items()}
    remember("rewrites", what, {"operation": describe(conv), "timings": content})
    return timings


def _read(content: dict[str, Any] | None, forms: Mapping[str, Form]) -> dict[str, Timing] | None:
    """Timings from disk; None if there are none, or none that can be made sense of."""
    try:
        timings = {} if content is None else content["timings"]
        found = {
            name: Timing(float(t["seconds"]), int(t["temp_bytes"])) for name, t in timings.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if ORIGINAL in found and found.keys() <= forms.keys() else None


def _measure(conv: Convolution, forms: Mapping[str, Form]) -> dict[str, Timing]:
    """Time each form."""
    generator = np.random.default_rng(0)
    # Whatever is being traced just now is none of the timed programs' business.
    with jax.ensure_compile_time_eval():
        args = [jnp.asarray(generator.standard_normal(x.shape), x.dtype) for x in conv.arguments()]
        compiled = {name: jax.jit(form).lower(*args).compile() for name, form in forms.items()}
        seconds = in_turn(
            {
                name: lambda run=executable: jax.block_until_ready(run(*args))
                for name, executable in compiled.items()
            },
            _SECONDS,
        )
    analyses: dict[str, Any] = {name: c.memory_analysis() for name, c in compiled.items()}
    return {
        name: Timing(seconds[name], a.temp_size_in_bytes if a else 0)
        for name, a in analyses.items()
    }
