"""The range that holds a given percentage of the values.

source: percentile calibration of Wu et al., Integer Quantization for Deep Learning Inference (2020), section 5.2.
Departs: one order statistic of all values seen, not the mean of the batches' own; interpolated inside its bin instead
of taken at the bin's left edge. Zeros count as values: after a ReLU, 99.999 means 99.998 of the positive half.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from calibrators.grid.spec import QuantSpec
from calibrators.options import option
from calibrators.ranges.range_method import RangeMethod, Samples

__all__ = ["Percentile"]


@dataclass(frozen=True)
class Percentile(RangeMethod):
    """Range that holds q percent of the values; two-sided data lose half of the rest at each end."""

    q: float = option(99.999, "percentage of the values inside the range", minimum=50.0, maximum=100.0)

    def bounds(self, samples: Samples, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        if spec.symmetric:
            magnitudes = samples.magnitudes()
            reach = order_statistic(magnitudes, self._ranks(samples.total, magnitudes.crosses_zero))
            return -reach, reach
        ranks = self._ranks(samples.total, samples.crosses_zero)
        return -order_statistic(samples.negated(), ranks), order_statistic(samples, ranks)

    def _ranks(self, total: int, shared: Tensor) -> Tensor:
        """Rank of the upper end: ceil(q * total), or with half of the tail where `shared` by two ends; int64 [rows]."""
        tail = (100 - Fraction(str(self.q))) / 100 * total
        return torch.where(shared, total - tail // 2, total - tail // 1)


def order_statistic(samples: Samples, ranks: Tensor) -> Tensor:
    """Value of rank `ranks` (1 is the smallest) in each row, float64 [rows], within the row's extremes.

    The values of a bin are taken as spread evenly over it.
    """
    values, order = samples.values.to(torch.float64).sort(dim=-1)  # [rows, n]
    counts = samples.counts.to(torch.float64).expand_as(values).gather(-1, order)
    reached = counts.cumsum(-1)
    ranks = ranks.to(torch.float64)[:, None]  # [rows, 1]
    at = torch.searchsorted(reached, ranks).clamp(max=values.shape[-1] - 1)
    value, count, upto = (t.gather(-1, at) for t in (values, counts, reached))
    inside = (ranks - (upto - count) - 0.5) / count - 0.5  # position in the bin, from -1/2 to 1/2
    spread = torch.where(value == 0.0, 0.0, samples.width)
    return (value + inside * spread)[:, 0].clamp(samples.lo, samples.hi)
