"""Minimize a rough function of many variables from few values and no derivatives.

The variables are logarithms of multipliers; the loss over them is a nearly separable bowl with jumps where codes
change. Every minimizer starts at a point of known loss, keeps each variable in [LOWER, UPPER] and returns the best
point that it met. An objective may end the search by raising; its owner then knows the best point.

source: Nahshan et al., Loss Aware Post-training Quantization (2019), section 3: Powell's method over all scales.
Departs: a parabola through three values per variable instead of Brent's line search, and before it COBYQA (Ragonneau
and Zhang, 2023) over groups of variables; Powell's first step is STEP in the logarithm instead of 1 in the scale.

Must not know: networks, quantization, budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from calibrators.record import Parabola

__all__ = [
    "LOWER",
    "STEP",
    "UPPER",
    "Found",
    "Vector",
    "cobyqa",
    "coordinate_sweep",
    "fit_parabola",
    "powell",
]

LOWER, UPPER = math.log(0.4), math.log(2.5)

STEP = 0.15
"""Distance of the first trial, which widens a range by 16 %."""

REACH = 2.0
"""Largest distance of a vertex that is tried, in steps."""

NARROWER, WIDER = 0.6, 1.5
"""Factors for a step whose variable moved less than half of it, and more than one and a half of it."""

SMALLEST_STEP, NEAR = 0.01, 0.1
"""Smallest step of a variable, and the distance from a known value, in steps, below which a trial is not worth it."""

CONVERGED = 0.005
"""Final radius of COBYQA's trust region."""

FLAT = 1e-12
"""Curvature of a parabola, as a share of the values, up to which rounding may explain it."""

Vector = NDArray[np.float64]
Objective = Callable[[Vector], float]


@dataclass(frozen=True, eq=False)
class Found:
    """A point [variables] and its loss."""

    point: Vector
    loss: float


def fit_parabola(x: Sequence[float], y: Sequence[float]) -> Parabola:
    """Return the least-squares parabola through the points with finite values."""
    finite = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if len(finite) < 3:
        return Parabola((), None, f"{len(finite)} finite values are too few")
    points = np.array(finite)
    coefficients = tuple(float(c) for c in np.polyfit(points[:, 0], points[:, 1], 2))
    (left, lowest), (right, highest) = points.min(0), points.max(0)
    if coefficients[0] * (right - left) ** 2 <= FLAT * max(abs(lowest), abs(highest)):
        return Parabola(coefficients, None, "not convex")
    vertex = -coefficients[1] / (2.0 * coefficients[0])
    if not left <= vertex <= right:
        return Parabola(coefficients, None, f"vertex {vertex:.3g} is outside {left:.3g} to {right:.3g}")
    return Parabola(coefficients, vertex, "accepted")


def coordinate_sweep(objective: Objective, start: Found, steps: Vector) -> Found:
    """Search one variable after the other: try both sides, then the vertex of the parabola.

    steps: distances of the trials [variables], adapted in place, for the next sweep, to how far each variable moved.
    """
    found = start
    for index, step in enumerate(steps.tolist()):
        line = _Line(objective, found, index, step)
        line.attempt(line.centre + step)
        line.attempt(line.centre - step)
        line.attempt(line.promising())
        found = line.best
        moved = abs(float(found.point[index]) - line.centre) / step
        factor = NARROWER if moved < 0.5 else WIDER if moved > 1.5 else 1.0
        steps[index] = max(SMALLEST_STEP, factor * step)
    return found


class _Line:
    """Values of an objective along one variable."""

    def __init__(self, objective: Objective, start: Found, index: int, step: float) -> None:
        self.objective, self.start, self.best, self.index, self.step = objective, start, start, index, step
        self.centre = float(start.point[index])
        self.values = {self.centre: start.loss}

    def attempt(self, x: float) -> None:
        """Evaluate at `x`, clamped to the bounds, unless that is next to a known value."""
        x = min(max(x, LOWER), UPPER)
        if min(abs(x - known) for known in self.values) < NEAR * self.step:
            return
        point = self.start.point.copy()
        point[self.index] = x
        self.values[x] = self.objective(point)
        if self.values[x] < self.best.loss:
            self.best = Found(point, self.values[x])

    def promising(self) -> float:
        """Return the vertex, at most REACH steps away; without one, a point twice as far as the better trial."""
        reach = REACH * self.step
        coefficients = fit_parabola([*self.values], [*self.values.values()]).coefficients
        if coefficients and coefficients[0] > 0.0:
            vertex = -coefficients[1] / (2.0 * coefficients[0])
            return min(max(vertex, self.centre - reach), self.centre + reach)
        return self.centre + 2.0 * (min(self.values, key=self.values.__getitem__) - self.centre)


def cobyqa(objective: Objective, start: Found, groups: Sequence[Sequence[int]], evaluations: int) -> Found:
    """Run COBYQA over one shift per group of variables; a variable without a group stays."""
    member = np.zeros((len(start.point), len(groups)))  # [variables, groups]
    for column, group in enumerate(groups):
        member[list(group), column] = 1.0
    tracked = _Tracked(objective, start)
    options: Any = {"maxfev": evaluations, "initial_tr_radius": STEP, "final_tr_radius": CONVERGED}
    bounds = [(LOWER, UPPER)] * len(groups)

    def shifted(shift: Any) -> float:
        return tracked(start.point + member @ shift)

    minimize(shifted, np.zeros(len(groups)), method="COBYQA", bounds=bounds, options=options)
    return tracked.best


def powell(objective: Objective, start: Found, evaluations: int) -> Found:
    """Run Powell's method, with the variables as its first directions."""
    tracked = _Tracked(objective, start)
    options: Any = {"maxfev": evaluations, "direc": STEP * np.eye(len(start.point))}
    minimize(tracked, start.point, method="Powell", options=options)
    return tracked.best


class _Tracked:
    """An objective and its best point; beyond the bounds, the distance from them is added to its value there."""

    def __init__(self, objective: Objective, start: Found) -> None:
        self.objective, self.best = objective, start

    def __call__(self, x: Vector) -> float:
        inside = np.clip(x, LOWER, UPPER)
        loss = self.objective(inside)
        if loss < self.best.loss:
            self.best = Found(inside, loss)
        return loss + float(np.abs(x - inside).sum())
