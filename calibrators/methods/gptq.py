"""Hessian rounding: errors of rounded weights are fed into the weights that are still to be rounded.

source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
Departs: convolutions too, by the patches they see, one Hessian per group; inputs come from the network that is
quantized so far, activations included; a sample of the positions of large inputs; what reconstruction.hessian_rounding
says. Of layers that share a weight the first one decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibrators.options import check, option

if TYPE_CHECKING:
    from calibrators.execution.task import Problem
    from calibrators.program.freeze import CalibrationResult

__all__ = ["GPTQ"]


@dataclass(frozen=True)
class GPTQ:
    """Rounding layer by layer that makes later weights undo the errors of earlier ones, without training."""

    damping: float = option(0.01, "added to the diagonal of a Hessian, in means of it", minimum=1e-6, maximum=1)
    act_order: bool = option(False, "round the weights of strong inputs first")
    positions: int = option(32768, "most positions that the Hessian of a layer is taken over", minimum=1)
    ranges: str = option("mse", "range method for the activations")
    weight_ranges: str = option("mse", "range method for the weights")

    def __post_init__(self) -> None:
        check(self)

    def fit(self, problem: Problem) -> CalibrationResult:
        """Return the calibrated network; its record says for every layer how much of its output's error is left."""
        from calibrators.reconstruction.layer_rounding import round_layers

        return round_layers(problem, self)
