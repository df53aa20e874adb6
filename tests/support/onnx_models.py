"""Toy QDQ networks written by hand with NumPy and onnx.helper: what the runtime tests measure.

Knows nothing of the exporter: these files are the ground truth its output is measured against.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtime_tests.ort.sessions import Source, session
from runtime_tests.ort.worker import LAYOUT_OPTIMIZERS

Array = NDArray[Any]

ACTIVATIONS = {"u8": (TensorProto.UINT8, np.uint8), "s8": (TensorProto.INT8, np.int8),
               "s16": (TensorProto.INT16, np.int16)}  # fmt: skip
"""Container of activation codes, by the name tests use."""

SIGNED_LIMIT = 4.0
"""Half range of signed toy activations: weights are drawn with variance 1/fan_in, so 4 is 4 sigma."""


@dataclass(frozen=True)
class Edge:
    """A dequantized value and the names of its quantization parameters."""

    name: str
    scale: float
    params: tuple[str, str]


@dataclass
class Net:
    """A graph under construction; methods append nodes and return the value that these compute."""

    seed: int = 0
    opset: int = 20
    activation: str = "u8"
    float_bias: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def constant(self, hint: str, value: Array, *, dtype: int | None = None) -> str:
        """Add a raw_data initializer and return its name; `dtype` packs `value` into a 4- or 2-bit type."""
        name = f"{hint}.{len(self.initializers)}"
        if dtype is None:
            tensor = onnx.numpy_helper.from_array(np.asarray(value), name)
        else:
            packed = helper.make_tensor(name, dtype, value.shape, value.reshape(-1).tolist())
            tensor = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(packed), name)
        self.initializers[name] = tensor
        return name

    def op(self, op_type: str, *inputs: str, hint: str = "", domain: str = "", **attributes: Any) -> str:
        """Append a node and return the name of its one output."""
        name = hint or f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op_type, list(inputs), [name], name=f"node_{name}", domain=domain, **attributes)
        )
        return name

    def input(self, name: str, shape: tuple[int | str, ...], dtype: int = TensorProto.FLOAT) -> str:
        """Add a graph input and return its name."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def quantize(self, value: str, lo: float, hi: float, *, clip: tuple[int, int] | None = None) -> Edge:
        """Append Q, an optional Clip of the codes, and DQ after `value`, for the range [lo, hi]."""
        low, high = (0, 255) if self.activation == "u8" else (-128, 127)
        low, high = clip or (low, high)
        scale = (hi - lo) / (high - low)
        return self.quantize_with(value, scale, round(low - lo / scale), clip=clip)

    def quantize_with(self, value: str, scale: float, zero: int, *, clip: tuple[int, int] | None = None) -> Edge:
        """Append Q, an optional Clip of the codes, and DQ after `value`, for given parameters."""
        dtype = ACTIVATIONS[self.activation][1]
        params = (
            self.constant(f"{value}.scale", np.array(scale, np.float32)),
            self.constant(f"{value}.zero_point", np.array(zero, dtype)),
        )
        return self.pair(value, params, float(np.float32(scale)), clip=clip)

    def pair(self, value: str, params: tuple[str, str], scale: float, *, clip: tuple[int, int] | None = None) -> Edge:
        """Append Q, an optional Clip of the codes, and DQ after `value`, with parameters that exist already."""
        codes = self.op("QuantizeLinear", value, *params, hint=f"{value}.q{len(self.nodes)}")
        if clip is not None:
            dtype = ACTIVATIONS[self.activation][1]
            bounds = [self.constant(f"{value}.clip", np.array(bound, dtype)) for bound in clip]
            codes = self.op("Clip", codes, *bounds)
        return Edge(self.op("DequantizeLinear", codes, *params, hint=f"{codes}.dq"), scale, params)

    def like(self, value: str, edge: Edge) -> Edge:
        """Append Q and DQ after `value`, with the parameters of `edge`."""
        return self.pair(value, edge.params, edge.scale)

    def weight(self, shape: tuple[int, ...], *, axis: int, limit: int = 127) -> tuple[str, Array]:
        """Add dequantized random weights (variance 1/fan_in); return them and their scales along `axis`."""
        channels = shape[axis]
        fan_in = int(np.prod(shape)) // channels
        weight = np.moveaxis(self.rng.normal(0, fan_in**-0.5, shape), axis, 0)
        scale = (np.abs(weight).reshape(channels, -1).max(1) / limit).astype(np.float32)
        codes = np.rint(weight / scale.reshape(-1, *[1] * (len(shape) - 1)))
        codes = np.moveaxis(np.clip(codes, -limit, limit), 0, axis).astype(np.int8)
        return self.dequantize_codes("weight", np.ascontiguousarray(codes), scale, axis=axis), scale

    def dequantize_codes(self, hint: str, codes: Array, scale: Array, *, axis: int) -> str:
        """Append DequantizeLinear of constant codes, with zero points of 0."""
        zeros = self.constant(f"{hint}.zero_point", np.zeros(scale.shape, codes.dtype))
        names = (self.constant(f"{hint}.codes", codes), self.constant(f"{hint}.scale", scale), zeros)
        return self.op("DequantizeLinear", *names, axis=axis, hint=f"{names[0]}.dq")

    def bias(self, channels: int, x: Edge, scale: Array) -> str:
        """Add a bias of `channels` values: int32 codes with scale f32(x.scale * scale), or floats."""
        bias = self.rng.normal(0, 0.1, channels)
        if self.float_bias:
            return self.constant("bias", bias.astype(np.float32))
        scale = np.float32(x.scale) * scale
        return self.dequantize_codes("bias", np.rint(bias / scale).astype(np.int32), scale, axis=0)

    def conv(self, x: Edge, out: int, into: int, *, kernel: int = 3, group: int = 1, limit: int = 127) -> str:
        """Append a convolution of `into` input channels with same padding and return its float output."""
        weight, scale = self.weight((out, into // group, kernel, kernel), axis=0, limit=limit)
        pads = [kernel // 2] * 4
        bias = self.bias(out, x, scale)
        return self.op("Conv", x.name, weight, bias, group=group, kernel_shape=[kernel] * 2, pads=pads)

    def linear(self, x: Edge, out: int, into: int) -> str:
        """Append a Gemm with transB=1 and return its float output."""
        weight, scale = self.weight((out, into), axis=0)
        return self.op("Gemm", x.name, weight, self.bias(out, x, scale), transB=1)

    def matmul(self, x: Edge, out: int, into: int) -> str:
        """Append a MatMul (weights [into, out]) with its bias Add and return the float output."""
        weight, scale = self.weight((into, out), axis=1)
        return self.op("Add", self.op("MatMul", x.name, weight), self.bias(out, x, scale))

    def relu(self, value: str, hi: float = SIGNED_LIMIT) -> Edge:
        """Append a Relu and its quantizer with the range [0, hi]."""
        return self.quantize(self.op("Relu", value), 0.0, hi)

    def relu6(self, value: str, *, bits: int = 8) -> Edge:
        """Append a quantizer that saturates as Relu6 does: from 0 to 6; below 8 bits with a Clip of the codes."""
        low = 0 if self.activation == "u8" else -128
        clip = (low, low + (1 << bits) - 1) if bits < 8 else None
        return self.quantize(self.op("Relu", value), 0.0, 6.0, clip=clip)

    def signed(self, value: str) -> Edge:
        """Append the quantizer of a value without activation function."""
        return self.quantize(value, -SIGNED_LIMIT, SIGNED_LIMIT)

    def model(self, *outputs: str, ir_version: int = 10) -> onnx.ModelProto:
        """Return the finished model, with outputs typed by shape inference."""
        graph = helper.make_graph(self.nodes, "toy", self.inputs, [], list(self.initializers.values()))
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = ir_version
        known = {info.name: info for info in onnx.shape_inference.infer_shapes(model).graph.value_info}
        model.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in outputs)
        return model


def classifier_tail(net: Net, x: Edge, channels: int, classes: int = 10) -> str:
    """Append a global average pool, a flatten between two quantizers, and a linear layer with float output."""
    pooled = net.quantize(net.op("GlobalAveragePool", x.name), 0.0, SIGNED_LIMIT)
    flat = net.like(net.op("Flatten", pooled.name), pooled)
    return net.linear(flat, classes, channels)


def residual(**options: Any) -> onnx.ModelProto:
    """Return a stem, two residual blocks of two convolutions, max pool and classifier: [N, 3, 16, 16] -> [N, 10]."""
    net = Net(**options)
    x = net.signed(net.input("x", ("N", 3, 16, 16)))
    x = net.relu(net.conv(x, 16, 3))
    pooled = net.op("MaxPool", x.name, kernel_shape=[2, 2], strides=[2, 2])
    x = net.like(pooled, x)
    for _ in range(2):
        inner = net.relu(net.conv(x, 16, 16))
        inner = net.signed(net.conv(inner, 16, 16))
        x = net.relu(net.op("Add", x.name, inner.name))
    return net.model(classifier_tail(net, x, 16))


def squeeze_excite(**options: Any) -> onnx.ModelProto:
    """Return a convolution whose channels a squeeze-and-excite branch scales: [N, 3, 16, 16] -> [N, 10]."""
    net = Net(**options)
    x = net.relu(net.conv(net.signed(net.input("x", ("N", 3, 16, 16))), 16, 3))
    gate = net.quantize(net.op("GlobalAveragePool", x.name), 0.0, SIGNED_LIMIT)
    gate = net.relu(net.conv(gate, 8, 16, kernel=1))
    gate = net.signed(net.conv(gate, 16, 8, kernel=1))
    gate = net.quantize(net.op("Sigmoid", gate.name), 0.0, 1.0)
    x = net.quantize(net.op("Mul", x.name, gate.name), 0.0, SIGNED_LIMIT)
    return net.model(classifier_tail(net, x, 16))


def mobilenet(*, bits: int = 8, **options: Any) -> onnx.ModelProto:
    """Return two inverted residual blocks with relu6 as integer Clip: [N, 3, 16, 16] -> [N, 10]."""
    net = Net(**options)
    x = net.relu6(net.conv(net.signed(net.input("x", ("N", 3, 16, 16))), 8, 3), bits=bits)
    for _ in range(2):
        inner = net.relu6(net.conv(x, 24, 8, kernel=1), bits=bits)
        inner = net.relu6(net.conv(inner, 24, 24, group=24), bits=bits)
        inner = net.signed(net.conv(inner, 8, 24, kernel=1))
        x = net.signed(net.op("Add", x.name, inner.name))
    return net.model(classifier_tail(net, x, 8))


def transformer_mlp(**options: Any) -> onnx.ModelProto:
    """Return pre-norm MLP blocks, quantized only at the inputs of linear layers: [N, 12, 16] -> [N, 12, 16]."""
    net = Net(**options)
    value = net.input("x", ("N", 12, 16))
    for _ in range(2):
        gain, shift = (net.constant("norm", np.full(16, fill, np.float32)) for fill in (1.0, 0.0))
        hidden = net.signed(net.op("LayerNormalization", value, gain, shift, axis=-1))
        hidden = net.signed(net.op("Gelu", net.matmul(hidden, 32, 16)))
        value = net.op("Add", value, net.matmul(hidden, 16, 32))
    return net.model(value)


NETS = {
    "residual": residual,
    "squeeze_excite": squeeze_excite,
    "mobilenet": mobilenet,
    "transformer_mlp": transformer_mlp,
}
"""Every toy network by name."""

MACS = {
    "residual": 16 * 16 * 16 * 27 + 4 * 8 * 8 * 16 * 144 + 160,
    "squeeze_excite": 16 * 16 * 16 * 27 + 2 * 8 * 16 + 160,
    "mobilenet": 256 * (8 * 27 + 2 * (24 * 8 + 24 * 9 + 8 * 24)) + 80,
    "transformer_mlp": 2 * 2 * 12 * 16 * 32,
}
"""Multiply-accumulates of one sample, counted by hand from the layer shapes."""


def sample(model: onnx.ModelProto, *, batch: int = 2, seed: int = 1) -> dict[str, Array]:
    """Return standard normal inputs of a toy network by name."""
    rng = np.random.default_rng(seed)
    shapes = {
        info.name: [dim.dim_value or batch for dim in info.type.tensor_type.shape.dim] for info in model.graph.input
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def chain(*ops: str, opset: int = 20) -> onnx.ModelProto:
    """Return a float graph on [N, 4] of unary operators, one after the other."""
    net = Net(opset=opset)
    value = net.input("x", ("N", 4))
    for op_type in ops:
        value = net.op(op_type, value)
    return net.model(value)


def optimized_model(model: Source, *, layouts: bool = True) -> onnx.ModelProto:
    """Return the graph that onnxruntime executes, weights included.

    layouts: keep the blocked layout of float convolutions (see Model.optimized).
    raises:  ModelError if onnxruntime refuses the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model, save_optimized=path, disabled=() if layouts else LAYOUT_OPTIMIZERS)
        return onnx.load(path)
