"""Packed weights: the same codes and kernels in every storage, in what onnxruntime and OpenVINO really load."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.errors import InputError
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from exporter.checks import check_settings
from exporter.config import make_config
from exporter.emission import packing
from exporter.emission.build_model import emit, to_onnx
from exporter.emission.packing import STORAGES, alternatives, pack, small
from exporter.frontend.capture import capture
from runtime_tests.measure.size import size_of
from runtime_tests.ort.lint import lint
from runtime_tests.ort.sessions import loads, session
from runtime_tests.ort.versions import minimum_version
from runtime_tests.proof import parity
from tests.support.onnx_models import optimized_model
from tests.support.stored import stored

OPS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 6, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "linear": (nn.Linear(9, 5), (4, 9)),
    "tokens": (nn.Linear(9, 5, bias=False), (2, 3, 9)),
}
GRANULARITIES = {
    "channel": {},
    "symmetric": {"symmetric": True},
    "tensor": {"granularity": "tensor"},
}
PACKED_AS = {("int4", 2): "INT4", ("int4", 3): "INT4", ("int4", 4): "INT4",
             ("int2", 2): "INT2", ("int2", 3): "INT4", ("int2", 4): "INT4"}  # fmt: skip

pytestmark = pytest.mark.skipif(not loads(opset=25, ir_version=13), reason="this onnxruntime does not load 2-bit types")


@pytest.fixture(autouse=True)
def _pack_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "OVERHEAD", 0)


@functools.cache
def calibrated(op: str, bits: int, granularity: str) -> tuple[CalibrationResult, Tensor]:
    torch.manual_seed(0)
    layer, shape = OPS[op]
    layer.reset_parameters()  # type: ignore[operator]
    x = torch.randn(shape)
    rules = (LayerRule("*", weight_bits=bits, **GRANULARITIES[granularity]),)  # type: ignore[arg-type]
    graph = capture(nn.Sequential(layer, nn.ReLU()), x)
    return calibrate(graph, [x], method="mse", placement=PlacementOptions(first_last_bits=None, layers=rules)), x


def kernels(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in optimized_model(model).graph.node)


def types(model: onnx.ModelProto) -> set[str]:
    return {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda bits: f"{bits}-bit")
@pytest.mark.parametrize("op", OPS)
def test_every_storage_is_the_same_network(op: str, bits: int, granularity: str) -> None:
    """Same integer kernels, no differing integer, same values from an independent reader of the file."""
    result, x = calibrated(op, bits, granularity)
    plain = stored(result, "int8")
    [expected] = session(plain).run(None, {"input": x.numpy()})
    [by_text] = ReferenceEvaluator(plain).run(None, {"input": x.numpy()})
    for storage in ("int4", "int2"):
        model = stored(result, storage)
        onnx.checker.check_model(model, full_check=True)
        assert PACKED_AS[storage, bits] in types(model)
        assert kernels(model) == kernels(plain)
        [found] = session(model).run(None, {"input": x.numpy()})
        assert np.array_equal(found, expected)
        for optimized in (False, True):
            report = parity(model, result.program, [(x,)], optimized=optimized)
            assert report.mismatched == 0
        [read] = ReferenceEvaluator(model).run(None, {"input": x.numpy()})
        assert np.array_equal(read, by_text)
        assert [finding for finding in lint(model) if finding.severity == "error"] == []


@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda bits: f"{bits}-bit")
@pytest.mark.parametrize("op", OPS)
def test_openvino_reads_four_bits_and_not_two(op: str, bits: int) -> None:
    result, x = calibrated(op, bits, "channel")

    def run(storage: str) -> Any:
        core = openvino.Core()
        model = core.read_model(stored(result, storage).SerializeToString())
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return compiled(x.numpy())[0]

    step = float(result.activations[list(result.activations)[-1]].scale)
    assert np.abs(run("int4") - run("int8")).max() <= 1.001 * step  # its kernels may differ by one code at a tie
    if PACKED_AS["int2", bits] == "INT2":
        with pytest.raises(RuntimeError, match="INT2"):
            run("int2")


def test_codes_beyond_the_width_stay_int8() -> None:
    result, _ = calibrated("conv", 4, "channel")
    wide, _ = calibrated("linear", 6, "channel")
    assert "INT4" not in types(stored(wide, "int4")) and "INT4" in types(stored(result, "auto"))


def test_the_opset_is_the_first_that_has_what_was_packed() -> None:
    def opset(result: CalibrationResult, storage: str) -> tuple[int, int]:
        model = stored(result, storage)
        return model.opset_import[0].version, model.ir_version

    two, four, six = (calibrated("conv", bits, "channel")[0] for bits in (2, 4, 6))
    assert opset(six, "int4") == opset(two, "int8") == (20, 10)
    assert opset(two, "auto") == opset(four, "int2") == (21, 10)
    assert opset(two, "int2") == (25, 13)


@pytest.mark.parametrize(
    ("min_ort", "storage", "release", "type_"),
    [
        (None, "auto", "1.23", "INT4"),
        ("1.23", "auto", "1.23", "INT4"),
        ("1.22.1", "auto", "1.18", "INT8"),
        (None, "int2", "1.24", "INT2"),
        ("1.23", "int2", "1.23", "INT4"),
        ("1.19", "int2", "1.18", "INT8"),
    ],
)
def test_storage_follows_the_oldest_release(min_ort: str | None, storage: str, release: str, type_: str) -> None:
    result, x = calibrated("conv", 2, "channel")
    model = stored(result, storage, min_ort)
    assert str(minimum_version(ir.from_proto(model)).version) == release
    assert types(model) & {"INT2", "INT4"} == {type_} - {"INT8"}
    assert parity(model, result.program, [(x,)], optimized=True).mismatched == 0


def test_bytes_in_the_file_follow_the_oldest_release() -> None:
    assert packing.stored_bytes(10**5, 4, 0, "auto", "1.23") == packing.stored_bytes(10**5, 4, 0, "auto")
    assert packing.stored_bytes(10**5, 4, 0, "auto", "1.22") == 10**5


def test_small_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = to_onnx(calibrated("conv", 4, "channel")[0].program, opset=20)
    assert small(model, "int4") == []
    monkeypatch.setattr(packing, "OVERHEAD", 1024)
    assert small(model, "int4") == ["0.weight_quantized"]


def test_small_weights_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "OVERHEAD", 1024)
    result, _ = calibrated("conv", 4, "channel")
    assert pack(to_onnx(result.program, opset=20), "int4") == {}


def test_alternatives_differ_from_what_was_chosen_and_from_each_other() -> None:
    two, _ = calibrated("conv", 2, "channel")
    four, _ = calibrated("conv", 4, "channel")
    assert set(alternatives(to_onnx(two.program, opset=20), "auto")) == {"int8", "int2"}
    assert set(alternatives(to_onnx(four.program, opset=20), "auto")) == {"int8"}
    model = to_onnx(four.program, opset=20)
    assert set(alternatives(model, "int8")) == {"int4"} and types(ir.to_proto(model)).isdisjoint({"INT4"})


def test_alternatives_that_the_runtime_does_not_load_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "loads", lambda opset, ir_version: (opset, ir_version) < (25, 13))
    two, _ = calibrated("conv", 2, "channel")
    assert set(alternatives(to_onnx(two.program, opset=20), "auto")) == {"int8"}


@pytest.mark.parametrize("storage", STORAGES)
def test_the_bytes_are_packed(storage: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 4, 4)
    graph = capture(nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU()), x)
    result = calibrate(graph, [x], placement=PlacementOptions(weight_bits=2, first_last_bits=None))
    emit(result, tmp_path / "model.onnx", weight_storage=storage)
    found = size_of(tmp_path / "model.onnx", tmp_path / "model.onnx").by_type
    codes = 64 * 64 * 9
    widths = {"auto": ("INT4", 4), "int8": ("INT8", 8), "int4": ("INT4", 4), "int2": ("INT2", 2)}
    name, bits = widths[storage]
    assert codes * bits // 8 <= found[name] <= codes * bits // 8 + 64 + 1


class TestSettings:
    def test_nothing_narrow_enough(self) -> None:
        with pytest.raises(InputError, match="no weight has 4 bits or fewer"):
            check_settings(make_config({"weight_storage": "int4"}))

    def test_a_rule_may_make_it_so(self) -> None:
        check_settings(make_config({"weight_storage": "int4", "layers": [{"match": "*", "weight_bits": 3}]}))

    def test_an_old_runtime(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packing, "loads", lambda **_: False)
        with pytest.raises(InputError, match="opset 25, but the installed onnxruntime does not load"):
            check_settings(make_config({"weight_storage": "int2", "weight_bits": 2}))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"min_ort": "1.17"}, "opset 20\\) run in onnxruntime 1.18 and newer"),
            ({"min_ort": "1.22", "weight_storage": "int4", "weight_bits": 4}, "4-bit weights load in onnxruntime 1.23"),
            ({"min_ort": "1.23", "weight_storage": "int2", "weight_bits": 2}, "2-bit weights load in onnxruntime 1.24"),
            ({"min_ort": "new"}, "min_ort = 'new' should be a release such as 1.19"),
        ],
    )
    def test_a_release_that_is_too_old_for_the_request(self, settings: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=words):
            check_settings(make_config(settings))

    def test_a_release_that_is_new_enough(self) -> None:
        for storage, release in (("auto", "1.18"), ("int8", "1.19.2"), ("int4", "1.23"), ("int2", "1.24")):
            check_settings(make_config({"min_ort": release, "weight_storage": storage, "weight_bits": 2}))
        weight_only = {"weight_only": True, "weight_bits": 4, "weight_storage": "int4", "min_ort": "1.19"}
        check_settings(make_config(weight_only))

    def test_unknown(self) -> None:
        with pytest.raises(InputError, match="weight_storage = 'int3'"):
            make_config({"weight_storage": "int3"})
