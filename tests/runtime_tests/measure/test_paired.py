"""Scores compared by sample, against other computations of the same figures."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from calibrators.intervals import ratio
from runtime_tests.measure.paired import change


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (7, 2), (3, 3), (40, 61)])
def test_probability_is_that_of_the_exact_test(lost: int, gained: int) -> None:
    first = np.repeat([True, False, True, False], [lost, gained, 20, 5])
    second = np.repeat([False, True, True, False], [lost, gained, 20, 5])
    found = change(first, second)
    assert (found.samples, found.lost, found.gained) == (lost + gained + 25, lost, gained)
    assert found.drop.value == pytest.approx(first.mean() - second.mean())
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-12)
    assert found.drop.low < found.drop.value < found.drop.high


def test_ratio_uses_that_samples_are_the_same() -> None:
    generator = np.random.default_rng(0)
    before = generator.lognormal(0, 2, 500)
    after = before * generator.uniform(0.75, 0.85, 500)
    paired = ratio([(after, before)])
    other = ratio([(after, generator.permutation(before))])
    assert paired.low < paired.value < paired.high < 0.9
    assert other.high - other.low > 10 * (paired.high - paired.low)
