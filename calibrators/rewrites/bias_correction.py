"""Empirical bias correction: give every weighted operator the mean output of the float network.

Source: Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2,
measured on data instead of derived from batch norm.
Departs: operators are corrected in topological order in one pass over a fixed sample, each with everything before it
quantized and corrected already; weights and activations are both quantized.

Must not know: methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from calibrators.errors import DataError
from calibrators.execution.measure import EMPTY_AGAIN, Batch
from calibrators.graph.aten import batch_of
from calibrators.graph.operators import CONVOLUTIONS
from calibrators.graph.walk import Values, walk
from calibrators.grid.numerics import along_axis
from calibrators.grid.spec import QuantizedTensor
from calibrators.program.freeze import BIAS_CODE_LIMIT, CalibrationResult

__all__ = ["correct_biases"]


def correct_biases(result: CalibrationResult, batches: Iterable[Batch], *, samples: int = 256) -> CalibrationResult:
    """Shift each bias of a result by the mean error of its operator's output, per output channel.

    Reads at most `samples` samples and holds only their live activations, so memory does not grow with the data.
    Operators without a bias are left as they are.

    raises: DataError if the data cannot be read again.
    """
    placement = result.placement
    kept = _first_samples(batches, samples, batch_of(placement.graph, 1))
    if not kept:
        raise DataError(EMPTY_AGAIN)
    bias_of = {site.users[0]: site.name for site in placement.sites if site.kind == "bias"}
    floats, quantized = ([walk(graph, batch) for batch in kept] for graph in (placement.graph, result.program))
    biases = dict(result.biases)
    with torch.no_grad():
        for name in [node.name for node in result.program.graph.nodes if node.name in bias_of]:
            shift = _match_means(_run_until(name, quantized), _run_until(name, floats))
            biases[bias_of[name]] = _shifted(biases[bias_of[name]], shift)
    return replace(result, biases=biases)


Step = tuple[fx.Node, Values]


def _run_until(name: str, walks: Iterable[Iterator[Step]]) -> list[Step]:
    """Advance the walks, one per batch, to the node called `name`, and return their steps there."""
    return [next(step for step in steps if step[0].name == name) for steps in walks]


def _match_means(steps: Sequence[Step], references: Sequence[Step]) -> Tensor:
    """Shift a node's values so that their channel means equal the references'; return the shift, float64."""
    axis = 1 if steps[0][0].target in CONVOLUTIONS else -1  # channels of a convolution, features of a linear layer
    total, count = torch.zeros((), dtype=torch.float64), 0
    for (node, values), (reference, floats) in zip(steps, references, strict=True):
        difference = (floats[reference] - values[node]).movedim(axis, 0).flatten(1)
        total = total + difference.sum(1, dtype=torch.float64)
        count += difference.shape[1]
    shift = total / count
    for node, values in steps:
        values[node] = values[node] + along_axis(shift, values[node], axis).float()
    return shift


def _shifted(coded: QuantizedTensor, shift: Tensor) -> QuantizedTensor:
    """Return the bias moved by `shift`, on the scale it has."""
    scale = coded.qparams.scale.double()
    limit = min(BIAS_CODE_LIMIT, coded.qparams.spec.qmax)
    codes = (coded.codes.double() + shift / scale).round().clamp(-limit, limit)
    return replace(coded, codes=codes.to(torch.int32))


def _first_samples(batches: Iterable[Batch], samples: int, multiple: int) -> list[Batch]:
    """Return the first `samples` samples or fewer, at least `multiple`, and of every batch a multiple of that."""
    kept: list[Batch] = []
    left = max(samples, multiple)
    for batch in batches:
        taken = min(left, len(batch[0])) // multiple * multiple
        if not taken:
            break
        kept.append(tuple(x[:taken] for x in batch))
        left -= taken
    return kept
