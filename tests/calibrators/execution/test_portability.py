"""The record states the cost of portability that a second calibration without limits would find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from calibrators.calibration import calibrate
from calibrators.execution.losses import OutputMetrics
from calibrators.execution.task import Problem
from calibrators.grid.metrics import SignalAndNoise
from calibrators.grid.numerics import dequantize
from calibrators.methods import range_method
from calibrators.program.freeze import CalibrationResult, freeze
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from tests.calibrators.program.test_settle import Sums, on_powers
from tests.support.networks import build


@pytest.fixture(scope="module")
def folded() -> tuple[fx.GraphModule, Tensor]:
    model, x = build("residual", batch=32)
    return fold(capture(model, x)), x


def sqnr(result: CalibrationResult, graph: fx.GraphModule, x: Tensor) -> float:
    found = SignalAndNoise()
    with torch.no_grad():
        found.add(result.program(x)[0], graph(x)[0])
    return found.decibels


@pytest.mark.parametrize(("method", "within"), [("mse", 0.5), ("gptq", 2.0)])
def test_the_cost_is_that_of_a_second_calibration(
    method: str, within: float, folded: tuple[fx.GraphModule, Tensor]
) -> None:
    graph, x = folded
    result, free = (calibrate(graph, [x], method=method, target=name) for name in ("ort-cpu", "ort-cpu-vnni"))
    cost = result.record.portability
    assert cost is not None and free.record.portability is None
    assert (cost.samples, cost.rounding) == (32, "method")
    assert cost.portable.sqnr_db == pytest.approx(sqnr(result, graph, x), abs=1e-6)
    assert cost.free.sqnr_db == pytest.approx(sqnr(free, graph, x), abs=within)
    assert cost.free.sqnr_db != cost.portable.sqnr_db


class OnPowers:
    """Ranges of `minmax` with activation scales on powers of two, where many sums are ties."""

    def fit(self, problem: Problem) -> CalibrationResult:
        method = range_method("minmax")
        activations = {name: on_powers(qparams) for name, qparams in problem.activations(method).items()}
        return freeze(problem.placement, activations, problem.weights(method))


def test_scales_moved_off_ties_go_back(generator: torch.Generator) -> None:
    x = torch.randn(8, 3, 6, 6, generator=generator)
    torch.manual_seed(0)
    graph = capture(Sums(), x)
    result, free = (calibrate(graph, [x], method=OnPowers(), target=name) for name in ("ort-cpu", "ort-cpu-vnni"))
    assert result.record.settled is not None and result.record.settled.moved
    cost = result.record.portability
    assert cost is not None
    assert cost.free.sqnr_db == pytest.approx(sqnr(free, graph, x), abs=0.2)


def test_outputs_without_any_noise_have_no_ratio() -> None:
    metrics = OutputMetrics([torch.ones(4, 1)], None)
    metrics([torch.ones(4, 1)], 0)
    assert metrics.reading(0.0).sqnr_db is None
    metrics.reset()
    metrics([torch.full((4, 1), 1.1)], 0)
    assert metrics.reading(0.0).sqnr_db == pytest.approx(20)


def test_trained_codes_are_judged_by_nearest_rounding(folded: tuple[fx.GraphModule, Tensor]) -> None:
    graph, x = folded
    result = calibrate(graph, [x], method="adaround", options={"iters": 40})
    cost = result.record.portability
    assert cost is not None and cost.rounding == "nearest"
    grids = {name: coded.qparams for name, coded in result.weights.items()}
    biases = {name: dequantize(coded.codes, coded.qparams).double() for name, coded in result.biases.items()}
    nearest = freeze(result.placement, result.activations, grids, biases)
    assert cost.portable.sqnr_db == pytest.approx(sqnr(nearest, graph, x), abs=1e-6)
    assert cost.portable.sqnr_db != pytest.approx(sqnr(result, graph, x), abs=1e-6)
