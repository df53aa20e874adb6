"""Seconds and memory that a piece of work takes.

Must not know: what the work is; also imported where only the standard library is installed.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROCESS = Path("/proc/self")
FORGET_PEAK = "5"
"""The text that resets the peak of the resident memory (proc(5), clear_refs)."""


@dataclass
class Spent:
    """Seconds, and how far resident memory rose above its start; None where the system does not say."""

    seconds: float = 0.0
    peak_mib: float | None = None


@contextmanager
def metered() -> Iterator[Spent]:
    """Measure the body; other threads of the process count too."""
    spent, before = Spent(), _fresh()
    start = time.perf_counter()
    yield spent
    spent.seconds = time.perf_counter() - start
    if before is not None:
        spent.peak_mib = (_status("VmHWM") - before) / 1024


def _fresh() -> int | None:
    """Return free memory to the system, forget the peak, and return the resident KiB."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (PROCESS / "clear_refs").write_text(FORGET_PEAK)
        return _status("VmRSS")
    except OSError:
        return None


def _status(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
