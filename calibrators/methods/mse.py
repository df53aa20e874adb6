"""The range with the least mean squared error of the round trip; see `PowerRange` for the search."""

from __future__ import annotations

from dataclasses import dataclass

from calibrators.ranges.range_method import PowerRange

__all__ = ["MSE"]


@dataclass(frozen=True)
class MSE(PowerRange):
    """Range with the least mean squared rounding and clipping error."""

    power = 2.0
