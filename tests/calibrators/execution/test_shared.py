"""Calibrations for several targets: what they share is what each would have found alone."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from calibrators import calibration
from calibrators.calibration import calibrate
from calibrators.execution import task
from calibrators.execution.shared import Shared
from calibrators.grid.target import SETTLED_BY_PLACEMENT, Target
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from calibrators.targets import get_target
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from tests.support.networks import build


@pytest.fixture(scope="module")
def folded() -> tuple[fx.GraphModule, Tensor]:
    model, x = build("residual", batch=8)
    return fold(capture(model, x)), x


FEW = PlacementOptions(weight_bits=4)
READ = set[str]()


class Seen(Target):
    """A target that notes in READ which fields and properties others read of it, but for a copy."""

    def __getattribute__(self, name: str) -> Any:
        if sys._getframe(1).f_globals["__name__"] not in ("dataclasses", Target.__module__):
            READ.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("mse", {"bias_correction": True, "explain": True}),
        ("gptq", {}),
        ("qdrop", {"options": {"iters": 2}}),
        ("lapq", {"options": {"max_evals": 11}}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_methods_read_no_field_that_placement_has_settled(
    method: str, more: Any, folded: tuple[fx.GraphModule, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = get_target("ort-cpu")
    target = Seen(**{each.name: getattr(plain, each.name) for each in fields(plain)})
    place = calibration.place

    def placed(*given: Any) -> Any:
        found = place(*given)
        READ.clear()
        return found

    monkeypatch.setattr(calibration, "place", placed)
    result = calibrate(folded[0], [folded[1]], method=method, target=target, placement=FEW, **more)
    assert result.program(folded[1])
    assert {"rounding_alike", "drops_clips", "pair_sum"} <= READ
    assert READ & {*SETTLED_BY_PLACEMENT, "weighted", "kernels"} == set()


def codes(result: CalibrationResult) -> list[Any]:
    scales = [(name, float(each.scale), int(each.zero_point)) for name, each in result.activations.items()]
    weights = [(name, each.codes.tolist()) for name, each in {**result.weights, **result.biases}.items()]
    return [scales, weights]


@pytest.mark.parametrize(
    ("names", "fits"),
    [
        (("ort-cpu", "openvino"), 1),
        (("ort-cpu", "ort-cpu-vnni"), 2),  # which limits no pairs
        (("ort-cpu", "tensorrt"), 2),
    ],
)
def test_results_are_shared_where_targets_place_the_same(
    names: tuple[str, ...], fits: int, folded: tuple[fx.GraphModule, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, x = folded
    alone = [calibrate(graph, [x], target=name) for name in names]
    passes, observe = list[int](), task.observe
    monkeypatch.setattr(task, "observe", lambda *given: passes.append(1) or observe(*given))
    shared = Shared()
    together = [calibrate(graph, [x], target=name, shared=shared) for name in names]
    assert [*map(codes, together)] == [*map(codes, alone)]
    assert [result.placement.target.name for result in together] == [*names]
    assert len(shared._results) == fits
    assert len(passes) == 1, "the float network runs once where the values that are observed are the same"
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.program(x)[0], other.program(x)[0])


def test_what_tries_other_placements_is_not_shared(folded: tuple[fx.GraphModule, Tensor]) -> None:
    graph, x = folded
    shared = Shared()
    calibrate(graph, [x], method="auto", options={"rungs": "minmax"}, shared=shared, goal=None)
    calibrate(graph, [x], method="minmax", sensitivity=True, shared=shared)
    assert not shared._results
