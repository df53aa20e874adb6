"""Hessian rounding: the errors of rounded weights are passed on to the weights that are still to be rounded.

source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
Departs: convolutions too, by the patches they read, one Hessian per group; inputs come from the network quantized so
far, activations included; large inputs are sampled by position; see also reconstruction.hessian_rounding. Of the layers
that share a weight, the first one decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibrators.options import Options, option

if TYPE_CHECKING:
    from calibrators.execution.task import Problem
    from calibrators.program.freeze import CalibrationResult

__all__ = ["GPTQ"]

LAYERS = 4.0
"""Effort of rounding layer by layer, relative to ranges alone."""


@dataclass(frozen=True)
class GPTQ(Options):
    """Rounding towards the float output, layer by layer: later weights make up for the errors of earlier ones."""

    parallel = True

    damping: float = option(0.01, "added to the diagonal of a Hessian, in means of it", minimum=1e-6, maximum=1)
    output_target: str = option(
        "float",
        "output that rounding aims at: the float network's, or the quantized one's",
        choices=("float", "quantized"),
    )
    ridge: float = option(0.01, "as damping, of the step towards the float output", minimum=1e-6, maximum=1)
    act_order: bool = option(True, "round the weights of strong inputs first")
    sweeps: int = option(3, "how often every code is chosen again, given all others", minimum=0)
    positions: int = option(16384, "largest number of positions that the Hessian of a layer is measured on", minimum=1)
    ranges: str = option("mse", "range method for the activations")
    weight_ranges: str = option("mse", "range method for the weights")

    def effort(self, samples: int) -> float:
        return LAYERS * super().effort(samples)

    def fit(self, problem: Problem) -> CalibrationResult:
        """Return the calibrated network, with the remaining error of every layer in its record."""
        from calibrators.reconstruction.layer_rounding import round_layers

        return round_layers(problem, self)
