"""The loss of the quantized network as a function of all its scales, evaluated exactly but without repeated work.

A point gives the parameters of every activation site that owns its scale and of every weight, by site name; biases
follow from them. The values that enter the first block that a point changes are kept for all samples, so that points
that differ late in the network run only its end; a point that is clearly worse than the best one is given up early.

Work is counted in evaluations: the multiply-accumulates of weighted operators over all samples of one full pass are
one evaluation; a part of the network or of the samples counts by its share.

Must not know: how points are chosen, which methods there are, ONNX.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from calibrators.errors import InputError, argument
from calibrators.execution.activation_cache import Cache, Recording
from calibrators.execution.blocks import partition
from calibrators.execution.losses import PredictionLoss
from calibrators.execution.simulation import channels_last
from calibrators.execution.streamed_network import StreamedNetwork
from calibrators.execution.task import Problem
from calibrators.graph.aten import batch_of, macs, outputs_of
from calibrators.grid.numerics import dequantize, fake_quant
from calibrators.grid.spec import QParams
from calibrators.program.freeze import code_bias, widen

__all__ = [
    "BudgetExhausted",
    "Measured",
    "NetworkLoss",
    "Point",
    "compared_outputs",
    "draw_samples",
    "float_outputs",
    "outputs_at",
]

CHUNK = 32
"""Samples per forward pass: the activations of one block stay near the processor."""

FIRST_LOOK = 0.25
"""Share of the samples after which a point may be given up."""

MARGIN = 0.25
"""A point is given up when its loss over the samples seen exceeds that of the best point by this share."""

Point = Mapping[str, QParams]


class BudgetExhausted(Exception):
    """The budget does not suffice for another evaluation."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A point and the loss of every sample under it, float64 [samples]."""

    point: Point
    losses: Tensor

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


@dataclass(frozen=True, eq=False)
class _Prefix:
    """The values that enter block `at` under `point`, for all samples."""

    at: int
    caches: Mapping[str, Cache]
    point: Point


class NetworkLoss(StreamedNetwork):
    """Mean loss over the samples at points, and the best point so far.

    inputs: one tensor per model input, [samples, ...].
    start:  parameters of every site; loss: of the outputs of these samples; budget: evaluations that may be spent.
    """

    def __init__(
        self, problem: Problem, inputs: Sequence[Tensor], start: Point, loss: PredictionLoss, *, budget: int
    ) -> None:
        placement = problem.placement
        owners = [s.name for s in placement.sites if s.kind == "activation" and s.shares is None]
        blocks = partition(placement.graph, placement.weight_of, chain=1, largest=1)
        super().__init__(problem, blocks, {name: start[name] for name in owners})
        self.loss, self.samples = loss, len(inputs[0])
        self.simulations = [self.simulation(block) for block in blocks]
        self.biases = {site.name: placement.added_to(site) for site in placement.sites if site.kind == "bias"}
        self.read_by = self._read_by()
        self.first = self._first_blocks()
        self.prefix = self.entry = _Prefix(0, self.record_inputs([inputs], self.samples), {})
        self.compared = [*compared_outputs(problem)]
        self.live = [self._live_at(index) for index in range(len(blocks) + 1)]
        work = [sum(macs(placement.nodes[name]) for name in block.weighted) * self.samples for block in blocks]
        self.work_from = [sum(work[index:]) for index in range(len(work) + 1)]
        self.budget, self.spent = budget * self.work_from[0], 0
        self.deadline = math.inf
        self.best: Measured | None = None
        self.current: dict[str, QParams] = {}
        self.widened: dict[str, QParams] = {}
        self.watch: Callable[[], None] = lambda: None

    # --- what a point needs -----------------------------------------------------------------------------------

    @property
    def evaluations(self) -> float:
        """Work done, in full evaluations."""
        return self.spent / self.work_from[0]

    def _read_by(self) -> dict[str, set[str]]:
        """Return by weight site the activation sites (owners) that it multiplies; none for weight-only layers."""
        found: dict[str, set[str]] = {}
        for site in (site for site in self.placement.sites if site.kind == "weight"):
            users = () if site.weight_only else site.users
            found[site.name] = {self.placement.input_of(self.placement.nodes[user]).name for user in users}
        return found

    def _first_blocks(self) -> dict[str, int]:
        """Return the first block in which the parameters of each site act, by the site's name."""
        first: dict[str, int] = {}
        for index, simulation in enumerate(self.simulations):
            sources = [self.biases[name][1].name for name in simulation.biases]
            for name in (*simulation.quantizers, *simulation.weights, *sources):
                first.setdefault(name, index)
        return first

    def _live_at(self, index: int) -> list[str]:
        """Return the values that enter block `index`; after the last block, the outputs that are compared."""
        made = {*self.entry.caches, *(name for block in self.blocks[:index] for name in block.outputs)}
        read = [name for block in self.blocks[index:] for name in block.inputs]
        read += self.compared
        return [name for name in dict.fromkeys(read) if name in made]

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, point: Point, *, whole: bool = False) -> float:
        """Return the mean loss at a point; for a point clearly worse than the best one, an estimate from some samples.

        whole:  use all samples in any case.
        raises: BudgetExhausted, before any work, if the budget does not hold a whole evaluation.
        """
        if self.best and self._agree_until(point, self.best.point) == len(self.blocks):
            return self.best.loss
        at = self.prefix.at if self._agree_until(point, self.prefix.point) >= self.prefix.at else 0
        if self.spent + self.work_from[at] > self.budget or time.perf_counter() > self.deadline:
            raise BudgetExhausted
        shared = [self.current, self.best.point] if self.best else [self.current]
        to = max(at, *(self._agree_until(point, other) for other in shared))
        self._set_point(point)
        with torch.no_grad():
            if to > at:
                self._advance(at, to, point)
            losses = self._losses(to, race=not whole)
        self.watch()
        return self._judge(point, losses)

    def _agree_until(self, point: Point, other: Point) -> int:
        """Return the first block in which two points differ; the number of blocks if they do not."""
        differ = (self.first[name] for name in point if name in self.first and not _same(point[name], other.get(name)))
        return min(differ, default=len(self.blocks))

    def _judge(self, point: Point, losses: Tensor) -> float:
        if len(losses) < self.samples:
            assert self.best is not None
            return self.best.loss + float(losses.mean() - self.best.losses[: len(losses)].mean())
        measured = Measured(dict(point), losses)
        if math.isnan(measured.loss):
            return math.inf
        if self.best is None or measured.loss < self.best.loss:
            self.best = measured
        return measured.loss

    def _losses(self, at: int, *, race: bool) -> Tensor:
        """Return the losses of the samples, computed from block `at` on; with `race`, of as many as it takes."""
        losses = torch.empty(0, dtype=torch.float64)
        for start, values in self._chunks_at(at):
            outputs = self._forward(values, at, len(self.blocks))
            made = self.loss([outputs[name] for name in self.compared], start)
            losses = torch.cat([losses, made])
            self.spent += self.work_from[at] * len(made) // self.samples
            if race and self._is_lost(losses):
                break
        return losses

    def _is_lost(self, losses: Tensor) -> bool:
        seen = len(losses)
        if self.best is None or seen < FIRST_LOOK * self.samples or seen == self.samples:
            return False
        return bool(losses.sum() > (1 + MARGIN) * self.best.losses[:seen].sum())

    # --- running ----------------------------------------------------------------------------------------------------

    def _chunks_at(self, at: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield by chunk the index of its first sample and the values that enter block `at`, which the prefix holds."""
        names, start = self.live[at], 0
        caches = (self.prefix if at else self.entry).caches
        for parts in self.chunks([caches[name] for name in names], CHUNK):
            yield start, dict(zip(names, parts, strict=True))
            start += len(parts[0])

    def _forward(self, values: dict[str, Tensor], at: int, to: int) -> dict[str, Tensor]:
        """Return the values that enter block `to`, from those that enter block `at`."""
        for index in range(at, to):
            block = self.blocks[index]
            made = self.simulations[index](*(values[name] for name in block.inputs))
            values |= dict(zip(block.outputs, made, strict=True))
            values = {name: values[name] for name in self.live[index + 1]}
        return values

    def _advance(self, at: int, to: int, point: Point) -> None:
        """Move the prefix from block `at`, where it is, or from the first block, to block `to`."""
        held = self.prefix if at else self.entry
        if held is not self.prefix:
            self._drop(self.prefix, {})
            self.prefix = held
        kept = {name: held.caches[name] for name in self.live[to] if name in held.caches}
        recording = Recording(self.memory, self.samples, set(self.live[to]) - kept.keys(), self.crossing_grid)
        for _, values in self._chunks_at(at):
            count = len(values[self.live[at][0]])
            recording.append(self._forward(values, at, to), count)
        caches = kept | recording.caches
        self._drop(held, caches)
        self.prefix = _Prefix(to, caches, dict(point))
        self.spent += self.work_from[at] - self.work_from[to]

    def _drop(self, prefix: _Prefix, kept: Mapping[str, Cache]) -> None:
        for name, cache in prefix.caches.items():
            if name not in kept and name not in self.entry.caches:
                cache.free()

    # --- setting a point --------------------------------------------------------------------------------------------

    def _set_point(self, point: Point) -> None:
        """Set the parameters of a point in every block; unchanged ones are not set again."""
        changed = {name for name in point if not _same(point[name], self.current.get(name))}
        for name in changed & self.quantizers.keys():
            self.quantizers[name].reset(point[name].to(self.device))
        touched = [name for name, sources in self.read_by.items() if changed & {name, *sources}]
        activations = {name: point[name] for name in self.quantizers}
        weights = widen(self.placement, activations, {name: point[name] for name in touched})
        for name, qparams in weights.items():
            if not _same(qparams, self.widened.get(name)):
                self.widened[name] = qparams
                weight = self.problem.values(self.placement.by_name[name])
                self._set("weights", name, channels_last(fake_quant(weight, qparams)))
        for name, (weight_site, source) in self.biases.items():
            if weight_site.name in weights:
                site = self.placement.by_name[name]
                scales = point[source.name].scale, self.widened[weight_site.name].scale
                coded = code_bias(self.problem.values(site).double(), *scales, site)
                self._set("biases", name, dequantize(coded.codes, coded.qparams))
        self.current = dict(point)

    def _set(self, kind: str, name: str, value: Tensor) -> None:
        for simulation in self.simulations:
            if name in getattr(simulation, kind):
                simulation.set(name, value.to(self.device))


def draw_samples(problem: Problem, samples: int, purpose: str) -> Tensor:
    """Draw at most `samples` of all samples: int64 [n], ascending; whole batches where their size is fixed."""
    total, batch = problem.samples, batch_of(problem.placement.graph, 1)
    wanted = min(total, samples)
    wanted = max(batch, wanted - wanted % batch)
    return torch.randperm(total, generator=problem.generator(purpose))[:wanted].sort().values


def compared_outputs(problem: Problem) -> dict[str, int]:
    """Return by fx name the index of each output that a loss compares: floats with one row per sample.

    raises: InputError if there is none.
    """
    graph = problem.placement.graph
    found: dict[str, int] = {}
    for index, node in enumerate(outputs_of(graph)):
        if node.name in problem.sample_values and node.meta["tensor_meta"].dtype.is_floating_point:
            found.setdefault(node.name, index)
    if not found:
        raise InputError(
            "the model has no floating-point output with one row per sample, by which the effect of a grid could be "
            f"measured; use a method that looks at layers (mse, gptq, qdrop), without {argument('budget')} and "
            f"{argument('sensitivity')}"
        )
    return found


def float_outputs(problem: Problem, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the compared outputs of the float network for all samples, [samples, ...] each."""
    graph = problem.placement.graph
    chunks = zip(*(torch.split(x, batch_of(graph, CHUNK)) for x in inputs), strict=True)
    parts = problem.ranks.spread(partial(outputs_at, graph, [*compared_outputs(problem).values()]), chunks)
    return [torch.cat(output) for output in zip(*parts, strict=True)]


@torch.no_grad()
def outputs_at(graph: fx.GraphModule, places: Sequence[int], chunk: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of a network at some places, for one input each."""
    outputs = graph(*chunk)
    return [outputs[place] for place in places]


def _same(ours: QParams, other: QParams | None) -> bool:
    return ours is other or (
        other is not None
        and ours.spec == other.spec
        and torch.equal(ours.scale, other.scale)
        and torch.equal(ours.zero_point, other.zero_point)
    )
