"""Compare two networks sample by sample, on the same samples in the same order.

Must not know: where scores come from, files, what the networks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtri

__all__ = ["Change", "Interval", "SampleScores", "change", "paired_interval", "ratio"]

Array = NDArray[Any]

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class SampleScores:
    """The scores of every held-out sample in the runtime.

    error: [n] float32: divergence of the predictions from the float model's in nats where the first output is logits
           [n, classes], else the energy of the difference of that output from the float model's.
    right: [n] bool, whether the decision is the label; None without labels.
    """

    error: Array
    right: Array | None


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """The difference of two shares on the same samples.

    lost, gained: samples that only the first network gets right, and only the second.
    drop:         share of the first minus share of the second, with its interval.
    p_value:      probability of so uneven a split if both networks were equally good (exact McNemar test).
    """

    samples: int
    lost: int
    gained: int
    drop: Interval
    p_value: float


def change(first: Array, second: Array) -> Change:
    """Return how the second network's decisions differ from the first's; first, second: [n] bool, right or not.

    source: McNemar 1947, Note on the sampling error of the difference between correlated proportions; exact binomial
            form. The interval is that of `paired_interval`.
    """
    lost, gained, samples = int(np.sum(first & ~second)), int(np.sum(second & ~first)), len(first)
    p_value = min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))
    drop = Interval((lost - gained) / max(samples, 1), *paired_interval(lost, gained, samples))
    return Change(samples, lost, gained, drop, p_value)


def paired_interval(lost: int, gained: int, samples: int) -> tuple[float, float]:
    """Return the confidence interval of a difference of two proportions measured on the same samples.

    lost, gained: number of samples that only the first network gets right, and only the second.
    returns:      bounds of p(first) - p(second), within [-1, 1]; never empty, even for lost = gained = 0.
    source:       Bonett and Price 2012, Adjusted Wald confidence interval for a difference of binomial proportions
                  based on paired data: one sample is added to each discordant cell.
    """
    first, second = (lost + 1) / (samples + 2), (gained + 1) / (samples + 2)
    difference = first - second
    error = float(ndtri((1 + CONFIDENCE) / 2)) * float(np.sqrt((first + second - difference**2) / (samples + 2)))
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
