"""Ranges that minimise the loss of the whole network, searched in three phases.

1. The range of every tensor that minimises the mean |error| ** p, for several p; beside them min-max and percentile.
2. The loss of the network over p, the vertex of the parabola near the best p, then one p for weights and another for
   activations.
3. From the best of these a joint search: one multiplier per activation and one per weight tensor, which moves both
   ends of a range, or the ranges of all channels, together; the zero point stays, for the ratio of the ends does.

source: Nahshan et al., Loss Aware Post-training Quantization (2019), sections 3 and 4.
Departs: the loss needs no labels; p from 1 to 5 with a guarded parabola near the best one, not one parabola over 2 to
4; two powers; multipliers in logarithms, within [0.4, 2.5]; COBYQA over groups and then parabolas, tensor by tensor,
instead of Powell; the best point met is the result, so that none of the ranges compared is better on the samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from torch import Tensor

from calibrators.errors import InputError
from calibrators.execution.losses import LOSSES, prediction_loss
from calibrators.execution.network_loss import BudgetExhausted, Landscape, Measured, Point, draw_samples, float_outputs
from calibrators.execution.task import Problem
from calibrators.grid.spec import QParams, Site
from calibrators.methods.lp import Lp
from calibrators.methods.minmax import MinMax
from calibrators.methods.percentile import Percentile
from calibrators.optimize.derivative_free import STEP, Found, Vector, cobyqa, coordinate_sweep, fit_parabola, powell
from calibrators.optimize.hessian import coupling, hessian, hessian_evaluations
from calibrators.options import check, option
from calibrators.program.freeze import CalibrationResult, freeze
from calibrators.ranges.range_method import RangeMethod

__all__ = ["LAPQ"]

POWERS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)

NEIGHBOURS = 2
"""Powers on each side of the best one that the parabola goes through."""

FIRST_EVALUATIONS = len(POWERS) + 3
"""Every power, min-max, percentile, and the vertex: a budget holds at least these."""

GROUPS, GROUP_EVALUATIONS = 8, 32
"""Groups of tensors that COBYQA moves, and evaluations it may take: four per group."""

QUARTERS = 4
"""The vertex is rounded to a multiple of 1/4: the grid is no finer than 1/2."""

EIGHT = 8
"""Bits from which on a loss is flat in the scales."""

EXPLAINED_BITS = (2, 4, 8)
EXPLAINED_SITES, EXPLAINED_SAMPLES, EXPLAINED_STEP = 12, 128, 0.1
"""Activations whose Hessian is taken, samples it is taken on, and the finite difference in the log scale."""


@dataclass(frozen=True)
class LAPQ:
    """Ranges that minimise the loss of the whole network, by a joint search over all scales."""

    loss: str = option("auto", "kl, ce (needs labels) or mse; auto: kl for [n, classes]", choices=("auto", *LOSSES))
    temperature: float = option(1.0, "temperature of both predictions in kl", minimum=0.1, maximum=100.0)
    optimizer: str = option(
        "cobyqa",
        "parabola: tensor by tensor; cobyqa: groups first, then the same; powell: as published",
        choices=("parabola", "cobyqa", "powell"),
    )
    max_evals: int = option(300, "evaluations of the network, parts by their share of work", minimum=FIRST_EVALUATIONS)
    max_seconds: float = option(0.0, "seconds after which the joint search ends; 0: none", minimum=0.0)
    samples: int = option(512, "samples that the loss is taken on, drawn with the seed", minimum=1)
    sweeps: int = option(10, "most sweeps over all tensors", minimum=0)
    percentile: float = option(99.99, "percentile among the ranges compared", minimum=50.0, maximum=100.0)

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs_labels(self) -> bool:
        """Whether the loss compares with labels."""
        return self.loss == "ce"

    def fit(self, problem: Problem) -> CalibrationResult:
        """The network at the best scales met; `record["lapq"]` tells how they were found.

        raises: InputError where labels or outputs do not fit the loss, DataError for data that cannot be read again.
        """
        if self.loss == "ce" and problem.labels is None:
            raise InputError("loss 'ce' of method 'lapq' needs labels, and the calibration data has none: use loss=kl.")
        return _Search(problem, self).run()


class _Search:
    """One search, phase by phase; what it finds out goes into `record`."""

    def __init__(self, problem: Problem, method: LAPQ) -> None:
        self.problem, self.method, self.placement = problem, method, problem.placement
        self.statistics = problem.statistics
        self.activations, self.weights = cache(problem.activations), cache(problem.weights)
        self.measure = cache(self._measure)
        self.rows = self._draw(method.samples)
        self.landscape = self._landscape(self.rows, self._point(Lp(2.0), Lp(2.0)), method.max_evals)
        self.record: dict[str, Any] = {"optimizer": method.optimizer, "loss": method.loss, "samples": len(self.rows)}

    def _draw(self, samples: int) -> Tensor:
        return draw_samples(self.problem, samples, "lapq")

    def _landscape(self, rows: Tensor, start: Point, evaluations: int) -> Landscape:
        inputs = self.problem.select(rows)
        labels = self.problem.labels_of(rows) if self.method.loss == "ce" else None
        floats = float_outputs(self.problem, inputs)
        loss = prediction_loss(self.method.loss, floats, labels, self.method.temperature)
        return Landscape(self.problem, inputs, start, loss, budget=evaluations)

    def run(self) -> CalibrationResult:
        """All phases."""
        started = time.perf_counter()
        with self.problem.stage("search", self.method.max_evals) as bar:
            self.landscape.watch = _steps(self.landscape, bar.advance)
            self._compare()
            if self.method.max_seconds:
                self.landscape.deadline = started + self.method.max_seconds
            with suppress(BudgetExhausted):
                self._split()
            start = self._best()
            with suppress(BudgetExhausted):
                self._joint(start)
        best = self._best()
        self.record |= {
            "losses": self.losses | {"init": start.loss, "final": best.loss},
            "multipliers": {name: _ratio(best.point[name], start.point[name]) for name in self._variables()},
            "evaluations": self.landscape.evaluations,
            "seconds": time.perf_counter() - started,
        }
        if self.problem.explain:
            self.record["landscape"] = self._explain()
        owners = self.landscape.quantizers
        activations = {name: qparams for name, qparams in best.point.items() if name in owners}
        weights = {name: qparams for name, qparams in best.point.items() if name not in owners}
        result = freeze(self.placement, activations, weights)
        return replace(result, observed=self.statistics, record={**result.record, "lapq": self.record})

    def _best(self) -> Measured:
        assert self.landscape.best is not None
        return self.landscape.best

    # --- phases 1 and 2: what the tensors say on their own ------------------------------------------------------------

    def _point(self, weights: RangeMethod, activations: RangeMethod) -> Point:
        return {**self.activations(activations), **self.weights(weights)}

    def _measure(self, weights: RangeMethod, activations: RangeMethod) -> float:
        return self.landscape.evaluate(self._point(weights, activations), whole=True)

    def _compare(self) -> None:
        """The usual ranges, and one power for all tensors: those of the grid and the vertex near the best."""
        usual = {"minmax": MinMax(), "percentile": Percentile(self.method.percentile), "mse": Lp(2.0)}
        self.losses = {name: self.measure(method, method) for name, method in usual.items()}
        curve = {p: self.measure(Lp(p), Lp(p)) for p in POWERS}
        best = min(POWERS, key=curve.__getitem__)
        index = POWERS.index(best)
        self.near = POWERS[max(0, index - NEIGHBOURS) : index + NEIGHBOURS + 1]
        parabola = fit_parabola(self.near, [curve[p] for p in self.near])
        self.record["powers"] = [{"p": p, "loss": loss} for p, loss in curve.items()]
        self.record["parabola"] = asdict(parabola) | {"coefficients": [*parabola.coefficients]}
        self.power = best
        if parabola.vertex is not None:
            vertex = round(QUARTERS * parabola.vertex) / QUARTERS
            loss = self.measure(Lp(vertex), Lp(vertex))
            self.record["parabola"] |= {"p": vertex, "loss": loss}
            self.power = vertex if loss < curve[best] else best

    def _split(self) -> None:
        """Another power for the weights, then another for the activations."""
        both = Lp(self.power)
        tried = [{"weights": self.power, "activations": self.power, "loss": self.measure(both, both)}]
        self.record["split"] = tried
        tried += ({"weights": p, "activations": self.power, "loss": self.measure(Lp(p), both)} for p in self.near)
        weights = min(tried, key=lambda entry: entry["loss"])["weights"]
        tried += ({"weights": weights, "activations": p, "loss": self.measure(Lp(weights), Lp(p))} for p in self.near)

    # --- phase 3: all tensors together --------------------------------------------------------------------------------

    def _variables(self) -> list[str]:
        """The sites with a multiplier, in order of execution."""
        return _low([site for site in self.placement.sites if site.name in self.landscape.first], self.landscape.first)

    def _joint(self, start: Measured) -> None:
        names = self._variables()
        objective = partial(_at, self.landscape, start.point, names)
        found = Found(np.zeros(len(names)), start.loss)
        if self.method.optimizer == "powell":
            powell(objective, found, self.method.max_evals)
            return
        if self.method.optimizer == "cobyqa":
            found = cobyqa(objective, found, _groups(names, self.landscape.quantizers), GROUP_EVALUATIONS)
        steps = np.full(len(names), STEP)
        for _ in range(self.method.sweeps):
            found = coordinate_sweep(objective, found, steps)

    # --- how the loss bends -------------------------------------------------------------------------------------------

    def _explain(self) -> dict[str, Any]:
        """By bits of the activations, weights at 8: the loss over p, and at the best p the Hessian of some log scales.

        The activations are spread evenly over the network.
        """
        owners = [site for site in self.placement.sites if site.name in self.landscape.quantizers]
        names = _low([site for site in owners if site.name in self.landscape.first], self.landscape.first)
        shown = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), EXPLAINED_SITES)).round().astype(int)]
        grid, values = self.placement.target.weight, self.problem.values
        weights = {
            site.name: MinMax().weight(values(site), replace(grid, axis=site.spec.axis))
            for site in self.placement.sites
            if site.kind == "weight"
        }
        base = {**self._best().point, **weights}
        evaluations = len(POWERS) + hessian_evaluations(len(shown))
        landscape = self._landscape(self._draw(EXPLAINED_SAMPLES), base, len(EXPLAINED_BITS) * evaluations)
        bent = {}
        with self.problem.stage("explain", len(EXPLAINED_BITS) * evaluations) as bar:
            landscape.watch = _steps(landscape, bar.advance)
            for bits in EXPLAINED_BITS:
                points = {p: {**base, **self._at_bits(names, p, bits)} for p in POWERS}
                curve = {p: landscape.evaluate(point, whole=True) for p, point in points.items()}
                power = min(curve, key=curve.__getitem__)
                objective = partial(_at, landscape, points[power], shown, whole=True)
                matrix = hessian(objective, np.zeros(len(shown)), EXPLAINED_STEP)
                powers = [{"p": p, "loss": loss} for p, loss in curve.items()]
                bent[str(bits)] = {"powers": powers, "p": power, "hessian": matrix.tolist(), **coupling(matrix)}
        return {"sites": shown, "samples": landscape.samples, "step": EXPLAINED_STEP, "bits": bent}

    def _at_bits(self, names: Sequence[str], p: float, bits: int) -> Point:
        sites = self.placement.by_name
        return {n: Lp(p).activation(self.statistics[n], replace(sites[n].spec, bits=bits)) for n in names}


def _low(sites: Sequence[Site], first: Mapping[str, int]) -> list[str]:
    """Sites below 8 bits, for 8 are flat, in order of execution; all if there are none. A fixed scale stays out."""
    free = [site for site in sites if site.fixed is None]
    low = [site for site in free if site.spec.bits < EIGHT] or free
    return [site.name for site in sorted(low, key=lambda site: (first[site.name], site.kind == "weight"))]


def _groups(names: Sequence[str], activations: Container[str]) -> list[list[int]]:
    """Indices of neighbouring activations, and of neighbouring weights, in GROUPS groups or less."""
    kinds = [[i for i, name in enumerate(names) if (name in activations) is kind] for kind in (True, False)]
    present = [kind for kind in kinds if kind]
    parts = [np.array_split(kind, min(len(kind), GROUPS // len(present))) for kind in present]
    return [part.tolist() for kind in parts for part in kind]


def _at(landscape: Landscape, start: Point, names: Sequence[str], logs: Vector, *, whole: bool = False) -> float:
    """Loss where the scale of each site is exp(log) times that of `start`."""
    moved = {name: _scaled(start[name], log) for name, log in zip(names, logs.tolist(), strict=True)}
    return landscape.evaluate({**start, **moved}, whole=whole)


def _scaled(qparams: QParams, log: float) -> QParams:
    """The range with both ends times exp(log): the zero point stays."""
    return replace(qparams, scale=(qparams.scale.double() * math.exp(log)).float()) if log else qparams


def _ratio(ours: QParams, other: QParams) -> float:
    return float(ours.scale.double().sum() / other.scale.double().sum())


def _steps(landscape: Landscape, advance: Callable[[int], None]) -> Callable[[], None]:
    """Reports whole evaluations as they are completed."""
    shown = 0

    def report() -> None:
        nonlocal shown
        done = int(landscape.evaluations)
        advance(done - shown)
        shown = done

    return report
