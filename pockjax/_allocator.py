"""Memory that the C library takes from the system anew for each step, and how to keep it.

XLA allocates a step's temporary buffer on each run. glibc gives blocks above 32 MiB back as soon as
they are freed, and then each 4 KiB page costs a fault on the next step: up to half of the time
of a step. ``mallopt`` can forbid that, as long as no thread has an arena of its own: those map
large blocks whatever has been said. So it has to be called before XLA starts its threads.

This file runs from its path too, without JAX: other frameworks are timed under the same setting.
"""

import ctypes
import logging
import os

THRESHOLD = 32 * 2**20
"""Bytes of a block from which on glibc always gives it back (DEFAULT_MMAP_THRESHOLD_MAX)."""

_SWITCH = "POCKJAX_KEEP_MEMORY"  # "0" to leave the C library as it is
_OPTIONS = (
    # Numbers of malloc.h, which Python has no names for.
    (-8, 1),  # M_ARENA_MAX: all threads take from the same memory
    (-4, 0),  # M_MMAP_MAX: large blocks too come from there
    (-1, -1),  # M_TRIM_THRESHOLD: the end of it is never given back
    (-2, 2**30),  # M_TOP_PAD: it grows in large pieces, which fragments it less
)
_kept = False
_told = False


def is_supported() -> bool:
    """Whether this process uses glibc."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # another system, another C library
        return False


def set_options() -> bool:
    """Tells glibc to keep what is freed; whether it will.

    It is for who knows that no thread has begun; others call `keep_memory`.
    """
    global _kept
    if not _kept and is_supported() and os.environ.get(_SWITCH) != "0":
        mallopt = ctypes.CDLL(None).mallopt
        _kept = all([mallopt(option, value) for option, value in _OPTIONS])
    return _kept


def keep_memory() -> bool:
    """Keeps memory that steps have freed in this process, so that the next step is faster.

    For programs that train on a CPU, as their first line: it works before JAX runs anything, which
    starts threads, and has no effect after that. Only Linux with glibc needs it. What it costs:
    memory once freed stays with the process until its end, and small blocks that come to lie in a
    large one make the next step take another, until there is room for all: a process may come to
    hold several times the temporary memory of a step, and takes some steps to get there.
    ``POCKJAX_KEEP_MEMORY=0`` in the environment switches it off.

    Returns:
        Whether memory will be kept: False with another C library, if JAX has run something, or if
        it was switched off.

    >>> import pockjax as pj
    >>> pj.keep_memory()  # doctest: +SKIP
    True
    """
    from pockjax._compat import backends_are_initialized

    return _kept or (not backends_are_initialized() and set_options())


def advise(temp_bytes: int) -> None:
    """Says once, in the log, what to add if steps take that much temporary memory on a CPU."""
    global _told
    if _told or _kept or temp_bytes < THRESHOLD or not is_supported():
        return
    if os.environ.get(_SWITCH) == "0":
        return
    _told = True
    logging.getLogger("pockjax").warning(
        "a step takes %.0f MiB of temporary memory, which the C library gives back and takes anew "
        "in each step, page by page; with pj.keep_memory() at the top of the program, before JAX "
        "runs anything, it is kept, which can halve the time (%s=0 silences this)",
        temp_bytes / 2**20, _SWITCH,
    )  # fmt: skip
