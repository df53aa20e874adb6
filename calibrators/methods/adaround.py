"""Learned rounding layer by layer.

source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", section 3.
Departs: layers see inputs that are quantized already (activations inside a layer, and its target, are float as in the
paper); loss and regularizer are relative (calibrators.reconstruction.reconstruct).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from calibrators.execution.blocks import Block, partition
from calibrators.execution.task import Problem
from calibrators.reconstruction.reconstruct import Reconstruction
from calibrators.reconstruction.training import Settings

__all__ = ["AdaRound"]


@dataclass(frozen=True)
class AdaRound(Reconstruction):
    """Learned rounding per layer; activation scales stay as the range method chose them."""

    def blocks(self, problem: Problem) -> tuple[Block, ...]:
        return partition(problem.placement.graph, problem.placement.weight_of, chain=1, largest=1)

    def settings(self, size: int = 1) -> Settings:
        return replace(super().settings(size), keep=0.0)
