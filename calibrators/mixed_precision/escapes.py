"""Escapes for single layers: 8 bits, or float where 8 bits do not help, for those that cost the prediction most.

The cost of a layer is measured alone: the float network in which only that is rounded which the escape would change.
Noise that never reaches an output costs nothing, and a layer whose noise is small beside its largest values costs much
where the rest of the network looks at the small ones.

Must not know: which methods there are, ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.errors import InputError
from calibrators.execution.held_out import Judge, Verdict, affordable
from calibrators.execution.network_loss import draw_samples
from calibrators.execution.task import Problem
from calibrators.goal import Goal
from calibrators.graph.aten import batch_of, example_batch, module_path, outputs_of, shape_of
from calibrators.graph.walk import Values, walk
from calibrators.grid.numerics import dequantize, fake_quant
from calibrators.grid.spec import QParams, QuantizedTensor, Site
from calibrators.ladder_record import CostlyLayers, Escape
from calibrators.placement.layer_rules import LayerRule, MatchedRule
from calibrators.placement.place import Placement
from calibrators.program.freeze import CalibrationResult, freeze
from calibrators.ranges.range_method import RangeMethod

__all__ = [
    "RANKED",
    "Candidate",
    "candidates",
    "costly_layers",
    "fewest",
    "finer",
    "most_escapes",
    "with_escapes",
]

FLAG = "auto"
"""Origin of the rules, in place of the flag by which a user gives one."""

WIDE_ENOUGH = 8
"""Bits of the first escape."""

SUFFICES = 0.5
"""Share of a layer's cost that 8 bits have to remove; where they remove less, the layer stays in float."""

VALUES_AT_ONCE = 1 << 28
"""Bytes of the float values of the samples that are run at a time."""

MOST = 0.5
"""Share of the layers that get an escape at most: beyond, other bits for all layers are the better answer."""

RANKED, JUDGED = 32, 128
"""Samples by which layers are ranked, and those by which advice is judged."""

LISTED = 20
"""Layers that advice lists, more where more are needed."""

Reading = tuple[str, str, str]
"""One place where a value is rounded: the kind of its site, its node, and the operator that reads it."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """An escape with its rule; the rule matches what `--layer` would match."""

    escape: Escape
    rule: MatchedRule


def candidates(result: CalibrationResult, judge: Judge) -> list[Candidate]:
    """Return the escapes of all layers, the one that takes most loss off first; none for layers that cost nothing.

    judge: has the samples on which costs are measured.
    """
    tried = [*_rules(result.placement)]
    losses = _Alone(result, judge).losses([changed for _, rules in tried for changed in rules.values()])
    costs, found = iter(losses), []
    for name, rules in tried:
        by_rule = {settings: next(costs) for settings in rules}
        most = max(by_rule.values())
        settings = next(each for each, cost in by_rule.items() if cost >= SUFFICES * most)
        if by_rule[settings] > 0:
            rule = result.placement.matching(LayerRule(name, **dict(settings)), FLAG)
            found.append(Candidate(Escape(name, dict(settings), by_rule[settings]), rule))
    return sorted(found, key=lambda each: -each.escape.cost)


Settings = tuple[tuple[str, int | bool], ...]


def most_escapes(placement: Placement, ranked: Sequence[Candidate]) -> int:
    """Return how many of the candidates may be chosen."""
    return min(len(ranked), int(MOST * len(placement.weight_of)))


def costly_layers(problem: Problem, result: CalibrationResult, ranges: RangeMethod, goal: Goal | None) -> CostlyLayers:
    """Return the layers of a finished network that cost the prediction most, and how many of them need an escape.

    problem: of the placement of the network; ranges: for the grids of escapes; goal: what the network should reach.
    raises:  InputError if no output has one row per sample.
    """
    vars(problem)["statistics"] = result.observed
    judge = Judge(problem, draw_samples(problem, affordable(problem, JUDGED), "advice"), goal)
    now = judge.judge(result.program)
    ranked = candidates(result, judge.part(RANKED))
    judged: dict[int, Verdict] = {}

    def suffices(count: int) -> bool:
        if count not in judged:
            judged[count] = judge.judge(with_escapes(problem, result, ranges, ranked[:count])[1].program)
        return bool(judged[count].reached)

    most = most_escapes(result.placement, ranked)
    advised = fewest(most, suffices) if most and now.reached is not None else None
    better = None if advised is None else judged[advised].figures
    layers = tuple(each.escape for each in ranked[: max(advised or 0, LISTED)])
    return CostlyLayers(judge.samples, judge.loss_name, layers, now.figures, advised, better)


def _rules(placement: Placement) -> Iterator[tuple[str, dict[Settings, frozenset[Reading]]]]:
    """Yield for every layer its possible rules, the mildest first, with the roundings that each takes away."""
    for name in _names(placement):
        rules: dict[Settings, frozenset[Reading]] = {}
        for settings in ({"weight_bits": WIDE_ENOUGH, "activation_bits": WIDE_ENOUGH}, {"float": True}):
            rule = placement.matching(LayerRule(name, **settings), FLAG)
            try:
                changed = _lifted(placement, placement.again([rule]))
            except InputError:  # the last layer that was left
                continue
            if changed:
                rules[tuple(settings.items())] = changed
        if rules:
            yield name, rules


def _names(placement: Placement) -> list[str]:
    """Return the names of the layers as rules match them: paths of modules, else names of operators."""
    paths = {name: module_path(placement.nodes[name]) for name in placement.weight_of}
    parents = {path for other in paths.values() for path in paths.values() if other.startswith(f"{path}.")}
    order = sorted(paths, key=list(placement.nodes).index)
    return list(dict.fromkeys(name if paths[name] in {"", *parents} else paths[name] for name in order))


def _lifted(placement: Placement, other: Placement) -> frozenset[Reading]:
    """Return the roundings of a placement that another one lacks, or has on a grid of more bits."""
    kept = {(*reading, site.spec.bits) for site, reading in _readings(other)}
    return frozenset(reading for site, reading in _readings(placement) if (*reading, site.spec.bits) not in kept)


def _readings(placement: Placement) -> Iterator[tuple[Site, Reading]]:
    for site in placement.sites:
        yield from ((site, (site.kind, site.node, user)) for user in site.users)


class _Alone:
    """The float network with few of the roundings of a result."""

    def __init__(self, result: CalibrationResult, judge: Judge) -> None:
        self.result, self.judge, self.graph = result, judge, result.placement.graph
        self.site_of = {reading: site for site, reading in _readings(result.placement)}

    @torch.no_grad()
    def losses(self, parts: Sequence[Collection[Reading]]) -> list[float]:
        """Return the mean loss with each of the parts of the roundings."""
        sums, start = [0.0] * len(parts), 0
        for batch in self._batches():
            values: Values = {}
            for node, alive in walk(self.graph, batch):
                values[node] = alive[node]
            for index, part in enumerate(parts):
                sums[index] += float(self.judge.losses(self._outputs(values, part), start).sum())
            start += len(batch[0])
        return [total / self.judge.samples for total in sums]

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        values = sum(4 * math.prod(shape_of(node)) for node in self.graph.graph.nodes if node.op == "call_function")
        sample = values // example_batch(self.graph)
        size = batch_of(self.graph, max(1, min(self.judge.size, VALUES_AT_ONCE // max(sample, 1))))
        yield from zip(*(torch.split(x, size) for x in self.judge.inputs), strict=True)

    def _outputs(self, values: Values, part: Collection[Reading]) -> list[Tensor]:
        """Return the compared outputs; only what follows a rounding is computed again."""
        rounded = {(node, user): self.site_of[kind, node, user] for kind, node, user in part}
        changed: Values = {}

        def read(reader: fx.Node, operand: fx.Node) -> Any:
            value = changed[operand] if operand in changed else values[operand]
            site = rounded.get((operand.name, reader.name))
            return value if site is None else self._on_grid(site, value)

        for node in self.graph.graph.nodes:
            sources = node.all_input_nodes
            if node.op == "call_function" and any(x in changed or (x.name, node.name) in rounded for x in sources):
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), partial(read, node))
                changed[node] = node.target(*args, **kwargs)
        end, outputs = self.graph.graph.output_node(), outputs_of(self.graph)
        return [read(end, outputs[index]) for index in self.judge.compared]

    def _on_grid(self, site: Site, value: Tensor) -> Tensor:
        if site.kind in ("activation", "constant"):
            return fake_quant(value, self.result.qparams_of(site))
        coded = (self.result.weights if site.kind == "weight" else self.result.biases)[site.name]
        return dequantize(coded.codes, coded.qparams)


def finer(problem: Problem, chosen: Sequence[Candidate]) -> Problem:
    """Return the problem of the network with escapes."""
    return problem.placed(problem.placement.again([each.rule for each in chosen]), coarser={}, free={})


def with_escapes(
    problem: Problem, result: CalibrationResult, ranges: RangeMethod, chosen: Sequence[Candidate]
) -> tuple[Problem, CalibrationResult]:
    """Return a network with escapes and its problem: all that they leave as it is keeps its codes and scales.

    problem: that of the result; ranges: for the grids that are new, whose weights are rounded to nearest.
    """
    other = finer(problem, chosen)
    placement = other.placement
    before = {(site.kind, site.node): site for site in problem.placement.sites}
    kept = {
        site.name: old
        for site in placement.sites
        if (old := before.get((site.kind, site.node))) is not None and old.spec == site.spec
    }
    activations: dict[str, QParams] = {}
    weights: dict[str, QParams | QuantizedTensor] = {}
    for site in placement.sites:
        old = kept.get(site.name)
        if site.kind == "activation" and site.shares is None:
            known = result.activations.get(old.name) if old is not None else None
            activations[site.name] = other.qparams(site, ranges) if known is None else known
        elif site.kind == "weight" and old is not None:
            weights[site.name] = result.weights[old.name]
            if old.name in problem.coarser:
                other.coarser[site.name] = problem.coarser[old.name]
            if old.name in problem.free:
                other.free[site.name] = problem.free[old.name]
        elif site.kind == "weight":
            weights[site.name] = other.qparams(site, ranges)
    biases = {
        site.name: dequantize(coded.codes, coded.qparams).double()
        for site in placement.sites
        if site.kind == "bias" and site.name in kept and placement.added_to(site)[0].name in kept
        for coded in [result.biases[kept[site.name].name]]
    }
    found = freeze(placement, activations, weights, biases)
    notes = tuple(dict.fromkeys((*result.record.notes, *found.record.notes)))
    record = replace(result.record, notes=notes, settled=found.record.settled)
    return other, replace(found, observed=other.statistics, record=record)


def fewest(most: int, suffice: Callable[[int], bool]) -> int | None:
    """Return the smallest number up to `most` that suffices, None if none does; what suffices does so with more, too.

    Numbers are tried by doubling and then by halving: few tries where few suffice.
    """
    low, high = 0, 1
    while not suffice(min(high, most)):
        if high >= most:
            return None
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffice(middle) else (middle, high)
    return high
