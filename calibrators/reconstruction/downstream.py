"""Follow a unit's errors downstream, through the float network from the unit to a later point.

A loss can send the outputs of the unit in training through the following units, in float and frozen, and compare the
values at a later point with those of the float network. Values that bypass the unit come from the network quantized so
far, as the unit's own inputs do.

source: Liu et al. 2023 (PD-Quant), where the later point is the prediction; Zhang et al. 2024 (RepAPQ), across-block
calibration, where it is the end of the stage.

Must not know: methods, losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from calibrators.execution.activation_cache import Cache
from calibrators.execution.blocks import Block, extract, merge
from calibrators.execution.simulation import channels_last, speed_up

__all__ = ["DownstreamTarget", "FrozenUnits"]


class FrozenUnits(torch.nn.Module):
    """Consecutive units of the float network as one frozen module from block.inputs to block.outputs.

    While gradients are computed, operators that mix all channels use the precision of training; otherwise everything is
    float32.
    """

    def __init__(self, graph: fx.GraphModule, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.block = merge(graph, blocks)
        self.graph = extract(graph, self.block).requires_grad_(False)
        for name, buffer in self.graph.named_buffers():
            setattr(self.graph, name, channels_last(buffer))
        self.operators = speed_up(self.graph, self.block.weighted)

    def train_in(self, precision: torch.dtype, gradients: torch.dtype) -> None:
        """Set the precisions of training."""
        for operator in self.operators:
            operator.train_in(precision, gradients)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.train(torch.is_grad_enabled())
        outputs: tuple[Tensor, ...] = self.graph(*inputs)
        return outputs


@dataclass(frozen=True, eq=False)
class DownstreamTarget:
    """Path from a unit's outputs to later values, with the goals for these in the float network.

    units:   the units in between; None where the later values are the unit's own outputs.
    own:     position of each input of `units` among the unit's supervised outputs, by fx name.
    passing: caches of the other inputs of `units`, in the network quantized so far, by fx name.
    supervised: indices of the later values among the outputs of `units`.
    goals:   later values in the float network, all samples; energy: their mean squares.
    """

    units: FrozenUnits | None
    own: Mapping[str, int]
    passing: Mapping[str, Cache]
    supervised: tuple[int, ...]
    goals: tuple[Cache, ...]
    energy: tuple[float, ...]

    def reads(self, index: Tensor) -> list[Tensor]:
        """Return the values that bypass the unit, then the goals, of the samples `index` [n]."""
        return [cache.gather(index) for cache in (*self.passing.values(), *self.goals)]

    def arriving(self, outputs: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the later values [n, ...] and their goals.

        outputs: the unit's supervised outputs; read: the result of `reads` for the same samples, on the same device.
        """
        passing, goals = read[: len(self.passing)], list(read[len(self.passing) :])
        if self.units is None:
            return list(outputs), goals
        values = dict(zip(self.passing, passing, strict=True)) | {name: outputs[i] for name, i in self.own.items()}
        made = self.units(*(values[name] for name in self.units.block.inputs))
        return [made[i] for i in self.supervised], goals
