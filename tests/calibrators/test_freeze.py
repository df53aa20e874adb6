"""From parameters to integers: biases, dead channels, the program against its simulation, bias correction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.corrections import correct_biases
from calibrators.errors import DataError, ModelError
from calibrators.freeze import BIAS_CODE_LIMIT, CalibrationResult
from calibrators.graph import constant
from calibrators.numerics import dequantize
from calibrators.place import PlacementOptions
from calibrators.program import DEQUANTIZE, QUANTIZE
from calibrators.simulate import sqnr
from exporter.capturing import capture
from tests.networks import NETWORKS, build, randomize

SQNR_8_BIT_DB = 20.0
"""Far below what 8 bits give on these networks (30 dB and more), far above what a misplaced scale leaves."""


def calibrated(model: nn.Module, x: Tensor, **options: object) -> CalibrationResult:
    placement = PlacementOptions(**options)  # type: ignore[arg-type]
    return calibrate(capture(model, x), [x], method="minmax", placement=placement)


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_program_is_close_to_the_float_model(name: str) -> None:
    model, x = build(name, batch=32)
    result = calibrated(model, x)
    expected, found = model(x).detach(), result.program(x)[0]
    noise = (expected - found).square().sum() / expected.square().sum()
    assert float(-10 * torch.log10(noise)) > SQNR_8_BIT_DB


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_every_bias_has_the_exact_product_scale(name: str) -> None:
    result = calibrated(*build(name))
    checked = 0
    for node in result.program.graph.nodes:
        if node.target not in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
            continue
        x, weight, bias = node.args[:3]
        product = constant(result.program, x.args[1]) * constant(result.program, weight.args[1])
        assert torch.equal(constant(result.program, bias.args[1]), product)
        assert constant(result.program, bias.args[0]).dtype == torch.int32
        checked += 1
    assert checked == len([site for site in result.placement.sites if site.kind == "bias"])


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_codes_stay_inside_their_grid(bits: int) -> None:
    model, x = build("pooled", batch=16)
    result = calibrated(model, x, weight_bits=bits, activation_bits=bits, first_last_bits=None)
    for site in result.placement.sites:
        if site.kind == "weight":
            codes = result.weights[site.name].codes
            assert int(codes.min()) >= -(2 ** (bits - 1)) + 1 and int(codes.max()) <= 2 ** (bits - 1) - 1
    for node in result.program.graph.nodes:
        if node.target is QUANTIZE:
            assert 0 <= node.args[3] < node.args[4] <= 2**bits - 1


def test_relu6_at_four_bits_is_a_bound_of_the_codes() -> None:
    """At 8 bits the clip stays in the program, where the runtime drops it; below, the codes saturate instead."""
    model, x = build("residual")
    clamp = torch.ops.aten.clamp.default
    full = calibrated(model, x).program
    low = calibrated(model, x, activation_bits=4, first_last_bits=None).program
    assert [node.target for node in full.graph.nodes].count(clamp) == 2
    assert [node.target for node in low.graph.nodes].count(clamp) == 0


def test_relu_of_codes_saturates_the_codes() -> None:
    model, x = build("pooled", batch=16)
    result = calibrated(model, x)
    [clamp] = [node for node in result.program.graph.nodes if node.target is torch.ops.aten.clamp.default]
    source, lo, hi = clamp.args
    assert source.target is QUANTIZE and [user.target for user in clamp.users] == [DEQUANTIZE]
    assert (lo, hi) == (int(constant(result.program, source.args[2])), 255)


def test_dead_channel_keeps_its_bias() -> None:
    """A channel without weights is its bias: no scale may round that away."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.777
    x = torch.randn(8, 3, 6, 6)
    result = calibrated(model, x)
    coded = result.biases["0.bias"]
    assert float(dequantize(coded.codes, coded.qparams)[1]) == pytest.approx(0.777, rel=1e-6)
    assert torch.equal(result.weights["0.weight"].codes[1], torch.zeros_like(result.weights["0.weight"].codes[1]))
    assert "scale widened in 1 channels" in result.record["notes"][0]


def test_bias_that_would_overflow_widens_the_weight_scale() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        model[0].weight[2] *= 1e-9
        model[0].bias[2] = 5.0
    result = calibrated(model, torch.randn(8, 3, 6, 6))
    coded = result.biases["0.bias"]
    assert int(coded.codes.abs().max()) <= BIAS_CODE_LIMIT
    assert float(dequantize(coded.codes, coded.qparams)[2]) == pytest.approx(5.0, rel=1e-6)


def test_constant_activations_and_zero_weights_calibrate() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result = calibrated(model.eval(), torch.ones(4, 1, 3, 3))
    assert torch.equal(result.program(torch.ones(4, 1, 3, 3))[0], torch.zeros(4, 2, 3, 3))


def test_result_does_not_depend_on_the_batch_split() -> None:
    model, x = build("pooled", batch=12)
    graph = capture(model, x)
    whole = calibrate(graph, [x], method="mse")
    parts = calibrate(graph, [x[9:], x[:2], x[2:9]], method="mse")
    for name, qparams in whole.activations.items():
        assert torch.equal(qparams.scale, parts.activations[name].scale), name
        assert torch.equal(qparams.zero_point, parts.activations[name].zero_point), name


def test_sqnr_orders_bit_widths() -> None:
    model, x = build("residual", batch=16)
    values = []
    for bits in (4, 6, 8):
        result = calibrated(model, x, weight_bits=bits, activation_bits=bits, first_last_bits=None)
        noise = sqnr(result, [(x,)])
        values.append((noise["clamp"], noise["stem.weight"]))
    assert values == sorted(values)


def test_bias_correction_removes_the_mean_error() -> None:
    """At 3 bits nearest rounding shifts every channel; afterwards the output's means agree far better."""
    model, x = build("residual", batch=64)
    result = calibrated(model, x, weight_bits=3, first_last_bits=None)
    corrected = correct_biases(result, [(x,)])
    expected = model(x).mean(0)
    before, after = (r.program(x)[0].mean(0) - expected for r in (result, corrected))
    assert float(after.norm()) < 0.1 * float(before.norm())
    assert torch.equal(corrected.weights["stem.weight"].codes, result.weights["stem.weight"].codes)


def test_no_batches() -> None:
    model, x = build("residual")
    with pytest.raises(DataError, match="no calibration batches"):
        calibrate(capture(model, x), [], method="minmax")


def test_overflow_inside_the_model_names_the_value() -> None:
    class Explodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv((x * 1e30) * 1e30)

    x = torch.ones(2, 1, 2, 2)
    with pytest.raises(DataError, match=r"4 values of activation mul_1 .*NaN or infinite|8 values of activation mul_1"):
        calibrate(capture(randomize(Explodes()), x), [x], method="minmax")


def test_weights_that_are_not_finite() -> None:
    model, x = build("residual")
    with torch.no_grad():
        model.get_parameter("point.weight")[0] = float("nan")
    with pytest.raises(ModelError, match=r"point\.weight.*NaN"):
        calibrate(capture(model, x), [x], method="minmax")
