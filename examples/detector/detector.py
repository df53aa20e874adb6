"""An anchor-free detector with outputs at two strides, and calibration data.

The network returns a dictionary: its keys are the names of the ONNX outputs. Decoding the boxes stays outside the
network (decode.py), because it does not run on integers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 4
SIZE = 64


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Head(nn.Module):
    """Class scores, box distances and centreness of every cell of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shared = ConvNorm(channels, channels)
        self.scores = nn.Conv2d(channels, CLASSES, 1)
        self.boxes = nn.Conv2d(channels, 4, 1)
        self.centreness = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.shared(x)
        return self.scores(y).sigmoid(), F.relu(self.boxes(y)), self.centreness(y).sigmoid()


class Detector(nn.Module):
    """[n, 3, 64, 64] -> three maps at stride 8 and three at stride 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 16, 2), ConvNorm(16, 24, 2), ConvNorm(24, 32, 2))
        self.down = ConvNorm(32, 48, 2)
        self.lateral_8, self.lateral_16 = nn.Conv2d(32, 32, 1), nn.Conv2d(48, 32, 1)
        self.head_8, self.head_16 = Head(32), Head(32)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        c8 = self.stem(image)
        p16 = self.lateral_16(self.down(c8))
        p8 = self.lateral_8(c8) + F.interpolate(p16, scale_factor=2.0, mode="nearest")
        outputs = {}
        for stride, maps in ((8, self.head_8(p8)), (16, self.head_16(p16))):
            names = (f"scores_{stride}", f"boxes_{stride}", f"centreness_{stride}")
            outputs.update(zip(names, maps, strict=True))
        return outputs


def build() -> nn.Module:
    """Return the detector; a real one would load its weights here or with --checkpoint."""
    torch.manual_seed(0)
    model = Detector()
    with torch.no_grad():
        for batch in calibration():  # random weights: let the batch norms see data
            model.train()(batch)
    return model


def calibration() -> Iterator[Tensor]:
    """Yield four batches of random images."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        yield torch.rand(16, 3, SIZE, SIZE, generator=generator)
