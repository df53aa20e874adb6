"""Reconstruction that also keeps the prediction: a unit's errors count by what the float network makes of them.

source: Liu et al. 2023, "PD-Quant: Post-Training Quantization based on Prediction Difference Metric" (CVPR).
Departs: the prediction is that of the mixed inputs which reconstruction sees, not of a second pass, and for a share of
every minibatch, so that the network behind the unit is not the price of the method; outputs that are no logits are
compared by their relative squared error; the prediction trains activation scales alone: where rounding follows it too,
as published (reach=all), calibration images gain what others lose; correction is off by default, for it costs more than
training and served calibration images better than others as well.
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
    """QDrop whose units also keep the network's prediction, through the float network behind them."""

    prediction: float = option(0.1, "weight of the difference of predictions beside the unit's own error", minimum=0)
    reach: str = option(
        "scales", "what follows the prediction: activation scales, or all that is trained", choices=REACHES
    )
    distance: str = option("auto", "kl or mse; auto: kl for outputs [n, classes]", choices=DISTANCES)
    temperature: float = option(4.0, "temperature of both predictions in kl", minimum=0.1, maximum=100)
    correct: int = option(0, "steps of distribution correction of every sample; 0: none", minimum=0)
    share: float = option(0.25, "share of a minibatch whose prediction is compared", minimum=0.01, maximum=1)

    def prepare(self, unit: Unit, run: Run) -> Unit:
        """The unit with corrected float inputs, and what the float unit makes of them as targets."""
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
