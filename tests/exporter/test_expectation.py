"""What folding keeps of batch norms: the distribution of a folded operator's output over the training set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from calibrators.blocks import extract, partition
from calibrators.calibration import calibrate
from calibrators.forms import to_integer_forms
from calibrators.norms import Expected, expected_outputs
from calibrators.place import PlacementOptions
from exporter.capturing import capture
from exporter.folding import fold

SAMPLES = 64
CLOSE = 1e-4
"""Sums of 64 * 36 float32 values by two routes."""


def conv_bn(i: int, o: int, k: int = 1, **more: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **more), nn.BatchNorm2d(o))


class RepVGG(nn.Module):
    """Kernels of one tap, so that no border disturbs the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.point, self.identity = conv_bn(6, 6), conv_bn(6, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.dense(x) + self.point(x) + self.identity(x))


class Scaled(nn.Module):
    """A depthwise batch norm under a layer scale and an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(6, 6, groups=6)
        self.gamma = nn.Parameter(torch.linspace(-1, 2, 6)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(3 - self.gamma * self.body(x) / 2)


class Residual(nn.Module):
    """A skip past the batch norm: nothing is known of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Serial(nn.Module):
    """A convolution behind the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.after = conv_bn(6, 6), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.after(self.body(x)))


def trained(block: nn.Module, x: Tensor) -> nn.Module:
    """The block with shifts and gains of its own, and with the running statistics of exactly these samples."""
    torch.manual_seed(1)
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    with torch.no_grad():
        block.train()(x)
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):  # torch keeps the unbiased variance
                norm.running_var *= 1 - 1 / (x.numel() / x.shape[1])
    return block.eval().requires_grad_(False)


def folded(make: Callable[[], nn.Module]) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 6, 6, 6) * torch.linspace(0.5, 2, 6)[:, None, None] + 1
    return fold(capture(trained(make(), x), (x,))), x


def convolution_output(graph: fx.GraphModule, x: Tensor) -> tuple[str, Tensor]:
    (node,) = [n for n in graph.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    weight, bias = (graph.get_parameter(str(a.target)) if str(a.target) in dict(graph.named_parameters())
                    else graph.get_buffer(str(a.target)) for a in node.args[1:3])  # fmt: skip
    return node.name, nn.functional.conv2d(x, weight, bias, *node.args[3:])


@pytest.mark.parametrize(("make", "branches"), [(RepVGG, 3), (Scaled, 1), (lambda: conv_bn(6, 8), 1)],
                         ids=["repvgg", "scaled", "plain"])  # fmt: skip
def test_mean_and_deviation_are_those_of_the_data(make: Callable[[], nn.Module], branches: int) -> None:
    graph, x = folded(make)
    name, y = convolution_output(graph, x)
    expected = expected_outputs(graph)[name]
    cells = y.double().movedim(1, 0).flatten(1)
    assert torch.allclose(expected.mean, cells.mean(1), rtol=CLOSE, atol=CLOSE)
    assert len(expected.gains) == branches
    assert (expected.std is None) == (branches > 1)
    if expected.std is not None:
        assert torch.allclose(expected.std, cells.std(1, correction=0), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("make", [Residual, Serial])
def test_nothing_is_said_where_it_is_not_known(make: Callable[[], nn.Module]) -> None:
    graph, _ = folded(make)
    assert len([n for n in graph.graph.nodes if n.target is torch.ops.aten.conv2d.default]) == 1
    assert not expected_outputs(graph)


def test_independent_branches_add_their_variances() -> None:
    gains = (torch.tensor([3.0]), torch.tensor([4.0]))
    assert Expected(torch.zeros(1), gains).spread.tolist() == [5.0]


def test_it_survives_integer_forms_and_extraction() -> None:
    graph, _ = folded(RepVGG)
    formed = to_integer_forms(graph)
    (name,) = expected_outputs(formed)
    (block,) = partition(formed, [name])
    assert list(expected_outputs(extract(formed, block))) == [name]


def test_it_belongs_to_the_sum_where_the_identity_is_taken_out() -> None:
    class Spiked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.identity = conv_bn(6, 6, 3), nn.BatchNorm2d(6)
            self.dense[0].weight.data *= 1e-2
            self.after = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(torch.relu(self.dense(x) + self.identity(x)))

    torch.manual_seed(0)
    model, x = Spiked().eval().requires_grad_(False), torch.randn(8, 6, 6, 6)
    graph = fold(capture(model, (x,)))
    placement = PlacementOptions(weight_bits=3, activation_bits=4, first_last_bits=None)
    result = calibrate(graph, [(x,)], placement=placement)
    (name,) = expected_outputs(result.placement.graph)
    node = next(n for n in result.placement.graph.graph.nodes if n.name == name)
    assert result.record["skips"]
    assert node.target is torch.ops.aten.add.Tensor
