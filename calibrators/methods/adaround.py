"""Learned rounding layer by layer.

source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", section 3.
Departs: layers see inputs that are quantized already (activations inside a layer, and its target, are float as in the
paper); loss and regularizer are relative (calibrators.reconstruction.reconstruct).
"""

from __future__ import annotations

from dataclasses import dataclass

from calibrators.reconstruction.policy import Reconstruction

__all__ = ["AdaRound"]


@dataclass(frozen=True)
class AdaRound(Reconstruction):
    """Learned rounding per layer; activation scales stay as the range method chose them."""
