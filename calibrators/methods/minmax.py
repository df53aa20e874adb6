"""The observed range.

source: common practice; in onnxruntime, `MinMaxCalibrater` without moving averages.
Departs: none. Nothing is averaged over batches, so the range does not depend on how the data is batched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibrators.ranges.range_method import RangeMethod

if TYPE_CHECKING:
    from torch import Tensor

    from calibrators.grid.spec import QuantSpec
    from calibrators.ranges.samples import Samples

__all__ = ["MinMax"]


@dataclass(frozen=True)
class MinMax(RangeMethod):
    """Range from the smallest to the largest value: nothing is clipped."""

    def bounds(self, samples: Samples, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return samples.lo, samples.hi
