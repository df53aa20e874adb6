"""A convolutional network in every runtime: emulated processors, WebAssembly, other versions.

`make test-runtimes` runs these tests; there, a runtime that is absent is a failure.
"""

from __future__ import annotations

import functools
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from calibrators.calibration import calibrate
from calibrators.program.freeze import CalibrationResult
from exporter.cli import app
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from exporter.pipeline import export
from runtime_tests.parity.results import ProvedOn
from runtime_tests.proof import Proof
from runtime_tests.runtimes import list_runtimes
from tests.support.elsewhere import available
from tests.support.stored import stored

pytestmark = pytest.mark.runtimes

NAMES = [runtime.name for runtime in list_runtimes()]
EXACT = [runtime.name for runtime in list_runtimes() if not (runtime.kernel_rate or runtime.lowers)]


class Small(nn.Module):
    """Convolutions, a depthwise one, a residual sum, two pools and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(x).relu(), 2)
        x = x + self.pointwise(self.depthwise(x).relu())
        logits: Tensor = self.head(nn.functional.avg_pool2d(x, 2).mean((2, 3)))
        return logits


@functools.cache
def calibrated(target: str) -> tuple[CalibrationResult, onnx.ModelProto, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Small().eval(), torch.randn(16, 3, 16, 16)
    result = calibrate(fold(capture(model, (x,))), [x], target=target)
    return result, stored(result), x


def proved(name: str, target: str = "ort-cpu") -> ProvedOn:
    """Return what a runtime computes."""
    runtime = available(name)
    result, model, x = calibrated(target)
    proof = Proof(model, result.program, ("optimized",), runtimes=[runtime])
    proof.add(x)
    (found,) = [each for each in proof.proved_on if each.runtime == name]
    return found


@pytest.mark.parametrize("name", EXACT)
def test_every_runtime_computes_the_reference(name: str) -> None:
    found = proved(name)
    assert found.refused is None
    assert (found.samples, found.values > 100_000, found.float_values) == (16, True, 0)
    assert (found.mismatched, found.outputs_identical, found.is_proved) == (0, True, True)


def test_openvino_computes_the_reference_up_to_single_steps() -> None:
    found = proved("openvino")
    assert found.is_proved and found.max_lsb <= 1 and found.values > 100_000


def test_emulated_processors_compute_as_the_real_ones_do() -> None:
    """Without VNNI, pairs of large weights saturate; that they do shows which processor runs."""
    found = proved("avx2", target="ort-cpu-vnni")
    assert found.kernel_mismatched > 100 and not found.outputs_identical
    assert not found.is_proved and found.worst[0].kernel == "QLinearConv"


def test_a_bundle(tmp_path: Path) -> None:
    proved("web")
    *_, x = calibrated("ort-cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        report = export(Small().eval(), [x], out=tmp_path / "out", prove_on=("web",), latency_runs=0)
    assert report["verdict"] == "pass"
    assert [each["runtime"] for each in report["proved_on"]] == ["ort", "web"]
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--on", "web"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "(wasm)" in shown.stdout
