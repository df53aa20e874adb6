"""Losses of a unit other than its squared error: weighted by importance, across blocks, on the prediction.

Must not know: which methods there are, ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibrators.execution.losses import is_logits, kl_divergence
from calibrators.grid.metrics import relative_error
from calibrators.reconstruction.downstream import DownstreamTarget
from calibrators.reconstruction.fisher import Importance, importances
from calibrators.reconstruction.reconstruct import Run
from calibrators.reconstruction.training import RelativeError, Unit

__all__ = ["AcrossBlocks", "FisherWeightedLoss", "Prediction", "fisher_weighted"]


def fisher_weighted(unit: Unit, run: Run) -> FisherWeightedLoss:
    """Return the loss of a unit with the Fisher weights of its outputs, which are computed once per run."""
    crossing = [name for block in run.blocks for name in block.outputs]
    weights = run.once("fisher", lambda: _importances(run, crossing))
    found = [weights.get(unit.block.outputs[i]) for i in unit.supervised]
    return FisherWeightedLoss(
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
class FisherWeightedLoss:
    """Relative squared error weighted by importance, except for the outputs of the network itself."""

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


@dataclass(frozen=True)
class AcrossBlocks:
    """Error of the unit plus `weight` times the error it makes at the end of its stage."""

    own: RelativeError
    downstream: DownstreamTarget
    later: RelativeError
    weight: float

    def reads(self, index: Tensor) -> Sequence[Tensor]:
        return self.downstream.reads(index)

    def __call__(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], read: Sequence[Tensor]) -> Tensor:
        arriving, wanted = self.downstream.arriving(outputs, read)
        return self.own(outputs, targets) + self.weight * self.later(arriving, wanted)


@dataclass(frozen=True)
class Prediction:
    """`weight` times the difference between the prediction that follows from the unit's outputs and the float one."""

    downstream: DownstreamTarget
    weight: float
    distance: str
    temperature: float
    share: float

    def reads(self, index: Tensor) -> Sequence[Tensor]:
        compared = max(1, round(self.share * len(index))) if torch.is_grad_enabled() else len(index)
        return self.downstream.reads(index[:compared])

    def __call__(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], read: Sequence[Tensor]) -> Tensor:
        compared = len(read[-1])
        arriving, wanted = self.downstream.arriving([y[:compared] for y in outputs], read)
        pairs = zip(arriving, wanted, self.downstream.energy, strict=True)
        differences = torch.stack([self._difference(y, t, energy) for y, t, energy in pairs])
        return self.weight * differences.mean()

    def _difference(self, y: Tensor, wanted: Tensor, energy: float) -> Tensor:
        if self.distance == "kl" or (self.distance == "auto" and is_logits(y)):
            classes_last = (y.movedim(1, -1), wanted.movedim(1, -1))
            return kl_divergence(*classes_last, self.temperature).mean()
        return relative_error(y, wanted, energy).mean()
