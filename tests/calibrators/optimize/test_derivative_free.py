"""Parabolas and their guards; minimizers on functions whose minimum is known; second differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from calibrators.optimize.derivative_free import (
    LOWER,
    STEP,
    UPPER,
    Found,
    Vector,
    cobyqa,
    coordinate_sweep,
    fit_parabola,
    powell,
)
from calibrators.optimize.hessian import coupling, hessian, hessian_evaluations

MINIMUM = np.array([0.2, -0.1, 0.05, -0.25, 0.0])
BENDS = np.array([1.0, 3.0, 0.5, 2.0, 1.5])

ROUNDING = 1e-9
"""Far above what float64 loses in a fit of a few points, far below any step taken."""

CLOSE = 0.02
"""COBYQA and Powell end when their own steps are about this small."""


class Counted:
    """An objective that counts its evaluations and keeps what it was asked."""

    def __init__(self, function: Callable[[Vector], float]) -> None:
        self.function, self.asked = function, []

    def __call__(self, x: Vector) -> float:
        self.asked.append((x.copy(), self.function(x)))
        return self.asked[-1][1]


def bowl(x: Vector) -> float:
    """A separable quadratic."""
    return float((BENDS * (x - MINIMUM) ** 2).sum()) + 1.0


def start(objective: Callable[[Vector], float], size: int = len(MINIMUM)) -> Found:
    return Found(np.zeros(size), objective(np.zeros(size)))


# --- parabolas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [(1.0, 1.5, 2.0), (1.0, 1.5, 2.0, 3.0, 5.0)], ids=["three", "five"])
def test_convex_data_give_their_vertex(x: tuple[float, ...]) -> None:
    parabola = fit_parabola(x, [0.7 * (a - 1.8) ** 2 + 0.3 for a in x])
    assert parabola.verdict == "accepted"
    assert parabola.vertex == pytest.approx(1.8, abs=ROUNDING)
    assert parabola.coefficients == pytest.approx((0.7, -2.52, 0.3 + 0.7 * 1.8**2), abs=ROUNDING)


def test_noisy_data_are_fitted_by_least_squares() -> None:
    x, y = np.array([1.0, 1.5, 2.0, 2.5, 3.0]), np.array([0.9, 0.35, 0.3, 0.28, 0.7])
    a, b, c = np.linalg.solve(*_normal_equations(x, y))
    parabola = fit_parabola(x, y)
    assert parabola.coefficients == pytest.approx((a, b, c), abs=ROUNDING)
    assert parabola.vertex == pytest.approx(-b / (2 * a), abs=ROUNDING)


def _normal_equations(x: Any, y: Any) -> tuple[Any, Any]:
    powers = np.stack([x**2, x, np.ones_like(x)], 1)
    return powers.T @ powers, powers.T @ y


@pytest.mark.parametrize(
    ("y", "verdict"),
    [
        ((1.0, 2.0, 1.0), "not convex"),
        ((1.0, 1.0, 1.0), "not convex"),
        ((1.0, 2.0, 3.0), "not convex"),
        ((4.0, 2.0, 1.0), "vertex 3.5 is outside 1 to 3"),
        ((1.0, math.nan, 1.0), "2 finite values are too few"),
        ((math.inf, math.nan, 1.0), "1 finite values are too few"),
    ],
    ids=["concave", "flat", "straight", "outside", "nan", "infinite"],
)
def test_a_vertex_that_cannot_be_trusted_is_refused(y: tuple[float, ...], verdict: str) -> None:
    parabola = fit_parabola((1.0, 2.0, 3.0), y)
    assert parabola.vertex is None
    assert parabola.verdict == verdict


def test_values_that_are_not_finite_do_not_spoil_the_others() -> None:
    parabola = fit_parabola((1.0, 2.0, 3.0, 4.0), (1.25, math.nan, 1.25, 3.25))
    assert parabola.vertex == pytest.approx(2.0, abs=0.51)
    assert parabola.verdict == "accepted"


# --- minimizers ----------------------------------------------------------------------------------------------------


def test_one_sweep_solves_a_separable_quadratic() -> None:
    objective = Counted(bowl)
    found = coordinate_sweep(objective, start(bowl), np.full(len(MINIMUM), STEP))
    assert found.point == pytest.approx(MINIMUM, abs=ROUNDING)
    assert found.loss == bowl(found.point)
    assert len(objective.asked) <= 3 * len(MINIMUM)


def test_minimizers_agree_on_a_separable_quadratic() -> None:
    swept = coordinate_sweep(bowl, start(bowl), np.full(len(MINIMUM), STEP))
    lines = powell(bowl, start(bowl), 200)
    model = cobyqa(bowl, start(bowl), [[i] for i in range(len(MINIMUM))], 200)
    for found in (swept, lines, model):
        assert found.point == pytest.approx(MINIMUM, abs=CLOSE)
        assert found.loss == bowl(found.point)


MINIMIZERS: dict[str, Callable[[Any, Found], Found]] = {
    "parabolas": lambda f, s: coordinate_sweep(f, coordinate_sweep(f, s, np.full(3, STEP)), np.full(3, STEP)),
    "powell": lambda f, s: powell(f, s, 100),
    "cobyqa": lambda f, s: cobyqa(f, s, [[0, 1], [2]], 40),
}


@pytest.mark.parametrize("name", MINIMIZERS)
def test_the_best_point_met_is_returned(name: str) -> None:
    """On a surface as rough as it is bent, and infinite in places."""

    def rough(x: Vector) -> float:
        return math.inf if x[0] > 0.1 else float((x**2).sum() + 0.05 * np.sin(97 * x).sum()) + 1.0

    objective = Counted(rough)
    found = MINIMIZERS[name](objective, start(rough, 3))
    best = min(loss for _, loss in objective.asked)
    assert found.loss == min(best, rough(np.zeros(3))) == rough(found.point)


@pytest.mark.parametrize("name", MINIMIZERS)
def test_no_variable_leaves_its_bounds(name: str) -> None:
    objective = Counted(lambda x: float(3.0 - x.sum()))
    found = MINIMIZERS[name](objective, Found(np.array([UPPER - 0.05, 0.0, LOWER]), objective(np.zeros(3))))
    points = np.array([x for x, _ in objective.asked])
    assert points.min() >= LOWER and points.max() <= UPPER
    assert found.point[0] == UPPER


@pytest.mark.parametrize("name", MINIMIZERS)
def test_a_minimum_is_not_left(name: str) -> None:
    at_start = start(lambda x: float(np.abs(x).sum()), 3)
    assert MINIMIZERS[name](lambda x: float(np.abs(x).sum()), at_start) is at_start


@pytest.mark.parametrize("name", MINIMIZERS)
def test_an_objective_ends_the_search_by_raising(name: str) -> None:
    asked = []

    def limited(x: Vector) -> float:
        if len(asked) == 5:
            raise TimeoutError
        asked.append(x)
        return float((x - 0.3).sum() ** 2)

    with pytest.raises(TimeoutError):
        MINIMIZERS[name](limited, Found(np.zeros(3), 1.0))
    assert len(asked) == 5


def test_variables_of_a_group_move_together_and_others_stay() -> None:
    objective = Counted(bowl)
    found = cobyqa(objective, start(bowl), [[0, 3], [1]], 60)
    points = np.array([x for x, _ in objective.asked])
    assert np.array_equal(points[:, 0], points[:, 3])
    assert not points[:, [2, 4]].any()
    together = (BENDS * MINIMUM)[[0, 3]].sum() / BENDS[[0, 3]].sum()
    assert found.point[[0, 1]] == pytest.approx((together, MINIMUM[1]), abs=CLOSE)


def test_steps_follow_how_far_a_variable_moved() -> None:
    steps = np.full(len(MINIMUM), STEP)
    coordinate_sweep(bowl, start(bowl), steps)
    moved = np.abs(MINIMUM) / STEP
    assert (steps[moved < 0.5] < STEP).all() and (moved < 0.5).any()
    assert (steps[moved > 1.5] > STEP).all() and (moved > 1.5).any()
    assert (steps[(moved > 0.5) & (moved < 1.5)] == STEP).all()


def test_a_slope_is_followed_farther_than_the_trial() -> None:
    found = coordinate_sweep(lambda x: 1.0 - float(x[0]), Found(np.zeros(1), 1.0), np.full(1, STEP))
    assert found.point[0] == pytest.approx(2 * STEP)


# --- second differences --------------------------------------------------------------------------------------------


def test_hessian_of_a_cubic_is_exact() -> None:
    half = np.random.default_rng(0).standard_normal((4, 4))
    matrix, centre = half + half.T, np.array([0.3, -0.2, 0.1, 0.0])
    objective = Counted(lambda x: float(0.5 * x @ matrix @ x + (x**3).sum() + x[0] * x[1] * x[2] - x.sum()))
    expected = matrix + np.diag(6 * centre)
    for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        expected[i, j] += centre[k]
        expected[j, i] += centre[k]
    assert hessian(objective, centre, 0.1) == pytest.approx(expected, abs=ROUNDING)
    assert len(objective.asked) == hessian_evaluations(4)


def test_coupling_is_the_share_of_the_off_diagonal() -> None:
    found = coupling(np.array([[2.0, -0.5, 0.1], [-0.5, 4.0, 0.0], [0.1, 0.0, -3.0]]))
    assert found.mean_diagonal == pytest.approx(3.0)
    assert found.mean_off_diagonal == pytest.approx(0.2)
    assert found.share == pytest.approx(0.2 / 3.0)
    assert list(found.eigenvalues) == sorted(found.eigenvalues) and found.eigenvalues[0] < 0
    assert coupling(np.diag([1.0, 2.0])).share == 0.0
    assert coupling(np.zeros((1, 1))).share == 0.0
