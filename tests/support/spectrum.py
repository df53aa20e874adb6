"""A network whose first layer no 8 bits can hold: channels from 1 to 1/1000, of which a logarithm looks at all.

It stands for the short-time Fourier transform in front of an audio network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Spectrum"]


class Spectrum(nn.Module):
    """Filters, log magnitudes, three layers; [n, 1, 12, 12] to [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filters = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        with torch.no_grad():
            self.filters.weight *= (10.0 ** torch.linspace(0, -3, 16))[:, None, None, None]
        self.first, self.second = nn.Conv2d(16, 16, 3, stride=2), nn.Conv2d(16, 16, 3, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        magnitudes = torch.log(self.filters(x).abs() + 1e-5)
        features = torch.relu(self.second(torch.relu(self.first(magnitudes))))
        scores: Tensor = self.head(features.mean((2, 3)))
        return scores
