"""Compare two networks sample by sample, on the same samples in the same order.

Must not know: where scores come from, files, what the networks are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from calibrators.intervals import Interval, paired_interval

__all__ = ["Change", "SampleScores", "change"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class SampleScores:
    """The scores of every held-out sample in the runtime.

    error: [n] float32: divergence of the predictions from the float model's in nats where the first output is logits
           [n, classes]; 1 where the class index that it is differs from the float model's; else the energy of the
           difference of that output from the float model's.
    right: [n] bool, whether the decision is the label; None without labels.
    """

    error: Array
    right: Array | None


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
