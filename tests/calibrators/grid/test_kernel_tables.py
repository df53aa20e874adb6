"""Formulas of the families of processors: what they share, where they differ, and codes that never occur."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from calibrators.grid.kernel_tables import (
    KERNELS,
    CodeGrid,
    add,
    arithmetics,
    average,
    differing,
    layer,
    mean,
    mul,
    sigmoid,
)
from calibrators.grid.processors import FAMILIES, PROCESSORS

EVERY = [*FAMILIES.values()]
TIED = CodeGrid(0.25, 128), CodeGrid(0.125, 3), CodeGrid(0.25, 128)
"""Half of all sums lie on ties."""
ODD = CodeGrid(0.0213, 117), CodeGrid(0.0131, 9), CodeGrid(0.0307, 120)
TWICE = 2.0**-6
"""Largest distance from a tie at which two roundings give another code: half a unit of the first, of products and means
of ODD, which have at least 5 bits after it."""


def near_tie(arithmetic: str) -> float:
    """Return how near a tie a result may be rounded to either side."""
    return TWICE if arithmetic == "Q31" else 1e-4


def every(grid: CodeGrid) -> np.ndarray:
    return grid.codes(unused=True)


@pytest.mark.parametrize("arithmetic", ["fused", "plain", "plain, one b", "values", "fixed", "fixed, half up", "Q31"])
def test_a_sum_is_the_nearest_code_except_next_to_ties(arithmetic: str) -> None:
    a, b, y = ODD
    left, right = every(a)[:, None].astype(np.float64), every(b).astype(np.float64)
    exact = ((left - 117) * float(a.step) + (right - 9) * float(b.step)) / float(y.step) + 120
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-4
    found = add(every(a)[:, None], every(b), a, b, y, arithmetic)
    assert np.array_equal(found[clear], np.rint(exact).clip(0, 255)[clear])
    assert clear.mean() > 0.99


@pytest.mark.parametrize("arithmetic", ["fused", "plain", "values", "rounded", "Q31"])
def test_a_product_is_the_nearest_code_except_next_to_ties(arithmetic: str) -> None:
    a, b, y = ODD
    left, right = every(a)[:, None].astype(np.float64), every(b).astype(np.float64)
    exact = (left - 117) * float(a.step) * (right - 9) * float(b.step) / float(y.step) + 120
    clear = np.abs(exact - np.floor(exact) - 0.5) > near_tie(arithmetic)
    found = mul(every(a)[:, None], every(b), a, b, y, arithmetic)
    assert np.array_equal(found[clear], np.rint(exact).clip(0, 255)[clear])


@pytest.mark.parametrize("arithmetic", ["rounded", "with zero", "Q31"])
def test_a_mean_is_the_nearest_code_except_next_to_ties(arithmetic: str) -> None:
    x, y = replace(ODD[0], count=49), ODD[2]
    exact = (x.codes().astype(np.float64) - 49 * 117) / 49 * float(x.step) / float(y.step) + 120
    clear = np.abs(exact - np.floor(exact) - 0.5) > near_tie(arithmetic)
    found = mean(x.codes(), x, y, arithmetic)
    assert len(found) == 49 * 255 + 1 and clear.mean() > 1 - 3 * near_tie(arithmetic)
    assert np.array_equal(found[clear], np.rint(exact).clip(0, 255)[clear])


def test_averages_of_windows_round_halves_of_int8_codes_away_from_0() -> None:
    sums, counts = np.array([8, 10, 12, 1018, 1022, 3]), np.array([4, 4, 4, 4, 4, 2])
    assert average(sums, counts, CodeGrid(0.5, 3)).tolist() == [2, 2, 3, 255, 255, 1]
    assert average(sums - 128 * counts, counts, CodeGrid(0.5, 3, -128, 127, -128)).tolist() == [
        *(-126, -126, -125, 127, 127, -127),
    ]


@pytest.mark.parametrize("arithmetic", ["Q31", "float64"])
def test_codes_of_a_layer_are_the_nearest_except_next_to_ties(arithmetic: str) -> None:
    sums, scales = np.arange(-20_000, 20_000)[:, None], np.array([0.002, 0.0071], np.float32)
    y = ODD[2]
    exact = sums * (np.float64(np.float32(0.0213)) * scales) / float(y.step) + 120
    clear = np.abs(exact - np.floor(exact) - 0.5) > (TWICE if arithmetic == "Q31" else 0.0)
    found = layer(sums, np.float32(0.0213), scales, y, arithmetic)
    assert np.array_equal(found[clear], np.rint(exact).clip(0, 255)[clear]) and clear.mean() > 0.96


def test_means_on_ties_differ_where_the_zero_point_is_odd() -> None:
    families = [FAMILIES["x86-vnni"], FAMILIES["xnnpack"]]
    x = CodeGrid(0.5, 115, count=64)
    differences = [int(differing("mean", [x], CodeGrid(0.125, zero), families).sum()) for zero in (132, 133)]
    assert differences[0] == 0 and differences[1] > 100
    assert len(arithmetics("mean", PROCESSORS.values())) == 1


@pytest.mark.parametrize("arithmetic", ["fused", "plain"])
def test_the_sigmoid_is_accurate_and_saturates(arithmetic: str) -> None:
    x = np.linspace(-30, 30, 4001, dtype=np.float32)
    found = sigmoid(x, arithmetic)
    assert np.abs(found - 1 / (1 + np.exp(-x.astype(np.float64)))).max() < 3e-7
    assert found.dtype == np.float32
    assert (found[0], found[-1]) == (
        sigmoid(np.float32([-18]), arithmetic)[0],
        sigmoid(np.float32([18]), arithmetic)[0],
    )


def test_sums_on_ties_differ_between_arm_and_x86() -> None:
    different = differing("add", TIED[:2], TIED[2], EVERY)
    assert different.shape == (256, 256)
    assert different.sum() > 1000
    assert not differing("add", TIED[:2], TIED[2], [PROCESSORS["x86-vnni"], PROCESSORS["x86-avx2"]]).any()


def test_a_ratio_that_rounds_up_to_a_power_of_two_leaves_fixed_point() -> None:
    """With 22 bits for the larger multiplier 1 - 2**-24 has none, and the kernel adds values instead."""
    y = CodeGrid(0.25, 128)
    below = CodeGrid(float(np.nextafter(np.float32(0.25), np.float32(0))), 128)
    inside, outside = (add(every(x)[:, None], every(x), x, x, y, "fixed") for x in (CodeGrid(0.25, 128), below))
    assert np.array_equal(inside, add(every(y)[:, None], every(y), y, y, y, "values"))
    assert np.array_equal(outside, add(every(y)[:, None], every(y), below, below, y, "values"))


def test_only_codes_that_occur_count() -> None:
    a, b, y = TIED
    different = differing("add", (a, b), y, EVERY)
    narrow = CodeGrid(a.scale, a.zero_point, 120, 135)
    assert np.array_equal(differing("add", (narrow, b), y, EVERY), different[120:136])


def test_the_order_of_operands_counts_where_shapes_differ() -> None:
    rng = np.random.default_rng(0)
    families = [PROCESSORS["x86-avx2"]]
    found = 0
    for _ in range(20):
        unit = float(rng.uniform(0.001, 0.01))
        a, b, y = (CodeGrid(unit * k, int(rng.integers(0, 256))) for k in rng.integers(1, 8, 3))
        assert not differing("add", (a, b), y, families).any()
        found += int(differing("add", (a, b), y, families, broadcast=True).sum())
    assert found > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_signed_codes_are_shifted_unsigned_ones(kernel: str) -> None:
    """In fixed point, where zero points are subtracted first, the container does not matter."""
    signed = [CodeGrid(g.scale, g.zero_point - 128, -128, 127, -128) for g in ODD]
    families = [PROCESSORS["arm64"], PROCESSORS["wasm"]]
    *inputs, y = ODD[3 - 1 - KERNELS[kernel] :]
    *shifted, to = signed[3 - 1 - KERNELS[kernel] :]
    assert np.array_equal(differing(kernel, inputs, y, families), differing(kernel, shifted, to, families))


def test_the_formulas_need_no_torch() -> None:
    code = "import sys, calibrators.grid.kernel_tables, calibrators.grid.processors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
