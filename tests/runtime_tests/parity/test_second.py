"""OpenVINO as a second runtime: what it may differ by, what it must not, and what is said where it cannot be used."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import junitparser
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from typer.testing import CliRunner

from calibrators.calibration import calibrate
from calibrators.errors import DataError, InputError, ModelError
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from exporter.checks import check_settings
from exporter.cli import app
from exporter.config import make_config
from exporter.frontend.capture import capture
from exporter.pipeline import export
from exporter.verify import verify
from runtime_tests.proof import second_parity
from runtime_tests.runtimes import openvino as second_runtime
from tests.support.folded import folded_network
from tests.support.networks import NETWORKS, build
from tests.support.stored import stored

NETS = (*NETWORKS, "shufflenet", "unet", "mobilenetv3", "elementwise", "convnext", "gpt", "slices")


@functools.cache
def calibrated(name: str, bits: int, *, weight_only: bool = False) -> tuple[CalibrationResult, tuple[Tensor, ...]]:
    graph, inputs = folded_network(name)
    options = PlacementOptions(weight_bits=bits, activation_bits=bits, weight_only=weight_only)
    return calibrate(graph, [inputs], method="mse", placement=options), inputs


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("name", NETS, ids=str)
def test_every_kernel_computes_the_reference_up_to_rare_single_steps(name: str, bits: int) -> None:
    result, inputs = calibrated(name, bits)
    found = second_parity(stored(result), result.program, [inputs])
    assert (found.violations, found.runtime, found.samples) == (0, "OpenVINO", 64)
    assert found.forced.max_lsb <= 1 and found.forced.mismatched <= 5e-3 * found.forced.values
    assert found.forced.values > 0
    assert found.relative < 0.5 and (found.agreement is None or found.agreement > 0.8)


def test_layers_are_executed_on_integers() -> None:
    result, inputs = calibrated("residual", 8)
    found = second_parity(stored(result), result.program, [inputs])
    assert found.executed["Convolution u8"] >= 3
    assert found.unplanned is None


@pytest.mark.parametrize("what", ["weight", "bias", "scale", "zero_point"])
def test_what_the_file_has_wrong_is_found(what: str) -> None:
    """One number of one layer, off by little."""
    result, inputs = calibrated("residual", 8)
    model = stored(result)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    named = {
        "weight": "weight_quantized",
        "bias": "bias_quantized",
        "scale": "weight_scale",
        "zero_point": "zero_point",
    }
    name = next(name for name in tensors if name.endswith(named[what]) and not name.endswith("weight_zero_point"))
    values = numpy_helper.to_array(tensors[name]).copy()
    if what == "weight":
        values.flat[:] = np.where(values == 0, 1, -values)
    elif what == "scale":
        values.flat[0] *= 1.1
    else:
        values.flat[0] += 40 if what == "bias" else 1
    if what == "bias":
        values.flat[0] += 4000
    tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    found = second_parity(model, result.program, [inputs])
    assert found.violations > 0


def test_weights_alone_run_in_float() -> None:
    result, inputs = calibrated("mlp", 4, weight_only=True)
    found = second_parity(stored(result), result.program, [inputs])
    assert found.violations == 0 and found.relative < 1e-4


def test_a_file_that_openvino_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.emission.packing.OVERHEAD", 0)
    result, inputs = calibrated("residual", 2)
    with pytest.raises(ModelError, match=r"OpenVINO \d+.* refuses the model: .*leave openvino out"):
        second_parity(stored(result, "int2"), result.program, [inputs])


def test_two_bit_types_are_refused_before_the_work() -> None:
    with pytest.raises(InputError, match="OpenVINO does not read its 2-bit types"):
        check_settings(make_config({"weight_storage": "int2", "weight_bits": 2, "openvino": True}))


def test_inputs_of_several_kinds_and_one_that_nobody_reads() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.table = nn.Linear(6, 5), nn.Linear(4, 5), nn.Embedding(7, 5)

        def forward(self, z: Tensor, unused: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x).relu() + self.b(z) + self.table(index), x

    inputs = (torch.randn(16, 4), torch.randn(16, 3), torch.randn(16, 6), torch.randint(0, 7, (16,)))
    result = calibrate(capture(Mixed(), inputs), [inputs])
    assert second_parity(stored(result), result.program, [inputs]).violations == 0


def test_a_fixed_batch() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            head: Tensor = self.head(self.conv(x).relu().mean((2, 3)))
            return head.reshape(1, 4)

    x = torch.randn(8, 3, 6, 6)
    graph = capture(One(), x[:1])
    result = calibrate(graph, x.split(1))
    found = second_parity(stored(result), result.program, x.split(1))
    assert not graph.meta["dynamic_batch"]
    assert (found.violations, found.samples) == (0, 8)


def test_no_batches() -> None:
    result, _ = calibrated("mlp", 8)
    with pytest.raises(DataError, match="no batch"):
        second_parity(stored(result), result.program, [])


def test_batches_as_they_come() -> None:
    result, inputs = calibrated("residual", 8)
    whole = second_parity(stored(result), result.program, [inputs])
    parts = second_parity(
        stored(result), result.program, [tuple(x[i : i + 24] for x in inputs) for i in (0, 24, 48, 64)]
    )
    assert parts.nodes == whole.nodes
    assert (parts.relative, parts.agreement, parts.executed) == (whole.relative, whole.agreement, whole.executed)


def test_export_and_verify(tmp_path: Path) -> None:
    model, x = build("residual")
    report = export(model, [x], method="mse", eval_data=[x], out=tmp_path / "out", openvino=True, latency_runs=0)
    assert report["verdict"] == "pass"
    second = report["parity"]["openvino"]
    assert (second["violations"], second["kernel_values"] > 0) == (0, True)
    assert "parity.openvino.violations" in {gate["name"] for gate in report["gates"]}
    suites = {suite.name for suite in junitparser.JUnitXml.fromfile(str(tmp_path / "out" / "junit.xml"))}
    assert "intact.parity.openvino" in suites
    assert f"OpenVINO {second['version']}" in (tmp_path / "out" / "report.html").read_text()
    again = verify(tmp_path / "out")
    assert again["verdict"] == "pass" and again["parity"]["openvino"]["samples"] > 0
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "out")])
    assert shown.exit_code == 0 and "OpenVINO" in shown.stdout


def test_a_second_runtime_changes_no_byte_of_the_model(tmp_path: Path) -> None:
    model, x = build("mlp")
    for name in ("with", "without"):
        export(model, [x], method="mse", out=tmp_path / name, openvino=name == "with", latency_runs=0)
    assert (tmp_path / "with" / "model.onnx").read_bytes() == (tmp_path / "without" / "model.onnx").read_bytes()
    assert "openvino" not in json.loads((tmp_path / "without" / "report.json").read_text())["parity"]


def test_where_openvino_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = build("mlp")
    export(model, [x], method="mse", out=tmp_path / "out", openvino=True, latency_runs=0)
    monkeypatch.setattr(second_runtime, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="OpenVINO is not installed"):
        export(model, [x], method="mse", out=tmp_path / "other", openvino=True, latency_runs=0)
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="OpenVINO is not installed"):
        verify(tmp_path / "out")


def test_a_violation_fails_the_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(second_runtime.Compiled, "kernel_rate", 1e-12)
    monkeypatch.setattr("runtime_tests.parity.results.FLOAT_CHANCE", -1)
    model, x = build("residual")
    report = export(model, [x], method="mse", out=tmp_path / "out", openvino=True, latency_runs=0)
    assert report["verdict"] == "fail"
    failed = {gate["name"] for gate in report["gates"] if not gate["passed"]}
    assert "parity.openvino.violations" in failed


def test_the_file_is_left_as_it_was() -> None:
    result, inputs = calibrated("mlp", 8)
    model = stored(result)
    before = model.SerializeToString(deterministic=True)
    second_parity(model, result.program, [inputs])
    assert onnx.ModelProto.FromString(before) == model
    assert torch.equal(inputs[0], calibrated("mlp", 8)[1][0])
