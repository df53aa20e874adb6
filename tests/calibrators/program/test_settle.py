"""Scales that make all processors round alike: the search, its order, and what it leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from calibrators.grid.spec import QParams
from calibrators.program.freeze import CalibrationResult, freeze
from calibrators.program.settle import LARGEST_MOVE, settle
from calibrators.targets import get_target
from runtime_tests.reference.execute import plan
from runtime_tests.reference.ties import ties_of
from tests.runtime_tests.reference.programs import calibrated


class Sums(nn.Module):
    """A chain of sums and products, whose results are operands of later ones, with sigmoids and a broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = torch.relu(x + branch(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        found: Tensor = self.head(x + self.gate(x))
        return found


@pytest.fixture
def found(generator: torch.Generator) -> CalibrationResult:
    """Scales on powers of two, where a large share of all sums are ties."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = calibrated(Sums(), torch.randn(8, 3, 6, 6, generator=generator))
    return replace(result, activations={name: on_powers(q) for name, q in result.activations.items()})


def on_powers(qparams: QParams) -> QParams:
    return replace(qparams, scale=torch.exp2(torch.round(torch.log2(qparams.scale))))


def ulps(result: CalibrationResult, start: CalibrationResult) -> dict[str, int]:
    """How many float32 numbers each scale moved, where it did."""
    pairs = {name: (result.activations[name].scale, q.scale) for name, q in start.activations.items()}
    moves = {name: int(a.view(torch.int32)) - int(b.view(torch.int32)) for name, (a, b) in pairs.items()}
    return {name: move for name, move in moves.items() if move}


def test_settled_scales_leave_no_tie_in_xnnpack(generator: torch.Generator) -> None:
    """Its sums round otherwise than those of onnxruntime, and its means do at odd zero points."""
    torch.manual_seed(0)
    with torch.no_grad():
        start = calibrated(Sums(), torch.randn(8, 3, 8, 8, generator=generator), target="xnnpack")
    families = start.placement.target.exact_on
    odd = torch.tensor(101, dtype=torch.int32)
    tied = {name: replace(on_powers(q), zero_point=odd) for name, q in start.activations.items()}
    before = ties_of(plan(replace(start, activations=tied).program), families)
    assert {tie.kernel for tie in before} == {"add", "mean"}
    result = freeze(start.placement, tied, start.weights)
    assert ties_of(plan(result.program, start.placement.target), families) == []
    assert result.record.settled is not None and result.record.settled.left == ()


def test_settled_scales_leave_no_tie(found: CalibrationResult) -> None:
    before = ties_of(plan(replace(found).program))
    assert {tie.kernel for tie in before} >= {"add"}
    result = freeze(found.placement, found.activations, found.weights)
    assert ties_of(plan(result.program)) == []
    settled = result.record.settled
    assert settled is not None
    assert settled.left == ()
    assert {move.site: move.ulps for move in settled.moved} == ulps(result, found) != {}
    assert all(abs(move.ulps) <= LARGEST_MOVE for move in settled.moved)


def test_biases_follow_the_settled_scales(found: CalibrationResult) -> None:
    result = freeze(found.placement, found.activations, found.weights)
    moved = ulps(result, found)
    followed = 0
    for name, coded in result.biases.items():
        weight, source = result.placement.added_to(result.placement.by_name[name])
        scale = result.activations[source.name].scale * result.weights[weight.name].qparams.scale
        assert torch.equal(coded.qparams.scale, scale.expand_as(coded.qparams.scale))
        followed += source.name in moved
    assert followed > 0


def test_settled_scales_stay_settled(found: CalibrationResult) -> None:
    once, _ = settle(found.placement, found.activations)
    twice, record = settle(found.placement, once)
    assert record is not None
    assert record.moved == ()
    assert all(torch.equal(once[name].scale, twice[name].scale) for name in once)


def test_one_family_has_nothing_to_settle(found: CalibrationResult) -> None:
    placement = replace(found.placement, target=get_target("ort-cpu-vnni"))
    scales, record = settle(placement, found.activations)
    assert record is None
    assert all(torch.equal(scales[name].scale, q.scale) for name, q in found.activations.items())


def test_what_fixed_scales_leave_is_named(found: CalibrationResult) -> None:
    sites = tuple(
        replace(site, fixed=(1.0, 0)) if site.kind == "activation" and site.fixed is None else site
        for site in found.placement.sites
    )
    scales, record = settle(replace(found.placement, sites=sites), found.activations)
    assert record is not None
    assert record.moved == ()
    assert sorted(record.left, key=repr) == sorted(ties_of(plan(found.program)), key=repr) != []
    assert all(torch.equal(scales[name].scale, q.scale) for name, q in found.activations.items())
