"""The range whose quantized histogram diverges least from the observed one.

source: Migacz, 8-bit inference with TensorRT (GTC 2017): for every threshold, P is the histogram inside it with the
clipped mass added to its end bins, Q the histogram inside it without that mass, averaged over the non-empty bins of
each level; the threshold with the least KL(P, Q) wins.
Departs: exact zeros are left out (every grid represents them, and after a ReLU they would dominate); a share of
Q's mass is spread evenly over all bins, so that KL is finite where clipped mass falls into an empty bin; levels follow
from the bits and from the signs that occur; asymmetric grids search both ends; thresholds are fractions of the range.
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

__all__ = ["Entropy"]


@dataclass(frozen=True)
class Entropy(RangeMethod):
    """Range with the least KL divergence between the observed and the quantized histogram."""

    smoothing: float = option(1e-4, "share of the quantized mass spread over all bins", minimum=1e-9, maximum=0.1)

    def bounds(self, samples: Samples, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        from calibrators.ranges.entropy import entropy_bounds

        return entropy_bounds(samples, spec, self.smoothing)
