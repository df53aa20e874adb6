"""Reconstruction: train the units of the network, one after the other, to reproduce their float output.

Float and quantized activations of all calibration samples advance together from unit to unit; each unit is trained on
inputs from the quantized units before it, then hardened, and run once to compute the inputs of the next unit.

source: Nagel et al. 2020 (AdaRound); Li et al. 2021 (BRECQ); Wei et al. 2022 (QDrop).
Departs: the loss is relative to the energy of the output and the regularizer to the loss of nearest rounding, so that
one set of options serves every architecture; learning rates follow from the number of steps; activation scales are
trained as logarithms; biases are trained too; a unit that training did not improve keeps nearest rounding.

Must not know: which methods there are, ONNX, runtimes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from calibrators.errors import DataError
from calibrators.execution.activation_cache import Cache, Recording
from calibrators.execution.blocks import Block, extract, merge
from calibrators.execution.instructions import computes_bfloat16
from calibrators.execution.measure import relative_errors
from calibrators.execution.streamed_network import RoundedNetwork
from calibrators.execution.task import Bar, Problem
from calibrators.graph.aten import batch_of, to_device
from calibrators.grid.limits import within
from calibrators.grid.metrics import LEAST_ENERGY, energy
from calibrators.grid.spec import QParams, QuantizedTensor
from calibrators.program.freeze import CalibrationResult, widen
from calibrators.reconstruction import grouping
from calibrators.reconstruction.downstream import DownstreamTarget, FrozenUnits
from calibrators.reconstruction.policy import Reconstruction
from calibrators.reconstruction.training import Learned, Loss, Settings, Unit, train
from calibrators.record import Grouping, ReconstructedUnit
from calibrators.record import Reconstruction as UnitsRecord

__all__ = ["Run", "reconstruct"]

SHRINKING = 4.0
"""Factor by which training may lower an activation scale before a bias needs a coarser weight scale."""

NARROW = 4
"""Most weight bits at which the rounding errors of bfloat16 are negligible next to those of quantization.

KL at 8/8 with bfloat16, divided by that with float32, 95 % paired interval (RepVGG, `qdrop`, 120 steps, 750 images):
values and gradients 1.23 (1.02 to 1.50), gradients alone 1.03 (0.87 to 1.19).
"""


@dataclass(frozen=True, eq=False)
class Floats:
    """Outputs of a unit in the float network.

    caches: all outputs that have samples, by fx name; energy: mean squares of the floating-point ones.
    """

    caches: dict[str, Cache]
    energy: dict[str, float]


@dataclass(frozen=True, eq=False)
class Deployed:
    """Results of a unit as it would be exported: mean relative error, the method's loss, outputs by fx name."""

    error: float
    loss: float
    caches: dict[str, Cache]


@dataclass(frozen=True, eq=False)
class Solved:
    """A finished unit: its record, and its outputs as it would be exported, by fx name."""

    record: ReconstructedUnit
    caches: dict[str, Cache]


def reconstruct(problem: Problem, method: Reconstruction) -> CalibrationResult:
    """Train the units of a network, neighbours joined as the method says, and return the calibrated network."""
    units = method.blocks(problem)
    groups, joined = _groups(problem, method, units)
    parts = ([units[i] for i in group] for group in groups)
    blocks = tuple(merge(problem.placement.graph, part) if len(part) > 1 else part[0] for part in parts)
    result = Run(problem, method, blocks, [len(group) for group in groups]).result()
    if len(blocks) < len(units):
        errors = relative_errors(result, [name for unit in units for name in unit.outputs], problem.batches)
        joined = replace(
            joined,
            groups=tuple(tuple(group) for group in groups if len(group) > 1),
            losses_after=tuple(fmean(errors[name] for name in unit.outputs) for unit in units),
        )
    assert result.record.reconstruction is not None
    done = replace(result.record.reconstruction, grouping=joined)
    return replace(result, record=replace(result.record, reconstruction=done))


def _groups(problem: Problem, method: Reconstruction, units: tuple[Block, ...]) -> tuple[list[list[int]], Grouping]:
    """Join neighbouring units; return the groups with the losses or capacities that decided them."""
    graph = problem.placement.graph
    record = Grouping(method.granularity, tuple(unit.name for unit in units))
    if method.groups:
        pairs = grouping.parse_groups(method.groups, len(units))
    elif method.granularity == "boundary":
        pairs = grouping.by_boundary(graph, units)
    elif method.granularity == "modcap":
        bits = {user: site.spec.bits for user, site in problem.placement.weight_of.items()}
        capacities = grouping.capacities(graph, units, bits)
        record = replace(record, capacities=tuple(capacities))
        pairs = grouping.by_capacity(capacities, method.joined)
    elif method.granularity == "loss":
        losses = _short_run(problem, method, units)
        record = replace(record, losses=losses)
        pairs = grouping.by_loss(losses, method.joined)
    else:
        return [[i] for i in range(len(units))], record
    if problem.explain and record.losses is None:
        record = replace(record, losses=_short_run(problem, method, units))
    return grouping.join(len(units), pairs, len(units) if method.groups else method.group), record


def _short_run(problem: Problem, method: Reconstruction, units: tuple[Block, ...]) -> tuple[float, ...]:
    """Return the errors of the units after a shorter run in which each is trained alone."""
    steps = max(1, round(method.probe * method.settings().iters))
    done = Run(problem, replace(method, iters=steps), units, [1] * len(units)).result().record.reconstruction
    assert done is not None
    return tuple(unit.after for unit in done.units)


class Run(RoundedNetwork):
    """One pass through the network, whose blocks are the units.

    sizes:    number of original units in each unit.
    position: index of the current unit.
    floats:   caches of the float values that the current and later units read, by fx name.
    goals:    float values downstream with which losses compare, by the index after the units that compute them.
    """

    def __init__(
        self, problem: Problem, method: Reconstruction, blocks: tuple[Block, ...], sizes: Sequence[int]
    ) -> None:
        activations = problem.activations(problem.range_method(method.ranges))
        weights = problem.weights(problem.range_method(method.weight_ranges))
        grids = widen(problem.placement, activations, weights, margin=SHRINKING)
        super().__init__(problem, blocks, activations, grids)
        self.method, self.sizes = method, sizes
        self.position = 0
        self.floats = dict(self.quantized)
        self.goals: dict[int, Floats] = {}
        self._computed: dict[str, Any] = {}
        self._settled: set[str] = set()  # sites that an earlier unit has trained

    def result(self) -> CalibrationResult:
        """Train every unit and return the calibrated network."""
        done: list[ReconstructedUnit] = []
        steps = sum(self.method.settings(size).iters for size in self.sizes)
        with self.problem.stage("reconstruct", steps) as bar:
            for index, block in enumerate(self.blocks):
                self.position = index
                start = time.perf_counter()
                unit = self._solve(block, bar)
                done.append(replace(unit, seconds=time.perf_counter() - start))
                self.forget(index, self.floats, self.quantized)
                if index + 1 in self.goals:
                    _free(*self.goals.pop(index + 1).caches.values())
        result = super().result()
        record = replace(result.record, reconstruction=UnitsRecord(tuple(done), self.memory.spilled))
        return replace(result, observed=self.problem.statistics, record=record)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result of `compute`, which is called only once per run and name."""
        if name not in self._computed:
            self._computed[name] = compute()
        return self._computed[name]

    def rewritten(
        self, unit: Unit, change: Callable[[Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]
    ) -> tuple[tuple[Cache, ...], tuple[Cache, ...]]:
        """Return new float inputs and targets of a unit; `change` gives new inputs and all outputs."""
        old = (*unit.float_inputs, *unit.targets)
        new = [Cache(self.memory, len(cache), cache.gather(torch.arange(1))) for cache in old]
        start = 0
        for chunk in self.chunks(unit.float_inputs):
            inputs, outputs = change(chunk)
            for cache, values in zip(new, (*inputs, *(outputs[i] for i in unit.supervised)), strict=True):
                cache.write(start, values)
            start += len(chunk[0])
        return tuple(new[: len(unit.float_inputs)]), tuple(new[len(unit.float_inputs) :])

    def downstream(self, unit: Unit, end: int) -> DownstreamTarget:
        """Return the path from the current unit to the outputs of unit `end` - 1, with the goals for these."""
        own = {unit.block.outputs[index]: i for i, index in enumerate(unit.supervised)}
        if end == self.position + 1:
            return DownstreamTarget(None, own, {}, tuple(own.values()), unit.targets, unit.energy)
        units = to_device(FrozenUnits(self.placement.graph, self.blocks[self.position + 1 : end]), self.device)
        settings = self.settings_of(unit)
        units.train_in(settings.precision, settings.gradients)
        names, outputs = units.block.inputs, units.block.outputs
        if end not in self.goals:
            floats = self.floats | {name: unit.targets[i] for name, i in own.items()}
            self.goals[end] = self._floats(units, outputs, tuple(floats[name] for name in names))
        goal = self.goals[end]
        passing = {name: self.quantized[name] for name in names if name not in own}
        supervised = tuple(i for i, name in enumerate(outputs) if name in goal.energy)
        return DownstreamTarget(units, own, passing, supervised, tuple(goal.caches[outputs[i]] for i in supervised),
                     tuple(goal.energy[outputs[i]] for i in supervised))  # fmt: skip

    # --- one unit ---------------------------------------------------------------------------------------------------

    def _solve(self, block: Block, bar: Bar) -> ReconstructedUnit:
        """Train a unit, or take over what an earlier run kept of it, and compute what later units read."""
        unit, floats = self._unit(block)
        loss = self.method.loss(unit, self)
        kept = self._restored(unit, loss, bar.skip) or self._trained(unit, loss, bar.advance)
        self.floats |= floats.caches
        self.quantized |= kept.caches
        return kept.record

    def _unit(self, block: Block) -> tuple[Unit, Floats]:
        """Return a unit before training, and its outputs in the float network."""
        simulation = self.simulation(block)
        floating = to_device(extract(self.placement.graph, block), self.device)
        float_inputs = tuple(self.floats[name] for name in block.inputs)
        floats = self._floats(floating, block.outputs, float_inputs)
        unit = Unit(
            block, simulation, self.inputs_of(block), float_inputs,
            targets=tuple(floats.caches[name] for name in floats.energy),
            supervised=tuple(block.outputs.index(name) for name in floats.energy),
            energy=tuple(floats.energy.values()),
            scales=self._new([n for n in simulation.quantizers if self.placement.by_name[n].fixed is None]),
            weights={name: self._weight(name) for name in self._new(list(simulation.weights))},
            biases={n: self.bias(n).float().to(self.device) for n in simulation.biases},
            reference=math.inf,
            device=self.device,
        )  # fmt: skip
        self._settled.update(unit.scales, unit.weights)
        return unit, floats

    def _trained(self, unit: Unit, loss: Loss, advance: Callable[[int], None]) -> Solved:
        block = unit.block
        before = self._deploy(unit, loss)
        learned = self._learn(unit, loss, before.loss, advance)
        nearest = self._harden(unit, learned)
        after = self._deploy(unit, loss)
        if not math.isfinite(after.error):
            raise DataError(f"unit {block.name} computes values that are not finite; check the calibration data")
        kept, dropped = after, before
        if after.loss > before.loss:
            nearest()
            kept, dropped = before, after
        _free(*dropped.caches.values())
        lowest, highest = _gain_range(learned) if kept is after else (None, None)
        record = ReconstructedUnit(
            name=block.name,
            weights=len(block.weighted),
            steps=self.settings_of(unit).iters,
            before=before.error,
            after=kept.error,
            loss_before=before.loss,
            loss_after=kept.loss,
            undecided=learned.rounding.undecided() if learned.rounding else 0.0,
            gain_lo=lowest,
            gain_hi=highest,
        )
        if self.problem.kept is not None:
            state = self._state(unit) if kept is after else {}
            self.problem.kept.save(self._step, state, asdict(record))
        return Solved(record, kept.caches)

    def _restored(self, unit: Unit, loss: Loss, skip: Callable[[int], None]) -> Solved | None:
        """Return a unit as an earlier run left it, None if none did; without tensors it kept nearest rounding."""
        found = self.problem.kept.load(self._step) if self.problem.kept is not None else None
        if found is None:
            return None
        state, record = found
        for name in unit.weights if state else ():
            codes, scale = state[f"codes/{name}"], state[f"weight scale/{name}"]
            qparams = replace(self.weights[name].qparams, scale=scale)
            self.weights[name] = QuantizedTensor(codes, qparams)
        for name in unit.scales if state else ():
            quantizer = self.quantizers[name]
            quantizer.reset(replace(quantizer.qparams, scale=state[f"scale/{name}"].to(self.device)))
        self.biases |= {name: state[f"bias/{name}"] for name in unit.biases if f"bias/{name}" in state}
        skip(self.settings_of(unit).iters)
        return Solved(ReconstructedUnit(**record), self._deploy(unit, loss).caches)

    def _state(self, unit: Unit) -> dict[str, Tensor]:
        """Return all that training a unit may have changed: codes and scales of weights, biases, activation scales."""
        found = {f"codes/{name}": self.weights[name].codes for name in unit.weights}
        found |= {f"weight scale/{name}": self.weights[name].qparams.scale for name in unit.weights}
        found |= {f"scale/{name}": self.quantizers[name].qparams.scale for name in unit.scales}
        found |= {f"bias/{name}": self.biases[name] for name in unit.biases if name in self.biases}
        return {name: values.cpu().contiguous() for name, values in found.items()}

    @property
    def _step(self) -> str:
        """The name of the current unit among the results that are kept: that of the unit in this run of this method."""
        run = repr((self.method, self.sizes, [block.name for block in self.blocks]))
        return f"{hashlib.sha256(run.encode()).hexdigest()[:16]}-{self.position}"

    def _learn(self, unit: Unit, loss: Loss, reference: float, advance: Callable[[int], None]) -> Learned:
        """Prepare the unit as the method does, and train it; a unit without targets stays as it is."""
        if not unit.targets:
            advance(self.settings_of(unit).iters)
            return Learned(None, {}, {})
        lesson = self.method.prepare(replace(unit, reference=reference), self)
        learned = train(lesson, loss, self.settings_of(unit), self.problem.generator(unit.block.name), advance)
        own = {*unit.float_inputs, *unit.targets}
        _free(*(cache for cache in (*lesson.float_inputs, *lesson.targets) if cache not in own))
        return learned

    def settings_of(self, unit: Unit) -> Settings:
        """Return the settings of the current unit: bfloat16 where that is fast and has no visible effect.

        Gradients stand it with weights of any width: their rounding errors are far below their noise from minibatches.
        """
        settings = self.method.settings(self.sizes[self.position])
        settings = replace(settings, batch=batch_of(self.placement.graph, settings.batch))
        bits = [grid.spec.bits for _, grid in unit.weights.values()]
        if self.method.precision != "auto" or not computes_bfloat16(self.device):
            return settings
        narrow = min(bits, default=8) <= NARROW
        precision = torch.bfloat16 if narrow else settings.precision
        return replace(settings, precision=precision, gradients=torch.bfloat16)

    def _new(self, names: list[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name not in self._settled)

    def _weight(self, name: str) -> tuple[Tensor, QParams]:
        values = self.problem.values(self.placement.by_name[name])
        return values.to(self.device), self.weights[name].qparams.to(self.device)

    def _harden(self, unit: Unit, learned: Learned) -> Callable[[], None]:
        """Turn what was learned into the unit's integers; return a function that undoes this."""
        weights = {name: self.weights[name] for name in unit.weights}
        biases = {name: self.biases[name] for name in unit.biases if name in self.biases}
        scales = {name: self.quantizers[name].qparams for name in unit.scales}
        for quantizer in unit.simulation.quantizers.values():
            quantizer.harden()
        unit.simulation.eval()
        if learned.rounding is not None:
            for name, coded in zip(unit.weights, learned.rounding.codes(), strict=True):
                gain = learned.gains.get(name, torch.ones(())).cpu()
                limits = self.placement.limits_of(self.placement.by_name[name])
                if limits is not None:
                    weight = self.problem.values(self.placement.by_name[name])
                    coded = replace(coded, codes=within(coded.codes, weight, coded.qparams, limits))
                self.weights[name] = replace(coded, qparams=replace(coded.qparams, scale=coded.qparams.scale * gain))
        self.biases.update(learned.biases)

        def undo() -> None:
            for name in learned.biases:
                del self.biases[name]
            self.biases.update(biases)
            self.weights.update(weights)
            for name, qparams in scales.items():
                self.quantizers[name].reset(qparams)

        return undo

    # --- passes over all samples ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _floats(self, network: torch.nn.Module, names: tuple[str, ...], inputs: tuple[Cache, ...]) -> Floats:
        """Return the outputs `names` of a float network for all samples."""
        recording = Recording(self.memory, len(inputs[0]), self.problem.sample_values)
        squares: dict[str, float] = {}
        for chunk in self.chunks(inputs):
            outputs = dict(zip(names, network(*chunk), strict=True))
            recording.append(outputs, len(chunk[0]))
            for name in recording.caches:
                if outputs[name].is_floating_point():
                    squares[name] = squares.get(name, 0.0) + energy(outputs[name].double())
        caches = recording.caches
        return Floats(
            caches, {name: max(total / _count(caches[name]), LEAST_ENERGY) for name, total in squares.items()}
        )

    @torch.no_grad()
    def _deploy(self, unit: Unit, loss: Loss) -> Deployed:
        """Run the unit as it would be exported, on all samples, and return the results."""
        self.fill(unit.simulation)
        recording = self.recording(len(unit.inputs[0]))
        noise = [0.0] * len(unit.targets)
        total = 0.0
        wanted = self.chunks(unit.targets) if unit.targets else itertools.repeat(())
        for chunk, targets in zip(self.chunks(unit.inputs), wanted, strict=False):
            outputs = unit.simulation(*chunk)
            samples = torch.arange(recording.recorded, recording.recorded + len(chunk[0]))
            recording.append(dict(zip(unit.block.outputs, outputs, strict=True)), len(samples))
            compared = [outputs[i] for i in unit.supervised]
            for i, (y, target) in enumerate(zip(compared, targets, strict=True)):
                noise[i] += energy((y - target).double())
            if compared:
                read = [x.to(self.device) for x in loss.reads(samples)]
                total += float(loss(compared, targets, read)) * len(samples)
        errors = [n / _count(cache) / e for n, cache, e in zip(noise, unit.targets, unit.energy, strict=True)]
        return Deployed(math.fsum(errors) / max(1, len(errors)), total / recording.recorded, recording.caches)


def _gain_range(learned: Learned) -> tuple[float, float] | tuple[None, None]:
    """Return the smallest and the largest learned factor of the weight scales, None where none was learned."""
    if not learned.gains:
        return None, None
    gains = torch.cat([gain.flatten() for gain in learned.gains.values()])
    return float(gains.min()), float(gains.max())


def _free(*caches: Cache) -> None:
    for cache in {id(cache): cache for cache in caches}.values():
        cache.free()


def _count(cache: Cache) -> int:
    return len(cache) * math.prod(cache.shape)
