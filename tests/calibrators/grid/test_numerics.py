"""The quantize formula: a golden table, its algebra, and equality with the ONNX reference evaluator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from calibrators.grid.numerics import SMALLEST_SCALE, dequantize, fake_quant, qparams_from_range, quantize
from calibrators.grid.spec import QParams, QuantSpec

UINT8, INT8 = QuantSpec(8), QuantSpec(8, signed=True)
NARROW = QuantSpec(8, signed=True, symmetric=True, narrow=True)

# (case, x, scale, zero point, bits, signed, code, value)
GOLDEN = [
    ("zero", 0.0, 1.0, 0, 8, False, 0, 0.0),
    ("zero-odd-zero-point", 0.0, 1.0, 3, 8, False, 3, 0.0),
    ("negative-zero", -0.0, 1.0, 128, 8, False, 128, 0.0),
    ("one", 1.0, 1.0, 0, 8, True, 1, 1.0),
    ("tie-0.5-to-even-below", 0.5, 1.0, 0, 8, True, 0, 0.0),
    ("tie--0.5-to-even-above", -0.5, 1.0, 0, 8, True, 0, 0.0),
    ("tie-1.5-to-even-above", 1.5, 1.0, 0, 8, True, 2, 2.0),
    ("tie--1.5-to-even-below", -1.5, 1.0, 0, 8, True, -2, -2.0),
    ("tie-2.5-to-even-below", 2.5, 1.0, 0, 8, True, 2, 2.0),
    ("tie--2.5-to-even-above", -2.5, 1.0, 0, 8, True, -2, -2.0),
    ("tie-0.5-odd-zero-point", 0.5, 1.0, 1, 8, False, 1, 0.0),
    ("tie-0.5-even-zero-point", 0.5, 1.0, 2, 8, False, 2, 0.0),
    ("tie-1.5-odd-zero-point", 1.5, 1.0, 1, 8, False, 3, 2.0),
    ("tie-1.5-even-zero-point", 1.5, 1.0, 2, 8, False, 4, 2.0),
    ("tie--0.5-odd-zero-point", -0.5, 1.0, 7, 8, False, 7, 0.0),
    ("tie--1.5-odd-zero-point", -1.5, 1.0, 7, 8, False, 5, -2.0),
    ("tie-odd-signed-zero-point", 0.5, 1.0, -1, 8, True, -1, 0.0),
    ("tie-small-scale", 0.375, 0.25, 0, 8, True, 2, 0.5),
    ("below-a-tie", 0.49999997, 1.0, 0, 8, True, 0, 0.0),
    ("above-a-tie", 0.50000006, 1.0, 0, 8, True, 1, 1.0),
    ("top-unsigned", 255.0, 1.0, 0, 8, False, 255, 255.0),
    ("saturated-above-unsigned", 1e9, 1.0, 0, 8, False, 255, 255.0),
    ("saturated-below-unsigned", -1.0, 1.0, 0, 8, False, 0, 0.0),
    ("saturated-above-signed", 127.5, 1.0, 0, 8, True, 127, 127.0),
    ("saturated-below-signed", -129.0, 1.0, 0, 8, True, -128, -128.0),
    ("saturated-behind-zero-point", 100.0, 1.0, 200, 8, False, 255, 55.0),
    ("infinity-saturates", float("inf"), 0.5, 10, 8, False, 255, 122.5),
    ("four-bits", 9.0, 1.0, 0, 4, True, 7, 7.0),
    ("two-bits", -9.0, 0.5, 0, 2, True, -2, -1.0),
    ("tiny-scale", 3.0 * 2.0**-100, 2.0**-100, 0, 8, True, 3, 3.0 * 2.0**-100),
    ("zero-channel", 0.0, 1.0, 0, 8, True, 0, 0.0),
]

SCALES = st.floats(min_value=2.0**-90, max_value=2.0**90, width=32)
SEEDS = st.integers(min_value=0, max_value=2**32 - 1)
GRIDS = st.builds(QuantSpec, bits=st.integers(2, 8), signed=st.booleans())

FLOAT32_ROUNDINGS = 2.0**-23
"""Relative to |x|: the division and the product each round once (2**-24), and the round trip is no larger than 2 |x|
wherever |x| exceeds half a scale."""


def tensor_qparams(scale: float, zero_point: int, spec: QuantSpec) -> QParams:
    return QParams(torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.int32), spec)


def any_zero_point(spec: QuantSpec, seed: int) -> int:
    return int(np.random.default_rng(seed).integers(spec.qmin, spec.qmax + 1))


@pytest.mark.parametrize("row", GOLDEN, ids=[row[0] for row in GOLDEN])
def test_golden_table(row: tuple[str, float, float, int, int, bool, int, float]) -> None:
    _, x, scale, zero_point, bits, signed, code, value = row
    qparams = tensor_qparams(scale, zero_point, QuantSpec(bits, signed=signed))
    codes = quantize(torch.tensor([x]), qparams)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert codes.item() == code
    assert dequantize(codes, qparams).item() == value
    assert fake_quant(torch.tensor([x]), qparams).item() == value


@settings(deadline=None, max_examples=200)
@given(scale=SCALES, spec=GRIDS, seed=SEEDS)
def test_codes_survive_the_way_through_floats(scale: float, spec: QuantSpec, seed: int) -> None:
    codes = torch.arange(spec.qmin, spec.qmax + 1).to(spec.dtype)
    qparams = tensor_qparams(scale, any_zero_point(spec, seed), spec)
    assert torch.equal(quantize(dequantize(codes, qparams), qparams), codes)


@settings(deadline=None, max_examples=100)
@given(scale=SCALES, spec=GRIDS, seed=SEEDS)
def test_round_trip_is_within_half_a_step(scale: float, spec: QuantSpec, seed: int) -> None:
    zero_point = any_zero_point(spec, seed)
    qparams = tensor_qparams(scale, zero_point, spec)
    inside = np.random.default_rng(seed).uniform(spec.qmin - zero_point, spec.qmax - zero_point, 200) * scale
    x = torch.tensor(inside, dtype=torch.float32)
    distance = (fake_quant(x, qparams).double() - x.double()).abs()
    assert bool((distance <= scale / 2 + FLOAT32_ROUNDINGS * x.double().abs() + FLOAT32_ROUNDINGS * scale).all())


@settings(deadline=None, max_examples=100)
@given(scale=SCALES, spec=GRIDS, seed=SEEDS)
def test_monotone_and_inside_the_grid(scale: float, spec: QuantSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = torch.tensor(np.sort(rng.normal(0.0, 100.0, 300)) * scale, dtype=torch.float32)
    codes = quantize(x, tensor_qparams(scale, any_zero_point(spec, seed), spec)).to(torch.int32)
    assert bool((codes.diff() >= 0).all())
    assert spec.qmin <= int(codes.min()) <= int(codes.max()) <= spec.qmax


@settings(deadline=None, max_examples=50)
@given(spec=GRIDS, seed=SEEDS)
def test_fake_quant_is_dequantize_of_quantize(spec: QuantSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(0.0, 5.0, (4, 50)), dtype=torch.float32)
    qparams = tensor_qparams(float(rng.uniform(0.001, 0.1)), any_zero_point(spec, seed), spec)
    assert torch.equal(fake_quant(x, qparams), dequantize(quantize(x, qparams), qparams))


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_per_channel_equals_per_tensor_channel_by_channel(axis: int, signed: bool, generator: torch.Generator) -> None:
    x = torch.randn(4, 5, 6, generator=generator) * 3
    spec = QuantSpec(8, signed=signed, axis=axis)
    channels = x.shape[axis]
    scale = torch.rand(channels, generator=generator) * 0.05 + 0.001
    zero_point = torch.randint(spec.qmin, spec.qmax + 1, (channels,), generator=generator, dtype=torch.int32)
    codes, back = quantize(x, QParams(scale, zero_point, spec)), fake_quant(x, QParams(scale, zero_point, spec))
    for channel in range(channels):
        alone = QParams(scale[channel], zero_point[channel], replace(spec, axis=None))
        part = x.select(axis, channel)
        assert torch.equal(codes.select(axis, channel), quantize(part, alone))
        assert torch.equal(back.select(axis, channel), fake_quant(part, alone))


# The range of a grid

ENDS = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)


@settings(deadline=None, max_examples=200)
@given(ends=st.tuples(ENDS, ENDS), spec=GRIDS, symmetric=st.booleans())
def test_a_range_becomes_a_grid_that_holds_zero(ends: tuple[float, float], spec: QuantSpec, symmetric: bool) -> None:
    spec = replace(spec, symmetric=symmetric)
    lo, hi = sorted(ends)
    qparams = qparams_from_range(torch.tensor(lo), torch.tensor(hi), spec)
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    assert 0.0 < scale < float("inf")
    assert spec.qmin <= zero_point <= spec.qmax
    assert fake_quant(torch.zeros(1), qparams).item() == 0.0
    reach = FLOAT32_ROUNDINGS * scale * 2**spec.bits  # the scale is rounded to float32
    if symmetric:
        assert zero_point == 0
        if max(-lo, hi) >= SMALLEST_SCALE * spec.qmax:
            assert abs(scale * spec.qmax - max(-lo, hi)) <= reach
    elif max(hi, 0.0) - min(lo, 0.0) >= SMALLEST_SCALE * (spec.qmax - spec.qmin):
        assert abs(scale * (spec.qmin - zero_point) - min(lo, 0.0)) <= scale / 2 + reach
        assert abs(scale * (spec.qmax - zero_point) - max(hi, 0.0)) <= scale / 2 + reach


@pytest.mark.parametrize(
    ("lo", "hi", "spec", "scale", "zero_point"),
    [
        (0.0, 255.0, UINT8, 1.0, 0),
        (3.0, 255.0, UINT8, 1.0, 0),
        (-255.0, -3.0, UINT8, 1.0, 255),
        (-1.0, 1.55, UINT8, 0.01, 100),
        (-1.0, 1.55, INT8, 0.01, -28),
        (-254.0, 10.0, NARROW, 2.0, 0),
        (-64.0, 127.0, QuantSpec(8, signed=True, symmetric=True), 1.0, 0),
        (0.0, 0.0, UINT8, 1.0, 0),
        (0.0, 0.0, NARROW, 1.0, 0),
        (-1.0, 2.0, QuantSpec(2), 1.0, 1),
        (0.0, 1e-35, UINT8, SMALLEST_SCALE, 0),
    ],
    ids=[
        "plain",
        "widened-down",
        "widened-up",
        "both-sides",
        "both-sides-signed",
        "narrow",
        "symmetric",
        "no-width",
        "dead-channel",
        "two-bits",
        "floor",
    ],
)
def test_scale_and_zero_point_of_a_range(lo: float, hi: float, spec: QuantSpec, scale: float, zero_point: int) -> None:
    found = qparams_from_range(torch.tensor(lo, dtype=torch.float64), torch.tensor(hi, dtype=torch.float64), spec)
    assert found.scale.dtype == torch.float32
    assert found.scale.item() == np.float32(scale)
    assert found.zero_point.item() == zero_point


# The ONNX reference evaluator


SHAPE = ("a", "b", "c")


def evaluate(x: Tensor, qparams: QParams) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values of QuantizeLinear and DequantizeLinear of opset 20."""
    spec = qparams.spec
    attributes = {} if spec.axis is None else {"axis": spec.axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"], **attributes),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["y"], **attributes),
    ]
    integer = TensorProto.INT8 if spec.signed else TensorProto.UINT8
    zero_point = qparams.zero_point.to(spec.dtype).numpy()
    graph = helper.make_graph(
        nodes,
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [
            helper.make_tensor_value_info("codes", integer, SHAPE),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE),
        ],
        [
            onnx.numpy_helper.from_array(qparams.scale.numpy(), "scale"),
            onnx.numpy_helper.from_array(zero_point, "zero_point"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    codes, y = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    return codes, y


@pytest.mark.parametrize("data", ["random", "ties", "grid"])
@pytest.mark.parametrize("axis", [None, 0, 1], ids=["per-tensor", "axis-0", "axis-1"])
@pytest.mark.parametrize("signed", [True, False], ids=["int8", "uint8"])
def test_equals_the_onnx_reference(data: str, axis: int | None, signed: bool, generator: torch.Generator) -> None:
    spec = QuantSpec(8, signed=signed, axis=axis)
    shape = () if axis is None else (8,)
    scale = torch.rand(shape, generator=generator) * 0.1 + 0.001
    zero_point = torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator, dtype=torch.int32)
    steps = torch.randint(-400, 400, (8, 8, 500), generator=generator).to(torch.float32)
    wide = scale if axis is None else scale.reshape((8, 1, 1) if axis == 0 else (1, 8, 1))
    x = {
        "random": torch.randn(8, 8, 500, generator=generator) * 10,
        "ties": (steps + 0.5) * wide,  # at most one float32 rounding from a tie
        "grid": steps * wide,
    }[data]
    qparams = QParams(scale, zero_point, spec)
    codes, y = evaluate(x, qparams)
    assert codes.dtype == (np.int8 if signed else np.uint8)
    assert int((quantize(x, qparams).numpy() != codes).sum()) == 0
    assert int((fake_quant(x, qparams).numpy() != y).sum()) == 0
