"""The range that holds a given percentage of the values.

source: percentile calibration of Wu et al., Integer Quantization for Deep Learning Inference (2020), section 5.2.
Departs: one order statistic of all values seen, not the mean of the batches' own; interpolated inside its bin instead
of being read at its left edge. Zeros count as values: after a ReLU, 99.999 means 99.998 of the positive half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibrators.options import option
from calibrators.ranges.range_method import RangeMethod

if TYPE_CHECKING:
    from torch import Tensor

    from calibrators.grid.spec import QuantSpec
    from calibrators.ranges.samples import Samples

__all__ = ["Percentile"]


@dataclass(frozen=True)
class Percentile(RangeMethod):
    """Range that holds q percent of the values; of two-sided data, half of the rest is clipped at each end."""

    q: float = option(99.999, "percentage of the values inside the range", minimum=50.0, maximum=100.0)

    def bounds(self, samples: Samples, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        from calibrators.ranges.percentile import percentile_bounds

        return percentile_bounds(samples, spec, self.q)
