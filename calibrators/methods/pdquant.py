"""Reconstruction that also preserves the prediction: a unit's errors are weighed by their effect on the output.

source: Liu et al. 2023, "PD-Quant: Post-Training Quantization based on Prediction Difference Metric" (CVPR).
Departs: the prediction is made from the mixed inputs of reconstruction, not in a second pass, and for a share of every
minibatch, since it runs the rest of the network; outputs that are not logits are compared by their relative squared
error; the prediction trains activation scales alone, because if rounding follows it too, as published (reach=all),
calibration images gain what others lose; correction is off by default, because it costs more than training and also
favoured calibration images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calibrators.methods.qdrop import QDrop
from calibrators.options import option

if TYPE_CHECKING:
    from calibrators.reconstruction.reconstruct import Run
    from calibrators.reconstruction.training import Loss, Unit

__all__ = ["PDQuant"]

DISTANCES = ("auto", "kl", "mse")

REACHES = ("scales", "all")


@dataclass(frozen=True)
class PDQuant(QDrop):
    """QDrop whose units also preserve the network's prediction, through the float network after them."""

    prediction: float = option(0.1, "weight of the difference of predictions next to the unit's own error", minimum=0)
    reach: str = option("scales", "parameters that the prediction trains: activation scales, or all", choices=REACHES)
    distance: str = option("auto", "kl or mse; auto: kl for outputs [n, classes]", choices=DISTANCES)
    temperature: float = option(4.0, "temperature of both predictions in kl", minimum=0.1, maximum=100)
    correct: int = option(0, "steps of distribution correction of every sample; 0: none", minimum=0)
    share: float = option(0.25, "share of a minibatch whose prediction is compared", minimum=0.01, maximum=1)

    def prepare(self, unit: Unit, run: Run) -> Unit:
        """Return the unit with corrected float inputs, and the float outputs for these as targets."""
        if not self.correct or not all(cache.dtype.is_floating_point for cache in unit.float_inputs):
            return unit
        from calibrators.graph.batch_norm import expected_outputs
        from calibrators.reconstruction.input_correction import Correction, Descent

        graph = run.placement.graph
        correction = Correction(graph, unit.block, expected_outputs(graph), Descent(self.correct), run.device)
        if not correction.statistics:
            return unit
        inputs, targets = run.rewritten(unit, correction)
        return replace(unit, float_inputs=inputs, targets=targets)

    def loss(self, unit: Unit, run: Run) -> Loss:
        from calibrators.reconstruction.training import RelativeError, ScaleOnlyLoss, Sum
        from calibrators.reconstruction.unit_losses import Prediction

        own = RelativeError(unit.energy)
        if not self.prediction:
            return own
        downstream = run.downstream(unit, len(run.blocks))
        share = self.share if run.placement.graph.meta["dynamic_batch"] else 1.0
        if not downstream.energy:
            return own
        prediction = Prediction(downstream, self.prediction, self.distance, self.temperature, share)
        return ScaleOnlyLoss(own, prediction) if self.reach == "scales" else Sum(own, prediction)
