"""Operators in integer forms on every processor: one network of all of them."""

from __future__ import annotations

import functools

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.program.freeze import CalibrationResult
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.proof import Proof
from tests.support.elsewhere import available
from tests.support.integer_forms import FORMS, as_module
from tests.support.networks import randomize
from tests.support.stored import stored

pytestmark = pytest.mark.runtimes


class Everything(nn.Module):
    """One convolution, then each form, joined by a layer that reads their means."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.forms = nn.ModuleDict({name: as_module(make()) for name, (make, _) in FORMS.items()})
        self.last = nn.ModuleDict({name: nn.LazyConv2d(4, 1) for name in FORMS})
        self.head = nn.Linear(4 * len(FORMS), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        parts = [F.adaptive_avg_pool2d(self.last[name](form(x)), 1) for name, form in self.forms.items()]
        result: Tensor = self.head(torch.cat(parts, 1).flatten(1))
        return result


@functools.cache
def calibrated() -> tuple[CalibrationResult, onnx.ModelProto, Tensor]:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model, x = Everything().eval(), torch.randn(16, 3, 12, 12)
        model(x)
    model.first, model.last = randomize(model.first), randomize(model.last)
    model.first.weight.data.mul_(3)
    result = calibrate(fold(capture(model, (x,))), [x], method="mse")
    return result, stored(result), x


@pytest.mark.parametrize("name", ["avx2", "sse", "arm64", "web"])
def test_every_processor_computes_the_reference(name: str) -> None:
    runtime, (result, file, x) = available(name), calibrated()
    assert result.record.settled is not None and result.record.settled.left == ()
    proof = Proof(file, result.program, ("optimized",), runtimes=[runtime])
    proof.add(x)
    (found,) = [each for each in proof.proved_on if each.runtime == name]
    assert found.refused is None and found.values > 100_000
    assert (found.mismatched, found.outputs_identical, found.is_proved) == (0, True, True)
