from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_tests.ort.saturation import Cpu, blocks, cpu_from, pair_sums, saturation, this_cpu
from tests.support import onnx_models as models
from tests.support.onnx_models import Net

SAFE = Cpu("X86_64", "with VNNI", ("avx2", "avx512_vnni"))
UNSAFE = Cpu("X86_64", "without VNNI", ("avx2", "fma"))


def layer(weights: Any, *, op: str = "Gemm", clip: tuple[int, int] | None = None, activation: str = "u8") -> Any:
    """One layer with given int8 weights: [out, in] for Gemm, [in, out] for MatMul, [out, in, h, w] for Conv."""
    net = Net(activation=activation)
    weights = np.asarray(weights, np.int8)
    axis = {"Gemm": 0, "Conv": 0, "MatMul": weights.ndim - 1}[op]
    channels = weights.shape[axis]
    reduction = {"Gemm": 1, "Conv": 1, "MatMul": weights.ndim - 2}[op]
    shape: tuple[int | str, ...] = ("N", weights.shape[reduction])
    extra: dict[str, Any] = {"transB": 1} if op == "Gemm" else {}
    if op == "Conv":
        extra = {"group": 1}
        shape = (*shape, 8, 8)
    x = net.quantize(net.input("x", shape), 0.0, 4.0, clip=clip)
    weight = net.dequantize_codes("w", weights, np.full(channels, 0.1, np.float32), axis=axis)
    return net.model(net.signed(net.op(op, x.name, weight, **extra)).name)


def int16_exact(pair: tuple[int, int], highest: int) -> bool:
    """Whether a0*w0 + a1*w1 stays in int16 for every pair of codes: tried at the corners."""
    sums = [a * pair[0] + b * pair[1] for a, b in product((0, highest), repeat=2)]
    return min(sums) >= -32768 and max(sums) <= 32767


@given(st.tuples(st.integers(-128, 127), st.integers(-128, 127)), st.sampled_from([255, 127, 63, 15]))
def test_predicate_is_that_of_every_pair_of_codes(pair: tuple[int, int], highest: int) -> None:
    positive, negative = (int(sums[0, 0]) for sums in pair_sums(np.array([pair], np.int8)))
    assert (highest * positive <= 32767 and highest * negative >= -32768) == int16_exact(pair, highest)


def test_pairs_start_at_even_positions_and_an_odd_rest_stands_alone() -> None:
    positive, negative = pair_sums(np.array([[1, 2, 100, -100, -7]], np.int8))
    np.testing.assert_array_equal(positive, [[3, 100, 0]])
    np.testing.assert_array_equal(negative, [[0, -100, -7]])


@pytest.mark.parametrize(
    ("weights", "clip", "saturates"),
    [
        ([[64, 64]], None, False),
        ([[64, 65]], None, True),
        ([[-64, -65]], None, True),
        ([[127, -127]], None, False),
        ([[127, 0, 127, 0]], None, False),
        ([[0, 127, 127, 0]], None, False),
        ([[127, 127]], (0, 129), False),
        ([[127, 127]], (0, 130), True),
        ([[127, 127]], (0, 15), False),
    ],
    ids=["7 bit", "just over", "negative", "opposite", "apart", "across pairs", "clip 129", "clip 130", "4 bit"],
)
def test_a_layer_saturates_at_the_edge(weights: Any, clip: Any, saturates: bool) -> None:
    result = saturation(layer(weights, clip=clip), cpu=UNSAFE)
    assert result.checked == 1
    assert bool(result.layers) == (not result.safe_without_vnni) == result.affected_here == saturates


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_matrix_products_reduce_over_their_inputs(op: str) -> None:
    along = np.array([[100, 100], [0, 0]]) if op == "Gemm" else np.array([[100, 0], [100, 0]])
    assert saturation(layer(along, op=op), cpu=SAFE).layers[0].pairs == 1
    assert saturation(layer(along.T, op=op), cpu=SAFE).layers == ()


@pytest.mark.parametrize(
    ("positions", "saturates"),
    [([(0, 0, 0), (0, 0, 1)], True), ([(0, 0, 0), (1, 0, 0)], True), ([(0, 0, 0), (1, 1, 1)], False)],
    ids=["neighbouring pixels", "neighbouring channels", "neither"],
)
def test_convolutions_are_checked_in_both_layouts(positions: list[tuple[int, int, int]], saturates: bool) -> None:
    weights = np.zeros((1, 2, 2, 2), np.int8)
    for position in positions:
        weights[(0, *position)] = 100
    assert bool(saturation(layer(weights, op="Conv"), cpu=SAFE).layers) == saturates


def test_int8_activations_run_as_uint8() -> None:
    risk = saturation(layer([[127, 127]], activation="s8"), cpu=SAFE).layers[0]
    assert (risk.activation_max, risk.worst) == (255, 255 * 254)


def test_depthwise_convolutions_are_exact_and_not_counted() -> None:
    result = saturation(models.mobilenet(), cpu=UNSAFE)
    assert result.checked == 8 - 2
    assert result.affected_here


@pytest.mark.parametrize(
    ("limit", "bits"), [(64, 8), (127, 7), (127, 4)], ids=["7-bit weights", "7-bit codes", "4-bit codes"]
)
def test_reduced_ranges_are_safe(limit: int, bits: int) -> None:
    net = Net()
    x = net.relu6(net.input("x", ("N", 16, 8, 8)), bits=bits)
    result = saturation(net.model(net.signed(net.conv(x, 32, 16, limit=limit)).name), cpu=UNSAFE)
    assert (result.checked, result.layers, result.affected_here) == (1, (), False)


def test_products_of_activations_are_no_layers() -> None:
    net = Net()
    x = net.signed(net.input("x", ("N", 4, 4)))
    assert saturation(net.model(net.signed(net.op("MatMul", x.name, x.name)).name), cpu=SAFE).checked == 0


@pytest.mark.parametrize(
    ("info", "saturates"),
    [
        ({"arch": "X86_64", "flags": ["avx2", "avx512_vnni"]}, False),
        ({"arch": "X86_64", "flags": ["avx2", "avx512vnni"]}, False),
        ({"arch": "X86_64", "flags": ["avx2", "avx_vnni"]}, False),
        ({"arch": "X86_64", "flags": ["avx2", "avx512f", "avx512bw"]}, True),
        ({"arch": "X86_64", "flags": ["sse4_2", "avx"]}, False),
        ({"arch": "ARM_8", "brand_raw": "Neoverse", "flags": ["asimd", "asimddp", "i8mm"]}, False),
        ({}, False),
    ],
    ids=["vnni", "vnni spelt otherwise", "avx-vnni", "avx512 only", "before avx2", "arm", "unknown"],
)
def test_cpu_flags_decide(info: dict[str, Any], saturates: bool) -> None:
    cpu = cpu_from(info)
    assert cpu.saturates == saturates
    assert cpu.arch == info.get("arch", "unknown")
    assert ("asimddp" in cpu.flags) == ("asimddp" in info.get("flags", []))


def test_report_of_a_file_names_this_machine(tmp_path: Path) -> None:
    onnx.save(models.residual(), tmp_path / "m.onnx")
    result = saturation(tmp_path / "m.onnx")
    assert result.checked == 6
    assert result.layers[0].name == "node_conv_4"
    assert result.layers[0].worst > result.layers[0].limit == 32767
    assert result.affected_here == this_cpu().saturates
    assert this_cpu().arch != "unknown"


def test_large_weights_are_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.zeros((7, 6), np.int8)
    weights[2, :2], weights[5, 4:] = 100, -120
    whole = saturation(layer(weights), cpu=UNSAFE).layers[0]
    assert (whole.pairs, whole.pairs_total, whole.worst) == (2, 21, 255 * 240)
    monkeypatch.setattr("runtime_tests.ort.saturation.BLOCK", 10)
    assert [len(block) for block in blocks(weights)] == [2, 2, 2, 1]
    assert saturation(layer(weights), cpu=UNSAFE).layers == (whole,)
