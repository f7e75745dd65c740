"""Which library computes a program's matrix products: timed once, and remembered on disk."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from pockjax.rewrites._timing import in_turn, remember, remembered

LIBRARIES: dict[str, dict[str, Any]] = {
    "XLA's choice": {},
    # Reductions stay with YNNPACK: XLA's own are many times slower. Products of a few hundred
    # rows, as mobile networks have, are up to 1.5 times faster by Eigen; large ones are slower.
    "Eigen": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
}
"""XLA's compiler options, by the library that computes products; the first is the default."""

DEFAULT_LIBRARY = next(iter(LIBRARIES))
_SECONDS = 0.5  # of running, for each library
_CLEARLY = 0.98  # of the default's time, for another library to be taken

_NONE: Mapping[str, Any] = {}

_log = logging.getLogger("pockjax")


def fastest(
    lowered: Any, start: Callable[[Any], Callable[[], Any]], options: Mapping[str, Any] = _NONE
) -> tuple[str, Any]:
    """Compiles a program with the library that makes it the fastest here.

    Args:
        lowered: a `jax.stages.Lowered` program for the CPU.
        start: makes of an executable a function that runs it once and waits until it is done.
        options: XLA's compiler options apart from the library.

    Returns:
        The library's name, and the executable.

    Raises:
        ValueError: XLA does not know one of the options.
    """
    what = [hashlib.sha256(lowered.as_text().encode()).hexdigest(), dict(options)]
    known = (remembered("libraries", what) or {}).get("library")
    if known in LIBRARIES:
        executable = _compiled(lowered, LIBRARIES[known] | dict(options))
        if executable is not None:
            return known, executable
    found = {name: _compiled(lowered, own | dict(options)) for name, own in LIBRARIES.items()}
    executables = {name: executable for name, executable in found.items() if executable is not None}
    if DEFAULT_LIBRARY not in executables:
        raise ValueError(f"XLA does not know one of these options: {dict(options)}")
    seconds = in_turn({name: start(x) for name, x in executables.items()}, _SECONDS)
    best = min(seconds, key=lambda name: seconds[name])
    if seconds[best] > _CLEARLY * seconds[DEFAULT_LIBRARY]:
        best = DEFAULT_LIBRARY
    remember("libraries", what, {"library": best, "seconds": seconds})
    return best, executables[best]


def _compiled(lowered: Any, options: Mapping[str, Any]) -> Any | None:
    """The program with options; None if this XLA does not know one of them."""
    try:
        return lowered.compile(compiler_options=dict(options) or None)
    except Exception as error:  # of no documented type
        if not options:
            raise
        _log.info("XLA does not take %s: %s", options, error)
        return None
