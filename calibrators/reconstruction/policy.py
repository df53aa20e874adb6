"""The options that reconstruction methods share, in groups, and the hooks that a method may override.

Listing methods imports this module, so it loads no torch: the engine is imported where a method runs.

Must not know: which methods there are, ONNX, runtimes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calibrators.options import Options, option

if TYPE_CHECKING:
    from calibrators.execution.blocks import Block
    from calibrators.execution.task import Problem
    from calibrators.program.freeze import CalibrationResult
    from calibrators.reconstruction.reconstruct import Run
    from calibrators.reconstruction.training import Loss, Settings, Unit

__all__ = ["GRANULARITIES", "BlockReconstruction", "Reconstruction"]

PRESETS = {"fast": 500, "best": 5000}
"""Training steps per unit."""

GRANULARITIES = ("block", "loss", "modcap", "boundary")
"""Which neighbours are joined: none, or those where the loss falls, capacities differ or shapes change."""

PRECISIONS = ("auto", "float32", "bfloat16")

STEP = 8.0
"""Effort of a training step for a sample: each unit computes it forwards and backwards, with quantizers."""


@dataclass(frozen=True)
class TrainingOptions:
    """Steps, learning rates and the regularizer."""

    preset: str = option("fast", "steps per unit: fast 500, best 5000", choices=tuple(PRESETS))
    iters: int = option(
        0, "steps per unit (a joined unit has those of all its members); 0: those of the preset", minimum=0
    )
    batch: int = option(32, "samples per step", minimum=1)
    lr: float = option(0.0, "learning rate of rounding; 0: 10 / iters", minimum=0)
    bias_lr: float = option(0.0, "learning rate of biases, relative to the mean bias; 0: 1 / iters", minimum=0)
    affine: bool = option(
        False, "learn a gain per weight scale, which the scale absorbs (per channel for per-channel weights)"
    )
    affine_lr: float = option(0.0, "learning rate of the logarithm of a gain; 0: 1 / iters", minimum=0)
    strength: float = option(100.0, "weight of the term that drives rounding to 0 or 1", minimum=0)
    warmup: float = option(0.2, "share of the steps before that term acts", minimum=0, maximum=0.9)


@dataclass(frozen=True)
class RangeOptions:
    """Ranges before training."""

    ranges: str = option("mse", "range method for the first activation scales")
    weight_ranges: str = option("mse", "range method for the weights")


@dataclass(frozen=True)
class PrecisionOptions:
    """Arithmetic of training."""

    precision: str = option(
        "auto",
        "arithmetic of training; auto: bfloat16 where that is fast and weights have few bits",
        choices=PRECISIONS,
    )


@dataclass(frozen=True)
class GroupingOptions:
    """Units that are trained jointly."""

    granularity: str = option("block", "which neighbours are trained jointly", choices=GRANULARITIES)
    joined: int = option(0, "number of pairs of neighbours to join; 0: all notable ones", minimum=0)
    group: int = option(3, "largest number of units trained jointly", minimum=1)
    probe: float = option(0.25, "length of the run that measures losses, as a share of iters", minimum=0.01, maximum=1)
    groups: str = option("", "units to train jointly, in place of granularity, such as 2-3,5-7 (counted from 0)")


@dataclass(frozen=True)
class Reconstruction(GroupingOptions, PrecisionOptions, RangeOptions, TrainingOptions, Options):
    """Base of the methods that train rounding unit by unit; here every unit is a layer and scales stay as they are."""

    slow = True

    def fit(self, problem: Problem) -> CalibrationResult:
        """Return the calibrated network."""
        from calibrators.reconstruction.reconstruct import reconstruct

        return reconstruct(problem, self)

    def effort(self, samples: int) -> float:
        return super().effort(samples) + STEP * self.batch * (self.iters or PRESETS[self.preset])

    # Hooks of a method.

    def blocks(self, problem: Problem) -> tuple[Block, ...]:
        """Return the units, in order."""
        from calibrators.execution.blocks import partition

        return partition(problem.placement.graph, problem.placement.weight_of, chain=1, largest=1)

    def settings(self, size: int = 1) -> Settings:
        """Return the settings of a unit that consists of `size` original ones."""
        import torch

        from calibrators.reconstruction.training import Settings

        iters = (self.iters or PRESETS[self.preset]) * size
        precision = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        return Settings(
            iters=iters,
            batch=self.batch,
            lr=self.lr or 10 / iters,
            scale_lr=1 / iters,
            bias_lr=self.bias_lr or 1 / iters,
            gain_lr=(self.affine_lr or 1 / iters) if self.affine else 0.0,
            strength=self.strength,
            warmup=self.warmup,
            keep=0.0,
            input_keep=1.0,
            precision=precision,
            gradients=precision,
        )

    def prepare(self, unit: Unit, run: Run) -> Unit:
        """Return the unit with other float inputs or targets."""
        return unit

    def loss(self, unit: Unit, run: Run) -> Loss:
        """Return the loss that the unit is trained on."""
        from calibrators.reconstruction.training import RelativeError

        return RelativeError(unit.energy)


@dataclass(frozen=True)
class BlockReconstruction(Reconstruction):
    """Base of the methods whose units are blocks, with weights and activations quantized together."""

    scale_lr: float = option(0.0, "learning rate of log activation scales; 0: 1 / iters", minimum=0)
    chain: int = option(3, "layers of a plain chain that form one unit", minimum=1)

    def blocks(self, problem: Problem) -> tuple[Block, ...]:
        from calibrators.execution.blocks import partition

        return partition(problem.placement.graph, problem.placement.weight_of, chain=self.chain)

    def settings(self, size: int = 1) -> Settings:
        settings = super().settings(size)
        return replace(settings, scale_lr=self.scale_lr or 1 / settings.iters, keep=1.0)
