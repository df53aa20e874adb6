"""Tolerances of golden outputs: none where integers decide alone, measured ones after float operators."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.grid.processors import PROCESSORS
from calibrators.program.freeze import CalibrationResult
from exporter.emission.build_model import emit
from exporter.frontend.capture import capture
from runtime_tests.parity.golden import GoldenOutput, golden_outputs, within
from runtime_tests.reference.execute import KernelPlan, plan, run
from tests.support.networks import build, randomize


class Forked(nn.Module):
    """One output of integer kernels, one after a float operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(10, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(x))
        return self.second(x), self.third(nn.functional.gelu(x))


@functools.cache
def calibrated(name: str) -> tuple[CalibrationResult, Tensor]:
    model, x = (randomize(Forked()), torch.randn(8, 10)) if name == "forked" else build(name)
    return calibrate(capture(model, x), [x], method="minmax", options={}), x


def described(name: str, folder: Path) -> tuple[KernelPlan, tuple[Tensor, ...], tuple[GoldenOutput, ...]]:
    result, x = calibrated(name)
    emit(result, folder / "m.onnx")
    kernels = plan(result.program)
    outputs = run(kernels, (x,))[1]
    return kernels, outputs, golden_outputs(folder / "m.onnx", kernels, [((x,), outputs)], processors=PROCESSORS)


@pytest.mark.parametrize("name", ["residual", "pooled", "mlp"])
def test_integers_are_bit_identical(name: str, tmp_path: Path) -> None:
    _, _, found = described(name, tmp_path)
    assert [(output.tolerance, output.measured) for output in found] == [(0.0, 0.0)]


def test_outputs_after_float_operators_have_a_tolerance(tmp_path: Path) -> None:
    _, (output,), (found,) = described("transformer", tmp_path)
    assert 2 * found.measured < found.tolerance < 0.2 * found.largest
    assert found.measured > 0
    assert within(found, output, output + 0.99 * found.tolerance)
    assert not within(found, output, output + 1.01 * found.tolerance)
    assert not within(found, output, output.where(output < output.max(), torch.nan))


def test_each_output_is_judged_by_what_computes_it(tmp_path: Path) -> None:
    _, _, found = described("forked", tmp_path)
    assert [output.tolerance > 0 for output in found] == [False, True]


def test_runs_with_other_codes_stay_within_the_tolerance(tmp_path: Path) -> None:
    """Codes after float operators that are one step off, at places that the measurement did not try."""
    kernels, (expected,), (found,) = described("transformer", tmp_path)
    _, x = calibrated("transformer")
    floats = {step.site for step in kernels.steps if not step.is_integer}
    generator = torch.Generator().manual_seed(7)

    def disturb(site: str, codes: Tensor) -> Tensor:
        if site not in floats:
            return codes
        moved = codes.flatten().clone()
        moved[int(torch.randint(len(moved), (1,), generator=generator))] ^= 1
        return moved.reshape(codes.shape)

    for _ in range(20):
        assert within(found, expected, run(kernels, (x,), disturb=disturb)[1][0])


def test_the_tolerance_is_the_same_each_time(tmp_path: Path) -> None:
    assert described("transformer", tmp_path)[2] == described("transformer", tmp_path)[2]
