from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from calibrators.errors import ModelError, UnknownNameError
from calibrators.grid.target import Target
from calibrators.targets import DEFAULT_TARGET, get_target, list_targets
from runtime_tests.ort.lint import RULES, files, lint
from runtime_tests.ort.versions import parse_version
from tests.support import onnx_models as models
from tests.support.onnx_models import Edge, Net, optimized_model

Model = onnx.ModelProto
IMAGE: tuple[int | str, ...] = ("N", 4, 6, 6)
ONE = np.float32(1)


VNNI = get_target("ort-cpu-vnni")
"""The target of toy networks, whose random weights take no care of pairs."""


def rules(model: Model | Path, target: Target = VNNI) -> set[str]:
    return {finding.rule for finding in lint(model, target)}


def image(net: Net) -> Edge:
    return net.signed(net.input("x", IMAGE))


def codes(net: Net, data: Any, scale: Any, *, dtype: int | None = None, **attributes: Any) -> str:
    """DequantizeLinear of constant codes, of a narrow type if `dtype` says so."""
    scale = np.asarray(scale, np.float32)
    zeros = np.zeros(scale.shape, np.int64 if dtype is not None else np.asarray(data).dtype)
    names = [
        net.constant("codes", np.asarray(data), dtype=dtype),
        net.constant("scale", scale),
        net.constant("zero", zeros, dtype=dtype),
    ]
    return net.op("DequantizeLinear", *names, **attributes)


def quantize_typed(net: Net, value: str, dtype: int, zero: int = 0) -> str:
    """Q and DQ with codes of any type."""
    params = net.constant("scale", ONE), net.constant("zero", np.array(zero), dtype=dtype)
    return net.op("DequantizeLinear", net.op("QuantizeLinear", value, *params), *params)


def linear(bad: bool, make: Callable[[Net, Edge, bool], str], *, opset: int = 20) -> Model:
    """x -> Q/DQ -> MatMul with weights from `make` -> Q/DQ."""
    net = Net(opset=opset)
    x = net.signed(net.input("x", ("N", 4)))
    return net.model(net.signed(net.op("MatMul", x.name, make(net, x, bad))).name)


def weight_codes(good: Any, wrong: Any, **options: Any) -> Callable[[bool], Model]:
    """MatMul whose weight codes have the NumPy type `good` or the ONNX or NumPy type `wrong`."""

    def make(net: Net, _: Edge, bad: bool) -> str:
        data = np.ones((4, 8), np.int64)
        if not bad or isinstance(wrong, type):
            return codes(net, data.astype(wrong if bad else good), np.full(8, 0.1), axis=1)
        return codes(net, data, np.full(8, 0.1), dtype=wrong, axis=1)

    return lambda bad: linear(bad, make, **options)


def duplicate_name(bad: bool) -> Model:
    model = models.chain("Tanh", "Tanh")
    if bad:
        model.graph.node.append(onnx.helper.make_node("Exp", ["x"], [model.graph.node[0].output[0]]))
    return model


def runtime_version(bad: bool) -> Model:
    return models.chain("Tanh", opset=99 if bad else 20)


def dangling_value(bad: bool) -> Model:
    model = models.chain("Tanh", "Exp")
    if bad:
        model.graph.node[1].input[0] = "gone"
    return model


def cycle(bad: bool) -> Model:
    model = models.residual()
    if bad:
        first, second = [node for node in model.graph.node if node.op_type == "Conv"][:2]
        first.input[0] = second.output[0]
    return model


def missing_domain(bad: bool) -> Model:
    model = models.residual()
    if bad:
        model.graph.node[0].domain = "com.example"
    return model


def unknown_operator(bad: bool) -> Model:
    model = models.residual()
    if bad:
        model.graph.node[3].op_type = "Frobnicate"
    return model


def stored_data(bad: bool) -> Model:
    model = models.residual()
    if bad:
        model.graph.initializer[0].dims[:] = [2**40]
    return model


def invalid_model(bad: bool) -> Model:
    model = models.residual()
    if bad:
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("colour", 3))
    return model


def false_shape(bad: bool) -> Model:
    model = models.residual()
    shape = ["N", 16, 8 if bad else 16, 16]
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(conv.output[0], TensorProto.FLOAT, shape))
    return model


def scaled(scale: float) -> Model:
    net = Net()
    weight = codes(net, np.ones((4, 8), np.int8), np.full(8, scale, np.float32), axis=1)
    return net.model(net.signed(net.op("MatMul", net.signed(net.input("x", ("N", 4))).name, weight)).name)


def scale_count(bad: bool) -> Model:
    return linear(bad, lambda net, _, bad: codes(net, np.ones((4, 8), np.int8), np.full(7 if bad else 8, 0.1), axis=1))


def saturating_pair(bad: bool) -> Model:
    return linear(bad, lambda net, _, bad: codes(net, np.full((4, 8), 65 if bad else 64, np.int8), 0.1))


def different_ties(bad: bool) -> Model:
    """A sum whose scales have the ratio 1 / 2, so that every second sum is a tie, or a ratio without ties."""
    net = Net()
    x = net.quantize_with(net.input("x", IMAGE), 0.25, 128)
    y = net.quantize_with(net.op("Tanh", x.name), 0.25, 128)
    return net.model(net.quantize_with(net.op("Add", x.name, y.name), 0.5 if bad else 0.25, 128).name)


@pytest.mark.parametrize(("code", "broken"), [(128, {"different-ties"}), (129, set())])
def test_a_constant_of_a_sum_has_its_own_codes_alone(code: int, broken: set[str]) -> None:
    net = Net()
    names = [net.constant("c", np.full((1, 4, 1, 1), code, np.uint8)), net.constant("s", np.float32(0.3))]
    constant = net.op("DequantizeLinear", *names, net.constant("z", np.uint8(128)))
    x = net.quantize_with(net.input("x", IMAGE), 0.25, 128)
    model = net.model(net.quantize_with(net.op("Add", x.name, constant), 0.5, 128).name)
    assert rules(model, get_target(DEFAULT_TARGET)) == broken


def no_graph(bad: bool) -> Model:
    model = models.residual()
    if bad:
        model.graph.input[0].type.tensor_type.elem_type = 99
    return model


def packed_data(bad: bool) -> Model:
    net = Net(opset=21)
    model = net.model(codes(net, np.ones(4, np.int64), 0.1, dtype=TensorProto.INT4))
    if bad:
        index = next(i for i, tensor in enumerate(model.graph.initializer) if tensor.name.startswith("codes"))
        packed = onnx.helper.make_tensor(model.graph.initializer[index].name, TensorProto.INT4, [4], [1] * 4)
        assert packed.int32_data
        model.graph.initializer[index].CopyFrom(packed)
    return model


def qparam_shape(bad: bool) -> Model:
    net = Net()
    shape = (1,) if bad else ()
    params = net.constant("s", np.full(shape, 0.1, np.float32)), net.constant("z", np.zeros(shape, np.uint8))
    return net.model(net.pair(net.input("x", ("N", 4)), params, 0.1).name)


def missing_zero_point(bad: bool) -> Model:
    model = models.residual()
    for node in model.graph.node:
        if bad and node.op_type == "DequantizeLinear":
            del node.input[2]
    return model


def float16_scale(bad: bool) -> Model:
    net = Net()
    scale = net.constant("s", np.array(0.1, np.float16 if bad else np.float32))
    zero = net.constant("z", np.array(0, np.uint8))
    value = net.input("x", ("N", 4), TensorProto.FLOAT16 if bad else TensorProto.FLOAT)
    return net.model(net.pair(value, (scale, zero), 0.1).name)


def double_qdq(bad: bool) -> Model:
    net = Net()
    x = image(net)
    return net.model(net.signed(x.name if bad else net.op("Tanh", x.name)).name)


def different_qparams(bad: bool) -> Model:
    net = Net()
    x = image(net)
    pooled = net.op("MaxPool", x.name, kernel_shape=[2, 2])
    return net.model(net.quantize(pooled, -1.0, 1.0).name if bad else net.like(pooled, x).name)


def softmax_scale(bad: bool) -> Model:
    net = Net()
    value = net.op("Softmax", image(net).name)
    return net.model(net.quantize_with(value, 1 / 255 if bad else 1 / 256, 0).name)


def narrow_activation(bad: bool) -> Model:
    net = Net(opset=21)
    return net.model(quantize_typed(net, net.input("x", IMAGE), TensorProto.UINT4 if bad else TensorProto.UINT8))


def wide_activation(bad: bool) -> Model:
    net = Net(opset=21)
    return net.model(quantize_typed(net, net.input("x", IMAGE), TensorProto.UINT16 if bad else TensorProto.UINT8))


def signed_fan_out(bad: bool) -> Model:
    net = Net(activation="s8" if bad else "u8")
    x = image(net)
    return net.model(net.signed(net.op("Add", x.name, net.op("Tanh", x.name))).name)


def signed_reshape(bad: bool) -> Model:
    net = Net(activation="s8", opset=21 if bad else 20)
    return net.model(net.op("Transpose", image(net).name))


def relu_narrow(bad: bool) -> Model:
    net = Net(opset=21)
    value = net.op("Relu", net.input("x", IMAGE))
    return net.model(quantize_typed(net, value, TensorProto.UINT4, zero=8 if bad else 0))


def relu_not_merged(bad: bool) -> Model:
    net = Net()
    value = net.op("Relu", net.conv(image(net), 8, 4))
    return net.model(net.quantize(value, -4.0 if bad else 0.0, 4.0).name)


def clip_net(scale: float, zero: int, low: float = 0.0, high: float = 6.0) -> Model:
    net = Net()
    bounds = [net.constant("bound", np.array(bound, np.float32)) for bound in (low, high)]
    return net.model(net.quantize_with(net.op("Clip", net.conv(image(net), 8, 4), *bounds), scale, zero).name)


def clip_not_merged(bad: bool) -> Model:
    return clip_net(8 / 255 if bad else 6 / 255, 0)


def bare_flatten(bad: bool) -> Model:
    net = Net()
    x = image(net)
    flat = net.op("Flatten", x.name)
    return net.model(net.linear(Edge(flat, x.scale, x.params) if bad else net.like(flat, x), 8, 144))


def float_output(bad: bool) -> Model:
    net = Net()
    value = net.conv(image(net), 8, 4)
    return net.model(net.op("Sigmoid", value if bad else net.signed(value).name))


def float_operand(bad: bool) -> Model:
    net = Net()
    gain = net.constant("gain", np.float32(0.5)) if bad else codes(net, np.uint8(64), 1 / 128)
    return net.model(net.signed(net.op("Mul", image(net).name, gain)).name)


def reduce_mean(bad: bool) -> Model:
    net = Net()
    x, axes = image(net), net.constant("axes", np.array([2, 3], np.int64))
    value = net.op("ReduceMean", x.name, axes) if bad else net.op("GlobalAveragePool", x.name)
    return net.model(net.signed(value).name)


def blocked_weight(bad: bool) -> Model:
    def make(net: Net, _: Edge, bad: bool) -> str:
        blocks: dict[str, Any] = {"block_size": 2, "axis": 0} if bad else {"axis": 1}
        return codes(net, np.ones((4, 8), np.int8), np.full((2, 8) if bad else 8, 0.1), **blocks)

    return linear(bad, make, opset=21)


def weight_only(bad: bool) -> Model:
    net = Net()
    value = net.input("x", ("N", 4))
    weight, _ = net.weight((4, 8), axis=1)
    return net.model(net.op("MatMul", value if bad else net.signed(value).name, weight))


def float_weight(bad: bool) -> Model:
    def make(net: Net, _: Edge, bad: bool) -> str:
        return net.constant("w", np.ones((4, 8), np.float32)) if bad else net.weight((4, 8), axis=1)[0]

    return linear(bad, make)


def quantized_constant(bad: bool) -> Model:
    """A weight stored as floats and quantized in the graph, as training tools export it."""

    def make(net: Net, _: Edge, bad: bool) -> str:
        if not bad:
            return net.weight((4, 8), axis=1)[0]
        params = net.constant("s", np.full(8, 0.1, np.float32)), net.constant("z", np.zeros(8, np.int8))
        stored = net.constant("w", np.ones((4, 8), np.float32))
        return net.op("DequantizeLinear", net.op("QuantizeLinear", stored, *params, axis=1), *params, axis=1)

    return linear(bad, make)


def float_bias(bad: bool) -> Model:
    net = Net(float_bias=bad)
    return net.model(net.linear(net.signed(net.input("x", ("N", 4))), 8, 4))


def with_bias(data: Any, factor: Callable[[Any], Any] = lambda scale: scale) -> Model:
    """A Gemm whose bias has the codes `data` and the right scale, changed by `factor`."""
    net = Net()
    x = net.signed(net.input("x", ("N", 4)))
    weight, scale = net.weight((8, 4), axis=0)
    bias = codes(net, data, factor(np.float32(x.scale) * scale), axis=0)
    return net.model(net.op("Gemm", x.name, weight, bias, transB=1))


def bias_type(bad: bool) -> Model:
    return with_bias(np.ones(8, np.int8 if bad else np.int32))


def bias_scale(bad: bool) -> Model:
    """Wrong in the last bit of one channel only."""

    def factor(scale: Any) -> Any:
        if bad:
            scale[3] = np.nextafter(scale[3], ONE)
        return scale

    return with_bias(np.ones(8, np.int32), factor)


def accumulator_overflow(bad: bool) -> Model:
    return with_bias(np.full(8, -(2**31) if bad else 2**30, np.int32))


CASES: dict[str, Callable[[bool], Model]] = {
    "duplicate-name": duplicate_name,
    "dangling-value": dangling_value,
    "cycle": cycle,
    "missing-domain": missing_domain,
    "unknown-operator": unknown_operator,
    "stored-data": stored_data,
    "no-graph": no_graph,
    "runtime-version": runtime_version,
    "invalid-model": invalid_model,
    "false-shape": false_shape,
    "bad-scale": lambda bad: scaled(0.0 if bad else 0.1),
    "scale-count": scale_count,
    "denormal-scale": lambda bad: scaled(1e-39 if bad else 0.1),
    "saturating-pair": saturating_pair,
    "different-ties": different_ties,
    "packed-data": packed_data,
    "qparam-shape": qparam_shape,
    "missing-zero-point": missing_zero_point,
    "float16-scale": float16_scale,
    "double-qdq": double_qdq,
    "different-qparams": different_qparams,
    "softmax-scale": softmax_scale,
    "narrow-activation": narrow_activation,
    "wide-activation": wide_activation,
    "signed-fan-out": signed_fan_out,
    "signed-reshape": signed_reshape,
    "relu-narrow": relu_narrow,
    "relu-not-merged": relu_not_merged,
    "clip-not-merged": clip_not_merged,
    "bare-flatten": bare_flatten,
    "float-output": float_output,
    "float-operand": float_operand,
    "reduce-mean": reduce_mean,
    "narrow-weight": weight_codes(np.int8, TensorProto.INT2, opset=25),
    "float-kernel-weight": weight_codes(np.int8, TensorProto.INT4, opset=21),
    "unsigned-weight": weight_codes(np.int8, np.uint8),
    "blocked-weight": blocked_weight,
    "weight-only": weight_only,
    "float-weight": float_weight,
    "float-bias": float_bias,
    "bias-type": bias_type,
    "bias-scale": bias_scale,
    "accumulator-overflow": accumulator_overflow,
}
"""For each rule a model that breaks it if asked to, and differs in nothing else."""


@pytest.mark.parametrize("rule", CASES)
def test_rule_finds_its_fault_and_nothing_in_the_model_without_it(rule: str) -> None:
    target = get_target(DEFAULT_TARGET) if rule in PORTABILITY else VNNI
    assert rule in rules(CASES[rule](True), target)
    assert rule not in rules(CASES[rule](False), target)


def test_every_rule_has_a_case_a_severity_and_a_sentence() -> None:
    assert set(CASES) | {"unreadable-file", "load-warning"} == set(RULES)
    for rule in RULES.values():
        assert rule.severity in ("error", "warning")
        assert rule.why.endswith(".")


PORTABILITY = ("saturating-pair", "different-ties")
BROKEN = ("duplicate-name", "dangling-value", "cycle", "missing-domain", "unknown-operator", "stored-data", "no-graph",
          "runtime-version", "invalid-model", "bad-scale", "scale-count")  # fmt: skip
"""Rules whose violation makes the others meaningless."""


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_file_gets_one_clear_finding(rule: str) -> None:
    assert {(finding.rule, finding.severity) for finding in lint(CASES[rule](True), VNNI)} == {(rule, "error")}


def test_unsigned_weights_are_slow_unless_signed_ones_would_saturate() -> None:
    def model(code: int) -> Model:
        net = Net()
        names = [
            net.constant("codes", np.full((4, 8), 128 + code, np.uint8)),
            net.constant("scale", np.float32(0.1)),
            net.constant("zero", np.uint8(128)),
        ]
        x = net.signed(net.input("x", ("N", 4)))
        return net.model(net.signed(net.op("MatMul", x.name, net.op("DequantizeLinear", *names))).name)

    portable = get_target(DEFAULT_TARGET)
    assert rules(model(65), portable) == set()
    assert rules(model(64), portable) == rules(model(65), VNNI) == {"unsigned-weight"}


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_file_never_ends_in_a_traceback(seed: int, tmp_path: Path) -> None:
    """Whatever bytes are hit, and whichever node is lost, there is a list of findings."""
    rng, content = np.random.default_rng(seed), models.residual().SerializeToString()
    for _ in range(20):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(len(damaged), size=4)] = rng.integers(256, size=4)
        (tmp_path / "m.onnx").write_bytes(
            damaged.tobytes()[: int(rng.choice([len(content), rng.integers(len(content))]))]
        )
        assert isinstance(lint(tmp_path / "m.onnx", VNNI), list)
    model = models.squeeze_excite()
    for index in range(seed, len(model.graph.node), 3):
        short = Model.FromString(model.SerializeToString())
        del short.graph.node[index]
        assert {finding.rule for finding in lint(short, VNNI)} == {"dangling-value"}


def test_loading_reports_what_onnxruntime_says(capfd: pytest.CaptureFixture[str]) -> None:
    warned = models.residual()
    warned.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "unused"))
    found = [finding for finding in lint(warned, VNNI, load=True) if finding.rule == "load-warning"]
    assert [finding.severity for finding in found] == ["error"]
    assert "'unused'" in found[0].message
    assert lint(models.residual(), VNNI, load=True) == []
    assert "unused" not in capfd.readouterr().err


def test_a_refusal_that_no_rule_foresees_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise ModelError("onnxruntime refuses the model: no kernel")

    monkeypatch.setattr(files, "load_warnings", refuse)
    (found,) = lint(models.residual(), VNNI, load=True)
    assert (found.rule, found.severity) == ("load-warning", "error")
    assert "no kernel" in found.message
    assert lint(models.residual(), VNNI) == []


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -0.1, 0.0])
def test_scales_that_are_no_scales_are_found(scale: float) -> None:
    (found,) = lint(scaled(scale), VNNI)
    assert (found.rule, found.severity) == ("bad-scale", "error")
    assert found.message.startswith("8 of 8 scales are 0, negative, infinite or NaN")


def test_a_target_with_vnni_has_no_saturating_pairs() -> None:
    assert rules(saturating_pair(True), get_target(DEFAULT_TARGET)) - rules(saturating_pair(True), VNNI) == {
        "saturating-pair"
    }


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [
        *((scale, zero_point) for scale in ("scalar", "one", "channel") for zero_point in ("alike", "none")),
        ("one", "scalar"),  # as onnxruntime's own quantize_static writes it
    ],
)
@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_every_form_of_a_bias_that_the_runtime_fuses_is_clean(op: str, scale: str, zero_point: str) -> None:
    net = Net()
    x = net.signed(net.input("x", IMAGE if op == "Conv" else ("N", 4)))
    shape = {"Conv": (8, 4, 3, 3), "Gemm": (8, 4), "MatMul": (4, 8)}[op]
    weight = codes(net, net.rng.integers(-60, 60, shape).astype(np.int8), 0.01)
    value = np.full({"scalar": (), "one": (1,), "channel": (8,)}[scale], np.float32(x.scale) * np.float32(0.01))
    bias = codes(net, np.arange(8, dtype=np.int32), value, axis=0)
    if zero_point == "none":
        del net.nodes[-1].input[2]
    if zero_point == "scalar":
        net.nodes[-1].input[2] = net.constant("zero", np.int32(0))
    if op == "MatMul":
        y = net.op("Add", net.op("MatMul", x.name, weight), bias)
    else:
        y = net.op(op, x.name, weight, bias, **({"transB": 1} if op == "Gemm" else {}))
    model = net.model(net.signed(y).name)
    assert lint(model) == []
    kernel = "QLinearConv" if op == "Conv" else "QGemm"
    assert kernel in {node.op_type for node in optimized_model(model).graph.node}


@pytest.mark.parametrize("name", models.NETS)
@pytest.mark.parametrize("opset", [13, 20, 21])
def test_well_formed_networks_are_clean(name: str, opset: int) -> None:
    if opset == 13 and name == "transformer_mlp":
        opset = 20  # LayerNormalization came with opset 17, Gelu with 20
    assert lint(models.NETS[name](opset=opset), VNNI) == []


def test_low_bit_activations_in_their_recommended_form_are_clean() -> None:
    assert lint(models.mobilenet(bits=4), VNNI) == []


def test_findings_name_place_and_remedy_and_errors_come_first() -> None:
    net = Net(float_bias=True)
    x = net.signed(net.signed(net.input("x", ("N", 4))).name)
    findings = lint(net.model(net.linear(x, 8, 4)), VNNI)
    assert [(finding.rule, finding.severity) for finding in findings] == [
        ("double-qdq", "error"),
        ("float-bias", "warning"),
    ]
    assert findings[0].where == "node_x.q0.dq.q2"
    assert "INT32" in findings[1].message


def test_an_old_ir_version_passes_and_a_future_one_does_not() -> None:
    model = models.chain("Tanh")
    model.ir_version = 99
    assert [(finding.rule, finding.where) for finding in lint(model)] == [("runtime-version", "ir_version")]


def test_a_form_that_is_too_new_is_one_finding() -> None:
    net = Net(opset=21)
    x = net.signed(net.input("x", ("N", 4)))
    for _ in range(3):
        packed = net.constant("packed", np.ones((4, 4), np.int64), dtype=TensorProto.INT4)
        int8 = net.op("Cast", packed, to=TensorProto.INT8)
        params = net.constant("scale", np.float32(0.1)), net.constant("zero", np.int8(0))
        x = net.signed(net.op("MatMul", x.name, net.op("DequantizeLinear", int8, *params)))
    model = net.model(x.name)
    assert lint(model, VNNI) == []
    (found,) = lint(model, VNNI, min_ort=parse_version("1.22.1"))
    assert found.rule == "runtime-version"
    assert found.message.startswith("Cast of INT4 (also at 2 other nodes) needs onnxruntime 1.23")


def test_constants_quantized_at_load_time_are_found() -> None:
    assert "float-weight" in rules(quantized_constant(True))
    assert "float-weight" not in rules(quantized_constant(False))


def test_one_output_channel_may_have_parameters_of_shape_one() -> None:
    net = Net()
    assert lint(net.model(net.linear(net.signed(net.input("x", ("N", 4))), 1, 4)), VNNI) == []


def test_parameters_of_different_shapes_are_found() -> None:
    net = Net()
    scale, zero = net.constant("s", np.full(4, 0.1, np.float32)), net.constant("z", np.uint8(0))
    assert "qparam-shape" in rules(net.model(net.pair(net.input("x", ("N", 4)), (scale, zero), 0.1).name))


def test_a_path_with_external_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(accumulator_overflow(True), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert rules(path) == {"accumulator-overflow"}


def test_accumulators_are_bounded_by_the_largest_sum_not_by_the_bias_alone() -> None:
    reach = 128 * 4 * 127  # zero point 128, four weights of at most 127
    codes = np.full(8, 2**31 - 1 - reach, np.int32)
    assert "accumulator-overflow" not in rules(with_bias(codes))
    assert "accumulator-overflow" in rules(with_bias(codes + np.int32(reach)))


def test_float_kernels_have_no_accumulators_and_merge_no_clip() -> None:
    """Beside int16 codes all is float: what would go wrong in an integer kernel does not."""
    net = Net(opset=21, activation="s16")
    x = net.quantize_with(net.input("x", ("N", 4)), 0.01, 0)
    weight, scale = net.weight((8, 4), axis=0)
    bias = codes(net, np.full(8, 2**31 - 1, np.int32), np.float32(x.scale) * scale, axis=0)
    y = net.op("Clip", net.op("Gemm", x.name, weight, bias, transB=1), net.constant("low", np.array(0.0, np.float32)))
    assert rules(net.model(net.quantize_with(y, 0.01, 0).name)) == {"wide-activation"}


@pytest.mark.parametrize("zero", [0, 1], ids=["lowest", "raised"])
@pytest.mark.parametrize("steps", [200.0, 254.4, 254.6, 255.0, 256.0, 300.0])
def test_clip_rule_agrees_with_what_the_runtime_keeps(zero: int, steps: float) -> None:
    model = clip_net(6.0 / steps, zero)
    ops = {node.op_type for node in optimized_model(model).graph.node}
    merged = "QLinearConv" in ops and "Clip" not in ops
    assert ("clip-not-merged" not in rules(model)) == merged


@pytest.mark.parametrize("rule", ["relu-not-merged", "float-output", "bare-flatten", "different-qparams"])
def test_slow_forms_leave_the_integer_kernels_in_the_runtime(rule: str) -> None:
    float_ops = {"Conv", "FusedConv", "Gemm", "MaxPool"}
    bad, good = ({node.op_type for node in optimized_model(CASES[rule](wrong)).graph.node} for wrong in (True, False))
    assert bad & float_ops
    if rule != "different-qparams":  # there the 8-bit pool has the name of the float one
        assert not good & float_ops


def test_rules_follow_the_target_that_is_given_or_that_the_metadata_name() -> None:
    """ARM has integer kernels for int8 activations, so that the rule about them is x86's."""
    model = signed_fan_out(True)
    found = [{finding.rule for finding in lint(model, target)} for target in (None, get_target("ort-arm"))]
    assert found[0] - found[1] == {"signed-fan-out"}
    model.metadata_props.add(key="intact.target", value="ort-arm")
    assert {finding.rule for finding in lint(model)} == found[1]
    model.metadata_props[0].value = "ort-gpu"
    with pytest.raises(UnknownNameError, match="ort-gpu"):
        lint(model)
    assert {finding.rule for finding in lint(model, get_target("ort-cpu"))} == found[0]


def test_targets_ignore_known_rules_only() -> None:
    assert all(target.ignored_rules <= RULES.keys() for target in list_targets())
