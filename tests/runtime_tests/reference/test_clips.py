"""A clip is taken for the saturation of the quantizer after it exactly where the runtime removes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calibrators.calibration import calibrate
from calibrators.program.qdq_program import is_saturation
from exporter import capture, emit, fold
from runtime_tests.ort.coverage import coverage
from runtime_tests.proof import validate
from tests.support.networks import Function
from tests.support.onnx_models import Net

SCALE = 0.01
LOW, HIGH = -0.2, 2.35
"""Values of the codes 0 and 255 for SCALE and a zero point of 20."""

BOUNDS = [
    *((LOW + inside, high) for inside in (0.0, 1e-6, 0.004, 0.006) for high in (9.0, math.inf)),
    *((low, HIGH - inside) for inside in (0.0, 1e-6, 0.004, 0.006) for low in (-9.0, -math.inf)),
    (LOW + 0.004, 1e8),
]


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_a_clip_vanishes_where_the_plan_says_so(low: float, high: float) -> None:
    net = Net()
    conv = net.conv(net.signed(net.input("x", ("N", 3, 6, 6))), 4, 3)
    limits = ["" if math.isinf(bound) else net.constant("bound", np.array(bound, np.float32)) for bound in (low, high)]
    net.quantize_with(net.op("Clip", conv, *limits), SCALE, 20)
    is_removed = "QLinearConv" in coverage(net.model(net.nodes[-1].output[0])).by_op
    assert is_removed == is_saturation((low, high), torch.tensor(SCALE), 20, (0, 255))


class Padded(nn.Module):
    """A clip without upper bound; its quantizer gets a grid of its own, on which the lower one lies between codes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.pad(self.a(x).clamp(min=-0.2), (1, 1, 1, 1), value=0.37))


def test_a_bound_that_rounds_to_the_end_of_the_grid_keeps_the_kernel(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    result = calibrate(fold(capture(Padded().eval(), x)), [x])
    emit(result, tmp_path / "model.onnx")
    validate(tmp_path / "model.onnx", reference=result, batches=[x]).raise_for_mismatch()
    assert coverage(tmp_path / "model.onnx").integer_macs == 1.0


READERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "one": torch.exp,
    "two that are equal": lambda y: torch.cat([y.exp(), y.exp()], 1),
    "one that reads twice": lambda y: torch.cat([y, y], 1).exp(),
    "one whose form reads twice": lambda y: y.sort(-1),
    "an output": lambda y: y,
    "an output and one": lambda y: (y, y.exp()),
    "a product": lambda y: y @ y.mT,
}


@pytest.mark.parametrize("clip", [F.relu, F.relu6], ids=["relu", "relu6"])
@pytest.mark.parametrize("reader", READERS)
def test_a_linear_layer_is_an_integer_kernel_whatever_reads_its_clip(reader: str, clip: Callable, tmp_path) -> None:
    """onnxruntime makes none where one float operator reads a Relu or Clip once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Function(lambda x: READERS[reader](clip(x))))
    x = torch.randn(16, 8)
    result = calibrate(fold(capture(model.eval(), x)), [x])
    emit(result, tmp_path / "model.onnx")
    found = validate(tmp_path / "model.onnx", reference=result, batches=[x])
    found.raise_for_mismatch()
    assert coverage(tmp_path / "model.onnx").by_op["QGemm"] == 1
    assert not found.optimized.unplanned
