"""Empirical bias correction: every weighted operator keeps, on average, its float output.

Source: Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2,
measured on data instead of derived from batch norm.
Departs: operators are corrected in topological order in one pass over a fixed sample, each with everything before it
quantized and corrected already; weights and activations are both quantized.

Must not know: methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.errors import DataError
from calibrators.execution.measure import EMPTY_AGAIN, Batch
from calibrators.graph.aten import batch_of
from calibrators.graph.operators import CONVOLUTIONS
from calibrators.program.freeze import BIAS_CODE_LIMIT, CalibrationResult, QuantizedTensor

__all__ = ["correct_biases"]


def correct_biases(result: CalibrationResult, batches: Iterable[Batch], *, samples: int = 256) -> CalibrationResult:
    """The result with each bias shifted by the mean error of its operator's output, per output channel.

    Reads at most `samples` samples and holds only their live activations, so memory does not grow with the data.
    Operators without a bias are left as they are.

    raises: DataError when the data cannot be read again.
    """
    placement = result.placement
    kept = _first_samples(batches, samples, batch_of(placement.graph, 1))
    if not kept:
        raise DataError(EMPTY_AGAIN)
    bias_of = {site.users[0]: site for site in placement.sites if site.kind == "bias"}
    floats = _LiveValues(placement.graph, kept)
    quantized = _LiveValues(result.program, kept)
    float_nodes = iter(placement.graph.graph.nodes)
    biases = dict(result.biases)
    with torch.no_grad():
        for node in result.program.graph.nodes:
            quantized.step(node)
            if node.name not in bias_of:
                continue
            for reference in float_nodes:
                floats.step(reference)
                if reference.name == node.name:
                    break
            shift = quantized.match_mean(node, floats.values[reference])
            site = bias_of[node.name]
            biases[site.name] = _shifted(biases[site.name], shift)
    return replace(result, biases=biases)


def _shifted(coded: QuantizedTensor, shift: Tensor) -> QuantizedTensor:
    """The bias moved by `shift`, on the scale it has."""
    scale = coded.qparams.scale.double()
    codes = (coded.codes.double() + shift / scale).round().clamp(-BIAS_CODE_LIMIT, BIAS_CODE_LIMIT)
    return replace(coded, codes=codes.to(torch.int32))


def _first_samples(batches: Iterable[Batch], samples: int, multiple: int) -> list[Batch]:
    """The first samples, at most so many, but one `multiple` at least; of every batch a number of multiples."""
    kept: list[Batch] = []
    left = max(samples, multiple)
    for batch in batches:
        taken = min(left, len(batch[0])) // multiple * multiple
        if not taken:
            break
        kept.append(tuple(x[:taken] for x in batch))
        left -= taken
    return kept


class _LiveValues:
    """Values of all batches at once, one node at a time, freed after their last reader."""

    def __init__(self, graph: fx.GraphModule, batches: list[Batch]) -> None:
        self.interpreter = fx.Interpreter(graph)
        self.batches = batches
        self.values: dict[fx.Node, list[Any]] = {}
        self.last_reader: dict[fx.Node, fx.Node] = {}
        for node in graph.graph.nodes:
            for source in node.all_input_nodes:
                self.last_reader[source] = node
        self.inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]

    def step(self, node: fx.Node) -> None:
        """Compute the node for every batch."""
        if node.op == "placeholder":
            self.values[node] = [batch[self.inputs.index(node)] for batch in self.batches]
        elif node.op == "get_attr":
            self.values[node] = [self.interpreter.fetch_attr(str(node.target))] * len(self.batches)
        elif node.op == "call_function":
            self.values[node] = [self._call(node, index) for index in range(len(self.batches))]
        for source in node.all_input_nodes:
            if self.last_reader[source] is node:
                del self.values[source]

    def _call(self, node: fx.Node, index: int) -> Any:
        args = fx.map_arg(node.args, lambda source: self.values[source][index])
        kwargs = fx.map_arg(node.kwargs, lambda source: self.values[source][index])
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def match_mean(self, node: fx.Node, references: list[Tensor]) -> Tensor:
        """Shift the node's values so that their channel means equal the references'; returns the shift, float64."""
        axis = _channel_axis(node)
        total, count = torch.zeros(references[0].shape[axis], dtype=torch.float64), 0
        for value, reference in zip(self.values[node], references, strict=True):
            difference = (reference - value).movedim(axis, 0).flatten(1)
            total += difference.sum(1, dtype=torch.float64)
            count += difference.shape[1]
        shift = total / count
        shape = [1] * references[0].ndim
        shape[axis] = -1
        self.values[node] = [value + shift.reshape(shape).float() for value in self.values[node]]
        return shift


def _channel_axis(node: fx.Node) -> int:
    """Return the channel dimension of a result: 1 for convolutions, the last for linear layers."""
    return 1 if node.target in CONVOLUTIONS else -1
