"""A joint search over all scales of a network by its loss, in the three phases described in calibrators.methods.lapq.

Must not know: ONNX, runtimes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from calibrators.execution.losses import prediction_loss
from calibrators.execution.network_loss import (
    BudgetExhausted,
    Measured,
    NetworkLoss,
    Point,
    draw_samples,
    float_outputs,
)
from calibrators.execution.task import Problem
from calibrators.grid.spec import QParams, Site
from calibrators.optimize.derivative_free import STEP, Found, Vector, cobyqa, coordinate_sweep, fit_parabola, powell
from calibrators.optimize.hessian import coupling, hessian, hessian_evaluations
from calibrators.program.freeze import CalibrationResult, freeze
from calibrators.ranges.range_method import POWERS, RangeMethod
from calibrators.record import Curvature, Lapq, LossLandscape, PowerLoss, SplitLoss

if TYPE_CHECKING:
    from calibrators.methods.lapq import LAPQ

__all__ = ["ScaleSearch"]

NEIGHBOURS = 2
"""Powers on each side of the best one that take part in the parabola."""

GROUPS, GROUP_EVALUATIONS = 8, 32
"""Number of groups of tensors that COBYQA moves, and of evaluations that it may take: four per group."""

QUARTERS = 4
"""The vertex is rounded to a multiple of 1/4, since the powers are 1/2 or more apart."""

EIGHT = 8
"""Bits at which the loss is flat in the scales."""

EXPLAINED_BITS = (2, 4, 8)
EXPLAINED_SITES, EXPLAINED_SAMPLES, EXPLAINED_STEP = 12, 128, 0.1
"""Number of activations in the Hessian, of samples for it, and the finite difference in the log scale."""


class ScaleSearch:
    """One search, phase by phase."""

    def __init__(self, problem: Problem, method: LAPQ) -> None:
        self.problem, self.method, self.placement = problem, method, problem.placement
        self.statistics = problem.statistics
        self.activations, self.weights = cache(problem.activations), cache(problem.weights)
        self.measure = cache(self._measure)
        self.rows = self._draw(method.samples)
        self.network_loss = self._network_loss(self.rows, self._point(self._lp(2.0), self._lp(2.0)), method.max_evals)
        self.split: list[SplitLoss] = []

    def _ranges(self, name: str, **options: float) -> RangeMethod:
        return self.problem.range_method(name, options)

    def _lp(self, p: float) -> RangeMethod:
        return self._ranges("lp", p=p)

    def _draw(self, samples: int) -> Tensor:
        return draw_samples(self.problem, samples, "lapq")

    def _network_loss(self, rows: Tensor, start: Point, evaluations: int) -> NetworkLoss:
        inputs = self.problem.select(rows)
        labels = self.problem.labels_of(rows) if self.method.loss == "ce" else None
        floats = float_outputs(self.problem, inputs)
        loss = prediction_loss(self.method.loss, floats, labels, self.method.temperature)
        return NetworkLoss(self.problem, inputs, start, loss, budget=evaluations)

    def run(self) -> CalibrationResult:
        """Run all phases and return the network at the best scales found."""
        started = time.perf_counter()
        with self.problem.stage("search", self.method.max_evals) as bar:
            self.network_loss.watch = _steps(self.network_loss, bar.advance)
            self._compare()
            if self.method.max_seconds:
                self.network_loss.deadline = started + self.method.max_seconds
            with suppress(BudgetExhausted):
                self._split()
            start = self._best()
            with suppress(BudgetExhausted):
                self._joint(start)
        best = self._best()
        found = Lapq(
            optimizer=self.method.optimizer,
            loss=self.method.loss,
            samples=len(self.rows),
            evaluations=self.network_loss.evaluations,
            seconds=time.perf_counter() - started,
            losses=self.losses | {"init": start.loss, "final": best.loss},
            powers=self.powers,
            parabola=self.parabola,
            split=tuple(self.split),
            multipliers={name: _ratio(best.point[name], start.point[name]) for name in self._variables()},
            landscape=self._explain() if self.problem.explain else None,
        )
        owners = self.network_loss.quantizers
        activations = {name: qparams for name, qparams in best.point.items() if name in owners}
        weights = {name: qparams for name, qparams in best.point.items() if name not in owners}
        result = freeze(self.placement, activations, weights)
        return replace(result, observed=self.statistics, record=replace(result.record, lapq=found))

    def _best(self) -> Measured:
        assert self.network_loss.best is not None
        return self.network_loss.best

    # --- phases 1 and 2: every tensor on its own ----------------------------------------------------------------------

    def _point(self, weights: RangeMethod, activations: RangeMethod) -> Point:
        return {**self.activations(activations), **self.weights(weights)}

    def _measure(self, weights: RangeMethod, activations: RangeMethod) -> float:
        return self.network_loss.evaluate(self._point(weights, activations), whole=True)

    def _compare(self) -> None:
        """Measure the usual ranges, then one power for all tensors: those of POWERS and the vertex near the best."""
        usual = {
            "minmax": self._ranges("minmax"),
            "percentile": self._ranges("percentile", q=self.method.percentile),
            "mse": self._lp(2.0),
        }
        self.losses = {name: self.measure(method, method) for name, method in usual.items()}
        curve = {p: self.measure(self._lp(p), self._lp(p)) for p in POWERS}
        best = min(POWERS, key=curve.__getitem__)
        index = POWERS.index(best)
        self.near = POWERS[max(0, index - NEIGHBOURS) : index + NEIGHBOURS + 1]
        self.parabola = fit_parabola(self.near, [curve[p] for p in self.near])
        self.powers = _powers(curve)
        self.power = best
        if self.parabola.vertex is not None:
            vertex = round(QUARTERS * self.parabola.vertex) / QUARTERS
            loss = self.measure(self._lp(vertex), self._lp(vertex))
            self.parabola = replace(self.parabola, p=vertex, loss=loss)
            self.power = vertex if loss < curve[best] else best

    def _split(self) -> None:
        """Try other powers for the weights, then for the activations."""
        self._try(self.power, self.power)
        for p in self.near:
            self._try(p, self.power)
        weights = min(self.split, key=lambda tried: tried.loss).weights
        for p in self.near:
            self._try(weights, p)

    def _try(self, weights: float, activations: float) -> None:
        self.split.append(SplitLoss(weights, activations, self.measure(self._lp(weights), self._lp(activations))))

    # --- phase 3: all tensors together --------------------------------------------------------------------------------

    def _variables(self) -> list[str]:
        """Return the sites with a multiplier, in order of execution."""
        return _low(
            [site for site in self.placement.sites if site.name in self.network_loss.first], self.network_loss.first
        )

    def _joint(self, start: Measured) -> None:
        names = self._variables()
        objective = partial(_at, self.network_loss, start.point, names)
        found = Found(np.zeros(len(names)), start.loss)
        if self.method.optimizer == "powell":
            powell(objective, found, self.method.max_evals)
            return
        if self.method.optimizer == "cobyqa":
            found = cobyqa(objective, found, _groups(names, self.network_loss.quantizers), GROUP_EVALUATIONS)
        steps = np.full(len(names), STEP)
        for _ in range(self.method.sweeps):
            found = coordinate_sweep(objective, found, steps)

    # --- explanation --------------------------------------------------------------------------------------------------

    def _explain(self) -> LossLandscape:
        """Measure, by bits of the activations and with 8-bit weights, the loss over p and its Hessian at the best p.

        The Hessian is over the log scales of activations spread evenly over the network.
        """
        owners = [site for site in self.placement.sites if site.name in self.network_loss.quantizers]
        names = _low([site for site in owners if site.name in self.network_loss.first], self.network_loss.first)
        shown = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), EXPLAINED_SITES)).round().astype(int)]
        grid, values = self.placement.target.weight, self.problem.values
        weights = {
            site.name: self._ranges("minmax").weight(values(site), replace(grid, axis=site.spec.axis))
            for site in self.placement.sites
            if site.kind == "weight"
        }
        base = {**self._best().point, **weights}
        evaluations = len(POWERS) + hessian_evaluations(len(shown))
        network_loss = self._network_loss(self._draw(EXPLAINED_SAMPLES), base, len(EXPLAINED_BITS) * evaluations)
        curvatures = {}
        with self.problem.stage("explain", len(EXPLAINED_BITS) * evaluations) as bar:
            network_loss.watch = _steps(network_loss, bar.advance)
            for bits in EXPLAINED_BITS:
                points = {p: {**base, **self._at_bits(names, p, bits)} for p in POWERS}
                curve = {p: network_loss.evaluate(point, whole=True) for p, point in points.items()}
                power = min(curve, key=curve.__getitem__)
                objective = partial(_at, network_loss, points[power], shown, whole=True)
                matrix = hessian(objective, np.zeros(len(shown)), EXPLAINED_STEP)
                rows = tuple(map(tuple, matrix.tolist()))
                curvatures[str(bits)] = Curvature(
                    **vars(coupling(matrix)), hessian=rows, p=power, powers=_powers(curve)
                )
        return LossLandscape(tuple(shown), network_loss.samples, EXPLAINED_STEP, curvatures)

    def _at_bits(self, names: Sequence[str], p: float, bits: int) -> Point:
        sites = self.placement.by_name
        return {n: self._lp(p).activation(self.statistics[n], replace(sites[n].spec, bits=bits)) for n in names}


def _powers(curve: Mapping[float, float]) -> tuple[PowerLoss, ...]:
    return tuple(PowerLoss(p, loss) for p, loss in curve.items())


def _low(sites: Sequence[Site], first: Mapping[str, int]) -> list[str]:
    """Return the sites below 8 bits in order of execution, or all if there are none; fixed scales are left out."""
    free = [site for site in sites if site.fixed is None]
    low = [site for site in free if site.spec.bits < EIGHT] or free
    return [site.name for site in sorted(low, key=lambda site: (first[site.name], site.kind == "weight"))]


def _groups(names: Sequence[str], activations: Container[str]) -> list[list[int]]:
    """Return the indices of neighbouring activations, and of neighbouring weights, in at most GROUPS groups."""
    kinds = [[i for i, name in enumerate(names) if (name in activations) is kind] for kind in (True, False)]
    present = [kind for kind in kinds if kind]
    parts = [np.array_split(kind, min(len(kind), GROUPS // len(present))) for kind in present]
    return [part.tolist() for kind in parts for part in kind]


def _at(network_loss: NetworkLoss, start: Point, names: Sequence[str], logs: Vector, *, whole: bool = False) -> float:
    """Return the loss where the scale of each site is exp(log) times that of `start`."""
    moved = {name: _scaled(start[name], log) for name, log in zip(names, logs.tolist(), strict=True)}
    return network_loss.evaluate({**start, **moved}, whole=whole)


def _scaled(qparams: QParams, log: float) -> QParams:
    """Multiply both ends of a range by exp(log), which keeps the zero point."""
    return replace(qparams, scale=(qparams.scale.double() * math.exp(log)).float()) if log else qparams


def _ratio(ours: QParams, other: QParams) -> float:
    return float(ours.scale.double().sum() / other.scale.double().sum())


def _steps(network_loss: NetworkLoss, advance: Callable[[int], None]) -> Callable[[], None]:
    """Return a function that reports whole evaluations as they are completed."""
    shown = 0

    def report() -> None:
        nonlocal shown
        done = int(network_loss.evaluations)
        advance(done - shown)
        shown = done

    return report
