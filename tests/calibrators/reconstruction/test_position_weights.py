"""Positions that a norm makes small count less: where a norm follows, its factors, and what it does to a network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators import calibrate
from calibrators.graph.aten import bind
from calibrators.graph.operators import NORMS
from calibrators.reconstruction.position_weights import norm_after, position_weights
from exporter import capture, fold
from tests.support.folded import output_error

WIDTH = 16


class After(nn.Module):
    """A linear layer, and what reads it."""

    def __init__(self, tail: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.norm, self.rms = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.plane = nn.LayerNorm((4, WIDTH))
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, x, self.linear(x))


TAILS: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "alone": (lambda m, _, y: m.norm(y), "layer_norm"),
    "rms": (lambda m, _, y: m.rms(y), "rms_norm"),
    "sum": (lambda m, x, y: m.norm(x + y), "layer_norm"),
    "residual": (lambda m, x, y: (x + y) + m.norm(x + y), None),  # two sums: the layer has two readers
    "stream": (lambda m, x, y: (lambda s: s + F.gelu(m.norm(s)))(x + y), "layer_norm"),
    "moved": (lambda m, _, y: m.norm(y.reshape(-1, 2, WIDTH)), "layer_norm"),
    "transposed": (lambda m, _, y: m.norm(y.transpose(1, 2).transpose(1, 2).transpose(0, 1)), None),
    "activation": (lambda m, _, y: m.norm(F.gelu(y)), None),
    "other-axes": (lambda m, _, y: m.plane(y), None),
    "output": (lambda _, x, y: x + y, None),
}


@pytest.mark.parametrize("name", TAILS)
def test_the_norm_that_follows(name: str) -> None:
    tail, wanted = TAILS[name]
    graph = capture(After(tail).eval(), (torch.randn(2, 4, WIDTH),))
    (linear,) = (node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default)
    found = norm_after(linear)
    assert (None if found is None else str(found.target).split(".")[1]) == wanted
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.gelu.default:
            assert norm_after(node) is None


@pytest.mark.parametrize("name", ["alone", "rms"])
def test_a_norm_scales_by_these_factors(name: str, generator: torch.Generator) -> None:
    model = After(TAILS[name][0]).eval()
    graph = capture(model, (torch.randn(2, 4, WIDTH),))
    (norm,) = (node for node in graph.graph.nodes if node.target in NORMS)
    x = torch.randn(2, 4, WIDTH, generator=generator) * torch.tensor([1e-2, 1.0, 10.0, 1e3])[:, None] + 0.1
    factors = position_weights(norm, x)
    centred = x - x.mean(-1, keepdim=True) if name == "alone" else x
    expected = (model.norm if name == "alone" else model.rms)(x)  # weights are one, biases zero
    torch.testing.assert_close(centred * factors.view(2, 4, 1), expected, rtol=1e-4, atol=1e-5)
    assert bind(norm)["normalized_shape"] == [WIDTH]


class Encoder(nn.Module):
    """A residual layer with a norm at its end; the first token is a hundred times larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


def tokens(samples: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(samples, 8, WIDTH, generator=generator)
    x[:, 0] *= 100
    return x


def test_large_tokens_do_not_cost_the_others_their_rounding(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    seen, unseen = tokens(64, generator), tokens(64, generator)
    graph = fold(capture(Encoder().eval(), (seen,)))
    errors = {name: output_error(calibrate(graph, [seen], method=name), graph, (unseen,)) for name in ("gptq", "mse")}
    assert errors["gptq"] < 0.85 * errors["mse"]  # as large as that of mse where all positions count alike
