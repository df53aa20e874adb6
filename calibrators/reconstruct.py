"""The one training loop: units of the network learn, one after the other, to give their float output.

Float and quantized activations of all calibration samples advance together from unit to unit; each unit is trained on
inputs that everything before it has already quantized, hardened, and run once to make the next unit's inputs.

source: Nagel et al. 2020 (AdaRound); Li et al. 2021 (BRECQ); Wei et al. 2022 (QDrop).
Departs: the loss is relative to the energy of the output and the regularizer to the loss of nearest rounding, so that
one set of options serves every architecture; activation scales are trained as logarithms; biases are trained as well; a
unit that training did not improve keeps nearest rounding.

Must not know: which methods there are, ONNX, runtimes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calibrators.blocks import Block, partition
from calibrators.freeze import CalibrationResult, Coded, code_bias, freeze
from calibrators.graph import bind
from calibrators.methods import get_method
from calibrators.numerics import dequantize
from calibrators.options import check, option
from calibrators.problem import Problem
from calibrators.quantizers import ActivationQuantizer, Masks, Rounding
from calibrators.simulation import Frontier, Simulation
from calibrators.spec import QParams, Site
from calibrators.stream import Cache, Memory

__all__ = ["Reconstruction", "Unit"]

CHUNK = 64
"""Samples per forward pass over the whole calibration set."""


@dataclass(frozen=True)
class Reconstruction:
    """Base of the methods that train rounding unit by unit; its fields are the options they share."""

    iters: int = option(1000, "training steps per unit", minimum=1)
    batch: int = option(32, "samples per training step", minimum=1)
    lr: float = option(1.0, "learning rate of rounding, times 10 / iters", minimum=0)
    scale_lr: float = option(1.0, "learning rate of activation scales, times 1 / iters", minimum=0)
    bias_lr: float = option(1.0, "learning rate of biases, times 1 / iters", minimum=0)
    strength: float = option(100.0, "weight of the term that drives rounding to 0 or 1", minimum=0)
    warmup: float = option(0.2, "share of the steps before that term acts", minimum=0, maximum=0.9)
    chain: int = option(3, "layers of a plain chain that form one unit", minimum=1)
    ranges: str = option("mse", "range method that gives the first scales")

    keep = 1.0
    """Probability that a value inside a unit, or at its input, is the quantized one."""

    learns_scales = True

    def __post_init__(self) -> None:
        check(self)

    def fit(self, problem: Problem) -> CalibrationResult:
        """The calibrated network."""
        return _Engine(problem, self).run()

    def blocks(self, problem: Problem) -> tuple[Block, ...]:
        """The units, in order."""
        weighted = [user for site in problem.placement.sites if site.kind == "weight" for user in site.users]
        return partition(problem.placement.graph, weighted, chain=self.chain)


@dataclass(frozen=True, eq=False)
class Unit:
    """A block in training.

    simulation: the block with quantizers; targets: caches of its float outputs; energy: their mean square.
    """

    block: Block
    simulation: Simulation
    float_inputs: tuple[Cache, ...]
    inputs: tuple[Cache, ...]
    targets: tuple[Cache, ...]
    energy: tuple[float, ...]


class _Engine:
    """One run over the network."""

    def __init__(self, problem: Problem, method: Reconstruction) -> None:
        self.problem, self.method = problem, method
        self.placement = problem.placement
        self.device = problem.device
        ranges = get_method(method.ranges)
        self.activations = problem.activations(ranges)
        self.weights: dict[str, Coded] = dict(problem.solve(ranges).weights)
        self.biases: dict[str, Tensor] = {}
        self.blocks = method.blocks(problem)
        self.frontier = Frontier(self.placement, self.blocks)
        self.nodes = self.frontier.nodes
        self.quantizers = {
            name: ActivationQuantizer(_to(qparams, self.device), nonnegative=self._nonnegative(name))
            for name, qparams in self.activations.items()
        }
        self.owned: set[str] = set()
        self.done: list[dict[str, Any]] = []

    def _nonnegative(self, name: str) -> bool:
        return self.problem.statistics[name].lo >= 0

    # --- the way through the network -------------------------------------------------------------------------------

    def run(self) -> CalibrationResult:
        memory = Memory(self.problem.memory)
        names = [node.name for node in self.placement.graph.graph.nodes if node.op == "placeholder"]
        inputs = self.problem.inputs()
        samples = len(inputs[0])
        floats: dict[str, Cache] = {}
        for name, value in zip(names, inputs, strict=True):
            floats[name] = Cache(memory, samples, value)
            floats[name].write(0, value)
        del inputs
        quantized = dict(floats)  # model inputs cross unquantized
        last = {name: index for index, block in enumerate(self.blocks) for name in block.inputs}
        total = len(self.blocks) * self.method.iters
        with self.problem.stage("reconstruct", total) as bar:
            for index, block in enumerate(self.blocks):
                start = time.perf_counter()
                unit = self._unit(block, floats, quantized, memory)
                made, entry = self._solve(unit, memory, bar.advance)
                floats |= dict(zip(block.outputs, unit.targets, strict=True))
                quantized |= dict(zip(block.outputs, made, strict=True))
                for name in [name for name in floats if last.get(name, -1) <= index]:
                    for cache in {id(c): c for c in (floats.pop(name), quantized.pop(name))}.values():
                        cache.free()
                self.done.append(entry | {"seconds": time.perf_counter() - start})
        activations = {name: _to(q.qparams, torch.device("cpu")) for name, q in self.quantizers.items()}
        result = freeze(self.placement, activations, self.weights, self.biases)
        record = {**result.record, "units": tuple(self.done), "spilled_bytes": memory.spilled}
        return replace(result, observed=self.problem.statistics, record=record)

    def _unit(self, block: Block, floats: Mapping[str, Cache], quantized: Mapping[str, Cache], memory: Memory) -> Unit:
        simulation = Simulation(self.placement, self.frontier, block, self.quantizers).to(self.device)
        simulation.eval()
        float_inputs = tuple(floats[name] for name in block.inputs)
        targets: list[Cache] = []
        sums: list[float] = []
        from calibrators.blocks import extract

        whole = extract(self.placement.graph, block).to(self.device)
        start = 0
        with torch.no_grad():
            for chunk in self._chunks(float_inputs):
                outputs = whole(*chunk)
                if not targets:
                    targets = [Cache(memory, len(float_inputs[0]), y) for y in outputs]
                    sums = [0.0] * len(outputs)
                for i, y in enumerate(outputs):
                    targets[i].write(start, y.cpu())
                    sums[i] += float(y.square().sum(dtype=torch.float64))
                start += len(chunk[0])
        energy = tuple(max(total / (len(c) * math.prod(c.shape)), 1e-30) for total, c in zip(sums, targets, strict=True))
        return Unit(block, simulation, float_inputs, tuple(quantized[n] for n in block.inputs), tuple(targets), energy)

    def _chunks(self, caches: tuple[Cache, ...]) -> Iterator[tuple[Tensor, ...]]:
        for chunk in zip(*(cache.chunks(CHUNK) for cache in caches), strict=True):
            yield tuple(x.to(self.device) for x in chunk)

    # --- one unit ---------------------------------------------------------------------------------------------------

    def _solve(self, unit: Unit, memory: Memory, advance: Callable[[int], None]) -> tuple[list[Cache], dict[str, Any]]:
        own = [name for name in unit.simulation.quantizers if name not in self.owned]
        self.owned.update(own)
        weights = [name for name in unit.simulation.weights if name not in self.owned]
        self.owned.update(weights)
        before_scales = {name: self.quantizers[name].qparams for name in own}
        before, made = self._deploy(unit, memory)
        undecided = self._train(unit, own, weights, before, advance)
        chosen = {name: self.weights[name] for name in weights}
        for name in own:
            self.quantizers[name].harden()
        for name, coded in zip(weights, self._rounding.codes(), strict=True) if weights else ():
            self.weights[name] = coded
        after, better = self._deploy(unit, memory)
        entry = {"name": unit.block.name, "weights": len(weights), "before": before, "after": after,
                 "undecided": undecided}
        if after > before:
            for name in own:
                self.quantizers[name].reset(before_scales[name])
            self.weights.update(chosen)
            for name in unit.simulation.biases:
                self.biases.pop(name, None)
            entry["after"] = before
            made, better = better, made
        for cache in made:
            cache.free()
        return better, entry

    def _deploy(self, unit: Unit, memory: Memory) -> tuple[float, list[Cache]]:
        """Run the unit as it would be exported: the relative error of its outputs, and the outputs."""
        simulation = unit.simulation
        for name in simulation.weights:
            simulation.set(name, _channels_last(dequantize(*_codes(self.weights[name]))).to(self.device))
        for name in simulation.biases:
            site = self.placement.by_name[name]
            coded = self._bias(site)
            simulation.set(name, dequantize(coded.codes, coded.qparams).to(self.device))
        made: list[Cache] = []
        noise = [0.0] * len(unit.targets)
        start = 0
        with torch.no_grad():
            targets = self._chunks(unit.targets)
            for chunk, wanted in zip(self._chunks(unit.inputs), targets, strict=True):
                outputs = simulation(*chunk)
                if not made:
                    made = [
                        Cache(memory, len(unit.inputs[0]), y, self._grid(name))
                        for name, y in zip(unit.block.outputs, outputs, strict=True)
                    ]
                for i, (y, target) in enumerate(zip(outputs, wanted, strict=True)):
                    made[i].write(start, y.cpu())
                    noise[i] += float((y - target).square().sum(dtype=torch.float64))
                start += len(chunk[0])
        count = [len(c) * math.prod(c.shape) for c in unit.targets]
        errors = [n / c / e for n, c, e in zip(noise, count, unit.energy, strict=True)]
        return sum(errors) / len(errors), made

    def _bias(self, site: Site) -> Coded:
        node = self.nodes[site.users[0]]
        source = self.placement.root(self.placement.activation_of[bind(node)["input"].name])
        weight = next(s for s in self.placement.sites if s.kind == "weight" and node.name in s.users)
        scale = self.quantizers[source.name].qparams.scale.cpu()
        bias = self.biases.get(site.name, self.problem.values(site))
        return code_bias(bias.double(), scale, self.weights[weight.name].qparams.scale, site)

    def _grid(self, name: str) -> QParams | None:
        site = self.frontier.site(name)
        if site is None:
            return None
        return _to(self.quantizers[self.placement.root(site).name].qparams, torch.device("cpu"))

    def _train(self, unit: Unit, own: list[str], weights: list[str], reference: float, advance: Callable[[int], None]) -> float:
        method, simulation = self.method, unit.simulation
        generator = self.problem.generator(unit.block.name)
        masks = Masks(method.keep, generator, self.device) if method.keep < 1 else None
        groups: list[dict[str, Any]] = []
        by_name = self.placement.by_name
        rounding = None
        if weights:
            values = [self.problem.values(by_name[name]).to(self.device) for name in weights]
            rounding = Rounding(values, [_to(self.weights[name].qparams, self.device) for name in weights])
            for name, leaf in zip(weights, rounding.weights, strict=True):
                simulation.set(name, leaf)
            groups.append({"params": [rounding.variable], "lr": method.lr * 10 / method.iters, "cosine": False})
        self._rounding = rounding
        biases: dict[str, Tensor] = {}
        for name in simulation.biases:
            bias = self.problem.values(by_name[name]).to(self.device).clone()
            biases[name] = bias.requires_grad_(bool(method.bias_lr))
            simulation.set(name, biases[name])
        if method.bias_lr and biases:
            size = float(torch.cat([b.detach().abs().flatten() for b in biases.values()]).mean())
            groups.append({"params": list(biases.values()), "lr": method.bias_lr * size / method.iters, "cosine": True})
        for name in own:
            learn = method.learns_scales and by_name[name].fixed is None
            self.quantizers[name].learn(masks, scale=learn)
        scales = [self.quantizers[name].log_scale for name in own if self.quantizers[name].log_scale.requires_grad]
        if scales:
            groups.append({"params": scales, "lr": method.scale_lr / method.iters, "cosine": True})
        optimizer = torch.optim.Adam(groups, fused=True)
        base = [group["lr"] for group in groups]
        free = float(rounding.free.sum()) if rounding else 1.0
        strength = method.strength * reference / max(free, 1.0)
        samples = len(unit.inputs[0])
        indices = _minibatches(samples, min(method.batch, samples), generator)
        warm = int(method.warmup * method.iters)
        for step in range(method.iters):
            index = next(indices)
            mixed = [self._mixed(q, f, index, masks) for q, f in zip(unit.inputs, unit.float_inputs, strict=True)]
            targets = [cache.gather(index).to(self.device) for cache in unit.targets]
            if rounding:
                rounding.soften()
            outputs = simulation(*mixed)
            losses = [torch.nn.functional.mse_loss(y, t) / e for y, t, e in zip(outputs, targets, unit.energy, strict=True)]
            (sum(losses) / len(losses)).backward()
            progress = (step - warm) / max(1, method.iters - warm)
            if rounding:
                rounding.backward(strength if step >= warm else 0.0, 20 - 18 * max(progress, 0.0))
            fade = 0.5 * (1 + math.cos(math.pi * step / method.iters))
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * fade if group["cosine"] else lr
            optimizer.step()
            for parameter in [*biases.values(), *scales]:
                parameter.grad = None
            advance(1)
        if method.bias_lr:
            for name, bias in biases.items():
                self.biases[name] = bias.detach().cpu().double()
        return rounding.undecided() if rounding else 0.0

    def _mixed(self, quantized: Cache, floating: Cache, index: Tensor, masks: Masks | None) -> Tensor:
        x = quantized.gather(index).to(self.device)
        if masks is None or quantized is floating:
            return x
        return torch.lerp(floating.gather(index).to(self.device), x, masks.like(x))


def _minibatches(samples: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random indices without replacement, epoch after epoch; an incomplete rest is dropped."""
    while True:
        order = torch.randperm(samples, generator=generator)
        for start in range(0, samples - size + 1, size):
            yield order[start : start + size]


def _codes(coded: Coded) -> tuple[Tensor, QParams]:
    return coded.codes, coded.qparams


def _to(qparams: QParams, device: torch.device) -> QParams:
    return replace(qparams, scale=qparams.scale.to(device), zero_point=qparams.zero_point.to(device))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
