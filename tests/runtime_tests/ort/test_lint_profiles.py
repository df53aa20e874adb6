"""Every rule of every profile: a small file that keeps it, one that breaks it, emitted files that keep all of them."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibrators.calibration import calibrate
from calibrators.errors import UnknownNameError
from calibrators.targets import get_target, list_targets
from exporter.emission.build_model import needed_opset, to_onnx
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.ort.lint import RULES, lint, names, rules_for
from runtime_tests.ort.lint.profiles import list_profiles
from tests.support.architectures import construct
from tests.support.networks import NETWORKS, build

PROFILES = list_profiles()

KEPT: dict[str, dict[str, Any]] = {
    "openvino": {"zero": 7},
    "tensorrt": {"codes": "INT8", "bias": "float"},
    "ort-qnn": {"zero": 7},
    "tidl": {"codes": "INT8"},
    "esp-dl": {"codes": "INT8", "channels": False},
    "st-edge-ai": {"codes": "INT8", "zero": 7},
    "nxp-neutron": {"codes": "INT8", "zero": 7, "channels": False},
    "vitis-ai": {"codes": "INT8", "channels": False, "opset": 17},
    "xnnpack": {"zero": 7},
    "tflite": {"zero": 7},
}
"""The parts of a file that keeps every rule of a profile."""

BROKEN: dict[str, dict[str, Any]] = {
    "activation-type": {"codes": "INT4", "opset": 21},
    "activation-zero-point": {"zero": 5, "then": "Sigmoid"},
    "bias-not-float": {"bias": "codes"},
    "bias-range": {"bias": "many bits"},
    "bias-scale": {"bias": "other scale"},
    "clip-of-codes": {"then": "clip"},
    "dequantizer-scale": {"then": "other scale"},
    "different-ties": {"then": "sum on ties"},
    "double-qdq": {"then": "again"},
    "dynamic-shape": {"batch": "N"},
    "early-quantizer": {"then": "Sigmoid"},
    "float-bias": {"bias": "float"},
    "float-result": {"then": "floats"},
    "input-zero-point": {"zero": 5},
    "opset": {"opset": 21},
    "power-of-two": {"scale": 0.3},
    "shared-scale": {"then": "concat"},
    "skipped-clip": {"then": "one-sided clip"},
    "symmetric-relu": {"relu": True, "zero": 7},
    "unfused-clip": {"clipped": True},
    "unsupported-operator": {"then": "Erf"},
    "weight-granularity": {"channels": True, "layer": "ConvTranspose"},
    "weight-type": {"weight": "UINT16", "opset": 21},
    "weight-zero-point": {"weight_zero": 3},
}
"""The change that breaks each rule."""


@dataclass
class File:
    """x -> Q/DQ -> `layer` -> Q/DQ -> `then`, quantized as the options say."""

    layer: str = "Conv"
    codes: str = "UINT8"
    zero: int = 0
    scale: float = 0.25
    weight: str = "INT8"
    weight_zero: int = 0
    channels: bool = True
    bias: str = "codes"
    relu: bool = False
    clipped: bool = False
    then: str = ""
    batch: int | str = 1
    opset: int = 20
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    @property
    def model(self) -> onnx.ModelProto:
        value = self.op(self.layer, self.pair("x"), self.weights(), self.biases())
        value = self.op("Relu", value) if self.relu else value
        if self.clipped:
            value = self.op("Clip", value, *(self.constant(bound, TensorProto.FLOAT) for bound in (-1.0, 1.0)))
        value = self.then_of(value)
        shapes = {"x": (self.batch, 4, 6, 6), value: (self.batch, 6 if self.then == "concat" else 3, 6, 6)}
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
        graph = helper.make_graph(self.nodes, "file", infos[:1], infos[1:], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)

    def then_of(self, value: str) -> str:
        if self.then == "clip":
            codes = self.op("QuantizeLinear", value, *self.parameters(self.scale))
            clipped = self.op("Clip", codes, *(self.constant(bound, self.type) for bound in (1, 9)))
            return self.op("DequantizeLinear", clipped, *self.parameters(self.scale))
        if self.then == "other scale":
            codes = self.op("QuantizeLinear", value, *self.parameters(self.scale))
            return self.op("DequantizeLinear", codes, *self.parameters(0.5))
        if self.then == "concat":
            return self.pair(self.op("Concat", self.pair(value), self.pair(value, 0.5), axis=1))
        if self.then == "sum on ties":
            return self.pair(self.op("Add", self.pair(value), self.pair(value, self.scale / 2)))
        if self.then == "floats":
            return self.op("Exp", value)
        quantized = self.pair(value)
        if self.then == "again":
            return self.pair(quantized, 0.5)
        if self.then == "one-sided clip":
            return self.op("Clip", quantized, *(self.constant(bound, TensorProto.FLOAT) for bound in (-1.0, 1e3)))
        return self.op(self.then, quantized) if self.then else quantized

    @property
    def type(self) -> int:
        return int(getattr(TensorProto, self.codes))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def constant(self, values: Any, dtype: int) -> str:
        name = f"constant_{len(self.constants)}"
        array = np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(dtype))
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def parameters(self, scale: float) -> tuple[str, str]:
        return self.constant(scale, TensorProto.FLOAT), self.constant(self.zero, self.type)

    def pair(self, value: str, scale: float | None = None) -> str:
        parameters = self.parameters(scale or self.scale)
        return self.op("DequantizeLinear", self.op("QuantizeLinear", value, *parameters), *parameters)

    def weights(self) -> str:
        dtype, shape = getattr(TensorProto, self.weight), (3,) if self.channels else ()
        scale = self.constant(np.full(shape, self.scale), TensorProto.FLOAT)
        axis = int(self.layer == "ConvTranspose")
        codes = self.constant(np.arange(12).reshape((4, 3) if axis else (3, 4))[..., None, None], dtype)
        zero = self.constant(np.full(shape, self.weight_zero), dtype)
        return self.op("DequantizeLinear", codes, scale, zero, axis=axis)

    def biases(self) -> str:
        if self.bias == "float":
            return self.constant([1.0, 2.0, 3.0], TensorProto.FLOAT)
        shape = (3,) if self.channels else ()
        step = np.float32(self.scale) * np.float32(self.scale) * np.float32(2 if self.bias == "other scale" else 1)
        scale, zero = (
            self.constant(np.full(shape, step), TensorProto.FLOAT),
            self.constant(np.zeros(shape), TensorProto.INT32),
        )
        codes = [1, 2, 2**22 if self.bias == "many bits" else 3]
        return self.op("DequantizeLinear", self.constant(codes, TensorProto.INT32), scale, zero, axis=0)


CASES = [(profile.name, rule.name) for profile in PROFILES.values() for rule in profile.rules]


@pytest.mark.parametrize("name", PROFILES)
def test_a_file_that_keeps_every_rule(name: str) -> None:
    assert lint(File(**KEPT[name]).model, name) == []


@pytest.mark.parametrize(("name", "rule"), CASES, ids=[f"{name}-{rule}" for name, rule in CASES])
def test_a_file_that_breaks_one_rule(name: str, rule: str) -> None:
    found = [each for each in lint(File(**{**KEPT[name], **BROKEN[rule]}).model, name) if each.rule == rule]
    assert found and all(each.where and each.message for each in found)


@functools.cache
def emitted(network: str, target: str) -> onnx.ModelProto:
    """Return the file of a network for a target."""
    model, x = build(network, batch=2) if network in NETWORKS else construct(network, 2)
    x = x[0] if isinstance(x, tuple) else x
    free = not get_target(target).static_shapes
    graph = fold(capture(model, x if free else x[:1], free_batch=free))
    result = calibrate(graph, [x if free else x[:1]], method="minmax", target=target)
    return ir.to_proto(to_onnx(result.program, opset=needed_opset(result)))


@pytest.mark.parametrize("network", ["pooled", "transformer"])
@pytest.mark.parametrize("target", [target.name for target in list_targets() if target.name in PROFILES])
def test_emitted_files_keep_every_rule_of_their_target(network: str, target: str) -> None:
    assert lint(emitted(network, target), target) == []


def test_a_clip_between_two_quantizers_is_a_maximum_and_a_minimum() -> None:
    model = emitted("elementwise", "ort-qnn")
    assert lint(model, "ort-qnn") == []
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["Max"] == 2 and operators["Min"] == 1 and not operators["Clip"]  # one Max is of a PReLU


@pytest.mark.parametrize(
    ("target", "rules"),
    [
        ("openvino", {"early-quantizer", "shared-scale"}),
        ("tensorrt", {"activation-type", "activation-zero-point", "bias-not-float", "clip-of-codes", "shared-scale"}),
        ("ort-qnn", {"dynamic-shape", "clip-of-codes", "float-result"}),
        ("xnnpack", {"dynamic-shape", "float-result", "shared-scale"}),
        ("tflite", {"dynamic-shape", "float-result", "shared-scale"}),
    ],
)
def test_files_of_another_target_do_not(target: str, rules: set[str]) -> None:
    assert {each.rule for each in lint(emitted("pooled", "ort-cpu"), target)} >= rules


def test_every_rule_names_its_source() -> None:
    assert set(KEPT) == set(PROFILES) and set(BROKEN) == {rule for _, rule in CASES}
    every = [rule for name in names() for stage in rules_for(name) for rule in stage] + [*RULES.values()]
    assert all(rule.source for rule in every)


def test_targets_without_a_profile_have_the_rules_of_onnxruntime() -> None:
    assert {rule.name for stage in rules_for("ort-arm") for rule in stage} <= set(RULES)
    with pytest.raises(UnknownNameError, match="unknown target 'tidle'"):
        lint(File().model, "tidle")
