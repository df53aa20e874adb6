"""A wrong fold is found on data; a network that amplifies rounding is not blamed for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from calibrators.errors import ModelError
from exporter.folding.agreement import check_folding
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture


class Chaotic(nn.Module):
    """A logistic map: errors grow by about two in every step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.linear, self.steps = nn.Linear(3, 3), steps

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.linear(x))
        for _ in range(self.steps):
            x = 3.99 * x * (1 - x)
        return x


def folded(steps: int) -> tuple[fx.GraphModule, fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    graph = capture(Chaotic(steps), x)
    other = copy.deepcopy(fold(graph))
    with torch.no_grad():
        for _, weight in other.named_parameters():
            weight.mul_(1 + 1e-7)
    return graph, other, x


def test_rounding_that_a_network_amplifies_is_no_fault() -> None:
    graph, other, x = folded(steps=15)
    with torch.no_grad():
        difference = (graph(x)[0] - other(x)[0]).abs().max()
    assert difference > 1e-3
    check_folding(graph, other, (x,))


@pytest.mark.parametrize("steps", [0, 5])
def test_a_wrong_fold_is_a_fault(steps: int) -> None:
    graph, other, x = folded(steps)
    check_folding(graph, other, (x,))
    with torch.no_grad():
        next(iter(other.parameters()))[0] += 0.1
    with pytest.raises(ModelError, match="folding changed output 'output' of the model"):
        check_folding(graph, other, (x,))
