"""Order statistics of weighted samples.

Must not know: methods, graphs.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from calibrators.grid.spec import QuantSpec
from calibrators.ranges.samples import Samples

__all__ = ["order_statistic", "percentile_bounds"]


def percentile_bounds(samples: Samples, spec: QuantSpec, q: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the range that holds `q` percent of the values, float64 [rows] each."""
    tail = (100 - Fraction(str(q))) / 100 * samples.total

    def ranks(shared: Tensor) -> Tensor:
        """Return the rank of the upper end, int64 [rows]: half of the tail is left out where two ends share it."""
        return torch.where(shared, samples.total - tail // 2, samples.total - tail // 1)

    if spec.symmetric:
        magnitudes = samples.magnitudes()
        reach = order_statistic(magnitudes, ranks(magnitudes.crosses_zero))
        return -reach, reach
    upper = ranks(samples.crosses_zero)
    return -order_statistic(samples.negated(), upper), order_statistic(samples, upper)


def order_statistic(samples: Samples, ranks: Tensor) -> Tensor:
    """Return the value of rank `ranks` (1 is the smallest) in each row, float64 [rows], within the row's extremes.

    The values of a bin count as spread evenly over it.
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
