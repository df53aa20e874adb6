"""A small RepVGG-style classifier of handwritten digits in its training form, with its data.

Every block sums a 3x3 convolution, a 1x1 convolution and an identity, each with its batch normalization; nothing is
folded, and there is no switch to a deployed form. `python -m exporter.demo.train` writes the weights beside this file.

Must not know: anything of this project; it stands for a user's file.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WEIGHTS", "DigitNet", "calibration", "digits", "evaluation", "network"]

WEIGHTS = Path(__file__).parent / "weights.safetensors"
DIGITS = Path(__file__).parent / "digits.npz"
"""1797 images of 8x8 pixels from 0 to 16, with labels: the test part of "Optical Recognition of Handwritten Digits" by
E. Alpaydin and C. Kaynak (UCI Machine Learning Repository, CC BY 4.0), as scikit-learn also ships it."""
HELD_OUT = 500
"""Images of the evaluation split; the other 1297 train the network, and the first of those calibrate it."""
CALIBRATION = 512
SIZE = 16
"""Side of an input image: the 8x8 digits, enlarged bilinearly."""

Split = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


class Block(nn.Module):
    """relu(bn(conv3x3(x)) + bn(conv1x1(x)) [+ bn(x) where the shape stays])."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.dense = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.dense_norm = nn.BatchNorm2d(outputs)
        self.point = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.point_norm = nn.BatchNorm2d(outputs)
        self.identity_norm = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense_norm(self.dense(x)) + self.point_norm(self.point(x))
        if self.identity_norm is not None:
            y = y + self.identity_norm(x)
        return F.relu(y)


class DigitNet(nn.Module):
    """[n, 1, 16, 16] float32 in 0..1 -> [n, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Block(1, 32),  # [n, 32, 16, 16]
            Block(32, 32),
            Block(32, 64, stride=2),  # [n, 64, 8, 8]
            Block(64, 64),
            Block(64, 96, stride=2),  # [n, 96, 4, 4]
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(96, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.blocks(image)).flatten(1))
        return logits


def network() -> DigitNet:
    """Return the trained network in its training form and eval mode."""
    model = DigitNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


@cache
def digits() -> tuple[Split, Split]:
    """Return (training, held out) images [n, 1, 16, 16] with labels [n], split by a fixed permutation."""
    with np.load(DIGITS) as data:
        small, labels = torch.from_numpy(data["images"])[:, None] / 16, data["labels"].astype(np.int64)
    images = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False).numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    return (images[training], labels[training]), (images[held_out], labels[held_out])


def calibration(batch: int = 64) -> Iterator[Split]:
    """Yield 512 training images in batches."""
    images, labels = digits()[0]
    return _batches(images[:CALIBRATION], labels[:CALIBRATION], batch)


def evaluation(batch: int = 100) -> Iterator[Split]:
    """Yield the 500 held-out images in batches."""
    return _batches(*digits()[1], batch)


def _batches(images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], batch: int) -> Iterator[Split]:
    for start in range(0, len(labels), batch):
        yield images[start : start + batch], labels[start : start + batch]
