"""Histograms of floats and codes: places of the bins, clipped values, the values that are counted."""

from __future__ import annotations

import pytest
import torch

from calibrators.calibration import calibrate
from calibrators.grid.numerics import fake_quant
from calibrators.grid.spec import QParams, QuantSpec
from runtime_tests.measure.histograms import BEYOND, PER_SAMPLE, RunningHistograms
from runtime_tests.measure.noise import Noise
from runtime_tests.reference.execute import plan, run
from tests.support.folded import folded_network


def grid(spec: QuantSpec, scale: float = 0.5, zero_point: int = 0) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), spec)


@pytest.mark.parametrize(
    ("spec", "codes", "floats"),
    [
        (QuantSpec(8), 64, 64),
        (QuantSpec(8, signed=True, symmetric=True, narrow=True), 64, 64),
        (QuantSpec(4), 16, 64),
        (QuantSpec(3, signed=True, symmetric=True, narrow=True), 7, 63),
        (QuantSpec(16, signed=True), 64, 64),
    ],
    ids=["8", "255 codes", "4", "7 codes", "16"],
)
def test_bins_are_whole_codes_or_parts_of_one(spec: QuantSpec, codes: int, floats: int) -> None:
    running, levels = RunningHistograms(grid(spec)), spec.qmax - spec.qmin + 1
    every = torch.arange(spec.qmin, spec.qmax + 1) * 0.5
    running.add(every, every, levels)
    found = running.result()
    assert found is not None and found.clipped == 0.0
    assert (len(found.codes), len(found.floats)) == (codes, floats + 2 * BEYOND)
    assert sum(found.codes) == sum(found.floats) == levels
    whole = found.codes[:-1]  # the last may hold fewer codes
    assert len({*whole}) == 1 and 0 < found.codes[-1] <= whole[0]


def test_values_beyond_the_range_are_counted_and_kept_apart() -> None:
    spec = QuantSpec(2)  # codes 0 to 3 stand for -0.5 to 1.0
    qparams = grid(spec, zero_point=1)
    exact = torch.tensor([[-100.0, -0.76, -0.74, 0.0, 0.1, 1.24, 1.26, float("inf"), float("nan")]])
    running = RunningHistograms(qparams)
    running.add(exact, fake_quant(exact, qparams), 1)
    found = running.result()
    assert found is not None and found.clipped == pytest.approx(4 / 9)
    left, right = found.floats[:BEYOND], found.floats[-BEYOND:]
    assert (left, right) == ((1, 0, 0, 1), (1, 0, 0, 1))
    assert sum(found.floats) == sum(found.codes) == 9
    assert RunningHistograms(qparams).result() is None


def test_channels_have_their_own_steps() -> None:
    spec = QuantSpec(4, signed=True, symmetric=True, axis=0)
    qparams = QParams(torch.tensor([0.1, 10.0]), torch.zeros(2, dtype=torch.int32), spec)
    weight = torch.tensor([[-0.8, 0.0, 0.7], [-80.0, 0.0, 70.0]])
    running = RunningHistograms(qparams)
    running.add(weight, weight, 2)
    found = running.result()
    assert found is not None
    assert [index - 8 for index, count in enumerate(found.codes) if count == 2] == [-8, 0, 7]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 3, 3), (1, 8)])
def test_the_scale_of_one_channel_leaves_the_shape_alone(shape: tuple[int, ...]) -> None:
    spec = QuantSpec(4, signed=True, symmetric=True, axis=0)
    running, x = (
        RunningHistograms(QParams(torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32), spec)),
        torch.ones(shape),
    )
    running.add(x, x, 1)
    found = running.result()
    assert found is not None and sum(found.floats) == x.numel()


def test_large_tensors_are_sampled_alike_in_all_places() -> None:
    spec = QuantSpec(1)
    exact = torch.zeros(2, 50, 7 * PER_SAMPLE)
    exact[:, ::10] = 0.5  # every tenth row
    running = RunningHistograms(grid(spec))
    running.add(exact, exact, 2)
    found = running.result()
    assert found is not None and sum(found.codes) == 2 * PER_SAMPLE
    assert found.codes[1] / sum(found.codes) == pytest.approx(0.1, abs=0.01)


def test_the_noise_of_a_network_comes_with_the_histograms_of_all_its_sites() -> None:
    graph, inputs = folded_network("mlp")
    result = calibrate(graph, [inputs])
    noise, weights = Noise(result), {site.name for site in result.placement.sites if site.kind == "weight"}
    assert {*noise.histograms()} == weights
    noise.start(inputs)
    kernels = plan(result.program, integer=False)
    run(kernels, inputs, see=noise.see)
    assert {*noise.histograms()} == weights | {*kernels.sites}
