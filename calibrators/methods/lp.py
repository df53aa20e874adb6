"""The range with the least mean |error| ** p of the round trip; see `PowerRange` for the search.

source: Nahshan et al., Loss Aware Post-training Quantization (2019), the Lp norm of the error as the starting point of
their search; p = 2.4 as BRECQ's code fixes it. Departs: the loss of the network is not consulted.
"""

from __future__ import annotations

from dataclasses import dataclass

from calibrators.options import option
from calibrators.ranges.range_method import PowerRange

__all__ = ["Lp"]


@dataclass(frozen=True)
class Lp(PowerRange):
    """Range with the least mean |error| ** p: above 2 it clips less, below 2 more."""

    p: float = option(2.4, "power of the error", minimum=0.5, maximum=8.0)

    @property
    def power(self) -> float:  # type: ignore[override]
        """The option under its general name."""
        return self.p
