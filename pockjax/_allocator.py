"""Memory that the C library takes from the system anew for each step, and how to avoid that.

XLA allocates a step's temporary buffer on each run. glibc gives blocks above 32 MiB back as soon as
they are freed, and then each 4 KiB page costs a fault on the next step: up to half of the time
of a step. With huge pages there are hundreds of times fewer, at no cost in memory; glibc reads that
setting as a process begins, so a program of ours begins again with it. ``mallopt`` can forbid to
give blocks back at all, as long as no thread has an arena of its own; the process then comes to
hold several times a step's memory.

This file runs from its path too, without JAX: other frameworks are timed under the same setting.
"""

import ctypes
import logging
import os
import sys
import threading
from pathlib import Path

THRESHOLD = 32 * 2**20
"""Bytes of a block from which on glibc always gives it back (DEFAULT_MMAP_THRESHOLD_MAX)."""

SETTING = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"

_HUGE_PAGES = "POCKJAX_HUGE_PAGES"  # "0" to stay as one is; "1" for who has begun again
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
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


def begin_again() -> None:
    """Starts this program anew with huge pages, once, if that is safe; else does nothing.

    It is not done in an interactive interpreter, in a process that already has threads, where the
    kernel or an older glibc does not know them, if ``GLIBC_TUNABLES`` says anything, or if
    ``POCKJAX_HUGE_PAGES=0``. Child processes inherit it.
    """
    if (
        _HUGE_PAGES in os.environ
        or "GLIBC_TUNABLES" in os.environ
        or hasattr(sys, "ps1")
        or sys.flags.interactive
        or threading.active_count() > 1
        or len(sys.orig_argv) < 2
        or not has_huge_pages()
    ):
        return
    name, _, value = SETTING.partition("=")
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, name: value, _HUGE_PAGES: "1"}
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:  # the program runs on, only slower
        os.environ[_HUGE_PAGES] = "0"


def has_huge_pages() -> bool:
    """Whether the setting means something here: glibc from 2.35 on, and a kernel that allows it."""
    if not is_supported():
        return False
    try:
        version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[1]
        number = tuple(int(part) for part in version.split(".")[:2])
        return number >= (2, 35) and "[never]" not in _THP.read_text()
    except (IndexError, ValueError, OSError):
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

    For programs that train on a CPU and have memory to spare, as their first line: it works before
    JAX runs anything, which starts threads, and has no effect after that. Only Linux with glibc
    needs it. It leaves no page faults at all, where huge pages (``GLIBC_TUNABLES`` in the
    environment) leave few. What it costs: memory once freed stays with the process until its end,
    and small blocks that come to lie in a large one make the next step take another, until there is
    room for all: a process may come to hold six times the memory of a step.
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
    """Says once, in the log, what to set if steps take that much temporary memory on a CPU."""
    global _told
    if _told or _kept or temp_bytes < THRESHOLD or not has_huge_pages():
        return
    if "hugetlb" in os.environ.get("GLIBC_TUNABLES", "") or os.environ.get(_HUGE_PAGES) == "0":
        return
    _told = True
    logging.getLogger("pockjax").warning(
        "a step takes %.0f MiB of temporary memory, which the C library gives back and takes anew "
        "in each step, page by page; start Python with %s in the environment, which can halve the "
        "time (%s=0 silences this)",
        temp_bytes / 2**20, SETTING, _HUGE_PAGES,
    )  # fmt: skip
