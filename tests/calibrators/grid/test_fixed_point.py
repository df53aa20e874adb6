"""Products in fixed point agree with the formulas of gemmlowp, computed number by number in Python's integers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calibrators.grid.fixed_point import FixedPoint, half_away


def truncated(numerator: int, denominator: int) -> int:
    """Divide as C does."""
    quotient = abs(numerator) // denominator
    return quotient if numerator >= 0 else -quotient


def doubling_high_mul(a: int, b: int) -> int:
    product = a * b
    return truncated(product + (2**30 if product >= 0 else 1 - 2**30), 2**31)


def divide_by_power(x: int, exponent: int) -> int:
    mask = (1 << exponent) - 1
    return (x >> exponent) + ((x & mask) > (mask >> 1) + (x < 0))


def multiplied(x: int, ratio: float) -> int:
    """Multiply as MultiplyByQuantizedMultiplier does, with two roundings."""
    fraction, shift = math.frexp(ratio)
    significand = math.floor(fraction * 2**31 + 0.5)
    if significand == 2**31:
        significand, shift = significand // 2, shift + 1
    return divide_by_power(doubling_high_mul(x << max(shift, 0), significand), max(-shift, 0))


RATIOS = [0.5, 0.75, 1.0, 3.0, 1 - 2.0**-40, 2.0**-7, 0.00137, 0.0421, 0.9999, 1.7, 1e-5]


@pytest.mark.parametrize("ratio", RATIOS)
def test_products_are_those_of_gemmlowp(ratio: float) -> None:
    values = np.r_[-300:301, np.random.default_rng(0).integers(-(2**24), 2**24, 500)]
    found = FixedPoint.of(ratio).scaled(values)
    assert found.tolist() == [multiplied(int(x), ratio) for x in values]


def test_each_channel_has_a_ratio_of_its_own() -> None:
    values = np.arange(-5000, 5000).reshape(-1, 1) * np.ones(len(RATIOS), np.int64)
    found = FixedPoint.of(RATIOS).scaled(values)
    for column, ratio in zip(found.T, RATIOS, strict=True):
        assert np.array_equal(column, FixedPoint.of(ratio).scaled(values[:, 0]))


def test_two_roundings_are_not_one() -> None:
    """0.4999 of a step becomes half of one by the first rounding, and a whole one by the second."""
    values, ratio = np.arange(-(2**16), 2**16), 0.0047
    once = np.floor(values * ratio + 0.5)
    differing = FixedPoint.of(ratio).scaled(values) != once
    assert 1e-4 < differing.mean() < 1e-2


def test_ratios_that_are_too_small_vanish() -> None:
    assert not FixedPoint.of(2.0**-33).scaled(np.array([-(2**31), 2**31 - 1])).any()


def test_a_mean_divides_the_significand() -> None:
    sums = np.arange(-9000, 9000)
    found = FixedPoint.of(0.731).divided(49).scaled(sums)
    clear = np.abs(sums * 0.731 / 49 - np.floor(sums * 0.731 / 49) - 0.5) > 2.0**-6  # half a unit of the first rounding
    assert clear.mean() > 0.9 and np.array_equal(found[clear], np.rint(sums * 0.731 / 49)[clear])


def test_halves_go_away_from_zero() -> None:
    values = np.array([-2.5, -1.5, -0.5, -0.49999999999999994, 0.0, 0.49999999999999994, 0.5, 1.5, 2.5, 2.4])
    assert half_away(values).tolist() == [-3, -2, -1, 0, 0, 0, 1, 2, 3, 2]
