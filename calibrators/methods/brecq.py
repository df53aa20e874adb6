"""Block reconstruction.

source: Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction".
Departs: rounding and activation scales are trained together, as later work compares with it; the Fisher weights are
computed as described in calibrators.reconstruction.fisher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibrators.options import option
from calibrators.reconstruction.policy import BlockReconstruction

if TYPE_CHECKING:
    from calibrators.reconstruction.reconstruct import Run
    from calibrators.reconstruction.training import Loss, Unit

__all__ = ["BRECQ"]


@dataclass(frozen=True)
class BRECQ(BlockReconstruction):
    """Learned rounding per block, weights and activations quantized together."""

    fisher: bool = option(False, "weigh errors by the squared gradient of the prediction")

    def loss(self, unit: Unit, run: Run) -> Loss:
        from calibrators.reconstruction.unit_losses import fisher_weighted

        return fisher_weighted(unit, run) if self.fisher else super().loss(unit, run)
