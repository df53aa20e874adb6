"""Operators that have no kernel of their own and run as others do on integers, each between two convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.networks import Function, randomize

__all__ = ["FORMS", "as_module", "between"]

CHANNELS = torch.linspace(-1.5, 2, 8).reshape(8, 1, 1)


class Between(nn.Module):
    """A function or module between two convolutions of 8 channels."""

    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.LazyConv2d(4, 1)
        self.form = as_module(form)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.form(self.first(x)))
        return result


def as_module(form: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a module as it is, a function as a module."""
    return form if isinstance(form, nn.Module) else Function(form)


def prelu() -> nn.Module:
    """Return a PReLU with slopes of both signs."""
    module = nn.PReLU(8)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-0.2, 0.9, 8))
    return module


FORMS: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], set[str]]] = {
    "hard-sigmoid": (nn.Hardsigmoid, {"QLinearAdd"}),
    "hard-swish": (nn.Hardswish, {"QLinearAdd", "QLinearMul"}),
    "spelled-hard-swish": (lambda: lambda x: x * F.relu6(x + 3) / 6, {"QLinearAdd", "QLinearMul"}),
    "quick-gelu": (lambda: lambda x: x * torch.sigmoid(1.702 * x), {"QLinearSigmoid", "QLinearMul"}),
    "squeeze-excite": (
        lambda: lambda x: x * F.hardsigmoid(F.adaptive_avg_pool2d(x, 1)),
        {"QLinearGlobalAveragePool", "QLinearAdd", "QLinearMul"},
    ),
    "scaled-branch": (lambda: lambda x: F.relu(x + 0.2 * torch.sigmoid(x)), {"QLinearSigmoid", "QLinearAdd"}),
    "scale-after-a-pool": (lambda: lambda x: F.max_pool2d(0.7 * F.max_pool2d(x, 2), 2), {"QLinearMul"}),
    "negative": (lambda: lambda x: F.max_pool2d(-2 * F.relu(x), 2), {"QLinearMul"}),
    "channels": (
        lambda: lambda x: F.max_pool2d(F.relu(x) * CHANNELS + CHANNELS[None], 2),
        {"QLinearMul", "QLinearAdd"},
    ),
    "difference": (lambda: lambda x: torch.cat([F.relu(x - 0.3) / 2, x], 1), {"QLinearConcat"}),
    "prelu": (prelu, {"QLinearMul", "Max"}),
    "prelu-of-one-slope": (lambda: nn.PReLU(8), {"QLinearLeakyRelu"}),
    "maxout": (lambda: lambda x: torch.max(*x.chunk(2, 1)), {"Max"}),
    "minimum": (lambda: lambda x: torch.minimum(F.relu(x + 0.3), x * CHANNELS), {"Min", "QLinearMul"}),
    "extremes": (
        lambda: lambda x: x.amax((2, 3), keepdim=True) + F.relu(x).min(3, keepdim=True)[0],
        {"ReduceMax", "ReduceMin"},
    ),
    "mean-of-a-sequence": (
        lambda: lambda x: x + x.flatten(2).mean(2, keepdim=True)[..., None],
        {"QLinearGlobalAveragePool", "QLinearAdd"},
    ),
    "mean-of-a-volume": (
        lambda: lambda x: x + x.unflatten(3, (2, -1)).mean((2, 3, 4), keepdim=True)[..., 0],
        {"QLinearGlobalAveragePool", "QLinearAdd"},
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.ReLU()), {"QLinearConv"}),
    "grouped-transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, (1, 2), groups=2), {"QLinearConv"}),
    "volumes": (
        lambda: nn.Sequential(
            *(nn.Unflatten(1, (4, 2)), nn.Conv3d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool3d((1, 2, 2))),
            *(nn.ConvTranspose3d(6, 3, 2, 2), nn.Conv3d(3, 2, (2, 3, 1), (2, 1, 1), groups=1), nn.Flatten(1, 2)),
        ),
        {"QLinearConv", "NhwcMaxPool"},
    ),
}
"""By name: the operator, and the integer kernels that compute it."""


def between(name: str) -> tuple[nn.Module, Tensor]:
    """Return the network of a form and data for it."""
    make, _ = FORMS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Between(make()).eval(), torch.randn(8, 3, 12, 12)
        with torch.no_grad():
            model(x)
        model.first, model.second = randomize(model.first), randomize(model.second)
        model.first.weight.data.mul_(3)
        return model, x
