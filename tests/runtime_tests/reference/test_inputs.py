"""The quantizer of an input: exact after basic arithmetic on it, whose every bit IEEE 754 decides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calibrators import calibrate
from exporter import capture
from runtime_tests.reference.kernel_plan import FLOAT, plan


class Normalizing(nn.Module):
    """A model that normalizes its own input."""

    def __init__(self, normalize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.normalize, self.layer = normalize, nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(self.normalize(x))
        return found


BYTES = torch.arange(192, dtype=torch.uint8).reshape(1, 3, 8, 8)
MEAN = torch.tensor([0.5, 0.4, 0.3])[:, None, None]


@pytest.mark.parametrize(
    ("normalize", "x", "kernel"),
    [
        (lambda x: x, BYTES / 255, "QuantizeLinear"),
        (lambda x: (x / 255.0 - MEAN) / 0.25, BYTES, "QuantizeLinear"),
        (lambda x: x.permute(0, 3, 1, 2).float() * 0.01 + 1, BYTES.permute(0, 2, 3, 1), "QuantizeLinear"),
        (lambda x: 2 * x - 1, BYTES / 255, "QuantizeLinear"),
        (lambda x: torch.exp(x / 255.0), BYTES, FLOAT),
        (lambda x: x - x.mean(), BYTES / 255, FLOAT),
        (lambda x: (x / 255.0) * (x / 128.0), BYTES, FLOAT),
    ],
    ids=["input", "bytes", "channels last", "floats", "exp", "mean", "two of them"],
)
def test_basic_arithmetic_on_an_input_is_exact(normalize: Callable[[Tensor], Tensor], x: Tensor, kernel: str) -> None:
    graph = capture(Normalizing(normalize).eval(), x.contiguous())
    result = calibrate(graph, [x.contiguous()], method="minmax")
    assert plan(result.program).steps[0].kernel == kernel
