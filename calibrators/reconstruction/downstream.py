"""What a unit's errors do farther on: the float network from behind the unit to a later place.

A loss that looks ahead sends the outputs of the unit in training through the following units as they were, frozen, and
compares what arrives with what arrives in the float network. Values that pass the unit by come from the network that
is quantized so far, as the unit's own inputs do.

source: Liu et al. 2023 (PD-Quant), where the way leads to the prediction; Zhang et al. 2024 (RepAPQ), across-block
calibration, where it ends with the stage.

Must not know: methods, which losses there are.
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
    """Consecutive units of the float network as one frozen module; takes block.inputs, returns block.outputs.

    While gradients flow, operators that mix all channels compute in `precision`; else everything is float32.
    """

    def __init__(self, graph: fx.GraphModule, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.block = merge(graph, blocks)
        self.graph = extract(graph, self.block).requires_grad_(False)
        for name, buffer in self.graph.named_buffers():
            setattr(self.graph, name, channels_last(buffer))
        self.operators = speed_up(self.graph, self.block.weighted)

    def train_in(self, precision: torch.dtype) -> None:
        """The precision of training."""
        for operator in self.operators:
            operator.train_in(precision)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.train(torch.is_grad_enabled())
        outputs: tuple[Tensor, ...] = self.graph(*inputs)
        return outputs


@dataclass(frozen=True, eq=False)
class DownstreamTarget:
    """The way from a unit's outputs to later values, and what these are in the float network.

    units:   what lies between; None where the unit itself makes the values.
    own:     position of each input of `units` among the unit's supervised outputs, by fx name.
    passing: caches of its other inputs in the network that is quantized so far, by fx name.
    supervised: which outputs of `units` are the later values.
    goals:   float values, all samples; energy: their mean squares.
    """

    units: FrozenUnits | None
    own: Mapping[str, int]
    passing: Mapping[str, Cache]
    supervised: tuple[int, ...]
    goals: tuple[Cache, ...]
    energy: tuple[float, ...]

    def reads(self, index: Tensor) -> list[Tensor]:
        """What passes the unit by, and the float values that should arrive, of the samples `index` [n]."""
        return [cache.gather(index) for cache in (*self.passing.values(), *self.goals)]

    def arriving(self, outputs: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The later values [n, ...] and what they are in the float network.

        outputs: the unit's supervised outputs; read: what it `reads` of the same samples, on the same device.
        """
        passing, goals = read[: len(self.passing)], list(read[len(self.passing) :])
        if self.units is None:
            return list(outputs), goals
        values = dict(zip(self.passing, passing, strict=True)) | {name: outputs[i] for name, i in self.own.items()}
        made = self.units(*(values[name] for name in self.units.block.inputs))
        return [made[i] for i in self.supervised], goals
