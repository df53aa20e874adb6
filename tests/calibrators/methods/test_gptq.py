"""Hessian rounding: against a plain loop, on every kind of layer and of input, and through to the runtime."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calibrators.calibration import calibrate
from calibrators.errors import DataError, InputError
from calibrators.execution.activation_cache import Memory
from calibrators.execution.measure import relative_errors
from calibrators.grid.limits import Limits
from calibrators.grid.numerics import dequantize, grid_of, quantize
from calibrators.grid.spec import QParams, QuantSpec
from calibrators.methods import get_method
from calibrators.methods.mse import MSE
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from calibrators.reconstruction import layer_rounding
from calibrators.reconstruction.hessian_rounding import BLOCK, Rounded, Rounder
from calibrators.reconstruction.moments import Im2col, Moments, half_of
from exporter import export
from exporter.emission.build_model import needed_opset, to_onnx
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.proof import parity
from tests.support.folded import folded_network, output_error
from tests.support.networks import build, randomize

W4 = QuantSpec(bits=4, signed=True, axis=0)
ROUNDING = 1e-9
"""Relative float64 noise of sums that are taken in two orders."""


# One weight -----------------------------------------------------------------------------------------------------------


def oracle(weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, hessian: np.ndarray, damping: float) -> Any:
    """Algorithm 1 of the paper for one group, column by column, with the inverse eliminated step by step; W4 codes."""
    left, rows = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    inverse = np.linalg.inv(hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian)))
    for j in range(weight.shape[1]):
        rows[:, j] = np.clip(np.round(left[:, j] / scale[:, j]) + zero_point[:, j], -8, 7)
        error = (left[:, j] - (rows[:, j] - zero_point[:, j]) * scale[:, j]) / inverse[j, j]
        left[:, j:] -= np.outer(error, inverse[j, j:])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]  # the column leaves the problem
    return rows


def inputs_of(columns: int, positions: int, generator: torch.Generator, groups: int = 1) -> Tensor:
    """Correlated nonnegative inputs, [groups, columns, positions]."""
    mixing = torch.randn(groups, columns, columns, generator=generator) / columns**0.5
    return (mixing @ torch.randn(groups, columns, positions, generator=generator) + 0.3).relu()


def moments_of(quantized: Tensor, exact: Tensor | None = None, pieces: int = 2) -> Moments:
    moments = Moments(
        Im2col(groups=quantized.shape[0]), quantized.shape[1], quantized.device, with_error=exact is not None
    )
    for index, piece in enumerate(torch.arange(quantized.shape[2]).chunk(pieces)):
        moments.add(index % 2, *(x[:, :, piece].mT for x in (quantized, exact) if x is not None))
    moments.finish()
    return moments


def hessian_of(x: Tensor, pieces: int = 2) -> Tensor:
    return moments_of(x, pieces=pieces).hessian


def objectives(weight: Tensor, codes: Tensor, qparams: QParams, hessian: Tensor) -> Tensor:
    """Error of every output channel, float64 [out]."""
    groups, columns = hessian.shape[:2]
    error = (weight - dequantize(codes, qparams)).double().reshape(groups, -1, columns)
    return torch.einsum("grk,gkl,grl->gr", error, hessian.double(), error).flatten()


def round_weight(
    weight: Tensor, qparams: QParams, hessian: Tensor, *, limits: Limits | None = None, **options: Any
) -> Rounded:
    rounder = Rounder(hessian, shared_order=limits is not None, **options)
    return rounder.round(weight, qparams, limits=limits)


def checked(weight: Tensor, qparams: QParams, hessian: Tensor, **options: Any) -> Rounded:
    """The rounding, after what holds of every rounding was found to hold."""
    rounded = round_weight(weight, qparams, hessian, **options)
    codes, spec = rounded.codes, qparams.spec
    assert codes.shape == weight.shape and codes.dtype == spec.dtype
    assert spec.qmin <= int(codes.min()) and int(codes.max()) <= spec.qmax
    nearest = objectives(weight, quantize(weight, qparams), qparams, hessian)
    assert (objectives(weight, codes, qparams, hessian) <= nearest * (1 + ROUNDING)).all()
    assert rounded.error <= rounded.nearest
    return rounded


@pytest.mark.parametrize("columns", [1, 2, 12, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize(
    "grid", [{}, {"axis": None}, {"block_size": 16}], ids=["per-channel", "per-tensor", "per-block"]
)
def test_equals_the_algorithm_of_the_paper(columns: int, grid: dict[str, Any], generator: torch.Generator) -> None:
    weight = torch.randn(6, columns, generator=generator)
    qparams = MSE().weight(weight, dataclasses.replace(W4, **grid))
    hessian = hessian_of(inputs_of(columns, 3 * columns + 9, generator))
    rounded = checked(weight, qparams, hessian)
    scale, zero_point = (x.expand_as(weight).double().numpy() for x in grid_of(weight, qparams))
    expected = torch.from_numpy(oracle(weight.numpy(), scale, zero_point, hessian[0].double().numpy(), 0.01))
    better = objectives(weight, expected, qparams, hessian) <= objectives(
        weight, quantize(weight, qparams), qparams, hessian
    )
    assert better.float().mean() > 0.5 or columns == 1
    assert int(rounded.codes.ne(expected)[better].sum()) == 0
    assert torch.equal(rounded.codes[~better], quantize(weight, qparams)[~better])
    assert rounded.kept == int((~better).sum())


def test_comes_near_the_best_of_all_roundings(generator: torch.Generator) -> None:
    weight = torch.randn(16, 4, generator=generator)
    qparams = MSE().weight(weight, dataclasses.replace(W4, bits=2))
    hessian = hessian_of(inputs_of(4, 64, generator))
    grid = torch.cartesian_prod(*[torch.arange(-2, 2)] * 4)
    every = torch.stack([objectives(weight, c.expand(16, 4), qparams, hessian) for c in grid])
    nearest = objectives(weight, quantize(weight, qparams), qparams, hessian)
    reached = objectives(weight, checked(weight, qparams, hessian).codes, qparams, hessian)
    best = every.min(0).values
    assert (reached >= best * (1 - ROUNDING)).all()
    assert (reached - best).sum() < 0.5 * (nearest - best).sum()


@pytest.mark.parametrize("groups", [1, 3, 12], ids=["one-group", "grouped", "depthwise"])
def test_groups_are_rounded_each_on_its_own(groups: int, generator: torch.Generator) -> None:
    weight = torch.randn(12, 3, 3, 3, generator=generator)
    qparams = MSE().weight(weight, W4)
    hessian = hessian_of(inputs_of(27, 100, generator, groups))
    rounded = checked(weight, qparams, hessian)
    for group, rows in enumerate(torch.arange(12).chunk(groups)):
        part = QParams(qparams.scale[rows], qparams.zero_point[rows], W4)
        alone = round_weight(weight[rows], part, hessian[group : group + 1])
        assert torch.equal(rounded.codes[rows], alone.codes)


def test_strong_inputs_come_first(generator: torch.Generator) -> None:
    weight = torch.randn(8, 20, generator=generator)
    qparams = MSE().weight(weight, W4)
    hessian = hessian_of(inputs_of(20, 90, generator) * torch.logspace(-1, 1, 20)[:, None])
    order = hessian[0].diagonal().argsort(descending=True)
    sorted_ = round_weight(weight[:, order], qparams, hessian[:, order][:, :, order])
    assert torch.equal(checked(weight, qparams, hessian, act_order=True).codes[:, order], sorted_.codes)


def test_weights_of_dead_inputs_are_rounded_to_nearest(generator: torch.Generator) -> None:
    weight = torch.randn(8, 20, generator=generator)
    qparams = MSE().weight(weight, W4)
    x = inputs_of(20, 90, generator)
    x[:, ::3] = 0
    codes = checked(weight, qparams, hessian_of(x)).codes
    alive = torch.arange(20) % 3 > 0
    assert torch.equal(codes[:, ~alive], quantize(weight, qparams)[:, ~alive])
    assert torch.equal(codes[:, alive], round_weight(weight[:, alive], qparams, hessian_of(x[:, alive])).codes)


def test_without_any_input_rounding_is_nearest(generator: torch.Generator) -> None:
    weight = torch.randn(4, 6, generator=generator)
    qparams = MSE().weight(weight, W4)
    rounded = checked(weight, qparams, torch.zeros(2, 6, 6))
    assert torch.equal(rounded.codes, quantize(weight, qparams))
    assert (rounded.nearest, rounded.error) == (0.0, 0.0)


@pytest.mark.parametrize("positions", [1, 5])
def test_singular_hessians(positions: int, generator: torch.Generator) -> None:
    weight = torch.randn(8, 32, generator=generator)
    checked(weight, MSE().weight(weight, W4), hessian_of(inputs_of(32, positions, generator)))


def test_damping_grows_until_the_hessian_is_positive_definite(generator: torch.Generator) -> None:
    weight = torch.randn(8, 16, generator=generator)
    hessian = hessian_of(inputs_of(16, 4, generator)) - 0.05 * torch.eye(16)
    qparams = MSE().weight(weight, W4)
    mean = float(hessian.diagonal(dim1=1, dim2=2).mean())
    damping = 1e-6
    while np.linalg.eigvalsh(hessian[0].numpy())[0] + damping * mean <= 0:
        damping *= 10
    assert 1e-6 < damping < 1
    grown, chosen = (round_weight(weight, qparams, hessian, damping=d) for d in (1e-6, damping))
    assert torch.equal(grown.codes, chosen.codes)
    with pytest.raises(DataError, match="not positive"):
        round_weight(weight, qparams, torch.full((1, 16, 16), 100.0) - 99 * torch.eye(16))


def test_a_hessian_does_not_depend_on_how_inputs_are_cut(generator: torch.Generator) -> None:
    x = inputs_of(12, 100, generator, groups=2)
    expected = 2 * x.double() @ x.double().mT / 100
    for pieces in (1, 3, 7):
        torch.testing.assert_close(hessian_of(x, pieces).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 3])
def test_after_sweeps_no_other_code_is_better(groups: int, generator: torch.Generator) -> None:
    weight = torch.randn(12, 20, generator=generator)
    qparams = MSE().weight(weight, W4)
    hessian = hessian_of(inputs_of(20, 90, generator, groups))
    once, swept = (checked(weight, qparams, hessian, act_order=True, sweeps=n) for n in (0, 30))
    assert swept.error < once.error
    damped = hessian + torch.diag_embed(0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, 20))
    reached = objectives(weight, swept.codes, qparams, damped)
    for column, step in itertools.product(range(20), (-1, 1)):
        other = swept.codes.clone()
        other[:, column] = (other[:, column].int() + step).clamp(-8, 7)
        assert (objectives(weight, other, qparams, damped) >= reached * (1 - 1e-5)).all()


# Limits of codes ------------------------------------------------------------------------------------------------------

W8 = dataclasses.replace(W4, bits=8, symmetric=True)


def neighbors(columns: int) -> Tensor:
    """Partners of columns: the first two, the next two; an odd last one is alone."""
    pairs = torch.arange(columns - columns % 2).view(-1, 2).flip(1).flatten()
    return torch.cat([pairs, torch.arange(columns - columns % 2, columns)])[None]


def pair_sums(codes: Tensor, groups: int, columns: int) -> tuple[int, int]:
    """Largest sum of the positive and smallest sum of the negative codes of neighbors."""
    rows = codes.long().reshape(groups, -1, columns)[:, :, : columns - columns % 2].unflatten(2, (-1, 2))
    return int(rows.clamp(min=0).sum(3).max()), int(rows.clamp(max=0).sum(3).min())


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"act_order": True, "sweeps": 2}], ids=str)
@pytest.mark.parametrize(("columns", "groups"), [(18, 1), (9, 4), (BLOCK + 11, 2)])
def test_pairs_keep_their_limit(columns: int, groups: int, options: dict[str, Any], generator: torch.Generator) -> None:
    weight = torch.randn(8, columns, generator=generator)
    weight[:, : columns // 3] *= 3
    qparams = MSE().weight(weight, W8)
    hessian = hessian_of(inputs_of(columns, 3 * columns, generator, groups))
    limits = Limits(partners=neighbors(columns), pair_lowest=-128, pair_highest=128)
    free = round_weight(weight, qparams, hessian, **options)
    rounded = round_weight(weight, qparams, hessian, limits=limits, **options)
    above, below = pair_sums(free.codes, groups, columns)
    assert above > 128 or below < -128
    above, below = pair_sums(rounded.codes, groups, columns)
    assert below >= -128 and above <= 128
    assert free.error < rounded.error <= rounded.nearest
    changed = (rounded.codes != free.codes).reshape(groups, -1, columns).any(2)
    assert changed.any()


def test_channels_keep_limits_of_their_own(generator: torch.Generator) -> None:
    weight = torch.randn(6, 20, generator=generator)
    qparams = MSE().weight(weight, W8)
    hessian = hessian_of(inputs_of(20, 90, generator))
    reach = torch.tensor([127, 63, 31, 127, 20, 7])[:, None]
    rounded = round_weight(weight, qparams, hessian, limits=Limits(-reach, reach))
    assert (rounded.codes.abs() <= reach).all() and rounded.codes.abs().amax(1)[2] == 31
    free = round_weight(weight, qparams, hessian)
    assert free.error < rounded.error
    wide = round_weight(weight, qparams, hessian, limits=Limits(-128, 127))
    assert torch.equal(wide.codes, free.codes)


def test_later_codes_compensate_for_a_limit(generator: torch.Generator) -> None:
    weight = torch.randn(6, 20, generator=generator)
    qparams = MSE().weight(weight, W8)
    hessian = hessian_of(inputs_of(20, 90, generator))
    rounded = round_weight(weight, qparams, hessian, limits=Limits(-100, 100))
    clipped = quantize(weight, qparams).clamp(-100, 100)
    cut, kept = (objectives(weight, codes, qparams, hessian).sum() for codes in (clipped, rounded.codes))
    assert kept < 0.5 * cut


def test_limits_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no code"):
        Limits(5, 4)
    with pytest.raises(ValueError, match="each other"):
        Limits(partners=torch.tensor([[1, 2, 0]]))


# Inputs as columns ----------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6)),
    "strided": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(0, 1)), (4, 9, 8)),
    "dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=(2, 1)), (4, 8, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 6, 6)),
    "patches": (nn.Conv2d(3, 5, 4, stride=4), (3, 8, 8)),
    "point": (nn.Conv2d(4, 6, 1), (4, 5, 5)),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5)),
    "conv1d": (nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2), (4, 17)),
    "linear": (nn.Linear(7, 5), (7,)),
    "tokens": (nn.Linear(7, 5), (6, 7)),
}


def smooth(x: Tensor) -> Tensor:
    """Nonnegative values, alike where they are neighbours."""
    for axis in range(1, x.ndim):
        x = x + x.roll(1, axis)
    return x.relu()


@functools.cache
def single(name: str) -> tuple[fx.GraphModule, Tensor]:
    layer, shape = LAYERS[name]
    x = smooth(torch.randn(64, *shape, generator=torch.Generator().manual_seed(3)))
    return fold(capture(randomize(nn.Sequential(layer)), x)), x


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("same", "transposed")])
def test_columns_times_the_weight_are_the_output(name: str, generator: torch.Generator) -> None:
    graph, x = single(name)
    (node,) = (n for n in graph.graph.nodes if "conv" in str(n.target) or "linear" in str(n.target))
    (layer,) = LAYERS[name][:1]
    columns = Im2col.of(node)
    seen = torch.cat([piece for (piece,) in columns.take([x], columns.draw(x.shape, 1.0, generator))], 1)
    rows = layer.weight.detach().reshape(seen.shape[0], -1, seen.shape[2])
    rows = rows.unflatten(2, (-1, columns.taps)).mT.flatten(2)
    with torch.no_grad():
        y = layer(x) - (layer.bias.reshape(-1, *[1] * (x.ndim - 2)) if columns.kernel else layer.bias)
    expected = y.movedim(1, -1) if columns.kernel else y
    torch.testing.assert_close((rows @ seen.mT).flatten(0, 1).mT, expected.reshape(-1, len(layer.weight)))
    some = torch.cat([piece for (piece,) in columns.take([x], columns.draw(x.shape, 0.25, generator))], 1)
    assert some.shape == (seen.shape[0], -(-seen.shape[1] // 4), seen.shape[2])
    everything = {tuple(column) for column in seen[0].tolist()}
    assert all(tuple(column) in everything for column in some[0].tolist())


# Networks -------------------------------------------------------------------------------------------------------------


def network(name: str) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The folded graph, and inputs for 64 samples."""
    if name in LAYERS:
        graph, x = single(name)
        return graph, (x,)
    return folded_network(name)


def calibrated(name: str, method: str = "gptq", bits: int = 4, size: int = 16, **settings: Any) -> CalibrationResult:
    graph, inputs = network(name)
    batches = [tuple(x[i : i + size] for x in inputs) for i in range(0, len(inputs[0]), size)]
    placement = PlacementOptions(weight_bits=bits, first_last_bits=None)
    return calibrate(graph, batches, method=method, placement=placement, **settings)


def layer_errors(name: str, result: CalibrationResult) -> float:
    """Sum of the relative squared errors of what all layers give."""
    layers = [user for site in result.placement.sites if site.kind == "weight" for user in site.users]
    return sum(relative_errors(result, layers, [network(name)[1]]).values())


def same(one: CalibrationResult, other: CalibrationResult) -> bool:
    return all(torch.equal(coded.codes, other.weights[name].codes) for name, coded in one.weights.items())


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name: str) -> None:
    graph, inputs = network(name)
    assert output_error(calibrated(name), graph, inputs) < output_error(calibrated(name, "mse"), graph, inputs)


@pytest.mark.parametrize("name", ["residual", "pooled", "mlp", "transformer", "unet", "densenet", "two-inputs"])
def test_no_layer_is_worse_than_with_nearest_rounding(name: str) -> None:
    result = calibrated(name)
    units = result.record.reconstruction.units
    assert len(units) == len(result.weights)
    assert all(unit.after <= unit.before for unit in units)
    assert sum(unit.after < unit.before for unit in units) > len(units) / 2
    assert result.biases.keys() == calibrated(name, "mse").biases.keys()


@pytest.mark.parametrize("name", ["residual", "pooled", "transformer", "mlp"])
def test_layers_come_closer_to_the_float_network(name: str) -> None:
    errors = [layer_errors(name, calibrated(name, method)) for method in ("gptq", "mse")]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("name", ["residual", "pooled", "mlp", "transformer"])
def test_the_float_target_comes_closer_still(name: str) -> None:
    towards = {
        target: layer_errors(name, calibrated(name, options={"output_target": target}))
        for target in ("float", "quantized")
    }
    assert towards["float"] < towards["quantized"]


def test_the_float_network_runs_only_where_it_is_needed() -> None:
    units = {
        target: calibrated("residual", options={"output_target": target}).record.reconstruction.units
        for target in ("float", "quantized")
    }
    assert [unit.strength for unit in units["quantized"]] == [None] * 4
    strengths = [unit.strength for unit in units["float"]]
    assert all(0 <= strength <= 1 for strength in strengths)
    assert max(strengths[1:]) > 0.5


def test_alike_samples_and_tokens_stand_in_one_half() -> None:
    halves = half_of(rows=40, first=0, count=40, samples=100)
    assert halves.tolist() == [0] * 16 + [1] * 16 + [0] * 8
    assert half_of(rows=24, first=40, count=12, samples=100).tolist() == [0] * 16 + [1] * 8
    assert half_of(rows=8, first=0, count=2, samples=2).tolist() == [0] * 4 + [1] * 4
    assert half_of(rows=1, first=0, count=64, samples=64).tolist() == [0]


class Frames(nn.Module):
    """Linear layers over tokens that are alike within a sample; input [n, 8, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(4)), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_tokens_of_a_sample_do_not_judge_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    seen, unseen = (
        torch.randn(n, 1, 12, generator=generator) + 0.05 * torch.randn(n, 8, 12, generator=generator)
        for n in (32, 256)
    )
    graph = fold(capture(randomize(Frames()), seen))
    placement = PlacementOptions(activation_bits=4, first_last_bits=None)
    errors = {
        target: output_error(
            calibrate(graph, [seen], method="gptq", options={"output_target": target}, placement=placement),
            graph,
            (unseen,),
        )
        for target in ("float", "quantized")
    }
    assert errors["float"] < 1.1 * errors["quantized"]


class Mean(nn.Module):
    """A linear layer on a value without samples; input [n, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) + self.second(x.mean(0))


def test_a_layer_may_read_a_value_without_samples() -> None:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    result = calibrate(fold(capture(randomize(Mean()), x)), [x], method="gptq")
    assert len(result.record.reconstruction.units) == len(result.weights)


def test_few_positions_do_not_make_rounding_worse_than_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    model = randomize(nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 8)))
    seen, unseen = (torch.randn(n, 96, generator=generator) for n in (40, 400))
    graph = fold(capture(model, seen))
    errors = {
        method: output_error(calibrate(graph, [seen], method=method, target="ort-cpu-vnni"), graph, (unseen,))
        for method in ("gptq", "mse")
    }
    assert errors["gptq"] < 1.1 * errors["mse"]


def test_data_that_changes_between_passes_is_refused() -> None:
    x = torch.randn(48, 3, 9, 9, generator=torch.Generator().manual_seed(0))

    class Dropping:
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            yield from x.split(16)[: 3 if self.passes < 2 else 2]

    with pytest.raises(DataError, match=r"48 samples in one pass and 32 in another"):
        calibrate(network("residual")[0], Dropping(), method="gptq")


def test_large_depthwise_kernels_keep_nearest_rounding() -> None:
    x = torch.randn(2, 40, 32, 32, generator=torch.Generator().manual_seed(0))
    model = randomize(nn.Sequential(nn.Conv2d(40, 40, 31, padding=15, groups=40), nn.ReLU(), nn.Conv2d(40, 4, 1)))
    result = calibrate(fold(capture(model, x)), [x], method="gptq")
    (note,) = (note for note in result.record.notes if "rounded to nearest" in note)
    assert "961 inputs in each of 40 groups" in note


def test_values_whose_squares_overflow_keep_nearest_rounding() -> None:
    x = 1e20 * torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    model = randomize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    result = calibrate(fold(capture(model, x)), [x], method="gptq")
    assert any("whose squares are not" in note for note in result.record.notes)


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_eight_bits_lose_nothing(name: str) -> None:
    found, nearest = (output_error(calibrated(name, m, bits=8), *network(name)) for m in ("gptq", "mse"))
    assert found < 1.02 * nearest


@pytest.mark.parametrize("block_size", [None, 16], ids=["per-channel", "per-block"])
def test_layers_of_which_weights_only_are_quantized(block_size: int | None) -> None:
    graph, (x,) = network("transformer")
    placement = PlacementOptions(weight_bits=4, weight_only=True, block_size=block_size)
    result, nearest = (calibrate(graph, [x], method=method, placement=placement) for method in ("gptq", "mse"))
    assert all(unit.after <= unit.before for unit in result.record.reconstruction.units)
    assert layer_errors("transformer", result) < 0.8 * layer_errors("transformer", nearest)
    model = onnx_ir.to_proto(to_onnx(result.program, opset=needed_opset(result)))
    report = parity(model, result.program, [(x,)], optimized=True)
    assert (report.kernel_mismatched, report.violations, report.unplanned) == (0, 0, {})


def test_a_seed_decides_everything() -> None:
    few = {"positions": 200}
    one, again = (calibrated("residual", options=few) for _ in range(2))
    assert same(one, again)
    assert not same(one, calibrated("residual", options=few, seed=1))


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_batches_may_be_cut_anywhere(name: str) -> None:
    whole = calibrated(name, size=64)
    assert all(same(whole, calibrated(name, size=size)) for size in (7, 16))


class Attention(nn.Module):
    """Query, key and value from one input, of which two convolutions see another view; input [n, 6, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.left, self.right, self.wide = nn.Conv1d(8, 4, 3), nn.Conv1d(8, 4, 3), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)).transpose(1, 2)
        return torch.cat([self.left(x).relu(), self.right(x).relu()], 1) + self.wide(x).relu()[:, :, :4]


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Moments]]:
    """The moments that are measured, in order."""
    made: list[Moments] = []
    begin = Moments.__init__

    def note(self: Moments, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(Moments, "__init__", note)
    yield made


def test_layers_that_read_the_same_share_a_hessian(updates: list[Moments]) -> None:
    x = torch.randn(48, 6, 8, generator=torch.Generator().manual_seed(0))
    graph = fold(capture(randomize(Attention()), x))
    result = calibrate(graph, [x], method="gptq", placement=PlacementOptions(weight_bits=4, first_last_bits=None))
    assert len(result.weights) == 6
    assert [tuple(moments.hessian.shape) for moments in updates] == [(1, 8, 8), (1, 24, 24), (1, 8, 8)]


class OneByOne(nn.Module):
    """A network that takes one sample at a time."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.reshape(1, *x.shape[1:]))


class Tied(nn.Module):
    """One weight, read twice; input [n, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).relu()).relu())


def test_of_layers_that_share_a_weight_the_first_decides(updates: list[Moments]) -> None:
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
    graph = fold(capture(randomize(Tied()), x))
    result = calibrate(graph, [x], method="gptq", placement=PlacementOptions(weight_bits=4))
    assert len(updates) == len(result.weights) == 2


def test_positions_bound_what_a_hessian_is_taken_over(updates: list[Moments]) -> None:
    calibrated("residual", options={"positions": 500})
    assert [sum(moments.counts) for moments in updates] == [500, 500, 500, 64]


def test_layers_with_too_many_inputs_keep_nearest_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_rounding, "LARGEST", 10)
    result, nearest = calibrated("residual"), calibrated("residual", "mse")
    (note,) = result.record.notes
    assert note.startswith("stem: rounded to nearest, because gptq takes at most 10 inputs")
    assert note.endswith("it has 27 inputs")
    assert [unit.name for unit in result.record.reconstruction.units] == ["depthwise", "point", "head"]
    assert torch.equal(result.weights["stem.weight"].codes, nearest.weights["stem.weight"].codes)


def test_no_activation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    memories: list[Memory] = []
    begin = Memory.__init__

    def note(self: Memory, *arguments: Any) -> None:
        begin(self, *arguments)
        memories.append(self)

    monkeypatch.setattr(Memory, "__init__", note)
    calibrated("pooled")
    assert [memory.used for memory in memories] == [0]


def test_a_network_that_takes_one_sample_at_a_time() -> None:
    model, x = build("residual", batch=16)
    graphs = [fold(capture(network, x[:1])) for network in (model, OneByOne(model))]
    assert [graph.meta["dynamic_batch"] for graph in graphs] == [True, False]
    placement = PlacementOptions(weight_bits=4)
    free, fixed = (calibrate(graph, [*x.split(1)], method="gptq", placement=placement) for graph in graphs)
    pairs = zip(free.weights.values(), fixed.weights.values(), strict=True)
    assert all(torch.equal(a.codes, b.codes) for a, b in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {"act_order": False},
        {"output_target": "quantized"},
        {"ridge": 0.5},
        {"damping": 0.1},
        {"weight_ranges": "minmax"},
    ],
    ids=str,
)
def test_options(options: dict[str, object]) -> None:
    result = calibrated("residual", options=options)
    assert not same(result, calibrated("residual"))
    assert all(unit.after <= unit.before for unit in result.record.reconstruction.units)


def test_values_that_are_refused() -> None:
    with pytest.raises(InputError, match="option 'damping' of method 'gptq' is 0"):
        get_method("gptq", {"damping": 0})


def test_an_export_is_proved(tmp_path: Any) -> None:
    model, x = build("residual", batch=64)
    report = export(model, [x], method="gptq", weight_bits=4, out=tmp_path / "out")
    assert report["verdict"] == "pass"
    assert report["parity"]["optimized"]["mismatched"] == 0
    assert [unit["name"] for unit in report["reconstruction"]["units"]] == ["stem", "depthwise", "point", "head"]
