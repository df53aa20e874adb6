"""Distribution correction: adjust the float inputs of a unit until its channels have the training set's statistics.

A few calibration samples do not represent the training set, but batch norms hold its statistics, which were kept for
the values inside a unit when the norms were folded (calibrators.graph.batch_norm).

source: Liu et al. 2023 (PD-Quant), distribution correction.
Departs: on the folded network, where the mean and deviation of a value after a batch norm are its shift and gain; where
branches were added, only the mean is known. Errors are in units of that deviation and the distance from the original in
units of the input's energy, so that no weight depends on the architecture; the number of steps is fixed, and samples do
not influence each other.

Must not know: methods, quantization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from calibrators.execution.blocks import Block, extract
from calibrators.graph.aten import to_device
from calibrators.graph.batch_norm import Expected
from calibrators.grid.metrics import relative_error

__all__ = ["Correction", "Descent"]

LEAST_CELLS = 16
"""Fewest positions of a feature map at which the statistics of one sample are meaningful."""

LEAST_GAIN = 0.1
"""Floor of the gains as a share of their mean, so that nearly constant channels do not dominate."""


class _Statistics:
    """Expected statistics of one value, on a device."""

    def __init__(self, expected: Expected, spread: Tensor, device: torch.device) -> None:
        self.mean = expected.mean.float().to(device)
        self.std = None if expected.std is None else expected.std.float().to(device)
        self.unit = spread.float().clamp(min=LEAST_GAIN * float(spread.mean())).to(device)

    def mismatch(self, y: Tensor) -> Tensor:
        """Return per sample [n] how far a value [n, channels, ...] is from its statistics, in deviations."""
        cells = y.flatten(2)
        error = ((cells.mean(2) - self.mean) / self.unit).square().mean(1)
        if self.std is None:
            return error
        return error + ((cells.std(2) - self.std) / self.unit).square().mean(1)


@dataclass(frozen=True)
class Descent:
    """Settings of the correction.

    steps:    of Adam; rate: its learning rate in root mean squares of the input, falling to 0.
    fidelity: weight of the squared distance from the original input, in units of its energy.
    """

    steps: int
    rate: float = 0.02
    fidelity: float = 1.0


class Correction:
    """Corrects the inputs of one unit; `expected` holds statistics by the fx name of a value."""

    def __init__(
        self,
        graph: fx.GraphModule,
        block: Block,
        expected: Mapping[str, Expected],
        descent: Descent,
        device: torch.device,
    ) -> None:
        nodes = {node.name: node for node in graph.graph.nodes}
        self.statistics = {
            name: _Statistics(expected[name], spread, device)
            for name in block.nodes
            if name in expected and (spread := expected[name].spread) is not None and _has_maps(nodes[name])
        }
        self.outputs = len(block.outputs)
        watched = replace(block, outputs=(*block.outputs, *self.statistics))
        self.graph = to_device(extract(graph, watched), device).requires_grad_(False)
        self.descent = descent

    def mismatch(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the mean mismatch of the values with known statistics, per sample [n]."""
        values = self.graph(*inputs)[self.outputs :]
        return torch.stack([s.mismatch(y) for s, y in zip(self.statistics.values(), values, strict=True)]).mean(0)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return corrected inputs [n, ...] and the unit's float outputs for them."""
        how = self.descent
        energy = [float(x.square().mean().clamp(min=1e-30)) for x in inputs]
        changed = [x.clone().requires_grad_() for x in inputs]
        optimizer = torch.optim.Adam([{"params": [x], "lr": 0.0} for x in changed])
        with torch.enable_grad():
            for step in range(how.steps):
                for group, e in zip(optimizer.param_groups, energy, strict=True):
                    group["lr"] = how.rate * e**0.5 * (1 - step / how.steps)
                optimizer.zero_grad()
                kept = _distance(changed, inputs, energy)
                (self.mismatch(changed) + how.fidelity * kept).sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        corrected = [x.detach() for x in changed]
        with torch.no_grad():
            return corrected, list(self.graph(*corrected)[: self.outputs])


def _distance(changed: Iterable[Tensor], inputs: Iterable[Tensor], energy: Iterable[float]) -> Tensor:
    """Return the mean squared change of each sample over the energy of each input, summed over the inputs, [n]."""
    triples = zip(changed, inputs, energy, strict=True)
    return torch.stack([relative_error(x, y, e) for x, y, e in triples]).sum(0)


def _has_maps(node: fx.Node) -> bool:
    shape = node.meta["tensor_meta"].shape
    return len(shape) > 2 and int(shape[2:].numel()) >= LEAST_CELLS
