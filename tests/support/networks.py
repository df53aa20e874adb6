"""Small networks that the tests share; random weights, seeded by the caller."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw random weights and batch norm statistics, none at its default, and return the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval().requires_grad_(False)


class Function(nn.Module):
    """A module that calls a function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """Convolutions, ReLU6, a depthwise convolution, a residual sum, global mean, linear head; input [n, 3, 9, 9]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = x + self.point(F.relu6(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


class Pooled(nn.Module):
    """Max pool, concatenation, squeeze-excite, SiLU, a ReLU on a value that is read twice; input [n, 3, 12, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.silu(self.stem(x)), 2)
        x = torch.cat([self.left(x), F.relu(self.right(x))], 1)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = x * gate
        x = x + self.last(F.relu(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Transformer(nn.Module):
    """Patch embedding, one attention block with GELU and layer norm, linear head; input [n, 3, 8, 8]."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        n, tokens, width = x.shape
        y = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = y.unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(y.transpose(1, 2).reshape(n, tokens, width))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class Mlp(nn.Module):
    """Linear layers between ReLUs: input [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU6(), nn.Linear(16, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 9, 9)),
    "pooled": (Pooled, (3, 12, 12)),
    "transformer": (Transformer, (3, 8, 8)),
    "mlp": (Mlp, (10,)),
}


def build(name: str, seed: int = 0, batch: int = 8) -> tuple[nn.Module, Tensor]:
    """Return a network with random weights and one batch of standard normal inputs."""
    kind, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(seed + 1)
    return randomize(kind(), seed), torch.randn(batch, *shape, generator=generator)


class ThinBlocks(nn.Module):
    """Depthwise convolutions of few channels on large images, whose integer kernels are slow."""

    def __init__(self, channels: int = 20, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 1),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]
