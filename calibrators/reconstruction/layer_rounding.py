"""Round the layers of a network one after the other, each with the Hessian of its inputs.

Must not know: which methods there are, ONNX.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from calibrators.errors import DataError
from calibrators.execution.blocks import partition
from calibrators.execution.simulation import Simulation
from calibrators.execution.streamed_network import RoundedNetwork
from calibrators.execution.task import Problem
from calibrators.graph.aten import bind, fan_in, layer_name, shape_of
from calibrators.grid.spec import QuantizedTensor, Site
from calibrators.program.freeze import CalibrationResult, widen
from calibrators.reconstruction.hessian_rounding import Hessian, Im2col, round_weight
from calibrators.record import ReconstructedUnit, Reconstruction

if TYPE_CHECKING:
    from calibrators.methods.gptq import GPTQ

__all__ = ["round_layers"]

LARGEST = 8192
"""Most columns of a Hessian, whose factor then takes a few GiB and minutes. A wider layer keeps nearest rounding."""


def round_layers(problem: Problem, method: GPTQ) -> CalibrationResult:
    """Return the calibrated network, with the remaining error of every layer in its record."""
    blocks = partition(problem.placement.graph, problem.placement.weight_of, chain=1, largest=1)
    activations = problem.activations(problem.range_method(method.ranges))
    weights = problem.weights(problem.range_method(method.weight_ranges))
    grids = widen(problem.placement, activations, weights)
    layers = _Layers(method, RoundedNetwork(problem, blocks, activations, grids))
    with problem.stage("round", len(blocks)) as bar:
        for index in range(len(blocks)):
            layers.round(index)
            bar.advance()
    result = layers.network.result()
    notes = (*result.record.notes, *layers.notes)
    done = Reconstruction(tuple(layers.units), layers.network.memory.spilled)
    record = replace(result.record, notes=notes, reconstruction=done)
    return replace(result, observed=problem.statistics, record=record)


Reading = tuple[str, Im2col]
"""The input of a Hessian: a value, by fx name, and the way layers cut it into columns."""


class _Layers:
    """The layers in order of execution.

    hessians: those that later layers share; units: the record of every layer; notes: for the user.
    """

    def __init__(self, method: GPTQ, network: RoundedNetwork) -> None:
        self.method, self.network = method, network
        self.units: list[ReconstructedUnit] = []
        self.notes: list[str] = []
        self.hessians: dict[Reading, Tensor] = {}
        self.sites: dict[str, str] = {}  # weight site -> the first layer that reads it
        for name in (name for block in network.blocks for name in block.weighted):
            if self._is_feasible(name):
                self.sites.setdefault(self._site(name).name, name)
        self.readers = Counter(map(self._reading, self.sites.values()))

    def _node(self, layer: str) -> fx.Node:
        return self.network.placement.nodes[layer]

    def _site(self, layer: str) -> Site:
        """Return the site of the layer's weight."""
        return self.network.placement.weight_of[layer]

    def _is_feasible(self, layer: str) -> bool:
        node = self._node(layer)
        columns = fan_in(node)
        if columns > LARGEST:
            reason = f"gptq takes at most {LARGEST} inputs per output, and it has {columns}"
            self.notes.append(f"{layer_name(node)}: rounded to nearest, because {reason}")
        return columns <= LARGEST

    def _reading(self, layer: str) -> Reading:
        node = self._node(layer)
        return bind(node)["input"].name, Im2col.of(node)

    def round(self, index: int) -> None:
        """Round the weights of a block, each with those before it already rounded, and advance past the block."""
        block = self.network.blocks[index]
        simulation = self.network.simulation(block)
        for layer in block.weighted:
            if self.sites.get(self._site(layer).name) == layer:
                self.network.fill(simulation)
                self._round(simulation, layer)
        self.network.advance(simulation)
        self.network.forget(index, self.network.quantized)

    def _round(self, simulation: Simulation, layer: str) -> None:
        start = time.perf_counter()
        site = self._site(layer).name
        qparams = self.network.weights[site].qparams
        device = self.network.device
        rounded = round_weight(
            self._weight(layer).to(device),
            qparams.to(device),
            self._hessian(simulation, layer),
            damping=self.method.damping,
            act_order=self.method.act_order,
        )
        self.network.weights[site] = QuantizedTensor(rounded.codes.cpu(), qparams)
        seconds = time.perf_counter() - start
        name = layer_name(self._node(layer))
        self.units.append(ReconstructedUnit(name, 1, before=rounded.nearest, after=rounded.error, seconds=seconds))

    def _weight(self, layer: str) -> Tensor:
        return self.network.placement.values(self._site(layer))

    def _hessian(self, simulation: Simulation, layer: str) -> Tensor:
        """Return the second moments of the layer's inputs in the network quantized so far."""
        reading = self._reading(layer)
        if reading not in self.hessians:
            self.hessians[reading] = self._measured(simulation, layer)
        self.readers[reading] -= 1
        return self.hessians[reading] if self.readers[reading] else self.hessians.pop(reading)

    @torch.no_grad()
    def _measured(self, simulation: Simulation, layer: str) -> Tensor:
        node, columns = self._node(layer), Im2col.of(self._node(layer))
        hessian = Hessian(columns.groups, fan_in(node), self.network.device)
        inputs = self.network.inputs_of(simulation.block)
        examples = len(self.network.placement.graph.meta["example"][0])
        positions = math.prod(shape_of(node)) // len(self._weight(layer)) * len(inputs[0]) / examples
        share = self.method.positions / positions
        generator = self.network.problem.generator(layer)
        network = simulation.reading(layer)
        for chunk in self.network.chunks(inputs):
            for x in columns.take(network(*chunk), share, generator):
                hessian.add(x)
        if not hessian.matrix.isfinite().all():
            raise DataError(f"layer {layer_name(node)} reads values that are not finite; check the calibration data")
        return hessian.matrix
