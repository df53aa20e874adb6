"""Mixed precision: measure how sensitive the network is to the bits of each scale, and choose bits within budgets.

1. Sensitivity: the loss with one scale on a coarser grid and all others on their finest.
2. An integer program picks the bits with the least sum of losses within the budgets (mixed_precision.ilp).
3. The network is measured with this choice. What each scale really costs there, the loss that its finest grid would
   take off, corrects the sensitivities; the program is solved again, and the best choice measured is kept.
4. For a limit on accuracy, bisection finds the smallest budget whose choice keeps it; each step is one reading.

source: the additive model and its integer program are those of HAWQ-V3 (Yao et al. 2021, section 3.4).
Departs: losses of the prediction are measured, not derived from Hessian traces, and corrected by measurement.

Must not know: ONNX, how reports look.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from calibrators.errors import InputError, argument
from calibrators.execution.task import Bar, Problem
from calibrators.graph.aten import macs
from calibrators.mixed_precision.budgets import ACCURACY, Budget
from calibrators.mixed_precision.ilp import Costs, Layer, Losses, Stored, Widths, allocate, monotone
from calibrators.mixed_precision.sensitivity import Grids, Kind, Meter, TunableScale, tunable_scales
from calibrators.placement.identity_taps import spike_of
from calibrators.placement.layer_rules import LayerRule, MatchedRule
from calibrators.placement.place import Placement, PlacementOptions
from calibrators.ranges.range_method import RangeMethod
from calibrators.record import MixedChoice, MixedPrecision, Reading, ScaleSensitivity, Sensitivity, WidthReading

__all__ = ["allocate_bits", "check_budgets", "measure_sensitivity", "network_costs"]

SAMPLES = 256
"""Samples for the readings of sensitivities: with all but one scale on the finest grid there is little noise."""

CHECKED = 512
"""Samples for the readings of choices."""

ROUNDS = 2
"""Number of corrections of the sensitivities by what the scales cost in the network that was found."""

STRETCH = 4.0
"""Largest factor by which one correction raises or lowers a sensitivity, because single readings are noisy."""

FRONT = 7
"""Number of budgets, from the least to the most that can be spent, whose best choice is read for the front."""

HALVINGS = 6
"""Number of readings of the bisection for a limit on accuracy."""

FLOAT, FLOAT_BITS = "", 32
"""Name that stands for the scale of an input that is not quantized, and its bits."""

MATCH = "budget"
"""Text in place of a glob in the rules that budgets led to."""


def measure_sensitivity(problem: Problem, options: PlacementOptions, method: RangeMethod) -> Sensitivity:
    """Return the loss by bits of every open weight and activation scale, for the record."""
    kinds: tuple[Kind, ...] = ("weight", "activation")
    grids = Grids(problem, tunable_scales(problem.placement, options, kinds), method)
    meter = Meter(grids, SAMPLES)
    with problem.stage("sensitivity", _readings(meter, kinds)) as bar:
        table = _Table(meter, kinds, bar)
    return table.record()


def allocate_bits(
    problem: Problem,
    options: PlacementOptions,
    method: RangeMethod,
    budgets: Sequence[Budget],
    stored: Stored,
) -> tuple[tuple[MatchedRule, ...], Sensitivity, MixedPrecision]:
    """Return rules with the bits of every open scale within the budgets, and the records of how they were found.

    The bits of weights are open; those of activations only if a budget limits bit operations.

    stored: the bytes of a weight in the file.
    raises: InputError if the coarsest grids, or for a limit on accuracy the finest, do not meet a budget.
    """
    return _BitAllocator(problem, options, method, budgets, stored).run()


def check_budgets(placement: Placement, options: PlacementOptions, budgets: Sequence[Budget], stored: Stored) -> None:
    """Raise InputError if the coarsest grids do not meet a limit on size, as `allocate_bits` does."""
    if budgets:
        _Limits(placement, options, budgets, stored)


def _readings(meter: Meter, kinds: Iterable[Kind]) -> int:
    return 1 + sum(len(scale.specs) - 1 for scale in meter.grids.scales.values() if scale.kind in kinds)


class _Table:
    """Readings with one scale at a time on a coarser grid."""

    def __init__(self, meter: Meter, kinds: Sequence[Kind], bar: Bar) -> None:
        self.meter = meter
        self.finest = meter.read({})
        bar.advance()
        self.readings: dict[str, dict[int, Reading]] = {}
        for name in meter.order:
            scale = meter.grids.scales[name]
            if scale.kind in kinds:
                self.readings[name] = {}
                for bits in scale.specs:
                    self.readings[name][bits] = meter.read({name: bits})
                    bar.advance(bits != scale.finest)

    @property
    def losses(self) -> dict[str, dict[int, float]]:
        """Loss that every scale adds, by its bits."""
        base = self.finest.loss
        return {name: monotone({b: r.loss - base for b, r in rs.items()}) for name, rs in self.readings.items()}

    def record(self, chosen: Widths | None = None) -> Sensitivity:
        """Return everything that was read, with the bits that were chosen."""
        problem, open_scales = self.meter.grids.problem, self.meter.grids.scales
        scales = tuple(
            ScaleSensitivity(
                site=name,
                kind=open_scales[name].kind,
                widths=tuple(WidthReading(**vars(reading), bits=bits) for bits, reading in readings.items()),
                bits=chosen[name] if chosen else None,
                **(_shape(problem, name) if open_scales[name].kind == "weight" else {}),
            )
            for name, readings in self.readings.items()
        )
        return Sensitivity(self.meter.metrics.loss_name, self.meter.samples, self.finest, scales)


@dataclass(frozen=True)
class _Choice:
    """Bits of the open scales, the loss that the sensitivities predict, and the network with them."""

    widths: Widths
    predicted: float
    reading: Reading


class _Limits:
    """The scales whose bits are open, what they cost, and the limits on that.

    raises: InputError if no choice is within the limits on size.
    """

    def __init__(
        self, placement: Placement, options: PlacementOptions, budgets: Sequence[Budget], stored: Stored
    ) -> None:
        self.budgets = budgets
        self.limits = {budget.quantity: budget.limit for budget in budgets if budget.quantity != ACCURACY}
        self.accuracy = next((budget for budget in budgets if budget.quantity == ACCURACY), None)
        self.axis = next(iter(self.limits), "weight_bytes")
        self.open: tuple[Kind, ...] = ("weight", "activation") if "bops" in self.limits else ("weight",)
        self.every = tunable_scales(placement, options, ("weight", "activation"))
        self.costs = network_costs(placement, stored, self.every)
        self.scales = {scale.site: scale for scale in self.every if scale.kind in self.open}
        self.given = {scale.site: self.costs.widths[scale.site] for scale in self.every if scale.kind not in self.open}
        if not self.scales:
            fixed = [argument("first_last_bits", options.first_last_bits)] if options.first_last_bits else []
            fixed += [argument("layers")] if options.layers else []
            raise InputError(
                f"a budget is given, but {' and '.join(fixed) or 'the target'} leaves no layer whose bits can be "
                "chosen; change that, or leave the budget out."
            )
        coarsest = {name: min(scale.specs) for name, scale in self.scales.items()}
        for quantity, limit in self.limits.items():
            least = self.costs.of(quantity, coarsest)
            if least > limit:
                raise InputError(
                    f"budget '{Budget(quantity, limit)}' cannot be met: the fewest bits that may be chosen take "
                    f"{least:.10g}; raise it, or let {argument('first_last_bits')} and {argument('layers')} rules "
                    "give fewer bits."
                )


class _BitAllocator(_Limits):
    """One allocation."""

    def __init__(
        self,
        problem: Problem,
        options: PlacementOptions,
        method: RangeMethod,
        budgets: Sequence[Budget],
        stored: Stored,
    ) -> None:
        super().__init__(problem.placement, options, budgets, stored)
        self.problem = problem.variant(memory=problem.memory // 2)  # two networks are held
        grids = Grids(self.problem, self.every, method)
        self.meter, self.check = Meter(grids, SAMPLES), Meter(grids, CHECKED)
        if self.accuracy and self.check.read({}).accuracy_drop is None:
            raise InputError(
                f"budget '{self.accuracy}' needs a model output of shape [n, classes]; limit {self.axis} instead."
            )

    def run(self) -> tuple[tuple[MatchedRule, ...], Sensitivity, MixedPrecision]:
        started = time.perf_counter()
        with self.problem.stage("sensitivity", _readings(self.meter, self.open)) as bar:
            self.table = _Table(self.meter, self.open, bar)
        self.losses: Losses = self.table.losses
        with self.problem.stage("allocate", None) as self.bar:
            best = self._cheapest() if self.accuracy else self._within(self.limits)
            mixed = MixedPrecision(
                budgets=tuple(map(str, self.budgets)),
                axis=self.axis,
                samples=self.check.samples,
                rank_correlation=self._rank_correlation(best),
                found=self._entry(best),
                front=self._front(),
                seconds=time.perf_counter() - started,
            )
        return self._rules(best.widths), self.table.record(best.widths), mixed

    # --- choices ------------------------------------------------------------------------------------------------------

    def _choice(self, widths: Widths) -> _Choice:
        reading = self.check.read({**self.given, **widths})
        self.bar.advance()
        return _Choice(widths, sum(self.table.losses[name][bits] for name, bits in widths.items()), reading)

    def _allocated(self, losses: Losses, limits: Mapping[str, float]) -> _Choice:
        widths = allocate(losses, self.costs, limits)
        if widths is None:
            texts = ", ".join(f"'{Budget(*limit)}'" for limit in limits.items())
            raise InputError(f"the budgets {texts} cannot be met together; raise one of them.")
        return self._choice(widths)

    def _within(self, limits: Mapping[str, float]) -> _Choice:
        """Return the best choice measured within limits on size, of those that corrected sensitivities lead to."""
        best = choice = self._allocated(self.losses, limits)
        tried, losses = [best.widths], self.losses
        for _ in range(ROUNDS):
            losses = self._corrected(losses, choice)
            choice = self._allocated(losses, limits)
            if choice.widths in tried:
                break
            tried.append(choice.widths)
            best = min(best, choice, key=lambda choice: choice.reading.loss)
        return best

    def _corrected(self, losses: Losses, choice: _Choice) -> Losses:
        """Scale the losses of every scale so that they match what its bits cost in the network of a choice."""
        corrected = dict(losses)
        for name, cost in self._costs_within(choice).items():
            expected = losses[name][choice.widths[name]]
            factor = min(max(cost / expected, 1 / STRETCH), STRETCH) if expected > 0 else 1.0
            corrected[name] = {bits: loss * factor for bits, loss in losses[name].items()}
        return corrected

    def _costs_within(self, choice: _Choice) -> dict[str, float]:
        """Return, for scales that are not on their finest grid, how much that grid lowers the loss of a choice.

        Scales whose bits are not open have their finest grid, so that their noise does not hide the differences.
        """
        widths = choice.widths
        loss = self.meter.read(widths).loss
        finest = {name: scale.finest for name, scale in self.meter.grids.scales.items()}
        coarse = [name for name in self.meter.order if widths.get(name, math.inf) < finest[name]]
        costs = {}
        for name in coarse:
            costs[name] = loss - self.meter.read({**widths, name: finest[name]}).loss
            self.bar.advance()
        return costs

    def _rank_correlation(self, choice: _Choice) -> float | None:
        """Return Spearman's correlation between the costs of scales alone and in the network of a choice."""
        costs = self._costs_within(choice)
        alone = [self.losses[name][choice.widths[name]] for name in costs]
        if len(set(alone)) < 2 or len(set(costs.values())) < 2:
            return None
        from scipy.stats import spearmanr  # imported only where a budget is given

        return float(spearmanr(alone, [*costs.values()]).statistic)

    def _cheapest(self) -> _Choice:
        """Return the smallest choice that keeps the limit on accuracy: by bisection of the budget on the axis."""
        assert self.accuracy is not None
        low, high = self._reach()
        high = min(high, self.limits.get(self.axis, math.inf))
        best = self._within({**self.limits, self.axis: high})
        if not self._keeps_accuracy(best):
            cost, drop = self.costs.of(self.axis, best.widths), best.reading.accuracy_drop
            raise InputError(
                f"budget '{self.accuracy}' cannot be met: with {self.axis}={cost:.10g} the drop is {drop:.4g} on "
                f"{self.check.samples} calibration samples; raise the limit, or give activations more bits."
            )
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            choice = self._allocated(self.losses, {**self.limits, self.axis: middle})
            if self._keeps_accuracy(choice):
                best, high = choice, self.costs.of(self.axis, choice.widths)
            else:
                low = middle
        return best

    def _keeps_accuracy(self, choice: _Choice) -> bool:
        assert self.accuracy is not None
        drop = choice.reading.accuracy_drop
        return drop is not None and drop <= self.accuracy.limit

    # --- records -------------------------------------------------------------------------------------------------

    def _reach(self) -> tuple[float, float]:
        """Return the least and most that can be spent on the axis."""
        ends = (min, max)
        least, most = (
            self.costs.of(self.axis, {name: end(scale.specs) for name, scale in self.scales.items()}) for end in ends
        )
        return least, most

    def _front(self) -> tuple[MixedChoice, ...]:
        """Return the best choices for budgets between these ends, and choices of uniform bits for comparison."""
        least, most = self._reach()
        budgets = [least + (most - least) * (index / (FRONT - 1)) ** 2 for index in range(FRONT)]  # denser where small
        widths = [allocate(self.losses, self.costs, {self.axis: budget * (1 + 1e-9)}) for budget in budgets]
        mixed = [self._entry(self._choice(chosen)) for chosen in widths if chosen is not None]
        candidates = sorted({bits for scale in self.scales.values() for bits in scale.specs})
        uniform = [
            replace(self._entry(self._choice({n: _nearest(k, bits) for n, k in self.scales.items()})), uniform=bits)
            for bits in candidates
        ]
        return (*mixed, *uniform)

    def _entry(self, choice: _Choice) -> MixedChoice:
        widths = {**self.given, **choice.widths}
        return MixedChoice(
            **vars(choice.reading),
            weight_bytes=self.costs.of("weight_bytes", widths),
            avg_weight_bits=self.costs.of("avg_weight_bits", widths),
            bops=self.costs.of("bops", widths),
            predicted=choice.predicted,
        )

    def _rules(self, widths: Widths) -> tuple[MatchedRule, ...]:
        """Return one rule per kind and bits, for the operators that read the scales."""
        found: dict[tuple[Kind, int], list[str]] = {}
        for name, scale in self.scales.items():
            found.setdefault((scale.kind, widths[name]), []).extend(scale.layers)
        return tuple(
            MatchedRule(_rule(kind, bits), frozenset(layers), MATCH) for (kind, bits), layers in sorted(found.items())
        )


def _shape(problem: Problem, name: str) -> dict[str, Any]:
    """Describe what makes a weight hard to quantize.

    spread: largest magnitude of a channel over that of the median channel: the price of one scale for all of them.
    spike:  how far a folded identity branch stands out (placement.identity_taps), None where there cannot be one.
    """
    site = problem.placement.by_name[name]
    values = problem.values(site)
    reach = values.movedim(problem.placement.target.weight.axis or 0, 0).flatten(1).abs().amax(1)
    spread = float(reach.max() / reach.median().clamp(min=1e-30))
    spike = spike_of(problem.placement.graph, problem.placement.nodes[site.node])
    return {"values": values.numel(), "spread": spread, "spike": spike}


def _rule(kind: Kind, bits: int) -> LayerRule:
    return LayerRule(MATCH, weight_bits=bits) if kind == "weight" else LayerRule(MATCH, activation_bits=bits)


def _nearest(scale: TunableScale, bits: int) -> int:
    return min(scale.specs, key=lambda width: (abs(width - bits), -width))


def network_costs(placement: Placement, stored: Stored, scales: Iterable[TunableScale] = ()) -> Costs:
    """Return the costs of bits in a network.

    stored: the bytes of a weight in the file; scales: those whose bits are open.
    """
    grids = {site.name: [site.spec] for site in placement.sites if site.kind in ("activation", "weight")}
    widths = {name: spec.bits for name, (spec,) in grids.items()}
    for scale in scales:
        grids[scale.site] += scale.specs.values()
    weights = {site.name: placement.values(site) for site in placement.sites if site.kind == "weight"}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    wide = {name: max(spec.tap_bits or 0 for spec in grids[name]) for name in weights}
    taps = {name: (len(weight), wide[name]) for name, weight in weights.items() if wide[name]}
    return Costs(list(_layers(placement)), sizes, taps, widths | {FLOAT: FLOAT_BITS}, stored)


def _layers(placement: Placement) -> Iterable[Layer]:
    """Yield every weighted operator with its scales and its multiply-accumulates for one sample."""
    samples = len(placement.graph.meta["example"][0])
    for site in (site for site in placement.sites if site.kind == "weight"):
        for user in site.users:
            node = placement.nodes[user]
            yield Layer(
                user, macs(node) // samples, site.name, FLOAT if site.weight_only else placement.input_of(node).name
            )
