"""Numbers as people read them: a value of the report in, a short text out; a dash for what was not measured.

Must not know: reports, pages.
"""

from __future__ import annotations

import math
from typing import Final, Protocol

__all__ = [
    "compact",
    "compared",
    "count",
    "decibel",
    "differ",
    "duration",
    "measured",
    "percent",
    "points",
    "significant",
    "size",
]

DASH: Final = "–"


def measured(value: object) -> float | None:
    """Return the value as a float, None for what was not measured."""
    return float(value) if isinstance(value, (int, float)) and not math.isnan(value) else None


def count(value: object) -> str:
    """Write a number in full: 12345678 -> 12,345,678."""
    number = measured(value)
    return DASH if number is None else f"{number:,.0f}"


def compact(value: object) -> str:
    """Write a number with three digits and a unit: 12345678 -> 12.3 M."""
    number = measured(value)
    if number is None:
        return DASH
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 10 * factor or (factor > 1e3 and abs(number) >= factor):
            return f"{number / factor:.1f} {unit}"
    return f"{number:,.0f}"


def percent(value: object, digits: int = 2, *, missing: str = DASH, rounded: bool = False) -> str:
    """Write a share: 0.9035 -> 90.35 %; below 1 it never reads 100 %, above 0 never 0 %, unless `rounded`."""
    number = measured(value)
    if number is None:
        return missing
    step = 10.0**-digits
    shown = number * 100
    if 0 < number < 1 and not rounded:
        shown = min(max(shown, step), 100 - step)
    return f"{shown:.{digits}f} %"


def compared(before: object, after: object, less: str, more: str) -> str:
    """Write a ratio with its direction: 10, 4 -> 2.50x smaller; 4, 10 -> 2.50x larger."""
    numbers = measured(before), measured(after)
    if not numbers[0] or not numbers[1]:
        return DASH
    ratio = numbers[0] / numbers[1]
    return f"{ratio:.2f}x {less}" if ratio >= 1 else f"{1 / ratio:.2f}x {more}"


def points(value: object) -> str:
    """Write a difference of shares in points: 0.001 -> 0.10 points, with the minus sign U+2212."""
    number = measured(value)
    if number is None:
        return DASH
    shown = round(number * 100, 2) + 0.0  # no negative zero
    return f"{shown:.2f} points".replace("-", "−")


def decibel(value: object) -> str:
    """Write decibels: 31.42 -> 31.4 dB; infinity is written as exact."""
    number = measured(value)
    if number is None:
        return DASH
    return "exact" if math.isinf(number) else f"{number:.1f} dB"


def size(value: object, digits: int = 3) -> str:
    """Write a number of bytes in powers of 1000: 7991296 -> 7.99 MB."""
    number = measured(value)
    if number is None:
        return DASH
    rounded = float(f"{number:.{digits}g}")
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if rounded >= factor:
            return f"{rounded / factor:.{digits}g} {unit}"
    return f"{rounded:.{max(digits, 3)}g} B"


def duration(value: object) -> str:
    """Write seconds: 83.0 -> 1 min 23 s; 2.14 -> 2.1 s."""
    number = measured(value)
    if number is None:
        return DASH
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{number:.1f} s"


def significant(value: object, digits: int = 4, *, missing: str = DASH, minus: str = "−") -> str:
    """Write a number of any magnitude with a few significant digits: 0.012345678 -> 0.01235."""
    number = measured(value)
    return missing if number is None else f"{number:.{digits}g}".replace("-", minus, 1 if number < 0 else 0)


class _Compared(Protocol):
    @property
    def values(self) -> int: ...
    @property
    def mismatched(self) -> int: ...


def differ(found: _Compared) -> str:
    """Write how many values differ: 3 of 4,096."""
    return f"{count(found.mismatched)} of {count(found.values)}"
