"""Files for runtimes other than onnxruntime on CPUs: their form, what is proved about them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn
from typer.testing import CliRunner

from calibrators.errors import ExportError, InputError, ModelError
from calibrators.targets import get_target, list_targets
from exporter import checks, export, pipeline
from exporter.cli import app
from runtime_tests.runtimes import list_runtimes, qnn
from tests.support.networks import build

TARGETS = ("openvino", "ort-qnn", "tensorrt")


class Clipped(nn.Module):
    """A clip beside which the grid has codes, activation functions, a concatenation of two scales, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.c, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.a(x).clamp(-0.3, 1), 3 * nn.functional.relu(self.b(x))], 1)
        y: torch.Tensor = self.head(nn.functional.silu(self.c(both)).mean((2, 3)))
        return y


@pytest.fixture(scope="module", params=TARGETS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """Return the name of a target, the report of a network exported for it, and the file."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp(request.param) / "out"
    x = torch.randn(4, 3, 8, 8)
    report = export(Clipped().eval(), [x], target=request.param, method="minmax", latency_runs=0, out=out)
    return request.param, report, onnx.load(out / "model.onnx")


def test_files_agree_with_the_reference_and_with_the_rules_of_their_target(exported: tuple[str, Any, Any]) -> None:
    name, report, _ = exported
    assert report["verdict"] == "pass" and report["target"] == name
    assert [report["parity"][level]["kernel_mismatched"] for level in ("optimized", "unoptimized")] == [0, 0]
    assert report["parity"]["optimized"]["violations"] == 0
    assert report["lint"] == []


def test_the_report_says_where_a_file_is_proved(exported: tuple[str, Any, Any]) -> None:
    name, report, _ = exported
    target, proved = get_target(name), {each["runtime"] for each in report["proved_on"]}
    warnings = " ".join(report["warnings"])
    assert ("not proved on the device" in warnings) == (target.proof == "qdq")
    if target.proof == "steps":
        assert target.proved_in in proved or f"not proved in {target.proved_in}: " in warnings
    statuses = {each["status"] for each in report["holds"]}
    assert statuses <= ({"unknown"} if target.proof == "qdq" else {"unknown", "proved"})


def test_files_have_the_form_of_their_target(exported: tuple[str, Any, Any]) -> None:
    name, _, model = exported
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zeros = {types[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert zeros == {TensorProto.INT8 if name == "tensorrt" else TensorProto.UINT8}
    codes = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    clips_codes = any(node.op_type == "Clip" and node.input[0] in codes for node in model.graph.node)
    assert clips_codes == (name == "openvino")
    biases = {node.input[2] for node in model.graph.node if node.op_type == "Conv"}
    assert (biases <= set(types)) == (name == "tensorrt")
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    assert (batch.dim_value == 1) == (name == "ort-qnn")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target": "ort-qnn", "activation_bits": 4},
            "activation_bits is 4, but target 'ort-qnn' has activations of 8",
        ),
        (
            {"target": "tensorrt", "layers": [{"match": "*", "activation_bits": 16}]},
            r"activation_bits of the rule for layers '\*' is 16, but target 'tensorrt' has activations of 8 bits only",
        ),
        (
            {"target": "openvino", "weight_bits": 4, "weight_storage": "int4"},
            "but files for openvino hold weights as int8",
        ),
    ],
)
def test_what_a_target_cannot_represent_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, x = build("mlp")
    with pytest.raises(InputError, match=message):
        export(model, [x], out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_few_bits_are_stored_as_int8_where_packed_weights_are_not_read(tmp_path: Path) -> None:
    model, x = build("mlp")
    report = export(model, [x], target="tensorrt", weight_bits=4, method="minmax", latency_runs=0, out=tmp_path / "out")
    assert report["verdict"] == "pass" and report["emission"]["opset"] == 20


def test_without_the_runtime_that_makes_the_file_nothing_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTACT_RUNTIMES", str(tmp_path / "runtimes"))
    model, x = build("mlp")
    message = "model.pte of target 'xnnpack' is made by xnnpack: not installed: executorch; run `intact runtimes --inst"
    with pytest.raises(InputError, match=message):
        export(model, [x], target="xnnpack", method="minmax", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_runtime_of_a_target_refuses_is_not_exportable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        name = "xnnpack"

        def missing(self) -> str:
            return ""

        def lower(self, *_: object) -> tuple[str, ...]:
            raise ModelError("op has no form there")

    for module in (checks, pipeline):
        monkeypatch.setattr(module, "get_runtime", lambda name: Refusing())
    model, x = build("mlp")
    with pytest.raises(ExportError, match=r"model\.pte for target 'xnnpack' cannot be made: op has no form there"):
        export(model, [x[:1]], target="xnnpack", method="minmax", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_target_names_a_runtime_and_what_it_promises() -> None:
    runtimes = {runtime.name for runtime in list_runtimes()}
    for target in list_targets():
        assert not target.proved_in or target.proved_in in runtimes
    shown = CliRunner().invoke(app, ["targets"], env={"COLUMNS": "200"}).stdout
    assert "at most one step off in qnn" in shown and "not proved on the device" in shown and "exact on arm64" in shown


def test_every_node_has_to_run_on_the_simulated_device() -> None:
    provider = qnn._OnHtp.provider.fget(None)  # type: ignore[attr-defined]
    assert provider["name"] == "QNN" and provider["options"]["htp_arch"] == qnn.ARCHITECTURE
    assert qnn.RUNTIME.kernel_rate == qnn._OnHtp.kernel_rate == qnn.KERNEL_RATE
