"""Block reconstruction.

source: Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction".
"""

from __future__ import annotations

from dataclasses import dataclass

from calibrators.reconstruct import Reconstruction

__all__ = ["BRECQ"]


@dataclass(frozen=True)
class BRECQ(Reconstruction):
    """Learned rounding per block, weights and activations quantized together."""
