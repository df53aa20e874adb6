"""Block reconstruction.

source: Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction".
Departs: rounding and activation scales are trained together, as later work compares with it; the Fisher weights are
computed as calibrators.reconstruction.fisher says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibrators.options import option
from calibrators.reconstruction.fisher import Importance, importances
from calibrators.reconstruction.reconstruct import Reconstruction, Run
from calibrators.reconstruction.training import Loss, RelativeError, Unit

__all__ = ["BRECQ"]


@dataclass(frozen=True)
class BRECQ(Reconstruction):
    """Learned rounding per block, weights and activations quantized together."""

    fisher: bool = option(False, "weigh errors by the squared gradient of the prediction")

    def loss(self, unit: Unit, run: Run) -> Loss:
        if not self.fisher:
            return RelativeError(unit.energy)
        crossing = [name for block in run.blocks for name in block.outputs]
        weights = run.once("fisher", lambda: _importances(run, crossing))
        found = [weights.get(unit.block.outputs[i]) for i in unit.supervised]
        return _FisherWeightedLoss(
            unit.energy, [replace(w, elements=w.elements.to(run.device)) if w else None for w in found]
        )


def _importances(run: Run, names: list[str]) -> Mapping[str, Importance]:
    graph = run.placement.graph
    returned = {node.name for node in graph.graph.output_node().all_input_nodes}
    inputs = tuple(run.floats[node.name] for node in graph.graph.nodes if node.op == "placeholder")
    batches = (tuple(x.cpu() for x in chunk) for chunk in run.chunks(inputs))
    generator = run.problem.generator("fisher")
    return importances(graph, [n for n in names if n not in returned], batches, generator)


@dataclass(frozen=True)
class _FisherWeightedLoss:
    """Relative squared error, every element weighed by its importance; outputs of the network itself are not."""

    energy: tuple[float, ...]
    importance: Sequence[Importance | None]

    def reads(self, index: Tensor) -> Sequence[Tensor]:
        return [importance.samples[index] for importance in self.importance if importance is not None]

    def __call__(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], read: Sequence[Tensor]) -> Tensor:
        errors, samples = [], iter(read)
        for y, target, energy, importance in zip(outputs, targets, self.energy, self.importance, strict=True):
            square = (y - target).square()
            if importance is not None:
                square = square * importance.elements
                square = square.reshape(len(square), -1).mean(1) * next(samples)
            errors.append(square.mean() / energy)
        return torch.stack(errors).mean()
