"""A network from timm, with calibration data.

Needs timm and a torchvision that fits the installed torch: pip install timm torchvision
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn

NAME = os.environ.get("TIMM_MODEL", "mobilenetv4_conv_small")
PRETRAINED = os.environ.get("TIMM_PRETRAINED") == "1"  # downloads weights
SIZE = 128


def network() -> nn.Module:
    """Return the network as timm builds it: nothing is folded or replaced."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(NAME, pretrained=PRETRAINED)
    if not PRETRAINED:  # random weights: let the batch norms see data, so that activations have a sensible scale
        with torch.no_grad():
            for images in calibration():
                model.train()(images)
    return model


def calibration() -> Iterator[Tensor]:
    """Yield four batches of smooth random images, normalized; with real images use the folder form of --data."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        coarse = torch.randn(8, 3, SIZE // 16, SIZE // 16, generator=generator)
        yield nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
