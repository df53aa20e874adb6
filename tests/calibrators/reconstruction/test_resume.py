"""Training that is interrupted after any unit and continues gives the bits of training that is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from calibrators.program.freeze import CalibrationResult
from tests.calibrators.reconstruction.test_reconstruct import METHODS, calibrated


class Stopped(Exception):
    """Ends a run after some units."""


class Memory:
    """Keeps units in memory, and stops the run after `left` more of them."""

    def __init__(self) -> None:
        self.units: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        self.left = -1
        self.loaded = 0

    def load(self, name: str) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
        found = self.units.get(name)
        self.loaded += found is not None
        return found

    def save(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        assert name not in self.units, "no unit is trained twice"
        self.units[name] = {key: value.clone() for key, value in tensors.items()}, dict(record)
        self.left -= 1
        if self.left == 0:
            raise Stopped


def bits(result: CalibrationResult) -> list[Tensor]:
    """Every integer and parameter of a result."""
    coded = [*result.weights.values(), *result.biases.values()]
    qparams = [*(each.qparams for each in coded), *result.activations.values()]
    return [*(each.codes for each in coded), *(each.scale for each in qparams), *(each.zero_point for each in qparams)]


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_runs_give_the_same_bits(method: str) -> None:
    whole = bits(calibrated("residual", method))
    kept, runs = Memory(), 0
    while True:
        kept.left, kept.loaded, before = 1, 0, len(kept.units)
        try:
            resumed = bits(calibrated("residual", method, kept=kept))
            break
        except Stopped:
            runs += 1
            assert len(kept.units) == before + 1
    assert runs == len(kept.units) >= 3 and kept.loaded >= runs
    assert len(whole) == len(resumed) and all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
