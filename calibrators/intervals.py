"""Confidence intervals of shares, of differences and of ratios measured on the same samples.

Must not know: where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

__all__ = ["CONFIDENCE", "Interval", "paired_interval", "ratio", "share_interval"]

Array = NDArray[Any]

CONFIDENCE = 0.95
Z = float(ndtri((1 + CONFIDENCE) / 2))
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def share_interval(share: float, samples: int) -> tuple[float, float]:
    """Return the confidence interval of a share of independent samples, which ends at 1 if all of them are right.

    source: E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    z2 = Z**2 / samples
    centre, spread = share + z2 / 2, Z * float(np.sqrt(share * (1 - share) / samples + z2 / (4 * samples)))
    low, high = (centre - spread) / (1 + z2), (centre + spread) / (1 + z2)
    return 0.0 if share == 0 else low, 1.0 if share == 1 else high  # without the rounding of the sums above


def paired_interval(lost: int, gained: int, samples: int) -> tuple[float, float]:
    """Return the confidence interval of a difference of two proportions measured on the same samples.

    lost, gained: number of samples that only the first network gets right, and only the second.
    returns:      bounds of p(first) - p(second), within [-1, 1]; never empty, even for lost = gained = 0.
    source:       Bonett and Price 2012, Adjusted Wald confidence interval for a difference of binomial proportions
                  based on paired data: one sample is added to each discordant cell.
    """
    first, second = (lost + 1) / (samples + 2), (gained + 1) / (samples + 2)
    difference = first - second
    error = Z * float(np.sqrt((first + second - difference**2) / (samples + 2)))
    return max(-1.0, difference - error), min(1.0, difference + error)


def ratio(pairs: Sequence[tuple[Array, Array]], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the ratio of two means over the same samples, with its 95 % paired bootstrap interval.

    pairs: per network the values of a method and of what it is compared with, [n] each, the latter not all zero; of
           several networks it is the geometric mean of their ratios.
    """
    logs = np.zeros(resamples)
    value = 0.0
    with np.errstate(divide="ignore"):  # a method without any divergence has the ratio 0
        for found, reference in pairs:
            means = _resampled_means(np.stack([found, reference], axis=1).astype(np.float64), resamples, seed)
            logs += (np.log(means[:, 0]) - np.log(means[:, 1])) / len(pairs)
            value += float(np.log(found.mean(dtype=np.float64)) - np.log(reference.mean(dtype=np.float64))) / len(pairs)
    low, high = np.quantile(np.exp(logs), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.exp(value)), float(low), float(high))


def _resampled_means(values: Array, resamples: int, seed: int) -> Array:
    """Return means [resamples, k] over samples of [n, k] drawn with replacement; the same draws for the same n."""
    draw, n = np.random.default_rng(seed), len(values)
    counts = (np.bincount(draw.integers(0, n, n), minlength=n) for _ in range(resamples))
    return np.stack([count @ values / n for count in counts])
