from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from calibrators.errors import DataError
from runtime_tests.ort.coverage import Coverage, coverage
from tests.support import onnx_models as models
from tests.support.onnx_models import Net

CONVOLUTIONAL = ["residual", "squeeze_excite", "mobilenet"]
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="int8 activations are fast on Arm")


def reasons(result: Coverage) -> dict[str, str]:
    return {node.op: node.why for node in result.float_nodes}


@pytest.mark.parametrize("name", models.NETS)
def test_macs_equal_the_count_by_hand_and_are_all_integer(name: str) -> None:
    result = coverage(models.NETS[name]())
    assert result.macs == models.MACS[name]
    assert result.integer_macs == 1.0


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_node_of_the_convolutional_toys_is_integer(name: str) -> None:
    result = coverage(models.NETS[name]())
    assert result.integer_nodes == result.compute_nodes > 0
    assert result.float_nodes == ()


def test_integer_clips_of_low_bit_activations_count_as_integer() -> None:
    result = coverage(models.mobilenet(bits=4))
    assert result.by_op["Clip"] == 5
    assert result.float_nodes == ()


def test_float_operators_of_a_transformer_are_named_and_cost_nothing() -> None:
    result = coverage(models.transformer_mlp())
    assert result.integer_nodes == 4
    assert {node.op for node in result.float_nodes} == {"LayerNormalization", "BiasGelu", "Add"}
    assert "no integer kernel" in reasons(result)["LayerNormalization"]
    assert all(node.macs == 0 for node in result.float_nodes)


@on_x86
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_int8_activations_lose_coverage_and_are_named(name: str) -> None:
    result = coverage(models.NETS[name](activation="s8"))
    assert result.integer_macs < 0.6
    assert result.macs == models.MACS[name]
    convs = [node for node in result.float_nodes if node.op == "Conv"]
    assert convs and all("int8 activations" in node.why for node in convs)
    assert result.float_nodes[0].macs == max(node.macs for node in result.float_nodes) > 0


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_float_bias_takes_the_last_linear_layer_out(name: str) -> None:
    result = coverage(models.NETS[name](float_bias=True))
    assert [(node.op, node.why) for node in result.float_nodes] == [
        ("Gemm", "its bias is float and its output is not quantized")
    ]
    assert result.integer_macs == 1 - result.float_nodes[0].macs / result.macs


def conv_net(*, quantized_input: bool = True, tail: str = "quantize", **changes: Any) -> onnx.ModelProto:
    """One convolution, whole or with one thing wrong."""
    net = Net(seed=2)
    value = net.input("x", ("N", 3, 8, 8))
    x = net.signed(value)
    weight, scale = net.weight((8, 3, 3, 3), axis=0)
    if changes.get("weight") == "float":
        weight = net.constant("w", net.rng.normal(size=(8, 3, 3, 3)).astype(np.float32))
    bias = net.bias(8, x, scale * np.float32(changes.get("bias_factor", 1.0)))
    y = net.op("Conv", x.name if quantized_input else value, weight, bias)
    if tail == "sigmoid":
        y = net.op("Sigmoid", y)
    elif tail == "centred relu":
        return net.model(net.quantize(net.op("Relu", y), -4.0, 4.0).name)
    return net.model(y if tail == "none" else net.quantize(y, -4.0, 4.0).name)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"quantized_input": False}, "its input is not quantized"),
        ({"weight": "float"}, "its weights are not stored as codes"),
        ({"tail": "none"}, "its output is not quantized"),
        ({"tail": "sigmoid"}, "its output is not quantized before Sigmoid"),
        ({"tail": "centred relu"}, "Relu cannot be merged into the quantizer after it"),
        ({"bias_factor": 1.5}, "not exactly float32(input scale * weight scale)"),
    ],
    ids=["float input", "float weight", "float output", "sigmoid", "centred relu", "bias scale"],
)
def test_the_reason_of_a_float_convolution_is_found(options: dict[str, Any], why: str) -> None:
    result = coverage(conv_net(**options))
    named = next(node for node in result.float_nodes if "Conv" in node.op)
    assert why in named.why
    assert result.macs == named.macs == 36 * 8 * 27
    assert result.integer_macs == 0.0


def test_the_convolution_without_fault_is_integer() -> None:
    assert coverage(conv_net()).integer_macs == 1.0


def test_reduce_mean_names_its_integer_form() -> None:
    net = Net()
    x = net.signed(net.input("x", ("N", 4, 6, 6)))
    axes = net.constant("axes", np.array([2, 3], np.int64))
    model = net.model(net.signed(net.op("ReduceMean", x.name, axes, keepdims=1)).name)
    assert "GlobalAveragePool" in reasons(coverage(model))["ReduceMean"]


def test_weight_only_matmul_is_float_and_counted() -> None:
    net = Net()
    weight, _ = net.weight((32, 16), axis=1)
    model = net.model(net.op("MatMul", net.input("x", ("N", 32)), weight))
    result = coverage(model)
    assert result.macs == 32 * 16
    assert result.integer_macs == 0.0


def test_float_convolutions_in_blocked_layout_are_counted_without_padding() -> None:
    net = Net()
    weight = net.constant("w", net.rng.normal(size=(5, 3, 3, 3)).astype(np.float32))
    model = net.model(net.op("Relu", net.op("Conv", net.input("x", ("N", 3, 8, 8)), weight)))
    assert coverage(model).macs == 36 * 5 * 27


def test_shape_arithmetic_does_not_count_as_computing() -> None:
    net = Net()
    x = net.input("x", ("N", 4))
    half = net.op("Mul", net.op("Shape", x), net.constant("two", np.array([2, 1], np.int64)))
    result = coverage(net.model(net.op("Expand", net.op("Tanh", x), half)))
    assert result.compute_nodes == 1


def test_a_sample_gives_shapes_that_the_file_leaves_open() -> None:
    net = Net()
    weight, _ = net.weight((16, 8), axis=1)
    y = net.signed(net.op("MatMul", net.signed(net.input("x", ("N", "T", 16))).name, weight))
    model = net.model(y.name)
    with pytest.raises(DataError, match=r"input 'x' .*only the first dimension may be free"):
        coverage(model)
    assert coverage(model, sample={"x": np.zeros((1, 5, 16), np.float32)}).macs == 5 * 16 * 8


def test_integer_inputs_get_zeros_of_their_type() -> None:
    net = Net()
    table = net.constant("table", np.eye(4, dtype=np.float32))
    model = net.model(net.op("Tanh", net.op("Gather", table, net.input("x", ("N", 3), TensorProto.INT64))))
    assert coverage(model).compute_nodes == 1


def test_a_transposed_convolution_of_a_reshaped_value_is_counted() -> None:
    net = Net()
    x = net.input("x", ("batch", 32))
    image = net.op("Reshape", x, net.constant("shape", np.array([-1, 2, 4, 4])))
    weight = net.constant("weight", np.ones((2, 3, 2, 2), np.float32))
    result = coverage(
        net.model(net.op("ConvTranspose", image, weight, strides=[2, 2])), sample={"x": np.ones((1, 32), np.float32)}
    )
    assert result.macs == 2 * 4 * 4 * 3 * 2 * 2


@pytest.mark.parametrize("size", [4, "height"], ids=["fixed", "free"])
def test_a_transposed_convolution_says_whether_free_sizes_keep_it_in_float(size: int | str) -> None:
    net = Net()
    image = net.op("Relu", net.input("x", ("batch", 2, size, 4)))
    weight = net.constant("weight", np.ones((2, 3, 2, 2), np.float32))
    model = net.model(net.op("ConvTranspose", image, weight, strides=[2, 2]))
    nodes = coverage(model, sample={"x": np.ones((1, 2, 4, 4), np.float32)}).float_nodes
    [why] = [node.why for node in nodes if node.op == "ConvTranspose"]
    assert ("only if sizes are fixed" in why) == (size == "height")


def test_sequences_of_tensors_do_not_count_as_computing() -> None:
    net = Net()
    x = net.input("x", ("batch", 4))
    parts = net.op("SplitToSequence", x, axis=1)
    joined = net.op("ConcatFromSequence", net.op("SequenceInsert", parts, x), axis=1)
    result = coverage(net.model(net.op("Sqrt", joined)), sample={"x": np.ones((2, 4), np.float32)})
    assert {node.op for node in result.float_nodes} <= {"Sqrt", "ConcatFromSequence"}


def test_a_path_gives_the_same(tmp_path: Path) -> None:
    model = models.residual(float_bias=True)
    onnx.save(model, tmp_path / "m.onnx")
    assert coverage(tmp_path / "m.onnx") == coverage(model)
