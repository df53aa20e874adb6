"""The range that is optimal for a Laplace or Gauss distribution with the observed moments.

source: Banner et al., Post training 4-bit quantization of convolutional networks for rapid-deployment (ACIQ, 2019),
section 2: the expected squared error of clipping at a is, for M bits, 2 b^2 exp(-a/b) + a^2 / (3 * 4^M) under a Laplace
law with mean distance b, and has a similar form under a Gauss law; data after a ReLU count as M + 1 bits.
Departs: the minimum is computed (Lambert's W, a root of the derivative) instead of tabulated; "auto" chooses the law by
mean |x| / std; a symmetric signed grid that sees one sign only has M bits, not M + 1. As in the source the range is cut
into 2^M intervals, which is coarse below 4 bits: prefer mse there.
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

__all__ = ["ACIQ"]


@dataclass(frozen=True)
class ACIQ(RangeMethod):
    """Range that is optimal for a Laplace or Gauss distribution with the observed moments, without a search."""

    law: str = option("auto", "distribution of the values", choices=("auto", "laplace", "gauss"))

    def bounds(self, samples: Samples, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        from calibrators.ranges.aciq import aciq_bounds

        return aciq_bounds(samples, spec, self.law)
