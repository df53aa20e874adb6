"""Reconstruction for reparameterized networks: mean absolute errors, a protecting affine, supervision across blocks.

A folded block sums the gains of its branches; a few channels and samples are far larger than the rest and dominate
squared errors. Three remedies, each with an option:

measure=mae   ranges and reconstruction by the mean absolute error.
affine        one gain and one shift per output channel after every folded layer. Learned gains g = exp(u) multiply the
              weight's scales and leave its codes; shifts are part of the bias: nothing is left to execute.
across        the output of the stage, through the float units that follow, as a second target: the gradient of an
              absolute error gives only a direction, and the units downstream show which errors count.

source: Zhang et al. 2024, "Towards Accurate Post-training Quantization for Reparameterized Models" (arXiv 2402.16121);
the published code has none of the three, so weights and schedules are ours.
Departs: errors relative to the root mean square of the targets; gains in logarithms, hence positive, and one per weight
scale (a weight with one scale for all channels has one gain: gains per channel could not be absorbed exactly there);
weight ranges by squared error, because the absolute error clips the taps of identity branches where these are not wide
(calibrators.placement.identity_taps); stages end where shapes change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibrators.methods.qdrop import QDrop
from calibrators.options import option

if TYPE_CHECKING:
    from calibrators.reconstruction.reconstruct import Run
    from calibrators.reconstruction.training import Loss, Unit

__all__ = ["RepAPQ"]

POWERS = {"mae": 1, "mse": 2}


@dataclass(frozen=True)
class RepAPQ(QDrop):
    """Reconstruction for reparameterized networks: absolute errors, a gain per channel, supervision across blocks."""

    ranges: str = option("mae", "range method for the first activation scales")
    measure: str = option("mae", "error that reconstruction minimizes", choices=tuple(POWERS))
    affine: bool = option(True, "learn a gain per weight scale, which absorbs it (per-channel weights: per channel)")
    across: float = option(1.0, "weight of the error at the end of the stage; 0: the unit's own output only", minimum=0)
    chain: int = option(1, "layers of a plain chain that form one unit", minimum=1)

    def loss(self, unit: Unit, run: Run) -> Loss:
        from calibrators.reconstruction.grouping import stage_ends
        from calibrators.reconstruction.training import RelativeError
        from calibrators.reconstruction.unit_losses import AcrossBlocks

        power = POWERS[self.measure]
        own = RelativeError(unit.energy, power)
        end = stage_ends(run.placement.graph, run.blocks)[run.position]
        if not self.across or end == run.position + 1:  # the unit's own output is that of the stage
            return own
        downstream = run.downstream(unit, end)
        if not downstream.energy:
            return own
        return AcrossBlocks(own, downstream, RelativeError(downstream.energy, power), self.across)
