"""Networks as their papers define them, at full width, to which published partitions and weight counts refer.

torchvision's layout and module names where it has the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PUBLISHED", "MobileNetV2", "RegNetX", "RepVGG", "ResNet"]


def conv_bn(
    i: int, o: int, k: int = 1, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Module:
    layers = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Shortcut(nn.Module):
    """ReLU of the branch's sum with its input, or with the input's projection where the shape changes."""

    def __init__(self, i: int, o: int, stride: int, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.downsample = conv_bn(i, o, 1, stride, act=None) if stride > 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.downsample(x))


def basic(i: int, width: int, stride: int) -> Shortcut:
    branch = nn.Sequential(conv_bn(i, width, 3, stride), conv_bn(width, width, 3, act=None))
    return Shortcut(i, width, stride, branch)


def bottleneck(i: int, width: int, stride: int) -> Shortcut:
    branch = nn.Sequential(conv_bn(i, width), conv_bn(width, width, 3, stride), conv_bn(width, 4 * width, act=None))
    return Shortcut(i, 4 * width, stride, branch)


class ResNet(nn.Module):
    """He et al. 2015, strides in the 3x3 convolutions; blocks: per stage."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], expansion: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = conv_bn(3, 64, 7, 2)
        channels = 64
        for stage, depth in enumerate(blocks):
            width, layers = 64 << stage, []
            for index in range(depth):
                layers.append(block(channels, width, 2 if stage and not index else 1))
                channels = width * expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class RegNetX(nn.Module):
    """Radosavovic et al. 2020; bottleneck ratio 1."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], group_width: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32, 3, 2)
        channels, stages = 32, []
        for width, depth in zip(widths, depths, strict=True):
            blocks = []
            for index in range(depth):
                stride = 1 if index else 2
                middle = conv_bn(width, width, 3, stride, width // group_width)
                branch = nn.Sequential(conv_bn(channels, width), middle, conv_bn(width, width, act=None))
                blocks.append(Shortcut(channels, width, stride, branch))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class InvertedResidual(nn.Module):
    def __init__(self, i: int, o: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = i * expansion
        expand = [conv_bn(i, hidden, act=nn.ReLU6)] if expansion > 1 else []
        depthwise = conv_bn(hidden, hidden, 3, stride, hidden, nn.ReLU6)
        self.conv = nn.Sequential(*expand, depthwise, conv_bn(hidden, o, act=None))
        self.is_residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, table 2."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 32, 3, 2, act=nn.ReLU6)]
        channels = 32
        for t, c, n, s in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for index in range(n):
                layers.append(InvertedResidual(channels, c, 1 if index else s, t))
                channels = c
        self.features = nn.Sequential(*layers, conv_bn(channels, 1280, act=nn.ReLU6))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class RepVGGBlock(nn.Module):
    """Ding et al. 2021, training form: 3x3, 1x1 and, where the shape stays, identity, each with a batch norm."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.rbr_dense, self.rbr_1x1 = conv_bn(i, o, 3, stride, act=None), conv_bn(i, o, 1, stride, act=None)
        self.rbr_identity = nn.BatchNorm2d(i) if i == o and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return F.relu(y if self.rbr_identity is None else y + self.rbr_identity(x))


class RepVGG(nn.Module):
    def __init__(self, widths: Sequence[int], depths: Sequence[int], classes: int) -> None:
        super().__init__()
        channels = 3
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for index in range(depth):
                blocks.append(RepVGGBlock(channels, width, 1 if index else 2))
                channels = width
            setattr(self, f"stage{stage}", nn.Sequential(*blocks))
        self.depth, self.linear = len(depths), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in range(self.depth):
            x = getattr(self, f"stage{stage}")(x)
        return self.linear(x.mean((2, 3)))


PUBLISHED: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: ResNet(basic, 1, (2, 2, 2, 2)),
    "resnet50": lambda: ResNet(bottleneck, 4, (3, 4, 6, 3)),
    "regnetx600m": lambda: RegNetX((48, 96, 240, 528), (1, 3, 5, 7), 24),
    "mobilenetv2": MobileNetV2,
}
