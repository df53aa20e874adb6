"""The range with the least mean absolute error of the round trip; see `PowerRange` for the search."""

from __future__ import annotations

from dataclasses import dataclass

from calibrators.ranges.range_method import PowerRange

__all__ = ["MAE"]


@dataclass(frozen=True)
class MAE(PowerRange):
    """Range with the least mean absolute rounding and clipping error."""

    power = 1.0
