"""Memory that the C library takes from the system anew for each step, and how to keep it.

XLA allocates a step's temporary buffer on each run. glibc gives blocks above 32 MiB back as soon as
they are freed, and then each 4 KiB page costs a fault on the next step: up to half of the time
of a step. With huge pages there are 512 times fewer. glibc reads that setting as a process begins,
and ``mallopt`` has no such option, so that a library can only say so; a program can begin again.
"""

import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

THRESHOLD = 32 * 2**20
"""Bytes of a block from which on glibc always gives it back (DEFAULT_MMAP_THRESHOLD_MAX)."""

SETTING = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"

_SWITCH = "POCKJAX_HUGE_PAGES"  # "0" to stay as one is; "1" for who has begun again
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_told = False


def is_set(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process was begun with huge pages for large blocks.

    >>> is_set({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}), is_set({})
    (True, False)
    """
    environment = os.environ if environment is None else environment
    tunables = environment.get("GLIBC_TUNABLES", "").split(":")
    return any(t in ("glibc.malloc.hugetlb=1", "glibc.malloc.hugetlb=2") for t in tunables)


def is_supported() -> bool:
    """Whether the setting means something here: glibc from 2.35 on, and a kernel that allows it."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        number = tuple(int(part) for part in version.split(".")[:2])
        allowed = "[never]" not in _THP.read_text()
    except (AttributeError, ValueError, OSError):  # another system, another C library
        return False
    return name == "glibc" and number >= (2, 35) and allowed


def begin_again() -> None:
    """Starts this program anew with the setting, once, if that is safe; else does nothing.

    It is not done in an interactive interpreter, in a process that already has threads, if
    ``GLIBC_TUNABLES`` says anything, or if ``POCKJAX_HUGE_PAGES=0``. Child processes inherit it.
    """
    if (
        _SWITCH in os.environ
        or "GLIBC_TUNABLES" in os.environ
        or hasattr(sys, "ps1")
        or sys.flags.interactive
        or threading.active_count() > 1
        or len(sys.orig_argv) < 2
        or not is_supported()
    ):
        return
    name, _, value = SETTING.partition("=")
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, name: value, _SWITCH: "1"}
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:  # the program runs on, only slower
        os.environ[_SWITCH] = "0"


def advise(temp_bytes: int) -> None:
    """Says once, in the log, what to set if steps take that much temporary memory on a CPU."""
    global _told
    if _told or temp_bytes < THRESHOLD or is_set() or not is_supported():
        return
    if os.environ.get(_SWITCH) == "0":
        return
    _told = True
    logging.getLogger("pockjax").warning(
        "a step takes %.0f MiB of temporary memory, which the C library gives back and takes anew "
        "in each step, page by page; start Python with %s in the environment, which can halve the "
        "time (%s=0 silences this)",
        temp_bytes / 2**20, SETTING, _SWITCH,
    )  # fmt: skip
