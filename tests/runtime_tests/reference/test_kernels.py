"""Each integer kernel against onnxruntime's own, on ordinary data and on data whose products sit on ties.

Every comparison asks for 0 differing codes (or float bits) and that the kernel of that name really ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import cpuinfo
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from calibrators.grid import kernel_tables
from calibrators.grid.processors import PROCESSORS, REFERENCE
from runtime_tests.ort.sessions import session
from runtime_tests.reference.kernels import (
    EXACT_FLOAT32,
    ConvGeometry,
    Grid,
    PoolGeometry,
    Weights,
    adds_swapped,
    average_pool,
    conv,
    global_average_pool,
    integer_clip,
    leaky_relu,
    linear,
    lookup,
    lookup_pair,
    matmul,
    pair_table,
    prepare_weights,
    quantize_bias,
    sigmoid,
    softmax,
    unary_table,
    unpadded,
)
from tests.support.onnx_models import Net, optimized_model

Array = NDArray[Any]

CPU = cpuinfo.get_cpu_info()
FLAGS = set(CPU.get("flags", ()))
HAS_FMA = CPU["arch"] == "X86_64" and {"avx2", "fma"} <= FLAGS
HAS_VNNI = CPU["arch"] == "X86_64" and bool({"avx512_vnni", "avx512vnni", "avx_vnni"} & FLAGS)

needs_fma = pytest.mark.skipif(not HAS_FMA, reason="this CPU has no AVX2 and FMA: QLinearAdd breaks ties otherwise")
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="this CPU has no VNNI: its u8 x s8 products saturate in int16")

FULL = (0, 255)


def grid(scale: float, zero_point: int, limits: tuple[int, int] = FULL) -> Grid:
    return Grid(torch.tensor(scale, dtype=torch.float32), zero_point, *limits, torch.uint8)


def random_grid(rng: np.random.Generator, limits: tuple[int, int] = FULL) -> Grid:
    return grid(float(rng.uniform(0.003, 0.05)), int(rng.integers(limits[0], limits[1] + 1)), limits)


def random_codes(rng: np.random.Generator, shape: tuple[int, ...], side: Grid) -> Tensor:
    return torch.from_numpy(rng.integers(side.qmin, side.qmax + 1, shape, dtype=np.uint8))


@dataclass
class Kernel:
    """A model of one operator between codes, built node by node and run once."""

    net: Net
    feeds: dict[str, Array]

    @classmethod
    def empty(cls) -> Kernel:
        return cls(Net(), {})

    def codes(self, codes: Tensor, side: Grid) -> str:
        """A graph input of codes, dequantized."""
        container = {torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8}[codes.dtype]
        name = self.net.input(f"x{len(self.feeds)}", tuple(codes.shape), container)
        self.feeds[name] = codes.numpy()
        return self.net.op("DequantizeLinear", name, *self.parameters(side))

    def weight(self, codes: Tensor, scale: Tensor, axis: int) -> str:
        zeros = np.zeros(tuple(scale.shape), codes.numpy().dtype)
        names = [self.net.constant("w", value) for value in (codes.numpy(), scale.numpy(), zeros)]
        return self.net.op("DequantizeLinear", *names, axis=axis)

    def parameters(self, side: Grid) -> tuple[str, str]:
        scale = self.net.constant("scale", side.scale.numpy())
        return scale, self.net.constant("zero_point", torch.tensor(side.zero_point, dtype=side.dtype).numpy())

    def quantized(self, value: str, side: Grid) -> str:
        value = self.net.op("QuantizeLinear", value, *self.parameters(side))
        if (side.qmin, side.qmax) == side.container:
            return value
        bounds = [self.net.constant("clip", np.array(bound, np.uint8)) for bound in (side.qmin, side.qmax)]
        return self.net.op("Clip", value, *bounds)

    def run(self, output: str, expected_kernel: str) -> Tensor:
        model: onnx.ModelProto = self.net.model(output)
        kinds = [node.op_type for node in optimized_model(model).graph.node]
        assert expected_kernel in kinds, f"{expected_kernel} did not run: {kinds}"
        assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Mul", "Concat", "Softmax"} & set(kinds), kinds
        return torch.from_numpy(session(model).run(None, self.feeds)[0])


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    different = int((ours != theirs).sum())
    assert different == 0, f"{different} of {ours.numel()} differ"


# --- weighted kernels ------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """Random weights with a bias, and an output grid that either fits the accumulators or puts them on ties."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    x: Grid
    y: Grid

    @property
    def weights(self) -> Weights:
        return prepare_weights(self.codes, torch.zeros_like(self.scale), self.scale, self.bias, self.x)


def random_layer(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    *,
    per_channel: bool = True,
    ties: bool = False,
    has_bias: bool = True,
    limits: tuple[int, int] = FULL,
) -> Layer:
    """Weight codes [out, in, ...]; with `ties` every channel has an even ratio of scales."""
    x, fan_in = random_grid(rng), int(np.prod(shape[1:]))
    codes = torch.from_numpy(np.clip(rng.normal(0, 40, shape).round(), -127, 127).astype(np.int8))
    out = shape[0]
    spread = float(40 * 80 * fan_in**0.5)  # standard deviation of the accumulators, roughly
    base = np.float32(rng.uniform(0.001, 0.02))
    y_scale = float(np.float32(x.scale) * base * np.float32(spread / 40))
    if ties:
        ratio = (
            2 * max(1, round(spread / 160)) + np.arange(out) % 4 * 2 if per_channel else 2 * max(1, round(spread / 80))
        )
        scale = np.float32(y_scale) / np.float32(x.scale) / np.asarray(ratio, np.float32)
    else:
        scale = base * rng.uniform(0.5, 2.0, out) if per_channel else base
    bias = torch.from_numpy(rng.normal(0, spread, out).round().astype(np.int32)) if has_bias else None
    w_scale = torch.from_numpy(np.asarray(scale, np.float32))
    return Layer(codes, w_scale, bias, x, grid(y_scale, int(rng.integers(0, 256)), limits))


def bias_name(kernel: Kernel, layer: Layer) -> list[str]:
    if layer.bias is None:
        return []
    scale = (layer.x.scale * layer.scale).expand(layer.bias.shape).contiguous()
    return [kernel.weight(layer.bias, scale, 0)]


def conv_in_runtime(layer: Layer, codes: Tensor, geometry: ConvGeometry) -> Tensor:
    kernel, space = Kernel.empty(), layer.codes.ndim - 2
    inputs = [kernel.codes(codes, layer.x), kernel.weight(layer.codes, layer.scale, 0), *bias_name(kernel, layer)]
    padding = list(geometry.padding)
    value = kernel.net.op(
        "Conv",
        *inputs,
        kernel_shape=list(layer.codes.shape[2:]),
        group=geometry.groups,
        strides=list(geometry.stride),
        dilations=list(geometry.dilation),
        pads=padding * 2,
    )
    assert len(padding) == space
    return kernel.run(kernel.quantized(value, layer.y), "QLinearConv")


CONVS = {
    "3x3": ((16, 8, 3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 1)),
    "1x1": ((24, 16, 1, 1), ConvGeometry((1, 1), (0, 0), (1, 1), 1)),
    "strided-5x3": ((8, 5, 5, 3), ConvGeometry((2, 3), (2, 0), (1, 1), 1)),
    "dilated": ((8, 8, 3, 3), ConvGeometry((1, 1), (2, 2), (2, 2), 1)),
    "grouped": ((12, 4, 3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 3)),
    "depthwise": ((16, 1, 3, 3), ConvGeometry((2, 2), (1, 1), (1, 1), 16)),
    "1d": ((12, 6, 5), ConvGeometry((2,), (2,), (1,), 1)),
    "1d-depthwise": ((12, 1, 3), ConvGeometry((1,), (1,), (1,), 12)),
}


@needs_vnni
@pytest.mark.parametrize("ties", [False, True], ids=["ordinary", "ties"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("name", CONVS)
def test_conv(name: str, per_channel: bool, ties: bool) -> None:
    shape, geometry = CONVS[name]
    rng = np.random.default_rng(len(name) + 2 * per_channel + ties)
    layer = random_layer(rng, shape, per_channel=per_channel, ties=ties)
    codes = random_codes(rng, (3, shape[1] * geometry.groups, 17, 15)[: len(shape)], layer.x)
    ours = conv(codes, layer.x, layer.weights, layer.y, geometry)
    assert_same_bits(ours, conv_in_runtime(layer, codes, geometry))
    assert len(ours.unique()) > 16, "the outputs saturate: nothing was tested"


@pytest.mark.parametrize("limits", [(0, 15), (3, 200)], ids=["4-bit", "clipped"])
@needs_vnni
def test_conv_with_integer_clip(limits: tuple[int, int]) -> None:
    rng = np.random.default_rng(limits[1])
    layer = random_layer(rng, (16, 8, 3, 3), has_bias=False, limits=limits)
    shape, geometry = CONVS["3x3"]
    codes = random_codes(rng, (2, shape[1], 9, 9), layer.x)
    ours = conv(codes, layer.x, layer.weights, layer.y, geometry)
    assert_same_bits(ours, conv_in_runtime(layer, codes, geometry))
    assert (int(ours.min()), int(ours.max())) == limits


@needs_vnni
@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "grouped"])
def test_conv_beyond_float32_integers(groups: int) -> None:
    rng = np.random.default_rng(groups)
    layer = random_layer(rng, (4 * groups, 512, 3, 3))
    layer.codes.fill_(127)[::2] = 126
    x, y = grid(0.01, 3), grid(float(0.01 * layer.scale.max() * 2e7), 0)
    layer = Layer(layer.codes, layer.scale, layer.bias, x, y)
    codes = random_codes(rng, (1, 512 * groups, 4, 4), x)
    codes[:, :, 1:, 1:] = 255 - codes[:, :, 1:, 1:] // 8
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), groups)
    assert len(layer.weights.parts) > 1
    assert_same_bits(conv(codes, x, layer.weights, y, geometry), conv_in_runtime(layer, codes, geometry))


@needs_vnni
def test_depthwise_kernel_too_large_to_split() -> None:
    rng = np.random.default_rng(5)
    layer = random_layer(rng, (3, 1, 31, 31))
    layer.codes.clamp_(min=100)
    x, y = grid(0.01, 0), grid(float(0.01 * layer.scale.max() * 1e5), 0)
    layer = Layer(layer.codes, layer.scale, None, x, y)
    codes = random_codes(rng, (1, 3, 40, 40), x)
    geometry = ConvGeometry((1, 1), (15, 15), (1, 1), 3)
    assert layer.weights.parts[0][1].dtype == torch.float64
    assert_same_bits(conv(codes, x, layer.weights, y, geometry), conv_in_runtime(layer, codes, geometry))


@pytest.mark.parametrize(("inputs", "size"), [(3000, 1), (900, 9), (5, 1)], ids=["1x1", "3x3", "short"])
def test_reduction_is_cut_into_the_fewest_exact_parts(inputs: int, size: int) -> None:
    rng = np.random.default_rng(inputs)
    codes = torch.from_numpy(rng.integers(-127, 128, (7, inputs, size), np.int8))
    x = grid(0.5, 7)
    weights = prepare_weights(codes, torch.zeros(1), torch.tensor(1.0), None, x)
    assert torch.equal(torch.cat([part for _, part in weights.parts], 1), codes.float())
    bounds = [np.abs(part.numpy().astype(np.int64)).sum(2) * x.reach for _, part in weights.parts]  # [out, part] each
    assert all(bound.sum(1).max() < EXACT_FLOAT32 for bound in bounds)
    for bound, following in pairwise(bounds):  # nor would the next input channel have fitted
        assert (bound.sum(1) + following[:, 0]).max() >= EXACT_FLOAT32


@pytest.mark.parametrize(("inputs", "is_moved"), [(20, True), (3000, False)], ids=["exact", "too-long"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_a_bias_takes_over_the_zero_point_where_sums_stay_exact(inputs: int, is_moved: bool, has_bias: bool) -> None:
    rng = np.random.default_rng(inputs)
    layer = random_layer(rng, (8, inputs))
    x, y, bias = grid(float(layer.x.scale), 100), layer.y, layer.bias if has_bias else None
    codes, weight, points = random_codes(rng, (16, inputs), x), layer.codes, torch.zeros_like(layer.scale)
    raw, weights = unpadded(weight, points, layer.scale, bias, x)
    assert raw.zero_point == (0 if is_moved else 100)
    expected = linear(codes, x, prepare_weights(weight, points, layer.scale, bias, x), y)
    assert_same_bits(linear(codes, raw, weights, y), expected)


@needs_vnni
def test_accumulators_beyond_int32_wrap() -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(rng, (8, 64))
    layer.bias = torch.tensor([2**31 - 1000] * 4 + [1000 - 2**31] * 4, dtype=torch.int64).to(torch.int32)
    y = grid(float(layer.x.scale * layer.scale.max()) * 3e7, 128)
    codes = random_codes(rng, (16, 64), layer.x)
    kernel = Kernel.empty()
    inputs = [kernel.codes(codes, layer.x), kernel.weight(layer.codes, layer.scale, 0), *bias_name(kernel, layer)]
    theirs = kernel.run(kernel.quantized(kernel.net.op("Gemm", *inputs, transB=1), y), "QGemm")
    assert_same_bits(linear(codes, layer.x, layer.weights, y), theirs)


@needs_vnni
@pytest.mark.parametrize("ties", [False, True], ids=["ordinary", "ties"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("length", [24, 2100], ids=["short", "beyond-2**24"])
def test_linear_to_codes(length: int, per_channel: bool, ties: bool) -> None:
    rng = np.random.default_rng(length + per_channel)
    layer = random_layer(rng, (20, length), per_channel=per_channel, ties=ties)
    codes = random_codes(rng, (33, length), layer.x)
    kernel = Kernel.empty()
    inputs = [kernel.codes(codes, layer.x), kernel.weight(layer.codes, layer.scale, 0), *bias_name(kernel, layer)]
    theirs = kernel.run(kernel.quantized(kernel.net.op("Gemm", *inputs, transB=1), layer.y), "QGemm")
    ours = linear(codes, layer.x, layer.weights, layer.y)
    assert_same_bits(ours, theirs)
    assert len(ours.unique()) > 16


@needs_vnni
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("length", [24, 2100], ids=["short", "beyond-2**24"])
def test_linear_to_float(length: int, per_channel: bool) -> None:
    rng = np.random.default_rng(length + per_channel)
    layer = random_layer(rng, (20, length), per_channel=per_channel)
    codes = random_codes(rng, (33, length), layer.x)
    kernel = Kernel.empty()
    inputs = [kernel.codes(codes, layer.x), kernel.weight(layer.codes, layer.scale, 0), *bias_name(kernel, layer)]
    theirs = kernel.run(kernel.net.op("Gemm", *inputs, transB=1), "QGemm")
    assert_same_bits(linear(codes, layer.x, layer.weights, None), theirs)


@needs_vnni
@pytest.mark.parametrize("quantized", [True, False], ids=["codes", "float"])
def test_linear_of_tokens_without_bias(quantized: bool) -> None:
    rng = np.random.default_rng(quantized)
    layer = random_layer(rng, (20, 48), has_bias=False)
    codes = random_codes(rng, (2, 7, 48), layer.x)
    kernel = Kernel.empty()
    x, weight = kernel.codes(codes, layer.x), kernel.weight(layer.codes.T.contiguous(), layer.scale, 1)
    value = kernel.net.op("MatMul", x, weight)
    if quantized:
        theirs = kernel.run(kernel.quantized(value, layer.y), "QLinearMatMul")
        assert_same_bits(linear(codes, layer.x, layer.weights, layer.y), theirs)
    else:
        assert_same_bits(linear(codes, layer.x, layer.weights, None), kernel.run(value, "MatMulIntegerToFloat"))


@needs_vnni
@pytest.mark.parametrize("quantized", [True, False], ids=["codes", "float"])
@pytest.mark.parametrize("length", [33, 700], ids=["short", "beyond-2**24"])
def test_matmul_of_two_activations(length: int, quantized: bool) -> None:
    rng = np.random.default_rng(length)
    a, b = grid(0.013, 9), grid(0.021, 130)
    y = grid(float(0.013 * 0.021 * 90 * 70 * length**0.5 / 20), 101)
    a_codes, b_codes = random_codes(rng, (2, 3, 11, length), a), random_codes(rng, (2, 3, length, 13), b)
    kernel = Kernel.empty()
    value = kernel.net.op("MatMul", kernel.codes(a_codes, a), kernel.codes(b_codes, b))
    if quantized:
        ours, theirs = matmul(a_codes, b_codes, a, b, y), kernel.run(kernel.quantized(value, y), "QLinearMatMul")
        assert len(ours.unique()) > 16
    else:
        ours, theirs = matmul(a_codes, b_codes, a, b, None), kernel.run(value, "MatMulIntegerToFloat")
    assert_same_bits(ours, theirs)


@needs_vnni
def test_float_bias_is_rounded_as_the_runtime_does() -> None:
    rng = np.random.default_rng(3)
    layer = random_layer(rng, (64, 32))
    layer.scale.mul_(10)
    bias = torch.from_numpy(rng.normal(0, 3, 64).astype(np.float32))
    layer.bias = quantize_bias(bias, layer.x.scale * layer.scale)
    y = grid(0.3, 120)
    codes = random_codes(rng, (64, 32), layer.x)
    kernel = Kernel.empty()
    inputs = [kernel.codes(codes, layer.x), kernel.weight(layer.codes, layer.scale, 0)]
    value = kernel.net.op("Gemm", *inputs, kernel.net.constant("bias", bias.numpy()), transB=1)
    assert_same_bits(linear(codes, layer.x, layer.weights, y), kernel.run(kernel.quantized(value, y), "QGemm"))


# --- element by element: every pair of codes -------------------------------------------------------------------------

add_table = partial(pair_table, kernel_tables.add, arithmetic=PROCESSORS[REFERENCE].add)
mul_table = partial(pair_table, kernel_tables.mul, arithmetic=PROCESSORS[REFERENCE].mul)

A_CODES = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 256).contiguous()
B_CODES = A_CODES.T.contiguous()
Table = Callable[[Grid, Grid, Grid], Tensor]


def pair_grids(rng: np.random.Generator, kind: str, ties: bool) -> tuple[Grid, Grid, Grid]:
    """Three grids; with `ties` the exact sums and products are halves of an output step in many pairs."""
    a, b = random_grid(rng), random_grid(rng)
    if not ties:
        return a, b, grid(float(a.scale * b.scale * 90 if kind == "Mul" else a.scale + b.scale), a.zero_point)
    unit = float(rng.uniform(0.001, 0.01))
    i, j, k = (int(v) for v in rng.integers(1, 6, 3))
    a, b = grid(unit * i, a.zero_point), grid(unit * j, b.zero_point)
    return a, b, grid(float(a.scale * b.scale) * 2 * k * 20 if kind == "Mul" else unit * 2 * k, b.zero_point)


@needs_fma
@pytest.mark.parametrize("ties", [False, True], ids=["ordinary", "ties"])
@pytest.mark.parametrize(("kind", "table"), [("Add", add_table), ("Mul", mul_table)], ids=["add", "mul"])
@pytest.mark.parametrize("seed", range(3))
def test_every_pair_of_codes(seed: int, kind: str, table: Table, ties: bool) -> None:
    a, b, y = pair_grids(np.random.default_rng(seed), kind, ties)
    kernel = Kernel.empty()
    value = kernel.net.op(kind, kernel.codes(A_CODES, a), kernel.codes(B_CODES, b))
    theirs = kernel.run(kernel.quantized(value, y), f"QLinear{kind}")
    assert_same_bits(lookup_pair(table(a, b, y), A_CODES, B_CODES), theirs)


BROADCASTS = {
    "scalar-first": ((1,), (2, 8, 9, 9)),
    "scalar-last": ((2, 8, 9, 9), (1,)),
    "channels-first": ((2, 8, 1, 1), (2, 8, 9, 9)),
    "channels-last": ((2, 8, 9, 9), (2, 8, 1, 1)),
    "row-times-column": ((2, 8, 9, 1), (2, 8, 1, 9)),
    "batch": ((1, 8, 9, 9), (2, 8, 9, 9)),
}


@needs_fma
@pytest.mark.parametrize("shapes", BROADCASTS.values(), ids=BROADCASTS)
@pytest.mark.parametrize("seed", [6, 11, 12])
def test_broadcast_sum(seed: int, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """The order of the two roundings follows the broadcast; with the other order some of these seeds differ."""
    rng = np.random.default_rng(seed)
    a, b, y = pair_grids(rng, "Add", ties=True)
    a_codes, b_codes = random_codes(rng, shapes[0], a), random_codes(rng, shapes[1], b)
    kernel = Kernel.empty()
    value = kernel.net.op("Add", kernel.codes(a_codes, a), kernel.codes(b_codes, b))
    theirs = kernel.run(kernel.quantized(value, y), "QLinearAdd")
    swapped = adds_swapped(*shapes, channels_last=False)
    table = add_table(b, a, y).T if swapped else add_table(a, b, y)
    assert_same_bits(lookup_pair(table, a_codes, b_codes), theirs)


@needs_vnni
@needs_fma
@pytest.mark.parametrize("narrow_first", [True, False], ids=["narrow-first", "narrow-last"])
@pytest.mark.parametrize("seed", [6, 11, 15])
def test_broadcast_sum_of_convolutions_is_channels_last(seed: int, narrow_first: bool) -> None:
    """Between integer convolutions the innermost axis is the channel, which both operands have in full."""
    rng = np.random.default_rng(seed)
    narrow, wide, y = pair_grids(rng, "Add", ties=True)
    kernel = Kernel.empty()

    def branch(out: Grid, size: int) -> tuple[str, Grid, Tensor]:
        layer = random_layer(rng, (8, 4, 1, 1))
        layer.y = out
        codes = random_codes(rng, (2, 4, size, size), layer.x)
        inputs = [kernel.codes(codes, layer.x), kernel.weight(layer.codes, layer.scale, 0), *bias_name(kernel, layer)]
        value = kernel.quantized(kernel.net.op("Conv", *inputs, kernel_shape=[1, 1]), out)
        geometry = ConvGeometry((1, 1), (0, 0), (1, 1), 1)
        found = conv(codes, layer.x, layer.weights, out, geometry)
        return kernel.net.op("DequantizeLinear", value, *kernel.parameters(out)), out, found

    pair = [branch(wide, 9), branch(narrow, 1)]
    (a_name, a, a_codes), (b_name, b, b_codes) = reversed(pair) if narrow_first else pair
    theirs = kernel.run(kernel.quantized(kernel.net.op("Add", a_name, b_name), y), "QLinearAdd")
    assert not adds_swapped(a_codes.shape, b_codes.shape, channels_last=True)
    assert_same_bits(lookup_pair(add_table(a, b, y), a_codes, b_codes), theirs)


def signed(side: Grid) -> Grid:
    return Grid(side.scale, side.zero_point - 128, -128, 127, torch.int8)


@needs_fma
@pytest.mark.parametrize(("kind", "table"), [("Add", add_table), ("Mul", mul_table)], ids=["add", "mul"])
def test_every_pair_of_signed_codes(kind: str, table: Table) -> None:
    """The kernels for int8, which the runtime takes on request only, compute on the signed codes as they are."""
    a, b, y = map(signed, pair_grids(np.random.default_rng(1), kind, ties=True))
    a_codes, b_codes = ((codes.to(torch.int16) - 128).to(torch.int8) for codes in (A_CODES, B_CODES))
    kernel = Kernel.empty()
    value = kernel.quantized(kernel.net.op(kind, kernel.codes(a_codes, a), kernel.codes(b_codes, b)), y)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    model = kernel.net.model(value).SerializeToString()
    runtime = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(runtime.run(None, kernel.feeds)[0])
    assert_same_bits(lookup_pair(table(a, b, y), a_codes, b_codes), theirs)


UNARY: dict[str, tuple[str, Callable[[Array], Array], dict[str, float]]] = {
    "sigmoid": ("Sigmoid", sigmoid, {}),
    "leaky-relu": ("LeakyRelu", lambda x: leaky_relu(x, 0.1), {"alpha": 0.1}),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", UNARY)
def test_table_of_a_function(name: str, seed: int) -> None:
    kind, function, attributes = UNARY[name]
    rng = np.random.default_rng(seed)
    x, y = random_grid(rng), random_grid(rng)
    y = grid(1 / 256, 0) if kind == "Sigmoid" and seed % 2 else y
    kernel = Kernel.empty()
    theirs = kernel.run(
        kernel.quantized(kernel.net.op(kind, kernel.codes(A_CODES, x), **attributes), y), f"QLinear{kind}"
    )
    assert_same_bits(lookup(unary_table(function, x, y), A_CODES), theirs)


@pytest.mark.parametrize("seed", range(4))
def test_concat_requantizes_each_input(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grids, y = [random_grid(rng) for _ in range(3)], random_grid(rng)
    grids.append(y)
    codes = [random_codes(rng, (2, c, 8, 8), side) for c, side in zip((3, 4, 5, 6), grids, strict=True)]
    kernel = Kernel.empty()
    value = kernel.net.op("Concat", *(kernel.codes(c, side) for c, side in zip(codes, grids, strict=True)), axis=1)
    theirs = kernel.run(kernel.quantized(value, y), "QLinearConcat")
    tables = [unary_table(lambda x: x, side, y) for side in grids]
    assert_same_bits(torch.cat([lookup(t, c) for t, c in zip(tables, codes, strict=True)], 1), theirs)


@pytest.mark.parametrize("scale", [1 / 256, 1 / 255, 0.0031], ids=["1/256", "1/255", "odd"])
def test_softmax(scale: float) -> None:
    rng = np.random.default_rng(11)
    x, y = grid(0.06, 120), grid(scale, 0)
    codes = random_codes(rng, (64, 40), x)
    kernel = Kernel.empty()
    theirs = kernel.run(
        kernel.quantized(kernel.net.op("Softmax", kernel.codes(codes, x), axis=-1), y), "QLinearSoftmax"
    )
    assert_same_bits(softmax(codes, x, y, -1), theirs)


# --- pools and moves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True], ids=["ordinary", "ties"])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 5)], ids=["1x1", "4x4", "7x5"])
def test_global_average_pool(size: tuple[int, int], ties: bool) -> None:
    rng = np.random.default_rng(size[0])
    x = random_grid(rng)
    y = grid(float(x.scale) * 2 / (size[0] * size[1]) * 5 if ties else 0.013, 37)
    codes = random_codes(rng, (4, 64, *size), x)
    kernel = Kernel.empty()
    value = kernel.quantized(kernel.net.op("GlobalAveragePool", kernel.codes(codes, x)), y)
    theirs = kernel.run(value, "QLinearGlobalAveragePool")
    assert_same_bits(global_average_pool(codes, x, y), theirs)


POOLS = {
    "2x2": PoolGeometry((2, 2), (2, 2), (0, 0), True),
    "3x3-padded": PoolGeometry((3, 3), (2, 2), (1, 1), True),
    "3x3-padding-not-counted": PoolGeometry((3, 3), (1, 1), (1, 1), False),
    "2x3": PoolGeometry((2, 3), (1, 2), (0, 1), True),
    "volume": PoolGeometry((2, 3, 2), (2, 1, 2), (1, 1, 0), True),
    "volume-padding-not-counted": PoolGeometry((3, 2, 3), (1, 2, 2), (1, 0, 1), False),
}


@pytest.mark.parametrize("ties", [False, True], ids=["ordinary", "ties"])
@pytest.mark.parametrize("name", POOLS)
def test_average_pool(name: str, ties: bool) -> None:
    geometry = POOLS[name]
    rng = np.random.default_rng(len(name))
    x = random_grid(rng)
    y = grid(float(x.scale) * 2 / math.prod(geometry.kernel) * 3 if ties else 0.017, 38)
    codes = random_codes(rng, (2, 16, 12, 11, 6)[: 2 + len(geometry.kernel)], x)
    kernel = Kernel.empty()
    pooled = kernel.net.op(
        "AveragePool",
        kernel.codes(codes, x),
        kernel_shape=list(geometry.kernel),
        strides=list(geometry.stride),
        pads=list(geometry.padding) * 2,
        count_include_pad=int(geometry.count_include_pad),
    )
    theirs = kernel.run(kernel.quantized(pooled, y), "QLinearAveragePool")
    assert_same_bits(average_pool(codes, x, y, geometry), theirs)


def test_max_pool_moves_codes() -> None:
    rng = np.random.default_rng(0)
    x = random_grid(rng, (0, 200))
    codes = random_codes(rng, (2, 4, 9, 9), grid(1.0, 0))
    kernel = Kernel.empty()
    pooled = kernel.net.op("MaxPool", kernel.codes(codes, x), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    theirs = kernel.run(kernel.quantized(pooled, x), "MaxPool")
    assert_same_bits(integer_clip(functional.max_pool2d(codes, 3, 1, 1), x), theirs)
