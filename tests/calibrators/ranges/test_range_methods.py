"""The range criteria: against exact distributions, order statistics, literal oracles, and on what breaks naive ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from calibrators.errors import DataError, InputError, ModelError
from calibrators.grid.numerics import fake_quant, quantize
from calibrators.grid.spec import QParams, QuantSpec
from calibrators.methods import RangeMethod, get_method, list_methods
from calibrators.methods.aciq import ACIQ
from calibrators.methods.entropy import Entropy
from calibrators.methods.lp import Lp
from calibrators.methods.minmax import MinMax
from calibrators.methods.mse import MSE
from calibrators.methods.percentile import Percentile
from calibrators.ranges.aciq import gauss_clip, laplace_clip
from calibrators.ranges.entropy import Histogram, divergence
from calibrators.ranges.histogram import BINS, Statistic
from calibrators.ranges.range_search import FRACTIONS, RangeError, lp_error, search_bounds
from calibrators.ranges.samples import BLOCK, Samples
from tests.support import oracle

METHODS = [info.name for info in list_methods() if isinstance(get_method(info.name), RangeMethod)]
ACTIVATION = QuantSpec(8)
WEIGHT = QuantSpec(8, signed=True, symmetric=True, axis=0, narrow=True)
SPECS = {
    "unsigned": ACTIVATION,
    "signed-asymmetric": QuantSpec(8, signed=True),
    "symmetric": QuantSpec(8, signed=True, symmetric=True),
    "narrow": QuantSpec(8, signed=True, symmetric=True, narrow=True),
    "unsigned-symmetric": QuantSpec(8, symmetric=True),
}
BY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
BY_METHOD = pytest.mark.parametrize("name", METHODS)
BY_BITS = pytest.mark.parametrize("bits", range(2, 9), ids=lambda bits: f"{bits}-bit")

QUANTILES = (np.arange(100_000) + 0.5) / 100_000
"""Probabilities whose quantiles stand for a distribution without sampling noise."""

ORACLE_TOLERANCE = 0.02
"""Relative: the table has three digits (0.4 %), 100 000 quantiles miss tails beyond 1e-5 (under 1 % of the error)."""

FLOAT32_ERROR = 1e-5
"""Relative: errors of weights are computed and compared in float32, 2**-24 per operation; the oracle's in float64."""


def observed(x: Tensor) -> Statistic:
    statistic = Statistic()
    statistic.update(x)
    return statistic


def quantiles(law: stats.rv_continuous) -> Tensor:
    return torch.from_numpy(law.ppf(QUANTILES)).to(torch.float32)


def mean_error(x: Tensor, qparams: QParams, p: float = 2.0) -> float:
    """Mean |round trip - x| ** p of a tensor with one scale, by the oracle."""
    spec, values = qparams.spec, x.numpy().astype(np.float64)
    back = oracle.round_trip(values, float(qparams.scale), int(qparams.zero_point), spec.qmin, spec.qmax)
    return float((np.abs(back - values) ** p).mean())


def ends(qparams: QParams) -> tuple[float, float]:
    spec, scale = qparams.spec, float(qparams.scale)
    return scale * (spec.qmin - int(qparams.zero_point)), scale * (spec.qmax - int(qparams.zero_point))


# What every method owes


@BY_BITS
@BY_METHOD
@BY_SPEC
def test_codes_stay_in_the_grid_and_zero_is_a_code(
    name: str, bits: int, spec: QuantSpec, generator: torch.Generator
) -> None:
    spec = replace(spec, bits=bits)
    x = torch.randn(2000, generator=generator) * 3 + 1
    qparams = get_method(name).activation(observed(x), spec)
    codes = quantize(x, qparams).to(torch.int32)
    assert spec.qmin <= int(codes.min()) <= int(codes.max()) <= spec.qmax
    assert spec.qmin <= int(qparams.zero_point) <= spec.qmax
    assert fake_quant(torch.zeros(1), qparams).item() == 0.0
    assert qparams.scale.shape == qparams.zero_point.shape == ()


@BY_METHOD
@pytest.mark.parametrize(
    "values",
    [[3.0], [-3.0], [0.0], [0.0] * 9, [2.5] * 1000, [1e-42], [3e38], [-1e-30, 2e-30], [0.0, 5.0]],
    ids=["one", "one-negative", "one-zero", "zeros", "constant", "subnormal", "huge", "tiny", "zero-and-one"],
)
@BY_SPEC
def test_degenerate_tensors(name: str, values: list[float], spec: QuantSpec) -> None:
    x = torch.tensor(values)
    for qparams in (get_method(name).activation(observed(x), spec), get_method(name).weight(x, spec)):
        scale = float(qparams.scale)
        assert 0.0 < scale < math.inf
        unreachable = spec.symmetric and not spec.signed  # this grid has no code for negative values
        kept = x.clamp(min=0.0) if unreachable else x
        assert float((fake_quant(kept, qparams) - kept).abs().max()) <= scale


@BY_METHOD
def test_any_split_and_order_of_the_batches_gives_the_same_bits(name: str, generator: torch.Generator) -> None:
    x = torch.randn(5000, generator=generator).exp() - 1
    whole = get_method(name).activation(observed(x), ACTIVATION)
    parts = Statistic()
    for batch in torch.split(x[torch.randperm(5000, generator=generator)], 617):
        parts.update(batch)
    streamed = get_method(name).activation(parts, ACTIVATION)
    assert torch.equal(streamed.scale, whole.scale)
    assert torch.equal(streamed.zero_point, whole.zero_point)


@BY_METHOD
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_per_channel_equals_per_tensor_channel_by_channel(
    name: str, symmetric: bool, generator: torch.Generator
) -> None:
    weight = torch.randn(5, 3, 3, 3, generator=generator) * torch.tensor([1.0, 1e-4, 50.0, 0.0, 1.0]).view(5, 1, 1, 1)
    weight[4].abs_()
    spec = QuantSpec(4, signed=True, symmetric=symmetric, axis=0)
    method = get_method(name)
    channels = method.weight(weight, spec)
    alone = [method.weight(channel, replace(spec, axis=None)) for channel in weight]
    assert torch.equal(channels.scale, torch.stack([q.scale for q in alone]))
    assert torch.equal(channels.zero_point, torch.stack([q.zero_point for q in alone]))


@BY_METHOD
def test_the_axis_may_be_any(name: str, generator: torch.Generator) -> None:
    weight = torch.randn(4, 6, 3, 3, generator=generator)
    along_1 = get_method(name).weight(weight, replace(WEIGHT, axis=1))
    along_0 = get_method(name).weight(weight.transpose(0, 1), WEIGHT)
    assert along_1.scale.shape == (6,)
    assert torch.equal(along_1.scale, along_0.scale)


def test_channels_of_a_large_weight_do_not_influence_each_other(generator: torch.Generator) -> None:
    weight = torch.randn(3, BLOCK // 2, generator=generator)  # more than one block of rows
    scale = MSE().weight(weight, WEIGHT).scale
    assert torch.equal(scale[2], MSE().weight(weight[2], replace(WEIGHT, axis=None)).scale)


def test_a_large_weight_with_one_scale(generator: torch.Generator) -> None:
    weight = torch.randn(BLOCK + 1, generator=generator)
    spec = replace(WEIGHT, bits=4, axis=None)
    assert MinMax().weight(weight, spec).scale.item() == pytest.approx(float(weight.abs().max()) / spec.qmax)
    assert mean_error(weight, MSE().weight(weight, spec)) == pytest.approx(0.0129, rel=ORACLE_TOLERANCE)


# Refusals


@BY_METHOD
def test_no_finite_value(name: str) -> None:
    with pytest.raises(DataError, match="2 values, none of them finite"):
        get_method(name).activation(observed(torch.tensor([math.nan, math.inf])), ACTIVATION)
    with pytest.raises(DataError, match="no value at all"):
        get_method(name).activation(Statistic(), ACTIVATION)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_weight_that_is_not_finite(bad: float) -> None:
    with pytest.raises(ModelError, match=r"shape \[2, 2\].* 1 of its 4 values"):
        MSE().weight(torch.tensor([[1.0, bad], [0.0, 2.0]]), WEIGHT)


def test_an_empty_weight() -> None:
    with pytest.raises(ModelError, match="empty"):
        MSE().weight(torch.zeros(4, 0), WEIGHT)


def test_activations_have_one_scale() -> None:
    with pytest.raises(InputError, match="one scale per tensor"):
        MinMax().activation(observed(torch.ones(2)), WEIGHT)


# minmax, percentile


@pytest.mark.parametrize("q", [90.0, 99.9, 99.999, 100.0], ids=str)
@pytest.mark.parametrize("sides", ["one-sided", "two-sided", "negative", "symmetric"])
def test_percentile_is_the_order_statistic(q: float, sides: str, generator: torch.Generator) -> None:
    x = torch.randn(20_000, generator=generator) + 0.3
    x = {"one-sided": x.relu(), "negative": -x.relu()}.get(sides, x)
    exact = np.sort(x.abs().numpy() if sides == "symmetric" else x.numpy()).astype(np.float64)
    tail = (100.0 - q) / 100.0 / (2.0 if sides == "two-sided" else 1.0) * len(exact)
    rank = len(exact) - math.floor(round(tail, 6))  # 6 digits: the tail is a multiple of 1e-5 of 20 000 values
    expected = {
        "one-sided": (None, exact[rank - 1]),
        "two-sided": (exact[-rank], exact[rank - 1]),
        "negative": (exact[-rank], None),
        "symmetric": (-exact[rank - 1], exact[rank - 1]),
    }[sides]
    spec = replace(ACTIVATION, signed=True, symmetric=sides == "symmetric")
    statistic = observed(x)
    binned = Percentile(q).bounds(Samples.of_statistic(statistic), spec)
    direct = Percentile(q).bounds(Samples.of_rows(x[None]), spec)
    for end, in_bins, in_rows in zip(expected, binned, direct, strict=True):
        if end is not None:
            assert abs(float(in_bins) - end) <= statistic.width
            assert float(in_rows) == end


def test_percentile_interpolates_inside_a_bin() -> None:
    centre, width = 1.0 - 0.5 / BINS, 1.0 / BINS  # R = 1: the last bin
    statistic = observed(torch.linspace(1.0 - width, 1.0, 1001)[1:])
    for q in (50.0, 75.0):
        _, hi = Percentile(q).bounds(Samples.of_statistic(statistic), ACTIVATION)
        ideal = centre + (q / 100.0 - 0.5) * width
        assert abs(float(hi) - ideal) <= width / statistic.count


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_minmax_is_exact(signed: bool) -> None:
    qparams = MinMax().activation(observed(torch.tensor([-1.0, 0.5, 4.1])), QuantSpec(8, signed=signed))
    assert qparams.scale.item() == np.float32(np.float64(np.float32(4.1)) / 255 + 1.0 / 255)
    assert int(qparams.zero_point) - qparams.spec.qmin == 50  # 1.0 / 0.02


# mse, mae, lp


@pytest.mark.parametrize(
    ("law", "spec", "expected"),
    [
        (stats.norm, QuantSpec(4, signed=True, symmetric=True, narrow=True), 0.0129),
        (stats.laplace, QuantSpec(4, signed=True, symmetric=True, narrow=True), 0.0547),
        (stats.halfnorm, QuantSpec(4), 0.00369),
    ],
    ids=["gauss-narrow", "laplace-narrow", "half-gauss-unsigned"],
)
def test_four_bit_mse_is_the_exact_minimum(law: stats.rv_continuous, spec: QuantSpec, expected: float) -> None:
    x = quantiles(law)
    assert mean_error(x, MSE().activation(observed(x), spec)) == pytest.approx(expected, rel=ORACLE_TOLERANCE)
    assert mean_error(x, MSE().weight(x, spec)) == pytest.approx(expected, rel=ORACLE_TOLERANCE)


@pytest.mark.parametrize(
    ("bits", "clip", "error"),
    [(2, 1.224, 0.1902), (3, 1.952, 0.0469), (5, 3.270 - 0.371, 0.0037), (6, 3.270, 0.0011)],
    ids=lambda value: str(value),
)
def test_gauss_clip_and_error_at_other_widths(bits: int, clip: float, error: float) -> None:
    spec = QuantSpec(bits, signed=True, symmetric=True, narrow=True)
    x = quantiles(stats.norm)
    qparams = MSE().activation(observed(x), spec)
    digits = 0.5 * 10 ** -len(str(error).split(".")[1]) / error  # what the table rounded away
    assert mean_error(x, qparams) == pytest.approx(error, rel=ORACLE_TOLERANCE + digits)
    assert ends(qparams)[1] == pytest.approx(clip, rel=0.03)  # the minimum is flat: 3 % of the clip is 0.5 % of error


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4], ids=["mae", "mse", "lp"])
@pytest.mark.parametrize("bits", [2, 4, 8], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_search_is_never_worse_than_the_whole_range(
    p: float, bits: int, symmetric: bool, generator: torch.Generator
) -> None:
    weight = torch.randn(6, 27, generator=generator) ** 3
    spec = QuantSpec(bits, signed=True, symmetric=symmetric, axis=0)
    chosen, widest = Lp(p).weight(weight, spec), MinMax().weight(weight, spec)
    for channel, row in enumerate(weight):
        error, bound = (
            mean_error(row, QParams(q.scale[channel], q.zero_point[channel], spec), p) for q in (chosen, widest)
        )
        assert error <= bound * (1.0 + FLOAT32_ERROR)


@pytest.mark.parametrize(("name", "p"), [("mae", 1.0), ("mse", 2.0)], ids=["mae", "mse"])
def test_mae_and_mse_are_lp(name: str, p: float, generator: torch.Generator) -> None:
    statistic = observed(torch.randn(1000, generator=generator))
    assert torch.equal(
        get_method(name).activation(statistic, ACTIVATION).scale, Lp(p).activation(statistic, ACTIVATION).scale
    )


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, signed=True, symmetric=True)], ids=["uint4", "int4"])
def test_search_finds_the_brute_force_minimum(spec: QuantSpec, generator: torch.Generator) -> None:
    samples = Samples.of_statistic(observed(torch.randn(3000, generator=generator) - 0.7))
    error = lp_error(samples, spec, 2.0)
    found = MSE().bounds(samples, spec)
    lo, hi = (torch.linspace(0.02, 1.0, 99, dtype=torch.float64) * end for end in (samples.lo, samples.hi))
    product = torch.cartesian_prod(lo, hi)[:, :, None]  # [99 * 99, 2, 1]
    brute = float(error(product[:, 0], product[:, 1]).min())
    assert float(error(*(end[None] for end in found))) <= brute * 1.01  # in turn, not jointly: within one percent


def test_golden_section_improves_on_the_grid(generator: torch.Generator) -> None:
    samples = Samples.of_rows(torch.randn(50, 27, generator=generator))
    error = lp_error(samples, replace(WEIGHT, bits=4), 2.0)
    coarse, fine = (
        torch.stack(search_bounds(error, samples, symmetric=True, refinements=steps))[:, None] for steps in (0, 12)
    )
    gain = (error(*coarse) - error(*fine))[0] / error(*coarse)[0]
    assert float(gain.min()) >= -FLOAT32_ERROR
    assert float(gain.max()) > 0.001


def test_higher_powers_clip_less() -> None:
    statistic = observed(quantiles(stats.norm))
    widths = [ends(Lp(p).activation(statistic, QuantSpec(4)))[1] for p in (1.0, 2.0, 3.0)]
    assert widths == sorted(widths)
    assert widths[0] < widths[2]


def test_batches_and_whole_tensor_reach_the_same_error(generator: torch.Generator) -> None:
    x = torch.randn(50_000, generator=generator).relu()
    spec = QuantSpec(6)
    streamed = mean_error(x, MSE().activation(observed(x), spec))
    lo, hi = MSE().bounds(Samples.of_rows(x[None]), spec)
    direct = float(lp_error(Samples.of_rows(x[None]), spec, 2.0)(lo[None], hi[None])) * float(x.max()) ** 2
    assert streamed == pytest.approx(direct, rel=0.001)  # bins are 1/64 of a step: (1/64)**2 of the error, and slack


# entropy


def finite_candidates(error: RangeError, samples: Samples) -> int:
    lo, hi = samples.lo.clamp(max=0.0), samples.hi.clamp(min=0.0)
    grid = FRACTIONS[:, None]
    return int(error(grid * lo, grid * hi).isfinite().sum())


@BY_BITS
@BY_SPEC
@pytest.mark.parametrize("values", [[0.3], [1.0, -1.0], [1e-3, 7.0, -7.0]], ids=["one", "two", "spread"])
def test_entropy_always_searches(bits: int, spec: QuantSpec, values: list[float]) -> None:
    spec = replace(spec, bits=bits)
    for samples in (Samples.of_statistic(observed(torch.tensor(values))), Samples.of_rows(torch.tensor([values]))):
        seen = samples.magnitudes() if spec.symmetric else samples
        assert finite_candidates(divergence(Histogram.of(seen), spec, 1e-4), seen) >= 16


@pytest.mark.parametrize("bits", [4, 8], ids=str)
@pytest.mark.parametrize("spec", [ACTIVATION, SPECS["symmetric"]], ids=["unsigned", "symmetric"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "two-sided"])
def test_entropy_clips_a_heavy_tail(bits: int, spec: QuantSpec, relu: bool) -> None:
    x = quantiles(stats.t(3))
    statistic = observed(x.relu() if relu else x)
    spec = replace(spec, bits=bits)
    width, widest = (np.subtract(*ends(m.activation(statistic, spec))[::-1]) for m in (Entropy(), MinMax()))
    assert width < 0.75 * widest


@pytest.mark.parametrize("sides", ["one-sided", "two-sided"])
@pytest.mark.parametrize("bits", [2, 3], ids=str)
def test_divergence_is_that_of_the_literal_algorithm(sides: str, bits: int, generator: torch.Generator) -> None:
    weight = torch.randn(2, 400, generator=generator)
    weight[:, ::7] = 0.0
    samples = Samples.of_rows(weight.abs() if sides == "one-sided" else weight)
    histogram, smoothing = Histogram.of(samples), 1e-3
    error = divergence(histogram, QuantSpec(bits), smoothing)
    fractions = torch.tensor([1.0, 0.71, 0.3])[:, None]
    lo, hi = fractions * samples.lo, fractions.flip(0) * samples.hi
    found = error(lo, hi)
    for candidate in range(3):
        for row in range(2):
            width = float(histogram.width[row])
            first = histogram.bins - math.ceil(-float(lo[candidate, row]) / width)
            end = histogram.bins + math.ceil(float(hi[candidate, row]) / width)
            mass = histogram.mass[row].numpy()
            expected = oracle.divergence(mass, first, end, 2**bits, smoothing)
            assert float(found[candidate, row]) == pytest.approx(expected, rel=1e-9)  # float64 sums of 800 terms


def test_entropy_reads_the_bins_of_the_statistic(generator: torch.Generator) -> None:
    statistic = observed(torch.randn(10_000, generator=generator))
    mass = Histogram.of(Samples.of_statistic(statistic)).mass[0]
    counts = statistic.counts.double()
    assert torch.equal(mass, torch.cat([counts[:BINS], counts[BINS + 1 :]]))


def test_entropy_does_not_see_exact_zeros(generator: torch.Generator) -> None:
    x = torch.randn(10_000, generator=generator).abs()
    with_zeros = torch.cat([x, torch.zeros(90_000)])
    scales = [Entropy().activation(observed(values), ACTIVATION).scale for values in (x, with_zeros)]
    assert torch.equal(*scales)


# aciq


@pytest.mark.parametrize(
    ("bits", "laplace", "laplace_relu", "gauss", "gauss_relu"),
    [
        (2, 2.83, 3.90, 1.71, 2.15),
        (3, 3.90, 5.03, 2.15, 2.56),
        (4, 5.03, 6.20, 2.56, 2.94),
        (5, 6.20, 7.41, 2.94, 3.29),
        (6, 7.41, 8.65, 3.29, 3.61),
        (8, 9.90, 11.16, 3.92, 4.21),
    ],
    ids=lambda value: str(value),
)
def test_aciq_clips(bits: int, laplace: float, laplace_relu: float, gauss: float, gauss_relu: float) -> None:
    found = laplace_clip(bits), laplace_clip(bits + 1), gauss_clip(bits), gauss_clip(bits + 1)
    assert found == pytest.approx((laplace, laplace_relu, gauss, gauss_relu), abs=0.01)  # two digits, cut off


@pytest.mark.parametrize("law", ["auto", "named"])
@pytest.mark.parametrize(
    ("distribution", "relu", "clip"),
    [(stats.laplace, False, 5.03), (stats.laplace, True, 6.20), (stats.norm, False, 2.56), (stats.norm, True, 2.94)],
    ids=["laplace", "laplace-relu", "gauss", "gauss-relu"],
)
def test_aciq_recognizes_the_law(law: str, distribution: stats.rv_continuous, relu: bool, clip: float) -> None:
    x = quantiles(distribution)
    x = x.relu() if relu else x
    named = "laplace" if distribution is stats.laplace else "gauss"
    lo, hi = ACIQ(named if law == "named" else "auto").bounds(Samples.of_statistic(observed(x)), QuantSpec(4))
    assert float(hi) == pytest.approx(clip, rel=0.005)  # moments of 1e5 quantiles in bins of 1/4096 of the range
    assert float(lo) == (0.0 if relu else pytest.approx(-clip, rel=0.005))


def test_aciq_follows_the_mean_only_where_the_grid_can() -> None:
    statistic = observed(quantiles(stats.norm) + 1.0)
    lo, hi = ACIQ().bounds(Samples.of_statistic(statistic), QuantSpec(4))
    assert float(lo + hi) / 2 == pytest.approx(1.0, abs=0.01)  # a bin is 1/1000 of sigma
    lo, hi = ACIQ().bounds(Samples.of_statistic(statistic), SPECS["symmetric"])
    assert float(hi) > float(-lo) or float(lo) == -float(hi)


def test_aciq_of_one_sign_on_a_symmetric_grid_has_no_extra_bit() -> None:
    x = quantiles(stats.norm).relu()
    _, hi = ACIQ("gauss").bounds(Samples.of_statistic(observed(x)), QuantSpec(4, signed=True, symmetric=True))
    assert float(hi) == pytest.approx(2.56, rel=0.005)
