"""Products with fixed-point numbers of 31 bits, rounded twice, as TensorFlow Lite's reference kernels compute them.

    scaled(v) = round(round(v * 2**left * m / 2**31) / 2**right)      ratio ~ m / 2**31 * 2**(left - right)

The first rounding takes halves up, the second away from 0 (`SaturatingRoundingDoublingHighMul`,
`RoundingDivideByPOT` of gemmlowp).

Must not know: kernels, grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FixedPoint", "half_away"]

Array = NDArray[Any]

BITS = 31
SMALLEST = -31
"""Exponent below which a ratio is 0."""


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Positive numbers as significand * 2**(exponent - 31), int64; significands have 31 bits."""

    significand: Array
    exponent: Array

    @classmethod
    def of(cls, ratio: Any) -> FixedPoint:
        """Return the nearest fixed-point numbers to float64 ones."""
        fraction, power = np.frexp(np.asarray(ratio, np.float64))
        significand, exponent = half_away(fraction * 2.0**BITS).astype(np.int64), power.astype(np.int64)
        carried = significand == 2**BITS
        significand, exponent = np.where(carried, significand // 2, significand), exponent + carried
        vanishes = exponent < SMALLEST
        return cls(np.where(vanishes, 0, significand), np.where(vanishes, 0, exponent))

    def divided(self, count: int) -> FixedPoint:
        """Return the numbers as a mean multiplies by them: divided by a count, the significand rounded down."""
        shift = np.minimum(count.bit_length() - 1, BITS + self.exponent)
        return FixedPoint((self.significand << shift) // count, self.exponent - shift)

    def scaled(self, values: Array) -> Array:
        """Return products with integers of 32 bits, int64."""
        left, right = np.maximum(self.exponent, 0), np.maximum(-self.exponent, 0)
        products: Array = ((values.astype(np.int64) << left) * self.significand + 2 ** (BITS - 1)) >> BITS
        products += ((1 << right) >> 1) - ((products < 0) & (right > 0))
        products >>= right
        return products


def half_away(values: Array) -> Array:
    """Round float64 numbers, halves away from 0."""
    whole: Array = np.trunc(values)
    whole += np.copysign(np.abs(values - whole) >= 0.5, values)
    return whole
