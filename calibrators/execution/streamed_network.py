"""The network block by block: simulated with its quantizers, the values of all samples cached where it is cut.

Values of all samples advance block by block: what later blocks still read is cached, everything else is freed, and no
block is run again from the network's inputs.

Must not know: how parameters are chosen, ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from calibrators.errors import DataError
from calibrators.execution.activation_cache import Cache, Memory, Recording
from calibrators.execution.blocks import Block
from calibrators.execution.quantizers import ActivationQuantizer
from calibrators.execution.ranks import shards_of
from calibrators.execution.simulation import BlockBoundary, Simulation, channels_last
from calibrators.execution.task import Problem
from calibrators.graph.aten import batch_of, example_batch, shape_of, to_device
from calibrators.grid.numerics import dequantize, quantize
from calibrators.grid.spec import QParams, QuantizedTensor
from calibrators.program.freeze import CalibrationResult, code_bias, freeze

__all__ = ["RoundedNetwork", "StreamedNetwork"]

CHUNK, LARGEST_VALUE = 64, 16 << 20
"""Samples per forward pass over the whole calibration set; fewer where a value of so many would take more bytes."""


class StreamedNetwork:
    """Consecutive blocks with shared quantizers, and caches of the values that cross between blocks.

    blocks:     all of them, in order.
    quantizers: of activations, by name of the site that owns the scale.
    """

    def __init__(self, problem: Problem, blocks: tuple[Block, ...], activations: Mapping[str, QParams]) -> None:
        self.problem, self.blocks = problem, blocks
        self.placement, self.device = problem.placement, problem.device
        self.boundary = BlockBoundary(self.placement, blocks)
        self.memory = Memory(problem.memory, problem.device)
        self.chunk = _chunk(self.placement.graph)
        self.quantizers = {
            name: ActivationQuantizer(qparams.to(self.device), nonnegative=problem.statistics[name].lo >= 0)
            for name, qparams in activations.items()
        }

    def simulation(self, block: Block) -> Simulation:
        """Return the block to be run; its weights and biases are still to be set."""
        return to_device(Simulation(self.placement, self.boundary, block, self.quantizers), self.device).eval()

    def chunks(self, caches: Sequence[Cache], size: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield all samples in order, `size` at a time (or as many as the graph fixes), on the device."""
        size = batch_of(self.placement.graph, size or self.chunk)
        for chunk in zip(*(cache.chunks(size) for cache in caches), strict=True):
            yield tuple(x.to(self.device) for x in chunk)

    def record_inputs(
        self, batches: Iterable[Sequence[Tensor]], samples: int, part: range | None = None
    ) -> dict[str, Cache]:
        """Return caches of the network's inputs by fx name.

        part:   of the samples, all by default; the others are dropped as they come.
        raises: DataError where the batches do not hold as many samples as before.
        """
        names = [node.name for node in self.placement.nodes.values() if node.op == "placeholder"]
        part = range(samples) if part is None else part
        recording, seen = Recording(self.memory, len(part), names), 0
        for batch in batches:
            start, end = (min(max(end - seen, 0), len(batch[0])) for end in (part.start, part.stop))
            if start < end:
                recording.append({n: x[start:end] for n, x in zip(names, batch, strict=True)}, end - start)
            seen += len(batch[0])
        if seen != samples:
            raise DataError(
                f"the calibration data had {samples} samples in one pass and {seen} in another; give data"
                " that does not change between passes"
            )
        return recording.caches

    @torch.no_grad()
    def run(self, network: torch.nn.Module, names: Sequence[str], inputs: Sequence[Cache]) -> dict[str, Cache]:
        """Return caches of the outputs of a float network, called `names`, for all samples."""
        recording = Recording(self.memory, len(inputs[0]), self.problem.sample_values)
        for chunk in self.chunks(inputs):
            recording.append(dict(zip(names, network(*chunk), strict=True)), len(chunk[0]))
        return recording.caches

    def crossing_grid(self, name: str) -> QParams | None:
        """Return the grid on which a value crosses between blocks, None where it crosses in float."""
        site = self.boundary.site(name)
        if site is None:
            return None
        root = self.placement.root(site).name
        owned = self.quantizers[root].qparams.to("cpu")  # at other bits than the placement's while bits are tried
        return replace(self.placement.qparams_of(site, {root: owned}), spec=owned.spec)


class RoundedNetwork(StreamedNetwork):
    """A network whose weights are integers already, worked through once from its first block to its last.

    Of several processes each works its part of the samples through; `shards` divides all of them.

    quantized: caches of the values that cross into the block at work and later ones, by fx name.
    weights:   integers by site name, rounded to nearest until something better is put there.
    biases:    float64 by site name, where they are not the graph's.
    shards:    the samples of every forward pass, by shard; part: those of this process, which may have none.
    """

    def __init__(
        self,
        problem: Problem,
        blocks: tuple[Block, ...],
        activations: Mapping[str, QParams],
        weights: Mapping[str, QParams],
    ) -> None:
        super().__init__(problem, blocks, activations)
        size = batch_of(self.placement.graph, self.chunk)
        units = [range(start, min(start + size, problem.samples)) for start in range(0, problem.samples, size)]
        self.shards = shards_of(units)
        own = [unit for shard in problem.ranks.shards for unit in self.shards[shard]]
        self.part = range(own[0].start, own[-1].stop) if own else range(0)
        self.quantized = self.record_inputs(problem.batches, problem.samples, self.part)
        sites = self.placement.by_name
        self.weights = {
            name: QuantizedTensor(quantize(problem.values(sites[name]), q), q) for name, q in weights.items()
        }
        self.biases: dict[str, Tensor] = {}
        self._last_reader = {name: index for index, block in enumerate(blocks) for name in block.inputs}

    def inputs_of(self, block: Block) -> tuple[Cache, ...]:
        """Return caches of what the block reads."""
        return tuple(self.quantized[name] for name in block.inputs)

    def recording(self, samples: int) -> Recording:
        """Return a recording of values as they cross between blocks, quantized or not."""
        return Recording(self.memory, samples, self.problem.sample_values, self.crossing_grid)

    def fill(self, simulation: Simulation) -> None:
        """Set the weights and biases of a block to those that would be exported now."""
        for name in simulation.weights:
            coded = self.weights[name]
            simulation.set(name, channels_last(dequantize(coded.codes, coded.qparams)).to(self.device))
        for name in simulation.biases:
            coded = self._coded_bias(name)
            simulation.set(name, dequantize(coded.codes, coded.qparams).to(self.device))

    @torch.no_grad()
    def advance(self, simulation: Simulation, names: Sequence[str]) -> None:
        """Run a block as it would be exported now, and cache those of its outputs."""
        self.fill(simulation)
        block = simulation.block
        inputs = self.inputs_of(block)
        recording = self.recording(len(inputs[0]))
        for chunk in self.chunks(inputs):
            outputs = dict(zip(block.outputs, simulation(*chunk), strict=True))
            recording.append({name: outputs[name] for name in names}, len(chunk[0]))
        self.quantized |= recording.caches

    def read_after(self, index: int) -> tuple[str, ...]:
        """Return the outputs of the block at `index` that later blocks read."""
        return tuple(name for name in self.blocks[index].outputs if self._last_reader.get(name, -1) > index)

    def forget(self, index: int, *families: dict[str, Cache]) -> None:
        """Free the values that no block after the one at `index` reads."""
        for family in families:
            for name in [name for name in family if self._last_reader.get(name, -1) <= index]:
                family.pop(name).free()

    def result(self) -> CalibrationResult:
        """Return the calibrated network."""
        activations = {name: quantizer.qparams.to("cpu") for name, quantizer in self.quantizers.items()}
        return freeze(self.placement, activations, self.weights, self.biases)

    def bias(self, name: str) -> Tensor:
        """Return the bias of a site, float64."""
        return self.biases.get(name, self.problem.values(self.placement.by_name[name]).double())

    def _coded_bias(self, name: str) -> QuantizedTensor:
        site = self.placement.by_name[name]
        weight, source = self.placement.added_to(site)
        scale = self.quantizers[source.name].qparams.scale.cpu()
        return code_bias(self.bias(name), scale, self.weights[weight.name].qparams.scale, site)


def _chunk(graph: fx.GraphModule) -> int:
    """Return the samples per forward pass."""
    largest = max(4 * math.prod(shape_of(node)) // example_batch(graph) for node in graph.graph.nodes)
    return max(1, min(CHUNK, LARGEST_VALUE // max(1, largest)))
