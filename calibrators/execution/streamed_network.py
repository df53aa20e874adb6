"""The network as it will be exported, as far as it is decided, and its values where the work stands.

Values of all samples advance block by block: what later blocks still read is cached, everything else is gone, and no
block is run again from the network's inputs.

Must not know: how parameters are chosen, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from calibrators.execution.activation_cache import Cache, Memory, Recording
from calibrators.execution.blocks import Block
from calibrators.execution.quantizers import ActivationQuantizer
from calibrators.execution.simulation import BlockBoundary, Simulation, channels_last
from calibrators.execution.task import Problem
from calibrators.graph.aten import batch_of, to_device
from calibrators.grid.numerics import dequantize, quantize
from calibrators.grid.spec import QParams
from calibrators.program.freeze import CalibrationResult, QuantizedTensor, code_bias, freeze

__all__ = ["Deployment"]

CHUNK = 64
"""Samples per forward pass over the whole calibration set."""


class Deployment:
    """A network that is worked through block by block.

    blocks:     all of them, in order.
    quantized:  caches of the values that cross into the block at work and later ones, by fx name.
    quantizers: of activations, by name of the site that owns the scale.
    weights:    integers by site name, rounded to nearest until something better is put there.
    biases:     float64 by site name, where they are not the graph's.
    """

    def __init__(
        self,
        problem: Problem,
        blocks: tuple[Block, ...],
        activations: Mapping[str, QParams],
        weights: Mapping[str, QParams],
    ) -> None:
        self.problem, self.blocks = problem, blocks
        self.placement, self.device = problem.placement, problem.device
        self.boundary = BlockBoundary(self.placement, blocks)
        self.memory = Memory(problem.memory, problem.device)
        self.quantized = self._inputs()
        by_name = self.placement.by_name
        self.weights = {
            name: QuantizedTensor(quantize(problem.values(by_name[name]), q), q) for name, q in weights.items()
        }
        self.biases: dict[str, Tensor] = {}
        self.quantizers = {
            name: ActivationQuantizer(qparams.to(self.device), nonnegative=problem.statistics[name].lo >= 0)
            for name, qparams in activations.items()
        }
        self._last_reader = {name: index for index, block in enumerate(blocks) for name in block.inputs}

    def _inputs(self) -> dict[str, Cache]:
        names = [node.name for node in self.placement.graph.graph.nodes if node.op == "placeholder"]
        recording = Recording(self.memory, self.problem.samples, names)
        for batch in self.problem.batches:
            recording.append(dict(zip(names, batch, strict=True)), len(batch[0]))
        return recording.caches

    def inputs_of(self, block: Block) -> tuple[Cache, ...]:
        """What the block reads."""
        return tuple(self.quantized[name] for name in block.inputs)

    def chunks(self, caches: tuple[Cache, ...]) -> Iterator[tuple[Tensor, ...]]:
        """All samples in order, CHUNK at a time (or as many as the graph fixes), on the device."""
        size = batch_of(self.placement.graph, CHUNK)
        for chunk in zip(*(cache.chunks(size) for cache in caches), strict=True):
            yield tuple(x.to(self.device) for x in chunk)

    def simulation(self, block: Block) -> Simulation:
        """The block to be run; `fill` gives it its weights and biases."""
        return to_device(Simulation(self.placement, self.boundary, block, self.quantizers), self.device).eval()

    def fill(self, simulation: Simulation) -> None:
        """Let a block compute with the weights and biases that would be exported now."""
        for name in simulation.weights:
            coded = self.weights[name]
            simulation.set(name, channels_last(dequantize(coded.codes, coded.qparams)).to(self.device))
        for name in simulation.biases:
            coded = self._coded_bias(name)
            simulation.set(name, dequantize(coded.codes, coded.qparams).to(self.device))

    @torch.no_grad()
    def advance(self, simulation: Simulation) -> None:
        """Run a block as it would be exported now, for the values that later blocks read."""
        self.fill(simulation)
        block = simulation.block
        inputs = self.inputs_of(block)
        recording = self.recording(len(inputs[0]))
        for chunk in self.chunks(inputs):
            recording.append(dict(zip(block.outputs, simulation(*chunk), strict=True)), len(chunk[0]))
        self.quantized |= recording.caches

    def recording(self, samples: int) -> Recording:
        """Caches for values as they cross between blocks, quantized or not."""
        return Recording(self.memory, samples, self.problem.sample_values, self._grid)

    def forget(self, index: int, *families: dict[str, Cache]) -> None:
        """Free what no block behind the one at `index` reads."""
        for family in families:
            for name in [name for name in family if self._last_reader.get(name, -1) <= index]:
                family.pop(name).free()

    def result(self) -> CalibrationResult:
        """The calibrated network."""
        activations = {name: quantizer.qparams.to("cpu") for name, quantizer in self.quantizers.items()}
        return freeze(self.placement, activations, self.weights, self.biases)

    def bias(self, name: str) -> Tensor:
        """The bias of a site, float64."""
        return self.biases.get(name, self.problem.values(self.placement.by_name[name]).double())

    def _coded_bias(self, name: str) -> QuantizedTensor:
        site = self.placement.by_name[name]
        (user,) = site.users
        source = self.placement.input_of(self.placement.nodes[user])
        scale = self.quantizers[source.name].qparams.scale.cpu()
        return code_bias(self.bias(name), scale, self.weights[self.placement.weight_of[user].name].qparams.scale, site)

    def _grid(self, name: str) -> QParams | None:
        """The grid on which a value crosses, None where it crosses in float."""
        site = self.boundary.site(name)
        return self.quantizers[self.placement.root(site).name].qparams.to("cpu") if site else None
