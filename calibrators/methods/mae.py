"""The range with the least mean absolute error of the round trip.

source: grid search over the clipping range as in BRECQ's code (Li et al., 2021: 80 fractions) and MQBench's observer.
Departs: golden section after the grid; both ends searched separately where the grid is asymmetric; errors of an
activation are taken over all batches at once, at the bin centres of its statistic; exact zeros cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from calibrators.grid.spec import QuantSpec
from calibrators.ranges.range_method import RangeMethod, Samples
from calibrators.ranges.range_search import lp_bounds

__all__ = ["MAE"]


@dataclass(frozen=True)
class MAE(RangeMethod):
    """Range with the least mean absolute rounding and clipping error."""

    def bounds(self, samples: Samples, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return lp_bounds(samples, spec, 1.0)
