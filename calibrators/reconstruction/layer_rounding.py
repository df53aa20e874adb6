"""Round the layers of a network one after the other, each with the Hessian of its inputs.

Must not know: which methods there are, ONNX.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, fx

from calibrators.execution.activation_cache import Cache
from calibrators.execution.blocks import Block, extract, partition
from calibrators.execution.simulation import Simulation, channels_last
from calibrators.execution.streamed_network import RoundedNetwork
from calibrators.execution.task import Problem
from calibrators.graph.aten import bind, fan_in, layer_name, shape_of, to_device
from calibrators.grid.spec import QParams, QuantizedTensor, Site
from calibrators.program.freeze import CalibrationResult, widen
from calibrators.reconstruction.hessian_rounding import Rounder
from calibrators.reconstruction.moments import Im2col, Moments, half_of
from calibrators.reconstruction.output_target import toward_float
from calibrators.reconstruction.position_weights import norm_after, position_weights
from calibrators.record import ReconstructedUnit, Reconstruction

if TYPE_CHECKING:
    from calibrators.methods.gptq import GPTQ

__all__ = ["round_layers"]

LARGEST, LARGEST_GROUPS = 8192, 1 << 25
"""Most columns of a Hessian, whose factor then takes a few GiB and minutes, and most entries of those of many groups.

Layers beyond keep nearest rounding.
"""

FEW = 0.3
"""Damping of a Hessian that is measured on as many positions as it has columns, which would else fit their noise."""

NARROW = 4
"""Most bits of codes that are chosen again, which takes as long as rounding them: 8 bits have little to gain."""

PER_COLUMN, LEAST = 64, 2048
"""Positions for each column of the moments, and for any layer, up to those of the option: more change no result."""


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


Reading = tuple[str, Im2col, str]
"""The key of moments: a value, by fx name, the way layers cut it into columns, and the norm that weighs positions."""


class _Run(NamedTuple):
    """Neighbouring rows of a layer's input that stand in one half of the samples, and the positions to read there."""

    half: int
    rows: int
    positions: Tensor


def _dependent(graph: fx.GraphModule) -> frozenset[fx.Node]:
    """Return the nodes of a graph that depend on its inputs."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


class _Layers:
    """The layers in order of execution.

    floats:  caches of the float values that the current and later blocks read, by fx name; none where not needed.
    norms:   the norm after a layer, within its block, that says how much each position counts.
    moments: those that later layers share; units: the record of every layer; notes: for the user.
    """

    def __init__(self, method: GPTQ, network: RoundedNetwork) -> None:
        self.method, self.network = method, network
        self.with_floats = method.output_target == "float"
        self.floats = dict(network.quantized) if self.with_floats else {}
        self.examples = len(network.placement.graph.meta["example"][0])
        self.dependent = _dependent(network.placement.graph)
        self.units: list[ReconstructedUnit] = []
        self.notes: list[str] = []
        self.moments: dict[Reading, Moments] = {}
        self.norms = self._norms() if self.with_floats else {}
        self.sites: dict[str, str] = {}  # weight site -> the first layer that reads it
        for name in (name for block in network.blocks for name in block.weighted):
            if self._is_feasible(name):
                self.sites.setdefault(self._site(name).name, name)
        self.readers: dict[Reading, list[str]] = {}  # layers that share moments, in order
        for layer in self.sites.values():
            self.readers.setdefault(self._reading(layer), []).append(layer)

    def _node(self, layer: str) -> fx.Node:
        return self.network.placement.nodes[layer]

    def _site(self, layer: str) -> Site:
        """Return the site of the layer's weight."""
        return self.network.placement.weight_of[layer]

    def _is_feasible(self, layer: str) -> bool:
        node = self._node(layer)
        columns, groups = fan_in(node), Im2col.of(node).groups
        if columns <= LARGEST and (groups == 1 or groups * columns**2 <= LARGEST_GROUPS):
            return True
        size = f"{columns} inputs" + f" in each of {groups} groups" * (groups > 1)
        self._note(layer, f"gptq takes at most {LARGEST} inputs per output, fewer in groups, and it has {size}")
        return False

    def _note(self, layer: str, reason: str) -> None:
        self.notes.append(f"{layer_name(self._node(layer))}: rounded to nearest, because {reason}")

    def _norms(self) -> dict[str, fx.Node]:
        layers = ((block, name) for block in self.network.blocks for name in block.weighted)
        norms = ((block, name, norm_after(self._node(name))) for block, name in layers)
        return {name: norm for block, name, norm in norms if norm is not None and norm.name in block.nodes}

    def _reading(self, layer: str) -> Reading:
        node = self._node(layer)
        return bind(node)["input"].name, Im2col.of(node), self.norms[layer].name if layer in self.norms else ""

    def round(self, index: int) -> None:
        """Round the weights of a block, each with those before it already rounded, and advance past the block."""
        block = self.network.blocks[index]
        simulation = self.network.simulation(block)
        for layer in block.weighted:
            if self.sites.get(self._site(layer).name) == layer:
                self.network.fill(simulation)
                self._round(simulation, layer)
        names = self.network.read_after(index)
        if names and self.network.part:
            if self.with_floats:
                inputs = tuple(self.floats[name] for name in block.inputs)
                self.floats |= self.network.run(self._float_part(block, names), names, inputs)
            self.network.advance(simulation, names)
        self.network.forget(index, self.network.quantized, self.floats)

    def _float_part(self, block: Block, outputs: tuple[str, ...]) -> fx.GraphModule:
        """Return the float network from the inputs of a block to some of its values."""
        part = extract(self.network.placement.graph, replace(block, outputs=outputs))
        for module in part.modules():
            for name, value in module.named_buffers(recurse=False):
                setattr(module, name, channels_last(value))
        return to_device(part, self.network.device)

    def _round(self, simulation: Simulation, layer: str) -> None:
        start = time.perf_counter()
        node, site, how = self._node(layer), self._site(layer), self.method
        qparams = self.network.weights[site.name].qparams
        moments = self._moments(simulation, layer)
        hessian = moments.hessian
        if not moments.is_finite:
            self._note(layer, "it reads values that are not finite, or whose squares are not")
            return
        weight = self.network.placement.values(site).to(self.network.device)
        rows = weight.reshape(len(hessian), -1, hessian.shape[1])
        target = toward_float(rows, moments, how.ridge, self._own(layer))
        problem = self.network.problem
        limits = problem.placement.limits_of(site)
        damping = max(how.damping, FEW * hessian.shape[1] / sum(moments.counts))
        rounder = Rounder(
            hessian,
            damping=min(1.0, damping),
            act_order=how.act_order,
            shared_order=limits is not None,
            sweeps=how.sweeps if qparams.spec.bits <= NARROW else 0,
        )
        grids = [qparams]
        if limits is not None:
            free = replace(qparams, scale=qparams.scale / problem.coarser.get(site.name, 1.0))
            qparams = problem.within_limits(site, target.rows.reshape(weight.shape).cpu(), qparams)
            grids = [qparams, free]
        found = [(grid.to(weight.device), limit) for grid, limit in zip(grids, (limits, None), strict=False)]
        rounded, *without = rounder.round_each(weight, found, target=target.rows)
        if without:
            problem.free[site.name] = QuantizedTensor(without[0].codes.cpu(), grids[1])
        self.network.weights[site.name] = QuantizedTensor(rounded.codes.cpu(), qparams)
        done = ReconstructedUnit(
            layer_name(node),
            1,
            before=rounded.nearest,
            after=rounded.error,
            strength=target.strength if self.with_floats else None,
            after_free=without[0].error if without else None,
            seconds=time.perf_counter() - start,
        )
        self.units.append(done)

    def _moments(self, simulation: Simulation, layer: str) -> Moments:
        """Return the moments of the layer's inputs in the network quantized so far."""
        reading = self._reading(layer)
        if reading not in self.moments:
            self.moments[reading] = self._measured(simulation, layer)
        return self.moments.pop(reading) if layer == self.readers[reading][-1] else self.moments[reading]

    def _rows(self, layer: str) -> Tensor:
        """Return the weight of a layer, [groups, rows, columns]."""
        groups, weight = Im2col.of(self._node(layer)).groups, self.network.placement.values(self._site(layer))
        return weight.reshape(groups, -1, fan_in(self._node(layer)))

    def _own(self, layer: str) -> slice:
        """Return the rows of a layer among those of all layers that share its moments."""
        readers = self.readers[self._reading(layer)]
        start = sum(self._rows(earlier).shape[1] for earlier in readers[: readers.index(layer)])
        return slice(start, start + self._rows(layer).shape[1])

    @torch.no_grad()
    def _measured(self, simulation: Simulation, layer: str) -> Moments:
        node, columns = self._node(layer), Im2col.of(self._node(layer))
        weights = torch.cat([self._rows(reader) for reader in self.readers[self._reading(layer)]], 1)
        moments = Moments(
            columns,
            fan_in(node),
            self.network.device,
            with_error=self.with_floats,
            weights=weights,
            grid=None if layer in self.norms else self._grid(layer),
        )
        problem, generator = self.network.problem, self.network.problem.generator(layer)
        inputs = self._inputs(simulation, layer) if self.network.part else iter(())
        for shard, units in enumerate(self.network.shards):
            for unit in units:
                runs = self._runs(layer, unit, generator)  # of all processes, as one follows the other at random
                if shard in problem.ranks.shards:
                    read = [torch.split(columns.batched(x), [run.rows for run in runs]) for x in next(inputs)]
                    for run, *values in zip(runs, *read, strict=True):
                        for piece in columns.take(values, run.positions):
                            moments.add(run.half, *piece)
            if shard in problem.ranks.shards:
                moments.next_shard()
        moments.finish(problem.ranks)
        return moments

    def _runs(self, layer: str, unit: range, generator: torch.Generator) -> list[_Run]:
        """Return the runs of some samples in the input of a layer, with the positions that are drawn of each."""
        node = self._node(layer)
        read, columns, share = bind(node)["input"], Im2col.of(node), self._share(node)
        rows, *size = columns.batched(torch.empty(shape_of(read), device="meta")).shape
        rows = rows * len(unit) // self.examples if read in self.dependent else rows
        halves, lengths = torch.unique_consecutive(
            half_of(rows, unit.start, len(unit), self.network.problem.samples), return_counts=True
        )
        return [
            _Run(half, length, columns.draw((length, *size), share, generator))
            for half, length in zip(halves.tolist(), lengths.tolist(), strict=True)
        ]

    def _grid(self, layer: str) -> QParams | None:
        """Return the grid of the layer's input, None where it reads floats."""
        site = self.network.placement.activation_of.get(bind(self._node(layer))["input"].name)
        if site is None or layer not in site.users or site.spec.bits > 8:
            return None
        return self.network.quantizers[self.network.placement.root(site).name].qparams

    def _share(self, node: fx.Node) -> float:
        """Return the share of a layer's positions that its moments are measured on; all of them from 1 up."""
        samples = self.network.problem.samples
        positions = math.prod(shape_of(node)) // shape_of(bind(node)["weight"])[0] * samples / self.examples
        return min(self.method.positions, max(LEAST, PER_COLUMN * fan_in(node))) / positions

    def _inputs(self, simulation: Simulation, layer: str) -> Iterator[list[Tensor]]:
        """Yield the layer's input pass by pass: in the quantized network, and in the float one if it runs.

        Where a norm follows, each position is scaled as the norm scales it.
        """
        block, norm = simulation.block, self.norms.get(layer)
        parts: list[tuple[fx.GraphModule, tuple[Cache, ...]]] = [
            (simulation.reading(layer), self.network.inputs_of(block))
        ]
        if self.with_floats:
            caches = tuple(self.floats[name] for name in block.inputs)
            read = [bind(node)["input"].name for node in (self._node(layer), norm) if node is not None]
            parts.append((self._float_part(block, tuple(read)), caches))
        for chunks in zip(*(self.network.chunks(caches) for _, caches in parts), strict=True):
            made = [part(*chunk) for (part, _), chunk in zip(parts, chunks, strict=True)]
            values = [x if isinstance(x, Tensor) else x[0] for x in made]
            if norm is not None:
                sizes = position_weights(norm, made[-1][-1]).view(*values[0].shape[:-1], 1)
                values = [x * sizes for x in values]
            yield values
