"""The range with the least mean |error| ** p of the round trip.

source: Nahshan et al., Loss Aware Post-training Quantization (2019), the Lp norm of the error as the starting point of
their search; p = 2.4 as BRECQ's code fixes it.
Departs: grid and golden section, see `mse`; the loss of the network is not consulted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from calibrators.grid.spec import QuantSpec
from calibrators.options import option
from calibrators.ranges.range_method import RangeMethod, Samples
from calibrators.ranges.range_search import lp_bounds

__all__ = ["Lp"]


@dataclass(frozen=True)
class Lp(RangeMethod):
    """Range with the least mean |error| ** p: above 2 it clips less, below 2 more."""

    p: float = option(2.4, "power of the error", minimum=0.5, maximum=8.0)

    def bounds(self, samples: Samples, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return lp_bounds(samples, spec, self.p)
