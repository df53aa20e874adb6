"""Block reconstruction under random drop of activation quantization.

source: Wei et al. 2022, "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calibrators.options import option
from calibrators.reconstruction.policy import BlockReconstruction

if TYPE_CHECKING:
    from calibrators.reconstruction.training import Settings

__all__ = ["QDrop"]


@dataclass(frozen=True)
class QDrop(BlockReconstruction):
    """Learned rounding per block, while half of the activations are randomly left unquantized."""

    keep: float = option(0.5, "probability that an activation is quantized while training", minimum=0, maximum=1)

    def settings(self, size: int = 1) -> Settings:
        return replace(super().settings(size), keep=self.keep, input_keep=self.keep)
