"""Layers of which weights only are quantized: MatMulNBits at accuracy level 0, and the integers in the file proved."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import openvino
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from typer.testing import CliRunner

from calibrators.calibration import calibrate
from calibrators.errors import InputError
from calibrators.graph.aten import constant
from calibrators.grid.numerics import dequantize, quantize
from calibrators.grid.spec import QParams, QuantSpec
from calibrators.methods.minmax import MinMax
from calibrators.methods.mse import MSE
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.place import Placement, PlacementOptions, place
from calibrators.program.freeze import CalibrationResult, freeze
from calibrators.targets import get_target
from exporter.cli import app
from exporter.config import make_config
from exporter.frontend.capture import capture
from exporter.frontend.reference import export_program, load_reference, save_reference
from exporter.pipeline import export
from exporter.reporting.layer_sections import layer_entries
from exporter.verify import verify
from runtime_tests.measure.noise import Noise
from runtime_tests.ort.coverage import coverage
from runtime_tests.ort.lint import lint
from runtime_tests.ort.onnx_operators import DEQUANTIZE
from runtime_tests.ort.sessions import loads, session
from runtime_tests.parity.results import FLOAT_OUTPUT_ERROR, Level, ParityError
from runtime_tests.proof import parity
from tests.support.networks import build, randomize
from tests.support.onnx_models import optimized_model
from tests.support.stored import stored

FLOAT32_ERROR = 2e-6
"""Of a sum of up to 384 float32 products, relative to the largest of a matrix of sums: some ten roundings of 6e-8."""

CLEAN = {"violations": 0, "unplanned": {}, "kernel_mismatched": 0}
GRANULARITIES: dict[str, dict[str, Any]] = {
    "tensor": {"granularity": "tensor"},
    "channel": {},
    **{f"block-{size}": {"granularity": "block", "block_size": size} for size in (16, 32, 128)},
}


class Pair(nn.Module):
    """Two linear layers with a ReLU between them; inputs that are no multiple of a block."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(200, 24, bias=bias), nn.Linear(24, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


class Mixed(nn.Module):
    """Convolution, linear layers of which the middle one may have weights alone quantized; input [n, 2, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.before = nn.Conv2d(2, 4, 3), nn.Linear(64, 32)
        self.middle, self.behind = nn.Linear(32, 32, bias=False), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.before(torch.relu(self.conv(x)).flatten(1)))
        y: Tensor = self.behind(torch.relu(self.middle(x)))
        return y


def calibrated(model: nn.Module, x: Tensor, *layers: LayerRule, **options: Any) -> CalibrationResult:
    placement = PlacementOptions(layers=layers, first_last_bits=None, **options)
    return calibrate(capture(model, x), [x], method="mse", placement=placement)


@functools.cache
def pair(
    bits: int, granularity: str, bias: bool = True, shape: tuple[int, ...] = ()
) -> tuple[CalibrationResult, Tensor]:
    model = randomize(Pair(bias))
    x = torch.randn(8, *shape, 200, generator=torch.Generator().manual_seed(1))
    rule = LayerRule("*", weight_only=True, weight_bits=bits, **GRANULARITIES[granularity])
    return calibrated(model, x, rule), x


def compared(model: onnx.ModelProto, result: CalibrationResult, x: Tensor, *, optimized: bool = True) -> Level:
    return parity(model, result.program, [(x,)], optimized=optimized)


def found(report: Level) -> dict[str, Any]:
    return {key: getattr(report, key) for key in CLEAN}


def kernels(model: onnx.ModelProto) -> list[dict[str, int]]:
    """Attributes of every MatMulNBits that runs."""
    nodes = [node for node in optimized_model(model).graph.node if node.op_type == "MatMulNBits"]
    return [{attribute.name: attribute.i for attribute in node.attribute} for node in nodes]


def types(model: onnx.ModelProto) -> dict[str, str]:
    name = onnx.TensorProto.DataType.Name
    return {tensor.name: name(tensor.data_type) for tensor in model.graph.initializer}


# ---- what is emitted, and what runs


@pytest.mark.parametrize(("bias", "shape"), [(True, ()), (False, (3,))], ids=["bias-matrix", "no-bias-tokens"])
@pytest.mark.parametrize(
    ("bits", "granularity"),
    [
        *itertools.product((4, 8), ("channel", "block-16", "block-32", "block-128")),
        (3, "block-16"),
        (6, "channel"),
        (4, "tensor"),
        (8, "tensor"),
    ],
)
def test_the_runtime_computes_the_reference(bits: int, granularity: str, bias: bool, shape: tuple[int, ...]) -> None:
    result, x = pair(bits, granularity, bias, shape)
    model = stored(result)
    onnx.checker.check_model(model, full_check=True)
    width = 4 if bits <= 4 else 8
    assert [(k["bits"], k["accuracy_level"]) for k in kernels(model)] == [(width, 0)] * 2
    for optimized in (False, True):
        report = compared(model, result, x, optimized=optimized)
        assert found(report) == CLEAN
        assert all(output.relative < FLOAT32_ERROR for output in report.outputs)
    assert {finding.rule for finding in lint(model)} == {"weight-only"}


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("bits", [4, 8], ids=lambda bits: f"{bits}-bit")
def test_level_0_is_float32_arithmetic_and_the_default_is_not(bits: int, rows: int) -> None:
    """Against float64 sums of the dequantized weights; by default activations are rounded to int8 in the kernel."""
    torch.manual_seed(0)
    layer, x = nn.Linear(384, 64), torch.randn(64, 384)
    rule = LayerRule("*", weight_only=True, weight_bits=bits, granularity="block")
    result = calibrated(nn.Sequential(layer), x, rule)
    weight = dequantize(result.weights["0.weight"].codes, result.weights["0.weight"].qparams)
    exact = (x[:rows].double() @ weight.double().T + layer.bias.double()).detach().numpy()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    by_default = ort.InferenceSession(stored(result).SerializeToString(), options, providers=["CPUExecutionProvider"])
    errors = [
        np.abs(runner.run(None, {"input": x[:rows].numpy()})[0] - exact).max() / np.abs(exact).max()
        for runner in (session(stored(result)), by_default)
    ]
    assert errors[0] < FLOAT32_ERROR < FLOAT_OUTPUT_ERROR < errors[1]


@pytest.mark.parametrize("name", ["transformer", "mlp", "residual", "pooled"])
def test_all_linear_layers_of_networks(name: str) -> None:
    model, x = build(name, batch=32)
    result = calibrated(model, x, weight_only=True, weight_bits=4, block_size=16)
    linear = sum(node.target is torch.ops.aten.linear.default for node in result.program.graph.nodes)
    emission = stored(result)
    assert len(kernels(emission)) == linear
    assert found(compared(emission, result, x)) == found(compared(emission, result, x, optimized=False)) == CLEAN


@pytest.mark.parametrize("layer", ["before", "middle", "behind"])
def test_among_integer_kernels(layer: str) -> None:
    """Codes in front, a quantizer behind: neither keeps the weight from its kernel, or makes an integer one of it."""
    model = randomize(Mixed())
    x = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    result = calibrated(model, x, LayerRule(layer, weight_only=True, weight_bits=4))
    emission = stored(result)
    executed = Counter(node.op_type for node in optimized_model(emission).graph.node)
    assert (executed["MatMulNBits"], executed["QLinearConv"]) == (1, 1)
    assert found(compared(emission, result, x)) == found(compared(emission, result, x, optimized=False)) == CLEAN


def test_methods_that_train_take_it() -> None:
    model, x = build("transformer", batch=32)
    placement = PlacementOptions(weight_only=True, weight_bits=3, block_size=16)
    options = {"iters": 20, "batch": 8}
    result = calibrate(capture(model, x), [x], method="qdrop", options=options, placement=placement)
    assert found(compared(stored(result), result, x)) == CLEAN


def test_the_stored_reference_keeps_blocks(tmp_path: Path) -> None:
    result, x = pair(4, "block-32")
    save_reference(export_program(result.program), tmp_path / "reference.pt2")
    report = parity(stored(result), load_reference(tmp_path / "reference.pt2"), [(x,)], optimized=True)
    assert found(report) == CLEAN and report.values == 24 * 200 + 5 * 24


# ---- storage


@pytest.mark.parametrize(
    ("bits", "storage", "expected"),
    [(4, "auto", ["INT4", "INT4"]), (4, "int8", ["INT8", "INT8"]), (5, "int4", ["INT8", "INT8"]),
     (2, "auto", ["INT4", "INT4"]), (2, "int2", ["INT2", "INT4"])],
)  # fmt: skip
def test_storage_decides_the_kernel(bits: int, storage: str, expected: list[str]) -> None:
    """Odd sizes included; 2-bit codes only where outputs fill bytes: the second layer has 5."""
    if storage == "int2" and not loads(opset=25, ir_version=13):
        pytest.skip("this onnxruntime does not load 2-bit types")
    result, x = pair(bits, "block-32")
    model = stored(result, storage)
    found_types = types(model)
    for what in ("quantized", "zero_point"):
        assert [found_types[f"{layer}.weight_{what}"] for layer in ("first", "second")] == expected
    assert [f"INT{kernel['bits']}" for kernel in kernels(model)] == expected
    assert found(compared(model, result, x)) == CLEAN


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_independent_reader_finds_the_same_weights(granularity: str) -> None:
    result, x = pair(4, granularity)
    model = stored(result)
    [by_text] = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    [expected] = session(model, optimized=False).run(None, {"x": x.numpy()})
    assert np.abs(by_text - expected).max() <= FLOAT32_ERROR * np.abs(expected).max()
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_quantized"):
            codes = result.weights[tensor.name.removesuffix("_quantized")].codes
            assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes.numpy().T)


@pytest.mark.parametrize(("bits", "size"), [(8, None), (4, 16)], ids=["8-bit-channel", "4-bit-block"])
def test_openvino_computes_it_too(bits: int, size: int | None) -> None:
    """By default it rounds activations as onnxruntime does, too; groups of size 0 turn that off."""
    model, x = build("transformer", batch=8)
    result = calibrated(model, x, weight_only=True, weight_bits=bits, block_size=size)
    network = openvino.Core().read_model(stored(result).SerializeToString())
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    [found] = openvino.Core().compile_model(network, "CPU", exact)(x.numpy()).values()
    [expected] = session(stored(result), optimized=False).run(None, {"x": x.numpy()})
    assert np.abs(found - expected).max() <= FLOAT_OUTPUT_ERROR * np.abs(expected).max()


def test_openvino_reads_no_block_that_is_cut_off() -> None:
    with pytest.raises(RuntimeError, match="cannot be divided by block_size"):
        openvino.Core().read_model(stored(pair(4, "block-32")[0]).SerializeToString())


# ---- the proof finds what is wrong


def changed(model: onnx.ModelProto, name: str, edit: Any) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in copy.graph.initializer:
        if tensor.name == name:
            array = numpy_helper.to_array(tensor).copy()
            tensor.CopyFrom(numpy_helper.from_array(edit(array), name))
    return copy


def one_code_more(array: NDArray[Any]) -> NDArray[Any]:
    flat = array.reshape(-1)
    flat[3] = type(flat[3])(int(flat[3]) - 1 if int(flat[3]) > 0 else int(flat[3]) + 1)
    return array


def one_ulp_more(array: NDArray[Any]) -> NDArray[Any]:
    array.reshape(-1)[0] = np.nextafter(array.reshape(-1)[0], np.float32(1))
    return array


@pytest.mark.parametrize(
    ("what", "edit", "mismatched"),
    [("quantized", one_code_more, 1), ("scale", one_ulp_more, 32), ("zero_point", one_code_more, 32)],
)
def test_a_changed_integer_in_the_file_is_found(what: str, edit: Any, mismatched: int) -> None:
    """However little it moves the output: an ulp of a scale moves nothing that a tolerance would show."""
    result, x = pair(4, "block-32")
    report = compared(changed(stored(result), f"first.weight_{what}", edit), result, x)
    [site] = [site for site in report.nodes if not site.legal]
    assert (site.site, site.kernel, site.mismatched) == ("first.weight", DEQUANTIZE, mismatched)
    with pytest.raises(ParityError, match=r"'first\.weight'"):
        report.raise_for_mismatch()


def test_a_file_without_the_weight_belongs_to_another_program() -> None:
    result, x = pair(4, "block-32")
    model = stored(result)
    for node in model.graph.node:
        node.input[:] = [name.replace("first.weight", "other") for name in node.input]
        node.output[:] = [name.replace("first.weight", "other") for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("first.weight", "other")
    with pytest.raises(ParityError, match="belongs to another program"):
        compared(model, result, x).raise_for_mismatch()


def test_a_weight_that_is_not_fused_is_a_surprise() -> None:
    """The same network with its bias inside the product: the ReLU behind keeps the runtime from fusing."""
    result, x = pair(4, "channel")
    model = stored(result)
    [product, addition, *_] = [node for node in model.graph.node if node.op_type in ("Gemm", "Add")]
    product.input.append(addition.input[1])
    product.output[0] = addition.output[0]
    model.graph.node.remove(addition)
    assert found(compared(model, result, x)) == CLEAN | {"unplanned": {"MatMulNBits": -1}}


# ---- why it is emitted so: still true in the installed runtime


def product(codes: Any, scale: Any, zero_point: Any, *behind: onnx.NodeProto, opset: int = 21, **axis: int) -> Any:
    """x -> Gemm with a dequantized weight -> `behind`, which reads "product" and makes "y"."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["weight"], **axis),
        helper.make_node("Gemm", ["x", "weight"], ["product" if behind else "y"]),
        *behind,
    ]
    constants = {"w": codes, "s": scale, "z": zero_point}
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", codes.shape[0]])],
        [value("y", TensorProto.FLOAT, ["n", codes.shape[1]])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 13 if opset >= 25 else 10
    return model


def codes(width: int, outputs: int = 8) -> NDArray[Any]:
    dtype = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}[width].numpy()
    limit = 1 << (width - 1)
    return np.random.default_rng(0).integers(-limit, limit, (64, outputs)).astype(dtype)


@pytest.mark.parametrize("width", [4, 8], ids=lambda width: f"{width}-bit")
def test_blocks_of_8_do_not_fuse(width: int) -> None:
    integers, scale = codes(width), np.full((8, 8), 0.1, np.float32)
    assert kernels(product(integers, scale, np.zeros((8, 8), integers.dtype), axis=0, block_size=8)) == []


@pytest.mark.parametrize("between", ["Relu", "QuantizeLinear"])
def test_what_keeps_a_product_from_fusing_directly_behind_it(between: str) -> None:
    integers = codes(4)
    scale, zero = np.full(8, 0.1, np.float32), np.zeros(8, integers.dtype)
    if between == "Relu":
        behind = [helper.make_node("Relu", ["product"], ["r"]), helper.make_node("Softmax", ["r"], ["y"])]
    else:
        behind = [helper.make_node("QuantizeLinear", ["product", "qs", "qz"], ["q"]),
                  helper.make_node("DequantizeLinear", ["q", "qs", "qz"], ["y"])]  # fmt: skip
    model = product(integers, scale, zero, *behind, axis=1)
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.float32(0.1), "qs"), numpy_helper.from_array(np.uint8(0), "qz")]
    )
    assert kernels(model) == []


@pytest.mark.parametrize(("shared", "count"), [("w", 0), ("s", 0), ("z", 2), ("", 2)], ids=["w", "s", "z", "none"])
def test_codes_and_scales_with_two_readers_do_not_fuse(shared: str, count: int) -> None:
    constants = {"w": codes(4), "s": np.linspace(0.1, 0.2, 8, dtype=np.float32), "z": np.zeros(8, codes(4).dtype)}
    behind = [
        helper.make_node("DequantizeLinear", [n if n == shared else f"{n}2" for n in constants], ["again"], axis=1),
        helper.make_node("Gemm", ["x", "again"], ["second"]),
        helper.make_node("Sub", ["product", "second"], ["y"]),
    ]
    model = product(*constants.values(), *behind, axis=1)
    others = constants | {"s": constants["s"] * 2}  # equal scales would be merged
    model.graph.initializer.extend(numpy_helper.from_array(array, f"{n}2") for n, array in others.items())
    assert len(kernels(model)) == count


def test_convolutions_have_no_such_kernel() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["weight"], axis=0),
        helper.make_node("Conv", ["x", "weight"], ["y"]),
    ]
    weight = np.ones((4, 3, 1, 1)).astype(ir.DataType.INT4.numpy())
    constants = {"w": weight, "s": np.ones(4, np.float32), "z": np.zeros(4).astype(weight.dtype)}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 3, 4, 4])],
        [value("y", TensorProto.FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert "DequantizeLinear" in {node.op_type for node in optimized_model(model, layouts=False).graph.node}


@pytest.mark.skipif(not loads(opset=25, ir_version=13), reason="this onnxruntime does not load 2-bit types")
@pytest.mark.parametrize(("outputs", "is_right"), [(8, True), (6, False)], ids=["whole-bytes", "rest"])
def test_two_bit_codes_are_right_in_whole_bytes_only(outputs: int, is_right: bool) -> None:
    integers = codes(2, outputs)
    model = product(integers, np.ones(outputs, np.float32), np.zeros(outputs, integers.dtype), opset=25, axis=1)
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    [by_kernel], [by_text] = (session(model, optimized=on).run(None, {"x": x}) for on in (True, False))
    assert len(kernels(model)) == 1
    assert np.allclose(by_kernel, by_text, atol=1e-4) == is_right


# ---- placement


def placed(model: nn.Module, x: Tensor, *layers: LayerRule, **options: Any) -> Placement:
    return place(capture(model, x), get_target("ort-cpu"), PlacementOptions(layers=layers, **options))


def specs(placement: Placement) -> dict[str, tuple[int, str, bool]]:
    weights = [site for site in placement.sites if site.kind == "weight"]
    return {site.name: (site.spec.bits, site.spec.granularity, site.weight_only) for site in weights}


def test_a_layer_has_its_weight_and_nothing_else_quantized() -> None:
    placement = placed(*build("mlp"), weight_only=True, weight_bits=4, first_last_bits=None)
    assert [site.kind for site in placement.sites] == ["weight"] * 3
    assert all(not site.spec.symmetric for site in placement.sites)


def test_first_and_last_layer_and_single_rules_keep_their_precedence() -> None:
    rules = (
        LayerRule("layers.2", granularity="block", block_size=32, symmetric=True),
        LayerRule("layers.4", weight_only=False, granularity="channel"),
    )
    placement = placed(*build("mlp"), *rules, weight_only=True, weight_bits=4, block_size=16)
    assert specs(placement) == {
        "layers.0.weight": (8, "channel", True),  # 10 inputs are less than a block
        "layers.2.weight": (4, "channel", True),
        "layers.4.weight": (8, "channel", False),
    }
    assert placement.by_name["layers.2.weight"].spec.symmetric
    assert [site.name for site in placement.sites if site.kind == "activation"] == ["layers.3.hardtanh"]


def test_reduced_range_is_for_integer_kernels() -> None:
    placement = placed(*build("residual"), weight_only=True, reduce_range=True)
    assert {name: bits for name, (bits, _, _) in specs(placement).items()} == {
        "stem.weight": 7, "depthwise.weight": 7, "point.weight": 7, "head.weight": 8,
    }  # fmt: skip


def test_convolutions_stay_as_they_are_and_are_told() -> None:
    everywhere = placed(*build("residual"), weight_only=True)
    by_rule = placed(*build("residual"), LayerRule("*", weight_only=True, granularity="block"))
    assert specs(everywhere) == specs(by_rule)
    assert [name for name, (_, _, only) in specs(everywhere).items() if only] == ["head.weight"]
    assert len(everywhere.notes) == 1 and "conv2d" in everywhere.notes[0]
    assert len(by_rule.notes) == 3 and all("conv2d has no such kernel" in note for note in by_rule.notes)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 20)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.tanh(self.a(x)))
        return y


def test_layers_that_share_a_weight_stay_as_they_are() -> None:
    placement = placed(randomize(Tied()), torch.randn(4, 20), weight_only=True, block_size=16)
    assert specs(placement) == {"a.weight": (8, "channel", False)}
    assert placement.notes == tuple(
        f"{layer}: not weight_only, because another layer shares its weight" for layer in ("a", "b")
    )


def test_activation_bits_of_a_wider_rule_are_told_to_have_no_effect() -> None:
    rules = LayerRule("layers.2", activation_bits=4), LayerRule("layers.*", weight_only=True)
    assert placed(*build("mlp"), *rules).notes == (
        "layers.2: activation_bits has no effect, because the layer is weight_only",
    )


@pytest.mark.parametrize(
    ("network", "layers", "options", "parts"),
    [
        ("residual", [("stem", {"weight_only": True})], {}, ["'stem'", "linear", "conv2d"]),
        ("mlp", [("layers.2", {"granularity": "block"})], {}, ["'layers.2'", "per block", "weight_only = true"]),
        ("padded", [], {"weight_only": True}, ["linear", "conv2d"]),
    ],
    ids=["convolution", "block-of-integers", "no-linear-layer"],
)  # fmt: skip
def test_what_cannot_be(network: str, layers: list[Any], options: dict[str, Any], parts: list[str]) -> None:
    model, x = build(network) if network != "padded" else (nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8))
    with pytest.raises(InputError) as caught:
        placed(model, x, *(LayerRule(match, **settings) for match, settings in layers), **options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# ---- blocked numerics


def spec(bits: int, block_size: int, *, symmetric: bool) -> QuantSpec:
    return QuantSpec(bits, signed=True, symmetric=symmetric, axis=0, narrow=symmetric, block_size=block_size)


@pytest.mark.parametrize("inputs", [64, 40, 7], ids=["whole", "rest", "less-than-one"])
@pytest.mark.parametrize("bits", [2, 4, 8], ids=lambda bits: f"{bits}-bit")
def test_the_formula_holds_block_by_block(bits: int, inputs: int) -> None:
    grid = spec(bits, 16, symmetric=bits == 8)
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0))
    qparams = MinMax().weight(weight, grid)
    assert qparams.scale.shape == qparams.zero_point.shape == (5, -(-inputs // 16))
    codes, back = quantize(weight, qparams), dequantize(quantize(weight, qparams), qparams)
    for row in range(5):
        for column in range(inputs):
            scale = qparams.scale[row, column // 16].numpy()
            zero_point = int(qparams.zero_point[row, column // 16])
            code = np.clip(np.rint(weight[row, column].numpy() / scale) + zero_point, grid.qmin, grid.qmax)
            assert int(codes[row, column]) == code
            assert back[row, column].numpy() == np.float32(code - zero_point) * scale


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("method", [MSE(), MinMax()], ids=["mse", "minmax"])
def test_ranges_of_blocks_are_those_of_the_blocks_alone(method: Any, symmetric: bool) -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    qparams = method.weight(weight, spec(4, 16, symmetric=symmetric))
    alone = QuantSpec(4, signed=True, symmetric=symmetric, axis=0, narrow=symmetric)
    for block in range(3):
        expected = method.weight(weight[:, 16 * block : 16 * block + 16], alone)
        assert torch.equal(qparams.scale[:, block], expected.scale)
        assert torch.equal(qparams.zero_point[:, block], expected.zero_point)


def test_smaller_blocks_are_more_precise() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    grids: list[QuantSpec] = [spec(4, size, symmetric=False) for size in (16, 64, 128)]
    grids.append(QuantSpec(4, signed=True, axis=0))
    errors = []
    for grid in grids:
        qparams: QParams = MSE().weight(weight, grid)
        errors.append(float((dequantize(quantize(weight, qparams), qparams) - weight).square().mean()))
    assert errors == sorted(errors) and errors[0] < 0.6 * errors[-1]


def test_blocks_of_zeros_keep_zero_exactly() -> None:
    model = randomize(Pair(True))
    with torch.no_grad():
        model.first.weight[:, 32:64] = 0
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    placement = placed(model, x, weight_only=True, weight_bits=4, block_size=32, first_last_bits=None)
    nodes = {node.name: node for node in placement.graph.graph.nodes}
    weights = {
        site.name: MSE().weight(constant(placement.graph, nodes[site.node]), site.spec) for site in placement.sites
    }
    coded = freeze(placement, {}, weights).weights["first.weight"]
    assert not dequantize(coded.codes, coded.qparams)[:, 32:64].any()
    assert bool((coded.qparams.scale > 0).all())


# ---- report, configuration, command


def test_coverage_counts_them_as_what_they_are() -> None:
    result, _ = pair(4, "block-32")
    covered = coverage(stored(result))
    assert (covered.integer_macs, covered.weight_only_macs, covered.accuracy_level) == (0.0, 1.0, 0)
    assert {node.why for node in covered.float_nodes if node.macs} == {
        "only the weights are quantized: a float kernel expands them, at accuracy level 0"
    }


def test_entries_of_layers_say_what_has_one_scale() -> None:
    result, _ = pair(4, "block-32")
    first, second = layer_entries(result, Noise(result))
    assert (first.granularity, first.block_size) == ("block", 32)
    assert second.granularity == "channel"
    assert first.input_bits is None


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"block_size": 24, "weight_only": True}, ["24", "power of two from 16"]),
        ({"block_size": 8, "weight_only": True}, ["8", "power of two from 16"]),
        ({"block_size": 32}, ["weight_only", "integer kernels have no scales per block"]),
        ({"layers": ["a: weight_only=true, activation_bits=4"]}, ["'a'", "leave activation_bits out"]),
        ({"layers": ["a: weight_only=false, granularity=block"]}, ["'a'", "integer kernels"]),
        ({"layers": ["a: weight_only=true, block_size=32"]}, ["'a'", "granularity = 'block'"]),
        ({"layers": ["a: weight_only=true, granularity=block, block_size=20"]}, ["'a'", "power of two"]),
        ({"layers": ["a: weight_only=1"]}, ["'a'", "true or false"]),
        ({"layers": ["a: weight_only=true, float=true"]}, ["'a'", "exclude each other"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        make_config(settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_the_digest_tells_them_apart() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"weight_only": True},
        {"weight_only": True, "block_size": 16},
        {"layers": ["a: weight_only=true"]},
        {"layers": ["a: weight_only=true, granularity=block"]},
    ]
    assert len({make_config(each).digest() for each in settings}) == len(settings)


def test_the_whole_way(tmp_path: Path) -> None:
    model, x = build("transformer")
    settings = {"weight_only": True, "weight_bits": 4, "block_size": 16, "latency_runs": 0}
    report = export(model, [x], out=tmp_path / "out", **settings)
    assert report["verdict"] == "pass"
    assert report["coverage"]["accuracy_level"] == 0 and report["coverage"]["weight_only_macs"] > 0.5
    assert report["parity"]["optimized"]["mismatched"] == 0
    assert verify(tmp_path / "out")["verdict"] == "pass"


NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 3))

def data():
    yield torch.randn(16, 40)
"""


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--weight-only", "--weight-bits", "4", "--block-size", "16"], 0, "weight-only MACs"),
        (["--layer", "0: weight_only=true, weight_bits=4, granularity=block, block_size=16"], 0, "weight-only MACs"),
        (["--block-size", "16"], 2, "without weight_only"),
        (["--layer", "0: granularity=block"], 2, "integer kernels do not have"),
        (["--layer", "0: weight_only=true, activation_bits=8"], 2, "leave activation_bits out"),
    ],
    ids=["everywhere", "one-layer", "block-size", "block", "activation-bits"],
)
def test_the_command(flags: list[str], code: int, told: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    source = tmp_path / "net.py"
    arguments = ["export", f"{source}:build", "--data", f"{source}:data", "--out", str(tmp_path / "out"), "-q"]
    result = CliRunner().invoke(
        app, [*arguments, "--set", "latency_runs=0", "--method", "mse", *flags], env={"COLUMNS": "200"}
    )
    assert result.exit_code == code, result.output
    assert told in result.output
