"""From parameters to integers: grids, codes that a method brings, biases, dead channels, bias correction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.errors import DataError, InputError, ModelError
from calibrators.graph.aten import constant
from calibrators.grid.numerics import dequantize, quantize
from calibrators.grid.spec import QuantizedTensor
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import BIAS_CODE_LIMIT, CalibrationResult, freeze, widen
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE
from calibrators.rewrites.bias_correction import correct_biases
from exporter.frontend.capture import capture
from tests.support.networks import NETWORKS, build, randomize
from tests.support.noise import noise_of

SQNR_8_BIT_DB = 20.0
"""Far below what 8 bits give on these networks (30 dB and more), far above what a misplaced scale leaves."""


def calibrated(model: nn.Module, x: Tensor, *, target: str = "ort-cpu", **options: object) -> CalibrationResult:
    placement = PlacementOptions(**options)  # type: ignore[arg-type]
    return calibrate(capture(model, x), [x], method="minmax", target=target, placement=placement)


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
            lowest = -127 if bits == 8 else -(2 ** (bits - 1))
            assert int(codes.min()) >= lowest and int(codes.max()) <= 2 ** (bits - 1) - 1
    widths = set()
    for node in result.program.graph.nodes:
        if node.target is QUANTIZE:
            width = result.placement.by_name[node.args[-1]].spec.bits
            assert 0 <= node.args[3] < node.args[4] <= 2**width - 1
            widths.add(width)
    assert widths == {bits, 8}


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
    assert result.record.notes[0].startswith("0.weight: 1 of 4 scales changed")


def test_bias_that_would_overflow_widens_the_weight_scale() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        model[0].weight[2] *= 1e-9
        model[0].bias[2] = 5.0
    result = calibrated(model, torch.randn(8, 3, 6, 6))
    coded = result.biases["0.bias"]
    assert int(coded.codes.abs().max()) <= BIAS_CODE_LIMIT
    assert float(dequantize(coded.codes, coded.qparams)[2]) == pytest.approx(5.0, rel=1e-6)


# --- low bits --------------------------------------------------------------------------------------------------------


def random_codes(result: CalibrationResult, seed: int = 0) -> dict[str, QuantizedTensor]:
    """Codes and zero points from all over the grid of each weight, on the scales of `result`."""
    generator = torch.Generator().manual_seed(seed)

    def integers(like: Tensor, lowest: int, highest: int) -> Tensor:
        return torch.randint(lowest, highest + 1, like.shape, generator=generator, dtype=like.dtype)

    found = {}
    for name, coded in result.weights.items():
        spec, zero_point = coded.qparams.spec, coded.qparams.zero_point
        if not spec.symmetric:
            zero_point = integers(zero_point, spec.qmin, spec.qmax)
        found[name] = QuantizedTensor(
            integers(coded.codes, spec.qmin, spec.qmax), dataclasses.replace(coded.qparams, zero_point=zero_point)
        )
    return found


@pytest.mark.parametrize("per_tensor", [False, True], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_stored_weights_are_those_of_the_grid(bits: int, per_tensor: bool) -> None:
    """int8 codes with zero point 0 stand for the very floats that codes and zero points of the grid stand for."""
    options = {"weight_bits": bits, "first_last_bits": None, "per_tensor_weights": per_tensor}
    result = calibrated(*build("mlp"), target="ort-cpu-vnni", **options)
    chosen = random_codes(result)
    program = freeze(result.placement, result.activations, chosen).program
    stored = {node.args[-1]: node.args for node in program.graph.nodes if node.target is DEQUANTIZE}
    for name, coded in chosen.items():
        codes, scale, zero_point = (constant(program, node) for node in stored[name][:3])
        assert codes.dtype == zero_point.dtype == torch.int8
        assert not zero_point.any() and zero_point.shape == scale.shape
        on_grid = coded.codes.numpy().astype(np.float32), coded.qparams.zero_point.numpy().astype(np.float32)
        centred = on_grid[0] - (on_grid[1] if per_tensor else on_grid[1][:, None])
        assert np.array_equal(codes.numpy().astype(np.float32), centred)
        expected = centred * (scale.numpy() if per_tensor else scale.numpy()[:, None])
        found = DEQUANTIZE(codes, scale, zero_point, *stored[name][3:]).numpy()
        assert np.array_equal(found.view(np.int32), expected.view(np.int32))
        assert torch.equal(torch.from_numpy(expected), dequantize(coded.codes, coded.qparams))


def test_extreme_codes_of_seven_bits_fit_their_container() -> None:
    grid = {"weight_bits": 7, "first_last_bits": None, "per_tensor_weights": True}
    result = calibrated(*build("mlp"), target="ort-cpu-vnni", **grid)
    coded = result.weights["layers.0.weight"]
    codes = torch.full_like(coded.codes, -64)
    codes[0] = 63
    for zero_point, ends in ((63, (-127, 0)), (-64, (0, 127))):
        qparams = dataclasses.replace(coded.qparams, zero_point=torch.tensor(zero_point, dtype=torch.int32))
        chosen = {**result.weights, "layers.0.weight": QuantizedTensor(codes, qparams)}
        program = freeze(result.placement, result.activations, chosen).program
        [node] = [n for n in program.graph.nodes if n.target is DEQUANTIZE and n.args[-1] == "layers.0.weight"]
        stored = constant(program, node.args[0])
        assert (int(stored.min()), int(stored.max())) == ends


def test_one_sided_weights_use_every_level() -> None:
    """A symmetric grid of 2 bits would give positive weights the codes 0 and 1 only."""
    model = randomize(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2)))
    with torch.no_grad():
        model[0].weight.abs_()
    coded = calibrated(model, torch.randn(8, 64), weight_bits=2, first_last_bits=None).weights["0.weight"]
    assert coded.codes.unique().tolist() == [-2, -1, 0, 1]
    assert coded.qparams.zero_point.tolist() == [-2] * 8


# --- what a method brings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_of_a_method_are_kept(bits: int) -> None:
    result = calibrated(*build("pooled"), target="ort-cpu-vnni", weight_bits=bits, first_last_bits=None)
    chosen = random_codes(result)
    frozen = freeze(result.placement, result.activations, chosen)
    for name, coded in chosen.items():
        assert not torch.equal(coded.codes, result.weights[name].codes)
        assert torch.equal(frozen.weights[name].codes, coded.codes)
        assert torch.equal(frozen.weights[name].qparams.scale, coded.qparams.scale)
        assert torch.equal(frozen.weights[name].qparams.zero_point, coded.qparams.zero_point)
    assert frozen.record.notes == ()


def test_parameters_and_codes_may_be_mixed() -> None:
    result = calibrated(*build("mlp"), weight_bits=4)
    codes = random_codes(result)["layers.2.weight"]
    qparams = {name: coded.qparams for name, coded in result.weights.items()}
    frozen = freeze(result.placement, result.activations, {**qparams, "layers.2.weight": codes})
    assert torch.equal(frozen.weights["layers.2.weight"].codes, codes.codes)
    for name in ("layers.0.weight", "layers.4.weight"):
        assert torch.equal(frozen.weights[name].codes, result.weights[name].codes)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda c: dataclasses.replace(c, codes=c.codes + 2), id="beyond-the-grid"),
        pytest.param(lambda c: dataclasses.replace(c, codes=c.codes.T), id="other-shape"),
        pytest.param(lambda c: dataclasses.replace(c, codes=c.codes.to(torch.int32)), id="other-type"),
        pytest.param(
            lambda c: dataclasses.replace(
                c, qparams=dataclasses.replace(c.qparams, zero_point=c.qparams.zero_point + 9)
            ),
            id="zero-point-off-the-grid",
        ),
    ],
)
def test_codes_off_the_grid_are_refused(spoil: Callable[[QuantizedTensor], QuantizedTensor]) -> None:
    result = calibrated(*build("mlp"), weight_bits=2, first_last_bits=None)
    chosen = {**result.weights, "layers.0.weight": spoil(result.weights["layers.0.weight"])}
    with pytest.raises(InputError, match=r"codes of weight 'layers\.0\.weight' are .* its grid holds torch\.int8"):
        freeze(result.placement, result.activations, chosen)


def test_zero_points_of_eight_bits_are_zero() -> None:
    result = calibrated(*build("mlp"))
    coded = result.weights["layers.0.weight"]
    moved = dataclasses.replace(coded.qparams, zero_point=torch.ones_like(coded.qparams.zero_point))
    with pytest.raises(InputError, match="zero points 0 to 0"):
        freeze(
            result.placement,
            result.activations,
            {**result.weights, "layers.0.weight": QuantizedTensor(coded.codes, moved)},
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_biases_of_a_method_replace_the_graphs(dtype: torch.dtype) -> None:
    result = calibrated(*build("mlp"), weight_bits=4)
    bias = torch.linspace(-2, 2, 16, dtype=dtype)
    frozen = freeze(result.placement, result.activations, result.weights, {"layers.0.bias": bias})
    coded, before = frozen.biases["layers.0.bias"], result.biases["layers.0.bias"]
    assert torch.equal(coded.qparams.scale, before.qparams.scale)
    exact = bias.numpy().astype(np.float64) / coded.qparams.scale.numpy().astype(np.float64)
    assert np.array_equal(coded.codes.numpy(), np.rint(exact).astype(np.int32))
    assert torch.equal(frozen.biases["layers.4.bias"].codes, result.biases["layers.4.bias"].codes)


def test_bias_of_no_site_is_named() -> None:
    result = calibrated(*build("mlp"))
    with pytest.raises(InputError, match=r"unknown bias 'layers\.0\.bais'\. Did you mean 'layers\.0\.bias'"):
        freeze(result.placement, result.activations, result.weights, {"layers.0.bais": torch.zeros(16)})


# --- biases that ask for a wider scale -------------------------------------------------------------------------------


def tiny_and_dead(**options: object) -> CalibrationResult:
    """A layer whose channel 1 has codes of zeros, whose channel 2 has tiny weights, and both a large bias."""
    model = randomize(nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight[2] *= 1e-9
        model[0].bias.zero_()
    result = calibrated(model, torch.randn(32, 12), weight_bits=4, first_last_bits=None, **options)
    coded = result.weights["0.weight"]
    codes, scale = coded.codes.clone(), coded.qparams.scale.clone()
    codes[1] = coded.qparams.zero_point[1]
    scale[1] = 1e-12
    weights = {**result.weights, "0.weight": QuantizedTensor(codes, dataclasses.replace(coded.qparams, scale=scale))}
    return dataclasses.replace(result, weights=weights)


def test_only_the_channels_concerned_are_widened() -> None:
    given = tiny_and_dead()
    before = given.weights["0.weight"]
    bias = torch.tensor([0.1, 5.0, -5.0, 0.1])
    frozen = freeze(given.placement, given.activations, given.weights, {"0.bias": bias})
    after, coded = frozen.weights["0.weight"], frozen.biases["0.bias"]
    assert (after.qparams.scale != before.qparams.scale).tolist() == [False, True, True, False]
    assert torch.equal(after.codes[[0, 1, 3]], before.codes[[0, 1, 3]])
    assert torch.equal(after.qparams.zero_point, before.qparams.zero_point)
    anew = int((after.codes[2] != before.codes[2]).sum())
    assert torch.equal(after.codes[2], quantize(dequantize(before.codes, before.qparams), after.qparams)[2])
    assert coded.codes.abs().max() <= BIAS_CODE_LIMIT < 1.001 * coded.codes[1:3].abs().min()
    assert torch.allclose(dequantize(coded.codes, coded.qparams), bias, rtol=0, atol=float(coded.qparams.scale.max()))
    [note] = frozen.record.notes
    assert note.startswith("0.weight: 2 of 4 scales changed") and f"{anew} codes of the method" in note
    assert anew > 0


def test_one_scale_for_all_channels_is_widened_for_the_largest_bias() -> None:
    result = calibrated(*build("mlp"), weight_bits=4, per_tensor_weights=True)
    bias = torch.zeros(16)
    bias[3] = 1e9
    frozen = freeze(result.placement, result.activations, result.weights, {"layers.0.bias": bias})
    coded = frozen.biases["layers.0.bias"]
    assert 0.999 * BIAS_CODE_LIMIT < int(coded.codes.max()) <= BIAS_CODE_LIMIT
    assert frozen.record.notes[0].startswith("layers.0.weight: 1 of 1 scales changed")


def test_widened_parameters_stand_smaller_activation_scales() -> None:
    """With a margin of 4 nothing is rounded anew when a method quarters the activation scales."""
    given = tiny_and_dead()
    biases = {"0.bias": torch.tensor([0.1, 5.0, -5.0, 0.1])}
    smaller = {
        name: dataclasses.replace(qparams, scale=qparams.scale / 4) for name, qparams in given.activations.items()
    }
    qparams = {name: coded.qparams for name, coded in given.weights.items()}
    notes = {}
    for margin in (1.0, 4.0):
        wide = widen(given.placement, given.activations, qparams, biases, margin=margin)
        coded = {name: QuantizedTensor(given.weights[name].codes, wide[name]) for name in wide}
        notes[margin] = freeze(given.placement, smaller, coded, biases).record.notes
    assert len(notes[1.0]) == 1 and notes[4.0] == ()


@pytest.mark.parametrize("bits", [4, 8])
def test_widening_twice_changes_nothing(bits: int) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        model[0].weight[0] *= 1e-9
        model[0].weight[1] = 0
        model[0].bias[:2] = 5.0
    result = calibrated(model, torch.randn(8, 3, 6, 6), weight_bits=bits, first_last_bits=None)
    qparams = {name: coded.qparams for name, coded in result.weights.items()}
    wide = widen(result.placement, result.activations, qparams)
    assert all(torch.equal(wide[name].scale, qparams[name].scale) for name in qparams)
    frozen = freeze(result.placement, result.activations, wide)
    assert frozen.record.notes == () != result.record.notes
    assert all(torch.equal(frozen.weights[name].codes, result.weights[name].codes) for name in wide)


# --- the whole -------------------------------------------------------------------------------------------------------


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
        noise = noise_of(result, (x,))
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
    with pytest.raises(DataError, match="the calibration data has no batches"):
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
