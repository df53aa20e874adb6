"""Scores against values worked out by hand, and paired intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scores import divergence, score, standard_error

from calibrators.intervals import Interval, ratio


def logits(*rows: tuple[float, ...]) -> np.ndarray:
    """Logits [n, classes] whose softmax are these probabilities."""
    return np.log(np.array(rows))


def test_divergence_of_two_coins() -> None:
    exact, found = logits((0.5, 0.5), (0.25, 0.75)), logits((0.25, 0.75), (0.25, 0.75))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(divergence(exact, found), [expected, 0.0], atol=1e-15)


def test_divergence_leaves_out_impossible_classes() -> None:
    exact, found = np.array([[0.0, 0.0, -np.inf]]), np.array([[0.0, 0.0, 0.0]])
    np.testing.assert_allclose(divergence(exact, found), [np.log(1.5)])


def test_divergence_of_sequences_is_the_mean_over_positions() -> None:
    exact, found = logits((0.5, 0.5), (0.5, 0.5))[None], logits((0.5, 0.5), (0.25, 0.75))[None]
    one = divergence(exact[0], found[0])[1]
    np.testing.assert_allclose(divergence(exact, found), [one / 2])


def test_scores_of_a_classifier() -> None:
    exact, found = np.eye(3)[[0, 1, 2, 0]] * 2, np.eye(3)[[0, 1, 1, 0]] * 2
    labels = np.array([0, 1, 1, 2])
    batches = [((exact[part],), (found[part],), labels[part]) for part in (slice(0, 3), slice(3, 4))]
    result = score(batches)
    assert (result.float_top1, result.top1, result.agreement) == (0.5, 0.75, 0.75)
    assert result.noise == pytest.approx(8 / 16)
    assert result.per_sample.gain is not None and result.per_sample.gain.tolist() == [0, 0, 1, 0]
    assert result.per_sample.kl is not None and result.per_sample.kl.dtype == np.float32
    assert (result.per_sample.kl > 0).tolist() == [False, False, True, False]


def test_outputs_without_classes_have_only_noise() -> None:
    result = score([((np.array([[3.0], [4.0]]),), (np.array([[3.0], [4.5]]),), np.array([0, 0]))])
    assert result.noise == pytest.approx(0.25 / 25)
    assert (result.float_top1, result.top1, result.agreement) == (None, None, None)
    assert (result.per_sample.kl, result.per_sample.gain) == (None, None)


def test_several_outputs() -> None:
    """A head of two classes, a regressed number, and indices that are no floats."""
    exact = (logits((0.5, 0.5)), np.array([[1.0]]), np.array([[7, 7]]))
    found = (logits((0.25, 0.75)), np.array([[2.0]]), np.array([[7, 8]]))
    result = score([(exact, found, None)])
    np.testing.assert_allclose(result.per_sample.kl, divergence(exact[0], found[0]), rtol=1e-6)
    signal = float(np.sum(exact[0] ** 2)) + 1
    assert result.noise == pytest.approx((float(np.sum((exact[0] - found[0]) ** 2)) + 1) / signal)


def test_standard_error() -> None:
    assert standard_error(np.array([1, 0, -1, 0])) == pytest.approx(np.sqrt(2 / 3) / 2)
    assert standard_error(np.array([1])) == 0


def test_a_constant_ratio_has_no_interval() -> None:
    reference = np.random.default_rng(0).exponential(size=50)
    found = ratio([(reference / 4, reference)], resamples=20)
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_is_paired() -> None:
    """Samples differ a hundredfold, ratios by a few percent: only pairs tell the difference."""
    draw = np.random.default_rng(0)
    reference = np.exp(draw.normal(size=400) * 2)
    found = reference * draw.uniform(0.85, 0.95, 400)
    paired = ratio([(found, reference)])
    unpaired = ratio([(draw.permutation(found), reference)])
    assert paired.low < 0.9 < paired.high < 0.95
    assert unpaired.high - unpaired.low > 10 * (paired.high - paired.low)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """95 % of 100 trials, short of which a bootstrap of 60 skewed samples may fall by a few."""
    draw, covered = np.random.default_rng(0), 0
    for _ in range(100):
        reference = draw.exponential(size=60)
        found = ratio([(reference * draw.uniform(0.4, 0.6, 60), reference)], resamples=200)
        covered += found.low <= 0.5 <= found.high
    assert 87 <= covered <= 100


def test_geometric_mean_over_networks() -> None:
    ones = np.ones(10)
    assert ratio([(4 * ones, ones), (ones, ones)], resamples=10).value == pytest.approx(2.0)


def test_no_divergence_at_all_has_the_ratio_zero() -> None:
    assert ratio([(np.zeros(5), np.ones(5))], resamples=10) == Interval(0.0, 0.0, 0.0)
