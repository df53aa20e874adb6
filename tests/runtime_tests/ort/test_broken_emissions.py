"""Forms that onnxruntime computes wrongly, kept as tests: each still fails as described, and lint flags it.

A test that fails after an upgrade is good news: that form may have been repaired. Then relax its lint rule from that
version on, and change the test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from calibrators.errors import ModelError
from runtime_tests.ort.lint import lint
from runtime_tests.ort.saturation import this_cpu
from runtime_tests.ort.sessions import session
from tests.support.onnx_models import Edge, Net, optimized_model

DESCRIBED = (1, 31)
"""The release these failures were seen in; older ones may fail in other ways."""

INSTALLED = tuple(map(int, ort.__version__.split(".")[:2]))

REPAIRED_IN = {
    "Add, parameters of shape [1]": (1, 32),
    "Mul, parameters of shape [1]": (1, 32),
    "blocked int8 weights": (1, 32),
}
"""Failures that later releases repaired. Lint goes on naming them: a file may meet any release from 1.23 on."""

pytestmark = pytest.mark.skipif(
    INSTALLED < DESCRIBED,
    reason=f"onnxruntime {ort.__version__} is older than the release these failures were seen in",
)

Model = onnx.ModelProto
IMAGE: tuple[int | str, ...] = ("N", 4, 6, 6)
REPAIRED = f"onnxruntime {ort.__version__} does this right now: relax the lint rule from this version on"


def flagged(model: Model, rule: str) -> bool:
    return rule in {finding.rule for finding in lint(model)}


def feed(model: Model, *, batch: int = 64, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {
        info.name: [dim.dim_value or batch for dim in info.type.tensor_type.shape.dim] for info in model.graph.input
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def run(model: Model, *, optimized: bool) -> Any:
    return session(model, optimized=optimized).run(None, feed(model))[0]


def run_with_defaults(model: Model) -> Any:
    """Output of a session without the entries that `session` pins."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    runner = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return runner.run(None, feed(model))[0]


def ops(model: Model) -> set[str]:
    return {node.op_type for node in optimized_model(model).graph.node}


def typed(net: Net, value: str, dtype: int, zero: int) -> str:
    """Q and DQ of `value` with scale 1/2 and codes of any type."""
    params = net.constant("scale", np.float32(0.5)), net.constant("zero", np.array(zero), dtype=dtype)
    return net.op("DequantizeLinear", net.op("QuantizeLinear", value, *params), *params)


def vector_of_one(op: str, **attributes: Any) -> Model:
    """An operator between quantizers whose parameters have shape [1]."""
    net = Net()

    def pair(value: str) -> Edge:
        params = net.constant("scale", np.full(1, 0.05, np.float32)), net.constant("zero", np.full(1, 128, np.uint8))
        return net.pair(value, params, 0.05)

    x = pair(net.input("x", IMAGE))
    operands = [x.name] * (1 if op == "AveragePool" else 2)
    return net.model(pair(net.op(op, *operands, **attributes)).name)


def two_bit_weight(op: str, dtype: int) -> Model:
    net = Net(opset=25)
    shape, axis = ((8, 4, 1, 1), 0) if op == "Conv" else ((4, 8), 1)
    x = net.signed(net.input("x", IMAGE if op == "Conv" else ("N", 4)))
    names = [
        net.constant("codes", np.ones(shape, np.int64), dtype=dtype),
        net.constant("scale", np.full(8, 0.1, np.float32)),
        net.constant("zero", np.zeros(8, np.int64), dtype=dtype),
    ]
    weight = net.op("DequantizeLinear", *names, axis=axis)
    return net.model(net.signed(net.op(op, x.name, weight)).name)


def four_bit_pool(dtype: int) -> Model:
    net = Net(opset=21)
    x = typed(net, net.input("x", IMAGE), dtype, 0)
    return net.model(typed(net, net.op("MaxPool", x, kernel_shape=[2, 2]), dtype, 0))


def four_bit_conv(dtype: int) -> Model:
    net = Net(opset=21)
    x = typed(net, net.input("x", IMAGE), dtype, 0)
    weight, _ = net.weight((8, 4, 1, 1), axis=0)
    return net.model(typed(net, net.op("Conv", x, weight), dtype, 0))


def signed_reshape(op: str, *, opset: int = 21) -> Model:
    net = Net(activation="s8", opset=opset)
    x = net.signed(net.conv(net.signed(net.input("x", IMAGE)), 8, 4))
    extra = [net.constant("shape", np.array([0, -1], np.int64))] if op == "Reshape" else []
    attributes = {"kernel_shape": [2, 2]} if op == "MaxPool" else {}
    return net.model(net.op(op, x.name, *extra, **attributes))


REFUSED: dict[str, tuple[str, Callable[[], Model]]] = {
    "Add, parameters of shape [1]": ("qparam-shape", lambda: vector_of_one("Add")),
    "Mul, parameters of shape [1]": ("qparam-shape", lambda: vector_of_one("Mul")),
    "AveragePool, parameters of shape [1]": (
        "qparam-shape",
        lambda: vector_of_one("AveragePool", kernel_shape=[2, 2]),
    ),
    "INT2 weights, MatMul": ("narrow-weight", lambda: two_bit_weight("MatMul", TensorProto.INT2)),
    "UINT2 weights, MatMul": ("narrow-weight", lambda: two_bit_weight("MatMul", TensorProto.UINT2)),
    "INT2 weights, Conv": ("narrow-weight", lambda: two_bit_weight("Conv", TensorProto.INT2)),
    "UINT4 activations, MaxPool": ("narrow-activation", lambda: four_bit_pool(TensorProto.UINT4)),
    "INT4 activations, MaxPool": ("narrow-activation", lambda: four_bit_pool(TensorProto.INT4)),
    "UINT4 activations, Conv": ("narrow-activation", lambda: four_bit_conv(TensorProto.UINT4)),
    "int8 Reshape at opset 21": ("signed-reshape", lambda: signed_reshape("Reshape")),
    "int8 Transpose at opset 21": ("signed-reshape", lambda: signed_reshape("Transpose")),
    "int8 MaxPool at opset 21": ("signed-reshape", lambda: signed_reshape("MaxPool")),
}
"""Models that load with optimizations off and not with them on, and the rule that names each."""


@pytest.mark.parametrize("form", REFUSED)
def test_session_is_refused_once_optimized(form: str) -> None:
    rule, build = REFUSED[form]
    model = build()
    assert flagged(model, rule)
    session(model, optimized=False)
    if REPAIRED_IN.get(form, (99,)) <= INSTALLED:
        session(model)
        return
    try:
        session(model)
    except ModelError:
        return
    pytest.fail(REPAIRED)


@pytest.mark.parametrize("op", ["Reshape", "Transpose", "MaxPool"])
def test_int8_reshapes_load_up_to_opset_20(op: str) -> None:
    model = signed_reshape(op, opset=20)
    assert not flagged(model, "signed-reshape")
    session(model)


@pytest.mark.parametrize(
    ("dtype", "zero"),
    [(TensorProto.INT4, 0), (TensorProto.UINT4, 8), (TensorProto.INT2, 0), (TensorProto.UINT2, 2)],
    ids=["INT4", "UINT4", "INT2", "UINT2"],
)
def test_relu_before_narrow_codes_is_dropped(dtype: int, zero: int) -> None:
    net = Net(opset=25)
    model = net.model(typed(net, net.op("Relu", net.input("x", IMAGE)), dtype, zero))
    assert flagged(model, "relu-narrow")
    assert run(model, optimized=False).min() >= 0
    assert run(model, optimized=True).min() < 0, REPAIRED


@pytest.mark.parametrize("dtype", [TensorProto.INT8, TensorProto.UINT8], ids=["INT8", "UINT8"])
def test_relu_before_bytes_is_kept(dtype: int) -> None:
    net = Net(opset=21)
    model = net.model(typed(net, net.op("Relu", net.input("x", IMAGE)), dtype, 5))
    assert not flagged(model, "relu-narrow")
    np.testing.assert_array_equal(run(model, optimized=True), run(model, optimized=False))


def double_pair() -> Model:
    net = Net()
    first = net.quantize(net.input("x", ("N", 4)), -1.0, 3.0)
    return net.model(net.quantize(first.name, -2.0, 2.0).name)


def test_two_pairs_in_a_row_are_merged_into_other_numbers_by_default() -> None:
    model = double_pair()
    assert flagged(model, "double-qdq")
    literal = run(model, optimized=False)
    assert np.mean(run_with_defaults(model) != literal) > 0.5, REPAIRED
    np.testing.assert_array_equal(run(model, optimized=True), literal)  # the entry that `session` pins repairs it


ACCURACY_LEVEL_ERROR = 1e-3
"""Relative error above which activations must have been rounded: float32 sums of 64 products stay below 1e-5."""


def test_weight_only_matmul_rounds_its_activations_by_default() -> None:
    net = Net()
    weight, _ = net.weight((64, 32), axis=1)
    model = net.model(net.op("MatMul", net.input("x", ("N", 64)), weight))
    assert flagged(model, "weight-only")
    assert "MatMulNBits" in ops(model)
    literal = run(model, optimized=False)
    by_default, pinned = (
        np.abs(result - literal).max() / np.abs(literal).max()
        for result in (run_with_defaults(model), run(model, optimized=True))
    )
    assert by_default > ACCURACY_LEVEL_ERROR, REPAIRED
    assert pinned < ACCURACY_LEVEL_ERROR


@pytest.mark.parametrize(
    ("scale", "exact"), [(1 / 255, False), (0.0047, False), (1 / 256, True), (1 / 200, True)],
    ids=["1/255", "0.0047", "1/256", "1/200"],
)  # fmt: skip
def test_softmax_kernel_rounds_the_inverse_scale_down(scale: float, exact: bool) -> None:
    net = Net()
    value = net.op("Softmax", net.signed(net.input("x", ("N", 64))).name)
    model = net.model(net.quantize_with(value, scale, 0).name)
    assert "QLinearSoftmax" in ops(model)
    assert flagged(model, "softmax-scale") == (not exact)
    differs = bool(np.any(run(model, optimized=True) != run(model, optimized=False)))
    assert differs == (not exact), REPAIRED


def test_gemm_without_zero_points_is_not_fused() -> None:
    net = Net()
    x = net.quantize(net.input("x", ("N", 4)), 0.0, 4.0)  # zero point 0: what an absent one means
    y = net.quantize(net.op("Relu", net.linear(x, 8, 4)), 0.0, 4.0)
    model = net.model(y.name)
    literal = run(model, optimized=False)
    assert "QGemm" in ops(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[2])
            if zero.data_type == TensorProto.UINT8:
                del node.input[2]
    assert flagged(model, "missing-zero-point")
    np.testing.assert_array_equal(run(model, optimized=False), literal)
    assert "QGemm" not in ops(model), REPAIRED


def test_blocked_weights_fail_when_run(capfd: pytest.CaptureFixture[str]) -> None:
    net = Net(opset=21)
    x = net.signed(net.input("x", ("N", 4)))
    names = [
        net.constant("codes", np.ones((4, 8), np.int8)),
        net.constant("scale", np.full((2, 8), 0.1, np.float32)),
        net.constant("zero", np.zeros((2, 8), np.int8)),
    ]
    weight = net.op("DequantizeLinear", *names, axis=0, block_size=2)
    model = net.model(net.signed(net.op("MatMul", x.name, weight)).name)
    assert flagged(model, "blocked-weight")
    expected = run(model, optimized=False)
    if REPAIRED_IN["blocked int8 weights"] <= INSTALLED:
        np.testing.assert_array_equal(run(model, optimized=True), expected)
        return
    with pytest.raises(Exception, match="QLinearMatMul"):  # onnxruntime's exceptions have no common class
        run(model, optimized=True)
    capfd.readouterr()  # the runtime prints its error as well


def bias_scaled(op: str, factor: float) -> Model:
    """A layer with a float output if Gemm, quantized if Conv, and a bias scale off by `factor`."""
    net = Net()
    shape: tuple[int | str, ...] = ("N", 4) if op == "Gemm" else ("N", 4, 1, 1)
    x = net.signed(net.input("x", shape))
    weight, scale = net.weight((8, 4) if op == "Gemm" else (8, 4, 1, 1), axis=0)
    right = np.float32(x.scale) * scale * np.float32(factor)
    bias = net.dequantize_codes("bias", np.full(8, 1000, np.int32), right.astype(np.float32), axis=0)
    if op == "Gemm":
        return net.model(net.op("Gemm", x.name, weight, bias, transB=1))
    return net.model(net.signed(net.op("Conv", x.name, weight, bias)).name)


@pytest.mark.parametrize(("op", "factor"), [("Gemm", 2.0), ("Gemm", 1.01), ("Conv", 1.01)], ids=str)
def test_a_wrong_bias_scale_is_ignored_in_silence(op: str, factor: float) -> None:
    wrong, right = bias_scaled(op, factor), bias_scaled(op, 1.0)
    assert flagged(wrong, "bias-scale") and not flagged(right, "bias-scale")
    assert ops(wrong) & {"QGemm", "QLinearConv"}
    np.testing.assert_array_equal(run(wrong, optimized=True), run(right, optimized=True), err_msg=REPAIRED)
    assert np.any(run(wrong, optimized=False) != run(right, optimized=False))


def test_a_grossly_wrong_bias_scale_takes_a_convolution_out() -> None:
    assert "QLinearConv" not in ops(bias_scaled("Conv", 2.0))


def test_float16_scales_are_refused_beside_float32_data() -> None:
    net = Net()
    params = net.constant("scale", np.float16(0.1)), net.constant("zero", np.uint8(0))
    model = net.model(net.pair(net.input("x", ("N", 4)), params, 0.1).name)
    assert flagged(model, "float16-scale")
    with pytest.raises(ModelError, match="refuses"):
        session(model, optimized=False)


@pytest.mark.parametrize("activation", ["u8", "s8"])
def test_fan_out_keeps_convolutions_of_int8_codes_in_float(activation: str) -> None:
    net = Net(activation=activation)
    x = net.signed(net.conv(net.signed(net.input("x", IMAGE)), 4, 4))
    y = net.signed(net.conv(x, 4, 4))
    model = net.model(net.signed(net.op("Add", x.name, y.name)).name)
    assert flagged(model, "signed-fan-out") == (activation == "s8")
    if activation == "u8":
        assert "Conv" not in ops(model)
    elif "avx2" in this_cpu().flags:
        assert "Conv" in ops(model), REPAIRED
