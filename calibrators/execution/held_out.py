"""Samples that a method holds out: a problem without them, and how close networks come to the float one on them.

Must not know: which methods there are, ONNX.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from calibrators.errors import InputError, argument
from calibrators.execution.losses import PredictionLoss, is_logits, prediction_loss
from calibrators.execution.measure import Batch
from calibrators.execution.task import KeptPart, Problem
from calibrators.goal import ROOM, Goal, reaches, with_room
from calibrators.graph.aten import batch_of, example_batch, outputs_of, shape_of
from calibrators.grid.metrics import decibels
from calibrators.intervals import Interval, ratio, share_interval
from calibrators.ladder_record import HeldOutFigure

__all__ = ["FEWEST", "Judge", "Verdict", "affordable", "hold_out"]

FEWEST = 8
"""Samples below which nothing is held out: four decide nothing."""

LEAST, MOST = 16, 512
"""Held-out samples, where there are twice as many, and at most: beyond, intervals hardly become narrower."""

CHUNK = 32
"""Samples per forward pass."""


def hold_out(problem: Problem, share: float) -> tuple[Problem, Tensor]:
    """Return the problem without a share of its samples, drawn with the seed, and those samples: int64 [n], ascending.

    Where the graph fixes the batch, whole batches are drawn.

    raises: InputError where there are too few samples.
    """
    size = batch_of(problem.placement.graph, 1)
    units = problem.samples // size
    wanted = math.ceil(affordable(problem, min(max(share * problem.samples, LEAST), MOST)) / size)
    held = max(1, min(wanted, units // 2))
    if problem.samples < FEWEST or units < 2:
        raise InputError(
            f"method 'auto' judges other methods on calibration samples that it holds out, but there are only "
            f"{problem.samples}; give at least {max(FEWEST, 2 * size)}, or name a method: {argument('method', 'gptq')}."
        )
    drawn = torch.randperm(units, generator=problem.generator("held out"))[:held].sort().values
    rows = (drawn[:, None] * size + torch.arange(size)).flatten()
    kept = torch.ones(problem.samples, dtype=torch.bool)
    kept[rows] = False
    labels = None if problem.labels is None else problem.labels_of(kept.nonzero().flatten())
    part = hashlib.sha256(repr(rows.tolist()).encode()).hexdigest()[:16]
    seen = None if problem.seen is None else KeptPart(f"without-{part}", problem.seen)
    rest = replace(problem, batches=_Rows(problem.batches, kept), labels=labels, coarser={}, free={}, seen=seen)
    return rest, rows


def affordable(problem: Problem, wanted: float) -> int:
    """Return as many samples as wanted, or as inputs and outputs of both networks take half of the problem's memory."""
    graph = problem.placement.graph
    ends = [*graph.graph.find_nodes(op="placeholder"), *outputs_of(graph)]
    each = sum(8 * math.prod(shape_of(node)) for node in ends) // example_batch(graph)
    return max(1, min(math.ceil(wanted), problem.memory // 2 // max(each, 1)))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Batches with the samples of a mask alone, bool [samples]."""

    batches: Iterable[Batch]
    kept: Tensor

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for batch in self.batches:
            inside = self.kept[start : start + len(batch[0])]
            start += len(batch[0])
            if bool(inside.any()):
                yield tuple(x[inside] for x in batch)


@dataclass(frozen=True, eq=False)
class Verdict:
    """A network on held-out samples.

    losses:  divergence from the float network's prediction by sample, float64 [n].
    figures: those with a limit; without any, agreement or sqnr_db of the first output.
    reached: whether every figure keeps its limit, None without limits.
    """

    losses: Tensor
    figures: tuple[HeldOutFigure, ...]
    reached: bool | None

    @property
    def loss(self) -> float:
        """The mean loss."""
        return float(self.losses.mean())

    def gain_over(self, other: Verdict) -> Interval:
        """Return the ratio of the mean loss to that of another network, by paired bootstrap.

        It is noise unless the interval ends below 1. Two networks without any loss have the ratio 1.
        """
        if not other.loss:
            return Interval(1.0, 1.0, 1.0) if not self.loss else Interval(math.inf, math.inf, math.inf)
        return ratio([(self.losses.numpy(), other.losses.numpy())])


@dataclass(eq=False)
class _Sums:
    """Measurements of one output, by sample: [n] each; `agree` is empty where the output decides nothing."""

    agree: Tensor
    signal: Tensor
    noise: Tensor


class Judge:
    """Compares networks with the float one on some samples of a problem.

    goal: limits that a network should keep, None for none; `room` of what they allow has to be left.
    raises: InputError if no output has one row per sample.
    """

    def __init__(self, problem: Problem, rows: Tensor, goal: Goal | None, room: float = ROOM) -> None:
        self.graph = graph = problem.placement.graph
        self.size = batch_of(graph, CHUNK)
        found = enumerate(outputs_of(graph))
        self.compared = [index for index, node in found if node.name in problem.sample_values]
        if not self.compared:
            raise InputError(
                "the model has no output with one row per sample, by which networks could be compared; name a method: "
                f"{argument('method', 'gptq')}."
            )
        self.inputs = problem.select(rows)
        self.floats = self._outputs(graph)
        self.loss = _loss(self.floats)
        self.limits = {name: with_room(name, limit, room) for name, limit in (goal or {}).items()}

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.inputs[0])

    @property
    def loss_name(self) -> Literal["kl", "mse", "share"]:
        """The divergence that is measured: kl of logits, mse, or of integers the share that differs."""
        floats = [y for y in self.floats if y.is_floating_point()]
        return "share" if not floats else "kl" if all(map(is_logits, floats)) else "mse"

    def part(self, samples: int) -> Judge:
        """Return the judge of about so many of the samples, evenly spread; whole batches where their size is fixed."""
        batch = batch_of(self.graph, 1)
        units = self.samples // batch
        drawn = torch.arange(0, units, max(1, units * batch // samples))
        rows = (drawn[:, None] * batch + torch.arange(batch)).flatten()
        other = copy.copy(self)
        other.inputs, other.floats = [x[rows] for x in self.inputs], [y[rows] for y in self.floats]
        other.loss = _loss(other.floats)
        return other

    def judge(self, network: Callable[..., Sequence[Tensor]]) -> Verdict:
        """Return what the network makes of the samples; it takes the inputs of the graph and returns all outputs."""
        return self.verdict(self._outputs(network))

    def verdict(self, outputs: Sequence[Tensor]) -> Verdict:
        """Return the verdict on the compared outputs of all samples."""
        sums = [_sums(y, t) for y, t in zip(outputs, self.floats, strict=True)]
        measured = dict(self._figures(sums))
        names = [name for name in self.limits if name in measured]
        shown = names or [name for name in ("agreement", "sqnr_db") if name in measured][:1]
        figures = [
            HeldOutFigure(n, measured[n].value, measured[n].low, measured[n].high, self.limits.get(n)) for n in shown
        ]
        kept = [reaches(name, measured[name].value, self.limits[name]) for name in names]
        return Verdict(self.losses(outputs), tuple(figures), all(kept) if kept else None)

    def _outputs(self, network: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
        chunks = zip(*(torch.split(x, self.size) for x in self.inputs), strict=True)
        with torch.no_grad():
            parts = [[outputs[index] for index in self.compared] for outputs in (network(*chunk) for chunk in chunks)]
        return [torch.cat(output) for output in zip(*parts, strict=True)]

    def losses(self, outputs: Sequence[Tensor], start: int = 0) -> Tensor:
        """Return the losses of the samples from `start` on, float64 [n], for their compared outputs."""
        places = [index for index, y in enumerate(self.floats) if y.is_floating_point()]
        if self.loss is not None:
            return self.loss([outputs[place] for place in places], start)
        pairs = zip(outputs, (y[start : start + len(outputs[0])] for y in self.floats), strict=True)
        return torch.stack([1 - _sums(*pair).agree for pair in pairs]).mean(0)

    def _figures(self, sums: Sequence[_Sums]) -> Iterator[tuple[str, Interval]]:
        if self.compared[0] == 0:
            if len(sums[0].agree):
                yield "agreement", self._agreement(sums[0])
            yield "sqnr_db", _sqnr(sums[0])
        if deciding := [self._agreement(each) for each in sums if len(each.agree)]:
            yield "lowest_agreement", min(deciding, key=lambda each: each.value)
        if others := [_sqnr(each) for each in sums if not len(each.agree)]:
            yield "lowest_sqnr_db", min(others, key=lambda each: each.value)

    def _agreement(self, sums: _Sums) -> Interval:
        share = float(sums.agree.mean())
        return Interval(share, *share_interval(share, self.samples))


def _loss(outputs: Sequence[Tensor]) -> PredictionLoss | None:
    floats = [y for y in outputs if y.is_floating_point()]
    return prediction_loss("auto", floats) if floats else None


def _sums(found: Tensor, exact: Tensor) -> _Sums:
    """Return the sums of an output; the same infinity on both sides, as of a mask, is neither signal nor noise."""
    hidden = (found == exact) & ~exact.isfinite()
    ours, truth = (torch.where(hidden, 0.0, y.double()).reshape(len(y), -1) for y in (found, exact))
    agree = torch.empty(0, dtype=torch.float64)
    if not exact.is_floating_point():
        agree = (ours == truth).double().mean(1)
    elif is_logits(exact):
        agree = (found.argmax(1) == exact.argmax(1)).double()
    return _Sums(agree, truth.square().sum(1), (ours - truth).square().sum(1))


def _sqnr(sums: _Sums) -> Interval:
    """Return signal over noise in dB, infinite without noise, with a bootstrap interval over the samples."""
    signal, noise = float(sums.signal.sum()), float(sums.noise.sum())
    if not noise or not signal:
        return Interval(*(3 * [decibels(signal, noise)]))
    found = ratio([(sums.noise.numpy(), sums.signal.numpy())])
    return Interval(*(decibels(1.0, each) for each in (found.value, found.high, found.low)))
