"""Quantities that metrics of the report measure: the units in which limits may be given, and how values are written.

Must not know: metrics, reports, pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Final, Literal

from exporter.reporting.number_format import significant, size

__all__ = ["Quantity", "units_of", "written"]

Quantity = Literal["number", "share", "points", "bytes", "ms", "dB"]
"""share: from 0 to 1; points: the difference of two shares."""

_SHARES: Final = {"%": Decimal("0.01"), "pp": Decimal("0.01")}
_UNITS: Final[Mapping[Quantity, Mapping[str, Decimal]]] = {
    "number": _SHARES,
    "share": _SHARES,
    "points": _SHARES,
    "bytes": {
        **{unit: Decimal(1000**power) for power, unit in enumerate(("B", "kB", "MB", "GB"))},
        **{unit: Decimal(1024**power) for power, unit in enumerate(("KiB", "MiB", "GiB"), start=1)},
    },
    "ms": {"us": Decimal("0.001"), "ms": Decimal(1), "s": Decimal(1000)},
    "dB": {"dB": Decimal(1)},
}
"""The units of a limit, each in the unit of the report."""

DIGITS: Final = 6
_WRITTEN: Final[Mapping[Quantity, tuple[float, str, int]]] = {
    "number": (1, "", DIGITS),
    "share": (100, " %", DIGITS),
    "points": (100, " points", 3),
    "ms": (1, " ms", 4),
    "dB": (1, " dB", 4),
}
"""Factor, unit and significant digits."""


def units_of(quantity: Quantity) -> Mapping[str, Decimal]:
    """Return the units of a quantity, each with its factor to the unit of the report."""
    return _UNITS[quantity]


def written(value: float | None, quantity: Quantity) -> str:
    """Write a value with its unit: 300000 bytes -> 300 kB; None is not measured."""
    if value is None:
        return "not measured"
    if quantity == "bytes":
        return size(value, DIGITS)
    factor, unit, digits = _WRITTEN[quantity]
    rounded = round(value * factor, 9) if math.isfinite(value) else value  # 0.07 * 100 is not 7
    return f"{significant(rounded, digits)}{unit.removesuffix('s') if rounded == 1 else unit}"
