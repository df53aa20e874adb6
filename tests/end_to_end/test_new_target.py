"""A target that is one new file: placement, program, emission, plan, linter and verdict follow it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import nn

import calibrators.targets
from calibrators.calibration import calibrate
from calibrators.errors import ExportError, ModelError
from calibrators.graph.operators import name_of
from calibrators.grid.spec import QuantSpec
from calibrators.grid.target import Target
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.placement_options import PlacementOptions
from calibrators.targets import get_target
from exporter import export
from exporter.emission.build_model import emit
from exporter.frontend.capture import capture
from runtime_tests.ort.meant_for import target_of
from runtime_tests.reference.execute import plan
from tests.support.networks import build

FILE = '''"""A runtime of the test."""

from dataclasses import replace

from calibrators.grid.spec import QuantSpec
from calibrators.targets.ort_cpu import TARGET as ORT_CPU

TARGET = replace(
    ORT_CPU,
    name="test-runtime",
    exact_on=("arm64", "x86-vnni"),
    opsets=(21, 22),
    static_shapes=True,
    weight=QuantSpec(bits=8, signed=True, symmetric=True, narrow=True),
    integer_ops=ORT_CPU.integer_ops - {"add.Tensor"},
    constant_operands=ORT_CPU.constant_operands - {"add.Tensor"},
    fused_ops=ORT_CPU.fused_ops | {"add.Tensor"},
    forms={name: forms for name, forms in ORT_CPU.forms.items() if name != "add.Tensor"},
)
'''


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Add a folder to the folder of targets."""
    folder = tmp_path / "targets"
    folder.mkdir()
    monkeypatch.setattr(calibrators.targets, "__path__", [*calibrators.targets.__path__, str(folder)])
    yield folder
    for name in [name for name in sys.modules if name == "calibrators.targets.test_runtime"]:
        del sys.modules[name]


def test_a_file_in_the_folder_is_a_target(registry: Path, tmp_path: Path) -> None:
    (registry / "test_runtime.py").write_text(FILE, encoding="utf-8")
    model, x = build("residual", batch=4)
    report = export(model, [x], target="test-runtime", method="minmax", latency_runs=0, out=tmp_path / "out")
    assert report["verdict"] == "pass"
    assert report["target"] == "test-runtime"
    assert report["emission"]["opset"] == 21
    assert not report["model"]["dynamic_batch"]
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    assert target_of(proto).name == "test-runtime"
    scales = [t for t in proto.graph.initializer if t.name.endswith("weight_scale")]
    assert scales and not any(t.dims for t in scales)  # one per tensor, as the grid of weights says


class Sum(nn.Module):
    """Two convolutions whose sum a third one reads, so that codes stand around the sum whoever placed them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.c(self.a(x) + self.b(x))
        return y


def added(**changes: object) -> Target:
    """Return a target whose placement knows no kernel for sums."""
    target = get_target("ort-cpu")
    forms = {name: forms for name, forms in target.forms.items() if name != "add.Tensor"}
    return replace(target, name="t", integer_ops=target.integer_ops - {"add.Tensor"}, forms=forms,
                   constant_operands=target.constant_operands - {"add.Tensor"}, **changes)  # fmt: skip


def test_the_plan_has_the_kernels_of_the_target_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    program = calibrate(capture(Sum(), x), [x], method="minmax", target=added()).program
    fused = get_target("ort-cpu").fused_ops | {"add.Tensor"}
    assert plan(program, added()).counts["QLinearAdd"] == 0
    assert plan(program, added(fused_ops=fused)).counts["QLinearAdd"] == 1


def test_types_for_which_a_target_has_no_kernels_stay_float() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    target = replace(get_target("ort-cpu"), activation=QuantSpec(bits=8, signed=True))
    program = calibrate(capture(Sum(), x), [x], method="minmax", target=target).program
    steps = [step for step in plan(program).steps if step.kernel != "QuantizeLinear"]
    assert {(step.kernel, step.reason) for step in steps} == {("float", "int8 activations have no integer kernels")}
    assert all(step.is_integer for step in plan(program, target).steps)


@pytest.mark.parametrize("settings", [{"activation_bits": 16}, {"weight_bits": 4}], ids=["wide", "packed"])
def test_a_file_of_an_opset_that_the_target_does_not_read_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(2, 32, 4, 4)
    target, rule = replace(get_target("ort-cpu"), opsets=(20, 20)), LayerRule("0", **settings)
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 4, 1))
    options = PlacementOptions(layers=(rule,))
    result = calibrate(capture(model, x), [x], method="minmax", target=target, placement=options)
    with pytest.raises(ExportError, match=r"has opset 21.* but target 'ort-cpu' reads at most 20"):
        emit(result, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"exact_on": ("x86",)}, "unknown processors", id="processor"),
        pytest.param({"exact_on": ()}, "at least 1 item", id="nowhere"),
        pytest.param({"opsets": (22, 21)}, "wrong order", id="opsets"),
        pytest.param({"forms": {"mul.Tensor": ("odd",)}}, "Input should be", id="form"),
        pytest.param({"forms": {"sub.Tensor": ("tensors",)}}, "operators of integer_ops", id="operator"),
        pytest.param({"min_version": "newest"}, "should match pattern", id="version"),
        pytest.param({"drops_clips": "yes"}, "valid boolean", id="type"),
    ],
)
def test_a_target_that_contradicts_the_schema_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        replace(get_target("ort-cpu"), **changes)


class Clipped(nn.Module):
    """A ReLU between a convolution and a linear layer that stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.conv(x).relu().amax((2, 3)))
        return y


def operators(rules: tuple[LayerRule, ...], **changes: bool) -> list[str]:
    """Return the names of the operators of a program for a target that differs in its forms."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    result = calibrate(
        capture(Clipped(), x),
        [x],
        method="minmax",
        target=replace(get_target("ort-cpu"), **changes),
        placement=PlacementOptions(layers=rules),
    )
    return [name_of(node.target) for node in result.program.graph.nodes]


def test_programs_have_the_forms_that_the_target_needs() -> None:
    rules = (LayerRule("head", float=True),)
    assert operators(rules).count("relu.default") == 1
    assert operators(rules, drops_clips=False).count("relu.default") == 0
    assert operators(rules).count("clamp.default") == 1
    assert operators(rules, shields_floats=False).count("clamp.default") == 0


def test_a_program_with_a_free_batch_is_refused_where_the_batch_must_be_fixed() -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(2, 3, 6, 6)
    program = torch.export.export(Clipped().eval(), (x,), dynamic_shapes=({0: batch},), strict=False)
    with pytest.raises(ModelError, match="free batch, but the target needs a fixed one"):
        capture(program, x, free_batch=False)
    assert not capture(Clipped().eval(), x, free_batch=False).meta["dynamic_batch"]


@pytest.mark.parametrize("name", ["ort-cpu", "ort-cpu-vnni", "ort-arm", "ort-web"])
def test_files_are_exact_where_their_target_says(name: str, tmp_path: Path) -> None:
    model, x = build("residual", batch=4)
    report = export(model, [x], target=name, method="minmax", latency_runs=0, out=tmp_path / "out")
    assert report["verdict"] == "pass"
    exact = {each["processor"] for each in report["holds"] if each["status"] in ("proved", "follows")}
    assert exact >= set(get_target(name).exact_on)
    differs = {each["processor"] for each in report["holds"] if each["status"] == "differs"}
    assert ("x86-avx2" in differs) == (name != "ort-cpu")
