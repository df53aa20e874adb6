"""Losses that look ahead: the way behind a unit, RepAPQ and PD-Quant as policies over the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.errors import InputError
from calibrators.execution.activation_cache import Cache
from calibrators.execution.blocks import partition
from calibrators.execution.quantizers import Rounding
from calibrators.graph.batch_norm import expected_outputs
from calibrators.graph.canonical import to_integer_forms
from calibrators.methods import get_method
from calibrators.methods.mrecg import MRECG
from calibrators.methods.pdquant import PDQuant
from calibrators.methods.qdrop import QDrop
from calibrators.methods.repapq import RepAPQ
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from calibrators.reconstruction.grouping import stage_ends
from calibrators.reconstruction.input_correction import Correction, Descent
from calibrators.reconstruction.reconstruct import Run
from calibrators.reconstruction.training import Loss, RelativeError, Unit
from calibrators.record import ReconstructedUnit
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from tests.calibrators.reconstruction.test_grouping import units as published_units
from tests.calibrators.reconstruction.test_reconstruct import calibrated, same
from tests.support.architectures import conv_bn
from tests.support.folded import folded_network, output_error

FLOAT_NOISE = 1e-5
"""Relative difference of one float32 network computed whole and in parts: other kernels, a few hundred roundings."""

EVERYTHING = torch.arange(64)


@dataclass(frozen=True)
class _Traveller(QDrop):
    """Sends the float outputs of every unit to the end of the network and notes what arrives."""

    def loss(self, unit: Unit, run: Run) -> Loss:
        ahead = run.downstream(unit, len(run.blocks))
        floats = [cache.gather(EVERYTHING) for cache in unit.targets]
        ahead = replace(ahead, passing={name: run.floats[name] for name in ahead.passing})
        with torch.no_grad():
            ARRIVED.append(ahead.arriving(floats, ahead.reads(EVERYTHING)))
        if ahead.units is not None:
            FROZEN.extend(p.requires_grad for p in ahead.units.parameters())
        return RelativeError(unit.energy)


ARRIVED: list[tuple[list[Tensor], list[Tensor]]] = []
FROZEN: list[bool] = []


@pytest.mark.parametrize("name", ["residual", "pooled", "mlp", "transformer", "unet", "densenet", "two-inputs"])
def test_the_float_way_ahead_of_every_unit_ends_in_the_float_outputs(name: str) -> None:
    ARRIVED.clear()
    FROZEN.clear()
    result = calibrated(name, _Traveller(iters=1, batch=16))
    graph, inputs = folded_network(name)
    with torch.no_grad():
        outputs = graph(*inputs)
    assert len(ARRIVED) == len(result.record.reconstruction.units)
    for arrived, wanted in ARRIVED:
        assert len(arrived) == len(wanted) > 0
        for y, t in zip(arrived, wanted, strict=True):
            (whole,) = [output for output in outputs if output.shape == y.shape]
            assert float((y - whole).norm() / whole.norm()) < FLOAT_NOISE
            assert float((t - whole).norm() / whole.norm()) < FLOAT_NOISE
    assert not any(FROZEN)


def test_the_way_ahead_lets_gradients_through_to_the_unit_alone() -> None:
    seen: list[bool] = []

    @dataclass(frozen=True)
    class Backward(QDrop):
        def loss(self, unit: Unit, run: Run) -> Loss:
            ahead = run.downstream(unit, len(run.blocks))
            outputs = [cache.gather(EVERYTHING).requires_grad_() for cache in unit.targets]
            sum(y.square().sum() for y in ahead.arriving(outputs, ahead.reads(EVERYTHING))[0]).backward()
            seen.append(all(y.grad is not None and bool(y.grad.any()) for y in outputs))
            return RelativeError(unit.energy)

    calibrated("residual", Backward(iters=1, batch=16))
    assert seen and all(seen)


def test_values_kept_for_later_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    live: set[int] = set()
    made, freed = Cache.__init__, Cache.free

    def note(self: Cache, *args: Any) -> None:
        made(self, *args)
        live.add(id(self))

    def drop(self: Cache) -> None:
        freed(self)
        live.discard(id(self))

    monkeypatch.setattr(Cache, "__init__", note)
    monkeypatch.setattr(Cache, "free", drop)
    calibrated("residual", "qdrop")
    plain = len(live)
    live.clear()
    calibrated("residual", "pdquant")
    assert len(live) == plain
    live.clear()
    calibrated("residual", "repapq", options={"iters": 2, "batch": 16})
    assert len(live) <= plain + 2  # one unit more per layer


# Stages ---------------------------------------------------------------------------------------------------------------


def test_stages_of_resnet18_end_where_shapes_change() -> None:
    graph, blocks, _ = published_units("resnet18")
    names = [block.name for block in blocks]
    ends = stage_ends(graph, blocks)
    assert [names[end - 1] for end in ends[1:9]] == [f"layer{i}.1" for i in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert ends[-1] == len(blocks)


# RepAPQ ---------------------------------------------------------------------------------------------------------------


def test_with_nothing_of_its_own_repapq_is_qdrop() -> None:
    options = {"iters": 20, "batch": 16}
    plain = {"measure": "mse", "ranges": "mse", "affine": False, "across": 0, "chain": 3}
    assert same(
        calibrated("residual", "repapq", options=options | plain), calibrated("residual", "qdrop", options=options)
    )


def test_in_a_stage_of_one_unit_the_stage_changes_nothing() -> None:
    """Every value of the residual network's head has a shape of its own."""
    one, other = ([u.loss_after for u in _units("mlp", across=across)] for across in (0.0, 1.0))
    assert one[-1] == other[-1]
    assert _units("residual", across=0.0)[0].loss_before < _units("residual", across=1.0)[0].loss_before


def _units(name: str, **options: Any) -> tuple[ReconstructedUnit, ...]:
    return calibrated(name, "repapq", options={"iters": 10, "batch": 16, **options}).record.reconstruction.units


@pytest.mark.parametrize("per_tensor", [False, True], ids=["per-channel", "per-tensor"])
def test_gains_are_absorbed_into_scales(per_tensor: bool) -> None:
    graph, inputs = folded_network("residual")
    placement = PlacementOptions(weight_bits=4, activation_bits=8, per_tensor_weights=per_tensor)
    results = [
        calibrate(graph, [inputs], method=RepAPQ(iters=100, batch=16, affine=affine, across=0), placement=placement)
        for affine in (False, True)
    ]
    moved = 0
    for name, coded in results[1].weights.items():
        spec = coded.qparams.spec
        assert int(coded.codes.min()) >= spec.qmin and int(coded.codes.max()) <= spec.qmax
        assert coded.qparams.scale.shape == results[0].weights[name].qparams.scale.shape
        assert torch.equal(coded.qparams.zero_point, results[0].weights[name].qparams.zero_point)
        moved += int((coded.qparams.scale != results[0].weights[name].qparams.scale).sum())
    assert moved
    unit = results[1].record.reconstruction.units[-1]
    assert 0 < unit.gain_lo <= unit.gain_hi and results[0].record.reconstruction.units[-1].gain_lo is None
    assert _output_error(results[1], inputs) == pytest.approx(unit.after, rel=1e-4)


def _output_error(result: CalibrationResult, inputs: tuple[Tensor, ...]) -> float:
    graph, _ = folded_network("residual")
    with torch.no_grad():
        (wanted,), (y,) = graph(*inputs), result.program(*inputs)
    return float((y - wanted).square().sum() / wanted.square().sum())


class Outliers(nn.Module):
    """Two convolutions and a head; the first channel of the first is huge for samples with a bright first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))


def test_absolute_errors_serve_the_many_where_a_few_are_huge() -> None:
    """One channel is 20 times the others for 5 percent of the samples, one activation scale for all channels."""
    torch.manual_seed(0)
    model = Outliers().eval().requires_grad_(False)
    model.first.weight[0, 1:] = 0
    model.first.weight[0, 0] = 20 / 9
    x = torch.randn(128, 4, 8, 8)
    rare = torch.arange(128) % 20 == 0
    x[:, 0] = torch.where(rare[:, None, None], x[:, 0].abs(), -x[:, 0].abs())
    graph = fold(capture(model, (x[:2],)))
    found = {}
    for method in (RepAPQ(iters=150), RepAPQ(iters=150, measure="mse", ranges="mse", affine=False, across=0)):
        placement = PlacementOptions(weight_bits=8, activation_bits=4, first_last_bits=None)
        result = calibrate(graph, [(x,)], method=method, placement=placement)
        with torch.no_grad():
            (wanted,), (y,) = graph(x), result.program(x)
        usual = ~rare
        found[method.measure] = float((y[usual] - wanted[usual]).abs().mean() / wanted[usual].abs().mean())
    assert found["mae"] < 0.5 * found["mse"]


class Labels(nn.Module):
    """Labels only: the last layer has no floating output that training could compare."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).argmax(1)


def test_a_unit_without_floating_outputs_keeps_nearest_rounding() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 6, 6)
    graph = fold(capture(Labels().eval(), (x[:2],)))
    placement = PlacementOptions(weight_bits=4, activation_bits=4, first_last_bits=None)
    for method in (QDrop(iters=5, chain=1), RepAPQ(iters=5), PDQuant(iters=5, chain=1)):
        units = calibrate(graph, [(x,)], method=method, placement=placement).record.reconstruction.units
        assert (units[-1].before, units[-1].after) == (0.0, 0.0)


def test_a_signed_input_keeps_its_negative_half() -> None:
    result = calibrated("residual", "repapq")
    (entry,) = [s for s in result.placement.sites if s.node == "x"]
    qparams = result.activations[entry.name]
    assert 64 < int(qparams.zero_point) < 192


# PD-Quant -------------------------------------------------------------------------------------------------------------


def test_without_its_prediction_pdquant_is_qdrop() -> None:
    options = {"iters": 20, "batch": 16}
    plain = {"prediction": 0.0}
    assert same(
        calibrated("residual", "pdquant", options=options | plain), calibrated("residual", "qdrop", options=options)
    )


def test_the_last_unit_is_compared_by_its_own_outputs() -> None:
    options = {"iters": 5, "batch": 16, "chain": 100, "prediction": 2.0, "distance": "mse"}
    (unit,) = calibrated("mlp", "pdquant", options=options).record.reconstruction.units
    assert unit.loss_after == pytest.approx(3 * unit.after, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "distance"), [("residual", "kl"), ("unet", "kl"), ("unet", "mse"), ("segmenter", "auto")]
)
def test_predictions_of_any_kind(name: str, distance: str) -> None:
    units = calibrated(
        name, "pdquant", options={"iters": 10, "batch": 16, "distance": distance}
    ).record.reconstruction.units
    assert all(unit.loss_after <= unit.loss_before for unit in units)


def test_at_eight_bits_there_is_next_to_nothing_to_lose() -> None:
    units = calibrated("residual", "pdquant", (8, 8), options={"iters": 20, "batch": 16}).record.reconstruction.units
    assert all(unit.loss_after < 1e-3 for unit in units)


def test_the_prediction_is_kept_better_than_by_the_units_error_alone() -> None:
    """Trained on what is measured: the squared error of the outputs, which a divergence need not lower."""
    options = {"iters": 300, "batch": 16}
    ahead = {"prediction": 5.0, "distance": "mse", "share": 1.0, "reach": "all"}
    more = calibrated("residual", "pdquant", (2, 3), options=options | ahead)
    base, network = calibrated("residual", "qdrop", (2, 3), options=options), folded_network("residual")
    assert output_error(more, *network) < 0.6 * output_error(base, *network)


def test_what_follows_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the weights are those of QDrop, unless all is to follow; those of activation scales are not."""
    gradients: list[Tensor] = []
    backward = Rounding.backward

    def watched(rounding: Rounding, strength: float, beta: Tensor) -> None:
        gradients.append(torch.cat([leaf.grad.flatten() for leaf in rounding.weights if leaf.grad is not None]))
        backward(rounding, strength, beta)

    monkeypatch.setattr(Rounding, "backward", watched)

    def first(method: str, **options: Any) -> tuple[Tensor, CalibrationResult]:
        gradients.clear()
        result = calibrated("residual", method, (2, 3), options={"iters": 20, "batch": 16, **options})
        return gradients[0], result

    plain, base = first("qdrop")
    scales, own = first("pdquant", prediction=10.0)
    everything, _ = first("pdquant", prediction=10.0, reach="all")
    assert torch.equal(scales, plain) and not torch.allclose(everything, plain)
    assert not all(torch.equal(own.activations[name].scale, base.activations[name].scale) for name in base.activations)


def test_methods_compose_with_grouping() -> None:
    for method in (PDQuant(iters=5, groups="0-1"), RepAPQ(iters=5, groups="0-1"), MRECG(iters=5, groups="0-1")):
        first, second, *_ = calibrated("residual", method).record.reconstruction.units
        assert ".." in first.name
        assert (first.steps, second.steps) == (10, 5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pdquant", {"distance": "cosine"}),
        ("pdquant", {"share": 0.0}),
        ("pdquant", {"prediction": -1.0}),
        ("pdquant", {"reach": "weights"}),
        ("repapq", {"measure": "huber"}),
        ("repapq", {"across": -0.5}),
    ],
    ids=str,
)
def test_options_out_of_range(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        get_method(method, options)


# Distribution correction ----------------------------------------------------------------------------------------------


def _correction(**descent: Any) -> tuple[Correction, Tensor]:
    """Of a convolution with a folded batch norm, and inputs that are not what it was trained on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model[1].momentum = None
    with torch.no_grad():
        model.train()(torch.randn(256, 3, 8, 8))
    graph = to_integer_forms(fold(capture(model.eval().requires_grad_(False), (torch.randn(2, 3, 8, 8),))))
    known = expected_outputs(graph)
    (block,) = partition(graph, list(known))
    correction = Correction(graph, block, known, Descent(**{"steps": 30, **descent}), torch.device("cpu"))
    return correction, 1.5 * torch.randn(32, 3, 8, 8) + 0.5


def test_correction_brings_statistics_closer_and_moves_little() -> None:
    correction, x = _correction()
    (corrected,), (y,) = correction([x])
    before, after = correction.mismatch([x]), correction.mismatch([corrected])
    assert bool((after < before).all()) and float(after.mean()) < 0.7 * float(before.mean())
    bound = correction.descent.rate * correction.descent.steps * float(x.square().mean().sqrt())
    assert 0 < float((corrected - x).abs().max()) <= bound  # Adam moves by no more than its rate
    assert torch.equal(y, correction.graph(corrected)[0])


def test_correction_keeps_samples_apart() -> None:
    correction, x = _correction(steps=5)
    energy = float(x.square().mean())
    half = x[:16] * (energy / float(x[:16].square().mean())) ** 0.5
    both = torch.cat([half, x[16:] * (energy / float(x[16:].square().mean())) ** 0.5])
    (alone,), _ = correction([half])
    (together,), _ = correction([both])
    assert torch.allclose(alone, together[:16], atol=1e-4)


def test_a_dear_distance_keeps_the_original() -> None:
    correction, x = _correction(fidelity=1e6)
    (corrected,), _ = correction([x])
    (free,), _ = _correction(fidelity=0.0)[0]([x])
    assert float((corrected - x).square().mean()) < 0.02 * float((free - x).square().mean())


def test_small_maps_are_not_corrected() -> None:
    """One position, or a few, have no deviation that could be compared."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval().requires_grad_(False)
    graph = to_integer_forms(fold(capture(model, (torch.randn(2, 3, 3, 3),))))
    known = expected_outputs(graph)
    (block,) = partition(graph, list(known))
    assert known and not Correction(graph, block, known, Descent(steps=1), torch.device("cpu")).statistics


def test_corrected_inputs_reach_training_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(conv_bn(3, 8), nn.ReLU(), conv_bn(8, 8), nn.ReLU())).eval().requires_grad_(False)
    x = torch.randn(32, 3, 8, 8)
    graph = fold(capture(model, (x[:2],)))
    placement = PlacementOptions(weight_bits=4, activation_bits=4)
    plain, corrected = (
        calibrate(graph, [(x,)], method=PDQuant(iters=50, chain=1, correct=correct), placement=placement)
        for correct in (0, 5)
    )
    assert not same(plain, corrected)
    first, other = (result.record.reconstruction.units[0] for result in (plain, corrected))
    assert first.before == other.before
