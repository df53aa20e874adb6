"""The method from end to end on small networks: never above what it compares, reproducible, provable."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibrators import calibrate
from calibrators.errors import InputError
from calibrators.execution.losses import prediction_loss
from calibrators.methods.lapq import FIRST_EVALUATIONS
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from calibrators.ranges.range_method import POWERS
from exporter import capture, emit
from runtime_tests.proof import parity
from tests.support.networks import build

SAMPLES = 64
EVALUATIONS = 40


@cache
def network(name: str = "residual") -> tuple[Any, Tensor]:
    model, x = build(name, batch=SAMPLES)
    return capture(model, x[:2]), x


def calibrated(
    method: str = "lapq",
    bits: int = 4,
    *,
    name: str = "residual",
    per_tensor: bool = False,
    explain: bool = False,
    **options: Any,
) -> CalibrationResult:
    graph, x = network(name)
    placement = PlacementOptions(
        weight_bits=bits, activation_bits=bits, first_last_bits=None, per_tensor_weights=per_tensor
    )
    given = {"max_evals": EVALUATIONS, **options} if method == "lapq" else options
    return calibrate(graph, list(x.split(16)), method=method, options=given, placement=placement, explain=explain)


def kl(result: CalibrationResult, name: str = "residual") -> float:
    """Divergence of the program from the float network on the calibration samples."""
    graph, x = network(name)
    with torch.no_grad():
        return float(prediction_loss("kl", [graph(x)[0]])([result.program(x)[0]], 0).mean())


@pytest.mark.parametrize("per_tensor", [False, True], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("optimizer", ["parabola", "cobyqa", "powell"])
def test_four_bits_are_better_than_every_range_compared(optimizer: str, per_tensor: bool) -> None:
    result = calibrated(optimizer=optimizer, per_tensor=per_tensor)
    record = result.record.lapq
    losses = record.losses
    for method in ("minmax", "mse"):
        other = calibrated(method, per_tensor=per_tensor)
        assert kl(other) == pytest.approx(losses[method], rel=1e-4)
        assert kl(result) < kl(other)
    assert kl(result) == pytest.approx(losses["final"], rel=1e-4)
    compared = [losses[n] for n in ("minmax", "percentile", "mse", "init")] + [e.loss for e in record.powers]
    assert losses["final"] <= min(compared)
    assert record.evaluations <= EVALUATIONS


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_eight_bits_lose_nothing(name: str) -> None:
    graph, x = network(name)
    result = calibrated(bits=8, name=name, max_evals=FIRST_EVALUATIONS)
    with torch.no_grad():
        floats, ours = graph(x)[0], result.program(x)[0]
    margin = floats.topk(2).values.diff().abs().flatten()
    decided = margin > (floats - ours).abs().amax(1) * 2
    assert (floats.argmax(1) == ours.argmax(1))[decided].all()
    assert kl(result, name) <= kl(calibrated("mse", 8, name=name), name) * (1 + 1e-4)


def test_same_seed_same_integers() -> None:
    first, again = (calibrated(samples=32, max_evals=FIRST_EVALUATIONS + 3) for _ in range(2))
    for name, coded in first.weights.items():
        assert torch.equal(coded.codes, again.weights[name].codes)
    for name, qparams in first.activations.items():
        assert torch.equal(qparams.scale, again.activations[name].scale)
    ours, theirs = first.record.lapq, again.record.lapq
    assert ours.seconds > 0 and theirs.seconds > 0
    assert replace(ours, seconds=0) == replace(theirs, seconds=0) and ours.samples == 32


def test_the_record_can_be_stored_and_tells_every_step() -> None:
    record = calibrated(explain=True, samples=16).record.lapq
    json.dumps(asdict(record), allow_nan=False)
    assert [entry.p for entry in record.powers] == list(POWERS)
    assert set(record.losses) == {"minmax", "percentile", "mse", "init", "final"}
    assert record.parabola.verdict == "accepted" or record.parabola.vertex is None
    assert all(0.4 <= factor <= 2.5 for factor in record.multipliers.values())
    bits = record.landscape.bits
    assert set(bits) == {"2", "4", "8"}
    size = len(record.landscape.sites)
    for found in bits.values():
        assert len(found.hessian) == len(found.eigenvalues) == size
        assert found.p == min(found.powers, key=lambda entry: entry.loss).p
    assert bits["2"].mean_diagonal > bits["8"].mean_diagonal


def test_the_smallest_budget_compares_and_stops() -> None:
    record = calibrated(max_evals=FIRST_EVALUATIONS, samples=16).record.lapq
    assert FIRST_EVALUATIONS - 1 <= record.evaluations <= FIRST_EVALUATIONS
    assert record.losses["final"] <= record.losses["mse"]


def test_time_limit_leaves_the_comparison() -> None:
    record = calibrated(max_seconds=1e-9, samples=16).record.lapq
    assert record.losses["final"] == record.losses["init"]
    assert len(record.powers) == len(POWERS)


def test_cross_entropy_needs_labels() -> None:
    with pytest.raises(InputError, match="loss 'ce' of method 'lapq' needs labels"):
        calibrated(loss="ce")
    graph, x = network()
    with pytest.raises(InputError, match="there are 3 labels for 64 calibration samples"):
        calibrate(graph, [x], method="lapq", options={"loss": "ce"}, labels=torch.tensor([0, 1, 2]))


def test_cross_entropy_with_labels() -> None:
    graph, x = network()
    labels = graph(x)[0].argmax(1)
    options = {"loss": "ce", "max_evals": 30}
    placement = PlacementOptions(weight_bits=4, activation_bits=4)
    record = calibrate(graph, [x], method="lapq", options=options, placement=placement, labels=labels).record.lapq
    assert record.losses["final"] <= min(record.losses.values())


@pytest.mark.parametrize("name", ["residual", "pooled"])
def test_the_runtime_computes_the_result(name: str, tmp_path: Path) -> None:
    result = calibrated(name=name, max_evals=FIRST_EVALUATIONS + 1)
    path = tmp_path / "model.onnx"
    emit(result, path)
    report = parity(path, result.program, [(network(name)[1],)], optimized=True)
    assert report.violations == 0
    assert report.mismatched == 0
