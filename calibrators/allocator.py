"""Keep freed memory in the process, so that every tensor does not fault its pages in anew.

glibc maps a large tensor when it is made and unmaps it when it is freed: the kernel clears its pages again each time.

Kept memory is not always used again: glibc before 2.38 cannot put an aligned tensor where one of its size was freed
(bug 14581), so that work on large weights, one after the other, leaves gaps as large as all its temporaries. After
each large weight the gaps go back to the system.

Must not know: what is computed.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os

__all__ = ["give_back", "keep_freed_memory"]

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of mallopt, from malloc.h."""

MAPPED_ABOVE = 1 << 26
"""Bytes above which a tensor still gets pages of its own."""
KEPT = 1 << 29
"""Bytes of free memory at the top of the heap above which it goes back to the system."""

GIVEN_BACK_ABOVE = 1 << 22
"""Bytes of a tensor whose temporaries are given back: what smaller ones leave is smaller than what they cost."""

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


def give_back(size: int, *, graphs: bool = False) -> None:
    """Give freed memory back to the system after work on a tensor of `size` bytes, if that is large.

    graphs: also that of graphs nobody refers to, whose nodes and modules refer to each other; this takes 0.1 s.
    """
    if size <= GIVEN_BACK_ABOVE:
        return
    if graphs:
        gc.collect()
    if keep_freed_memory():
        ctypes.CDLL(None).malloc_trim(0)
