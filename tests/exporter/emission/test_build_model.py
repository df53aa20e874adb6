"""Emission: the file is the program; names, metadata, shapes, determinism."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.errors import ExportError
from calibrators.graph.aten import constant
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from exporter.emission import build_model as emit_module
from exporter.emission import translate
from exporter.emission.build_model import emit, emit_float
from exporter.emission.onnx_forms import ONNX_FORMS
from exporter.frontend.capture import capture
from exporter.frontend.reference import export_program, load_reference, save_reference
from runtime_tests.ort.sessions import session
from tests.support.architectures import construct
from tests.support.networks import NETWORKS, build, randomize
from tests.support.onnx_models import optimized_model

QDQ_TOLERANCE = 1e-5
"""Relative, on outputs: float32 sums in another order; one code that falls the other way shows as 1e-3 or more."""


@functools.cache
def calibrated(name: str, bits: int = 8) -> tuple[CalibrationResult, Tensor]:
    model, x = build(name)
    placement = PlacementOptions(weight_bits=bits, activation_bits=bits)
    return calibrate(capture(model, x), [x], method="minmax", placement=placement), x


@functools.cache
def emitted(name: str, bits: int = 8) -> tuple[CalibrationResult, Tensor, onnx.ModelProto]:
    """Calibrated network, its data and the file's model: emission takes a second, so once for all tests."""
    result, x = calibrated(name, bits)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        emit(result, path, metadata={"version": "0", "method": "minmax"})
        return result, x, onnx.load(path)


@pytest.mark.parametrize("bits", [8, 4], ids=["w8a8", "w4a4"])
@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_file_computes_the_program(name: str, bits: int) -> None:
    result, x, model = emitted(name, bits)
    onnx.checker.check_model(model, full_check=True)
    expected = result.program(x)[0].numpy()
    [found] = session(model, optimized=False).run(None, {"x": x.numpy()})
    assert np.abs(found - expected).max() <= QDQ_TOLERANCE * np.abs(expected).max()


def test_an_independent_reader_agrees() -> None:
    result, x, model = emitted("residual")
    [found] = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    expected = result.program(x)[0].numpy()
    assert np.abs(found - expected).max() <= QDQ_TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_stored_integers_are_the_calibrated_ones(name: str) -> None:
    result, _, model = emitted(name)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for site, coded in {**result.weights, **result.biases}.items():
        codes = stored[f"{site}_quantized"]
        assert codes.dtype == coded.codes.numpy().dtype
        assert np.array_equal(codes, coded.codes.numpy())
    for tensor in model.graph.initializer:
        assert tensor.raw_data, f"{tensor.name} is not stored as raw data"


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("residual", {"QLinearConv": 3, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}),
        ("mlp", {"QGemm": 3}),
        ("transformer", {"QLinearConv": 1, "QGemm": 5}),
        ("pooled", {"QLinearConv": 6, "QLinearConcat": 1, "QLinearSigmoid": 2, "QLinearMul": 2, "QLinearAdd": 1}),
    ],
    ids=["residual", "mlp", "transformer", "pooled"],
)
def test_integer_kernels_that_run(name: str, kernels: dict[str, int]) -> None:
    _, _, model = emitted(name)
    operators = [node.op_type for node in optimized_model(model).graph.node]
    assert {kernel: operators.count(kernel) for kernel in kernels} == kernels
    assert not {"Conv", "FusedConv", "Gemm"} & set(operators)


def test_names_come_from_module_paths() -> None:
    _, _, model = emitted("residual")
    names = {output for node in model.graph.node for output in node.output}
    assert {"x_quantized", "point.conv2d_quantized", "depthwise.Conv", "output"} <= names
    assert {"stem.weight_quantized", "stem.bias_scale"} <= {tensor.name for tensor in model.graph.initializer}
    paths = {prop.value for node in model.graph.node for prop in node.metadata_props}
    assert {"stem", "depthwise", "point", "head"} <= paths


def test_metadata_holds_tool_and_nothing_of_this_machine() -> None:
    _, _, model = emitted("residual")
    assert {prop.key: prop.value for prop in model.metadata_props} == {"intact.version": "0", "intact.method": "minmax"}
    assert model.producer_name == "intact"
    content = model.SerializeToString()
    for word in (b"site-packages", b"networks.py", str(Path.cwd()).encode(), b"pkg.torch"):
        assert word not in content


def test_interface_is_the_models() -> None:
    _, _, model = emitted("residual")
    [given], [result] = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("x", "output")
    assert [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim] == ["batch", 3, 9, 9]
    assert [dim.dim_param or dim.dim_value for dim in result.type.tensor_type.shape.dim] == ["batch", 5]
    assert [opset.version for opset in model.opset_import if opset.domain == ""] == [20]


@pytest.mark.parametrize("batch", [1, 5])
def test_batch_is_free(batch: int) -> None:
    result, _, model = emitted("transformer")
    x = torch.randn(batch, 3, 8, 8)
    [found] = session(model, optimized=False).run(None, {"x": x.numpy()})
    assert found.shape == tuple(result.program(x)[0].shape)


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        calibrated.cache_clear()
        emit(calibrated("pooled")[0], tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_large_models_leave_the_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(emit_module, "EXTERNAL_DATA_ABOVE", 100)
    model, x = randomize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))), torch.randn(4, 64)
    result = calibrate(capture(model, x), [x], method="minmax")
    emit(result, path)
    assert (path.parent / "model.onnx.data").stat().st_size >= 64 * 64
    [found] = session(path, optimized=False).run(None, {"input": x.numpy()})
    assert found.shape == tuple(result.program(x)[0].shape)


def test_operator_without_onnx_form_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.conv(x))

    x = torch.randn(2, 3, 4, 4)
    result = calibrate(capture(randomize(Odd()), x), [x], method="minmax")
    with pytest.raises(ExportError, match=r"'special_bessel_j0' at .*test_build_model\.py:\d+.* has no ONNX form"):
        emit(result, path)
    assert not path.exists()


def test_the_one_operator_of_several_that_has_no_form_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_plain(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
        if alpha != 1:
            raise ValueError("no such form")
        return ONNX_FORMS[torch.ops.aten.elu.default](x, alpha, scale, input_scale)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.ELU(), nn.ELU(alpha=3.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    forms = {**ONNX_FORMS, torch.ops.aten.elu.default: only_plain}
    monkeypatch.setattr(translate, "ONNX_FORMS", forms)
    translate._translations.cache_clear()
    try:
        with pytest.raises(ExportError, match=r"operator 'elu' at elu_1 \(second, test_build_model\.py:\d+\)"):
            emit_float(capture(Two().eval(), torch.randn(2, 3)), tmp_path / "m.onnx")
    finally:
        translate._translations.cache_clear()


def test_reference_program_survives_its_file(tmp_path: Path) -> None:
    result, x = calibrated("pooled")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_reference(export_program(result.program), tmp_path / name / "reference.pt2")
    loaded = load_reference(tmp_path / "a" / "reference.pt2")
    assert torch.equal(loaded(x)[0], result.program(x)[0])
    first, second = ((tmp_path / name / "reference.pt2").read_bytes() for name in ("a", "b"))
    assert first == second
    assert b"networks.py" not in first
    codes = [node for node in loaded.graph.nodes if node.op == "get_attr" and "quantized" in str(node.target)]
    assert codes and all(constant(loaded, node).dtype in (torch.int8, torch.int32) for node in codes)


def test_reference_program_with_two_inputs_survives_its_file(tmp_path: Path) -> None:
    """Equal batches are a guard of the exported program, and guards are source code, which loading refuses."""
    model, inputs = construct("two-inputs")
    result = calibrate(capture(model, inputs), [inputs], method="minmax")
    save_reference(export_program(result.program), tmp_path / "reference.pt2")
    loaded = load_reference(tmp_path / "reference.pt2")
    assert torch.equal(loaded(*inputs)[0], result.program(*inputs)[0])


@pytest.mark.parametrize("size", [(3, 5), (4, 2), (1, 1)], ids=["uneven", "divisor", "global"])
def test_adaptive_pooling_of_the_float_model(size: tuple[int, int], tmp_path: Path) -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(x, size)

    x = torch.randn(2, 3, 8, 8)
    emit_float(capture(Pool(), x), tmp_path / "model.onnx")
    (found,) = session(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, Pool()(x).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("heads", [(5,), (), (5, 3)], ids=["one_axis", "no_heads", "two_axes"])
def test_attention_of_the_float_model(heads: tuple[int, ...], masked: bool, tmp_path: Path) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, *masks)

    inputs = [torch.randn(2, *heads, 7, size) for size in (4, 4, 6)]
    if masked:
        inputs.append(torch.rand(2, *(1 for _ in heads), 7, 7) > 0.3)
        inputs[-1][..., 0] = True
    expected = Attention()(*inputs).numpy()
    emit_float(capture(Attention(), inputs), tmp_path / "model.onnx")
    runtime = session(tmp_path / "model.onnx")
    (found,) = runtime.run(None, {slot.name: x.numpy() for slot, x in zip(runtime.get_inputs(), inputs, strict=True)})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_operator_that_torch_splits_before_it_fails_is_named(tmp_path: Path) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.rrelu(self.conv(x))

    x = torch.randn(2, 3, 4, 4)
    result = calibrate(capture(randomize(Random()), x), [x], method="minmax")
    with pytest.raises(ExportError, match=r"'rrelu' at .*test_build_model\.py:\d+.* has no ONNX form"):
        emit(result, tmp_path / "model.onnx")
