"""A magnitude is what a result would be if no terms cancelled, and hides no other operator's result."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from calibrators.graph.magnitude import magnitudes
from exporter.frontend.capture import capture
from tests.support.networks import Function

X = torch.tensor([[1.0, -1.0, 2.0, -2.0], [3.0, -3.0, 0.5, -0.5]])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda x: x.mean(1), 1.75, id="mean"),
        pytest.param(lambda x: x.sum(1) * -2, 14.0, id="sum-scaled"),
        pytest.param(lambda x: x.sum(1, keepdim=True) / 4 - x.mean(1, keepdim=True), 3.5, id="difference-of-means"),
        pytest.param(lambda x: x @ x.T, 18.5, id="product"),
        pytest.param(lambda x: (x - x)[:, ::2].flatten(), 6.0, id="moved"),
        pytest.param(lambda x: torch.relu(x.sum(1)), 0.0, id="another-operator"),
        pytest.param(lambda x: torch.where(x > 0, x, -math.inf), 3.0, id="infinity"),
    ],
)
def test_magnitude(function: Callable[[Tensor], Tensor], expected: float) -> None:
    assert magnitudes(capture(Function(function), X), (X,)) == (expected,)
