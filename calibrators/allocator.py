"""Keep freed memory in the process, so that every tensor does not fault its pages in anew.

glibc maps a large tensor when it is made and unmaps it when it is freed: the kernel clears its pages again each time.

Must not know: what is computed.
"""

from __future__ import annotations

import ctypes
import functools
import os

__all__ = ["keep_freed_memory"]

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of mallopt, from malloc.h."""

MAPPED_ABOVE = 1 << 26
"""Bytes above which a tensor still gets pages of its own."""
KEPT = 1 << 29
"""Bytes of free memory at the top of the heap above which it goes back to the system."""

CHOSEN_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Variables by which glibc takes these thresholds; `GLIBC_TUNABLES` is the other way."""


@functools.cache
def keep_freed_memory() -> bool:
    """Raise the thresholds of glibc's allocator, and return whether they were raised.

    Nothing happens where the environment sets them (MALLOC_..., GLIBC_TUNABLES), or where the C library has no
    `mallopt`: musl, macOS, Windows.
    """
    if any(name in os.environ for name in CHOSEN_BY_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; a C library that cannot be opened by no name
        return False
    return bool(mallopt(MMAP_THRESHOLD, MAPPED_ABOVE)) and bool(mallopt(TRIM_THRESHOLD, KEPT))
