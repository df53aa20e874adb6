"""Mixed reconstruction granularity: neighbours whose error oscillates are reconstructed jointly.

source: Ma et al. 2023, "Solving Oscillation Problem in Post-Training Quantization Through a Theoretical Perspective".
Departs: the groups are selected (calibrators.reconstruction.grouping), by the losses of a short run by default.
"""

from __future__ import annotations

from dataclasses import dataclass

from calibrators.methods.qdrop import QDrop
from calibrators.options import option
from calibrators.reconstruction.policy import GRANULARITIES

__all__ = ["MRECG"]


@dataclass(frozen=True)
class MRECG(QDrop):
    """Learned rounding, with neighbouring blocks trained jointly where the error oscillates."""

    granularity: str = option("loss", "which neighbours are trained jointly", choices=GRANULARITIES)
    keep: float = option(0.5, "probability that an activation is quantized; 1: BRECQ's base", minimum=0, maximum=1)
