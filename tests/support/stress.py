"""Networks and grids with which a runtime's kernels are compared with formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibrators.grid.kernel_tables import CodeGrid
from tests.support.architectures import construct
from tests.support.networks import NETWORKS, build, randomize
from tests.support.published_nets import PUBLISHED

__all__ = ["SIDE", "Grids", "grids_of", "images_of", "network_of"]

SIDE = 5
"""Height and width of the images whose means are computed."""

Grids = tuple[CodeGrid, CodeGrid, CodeGrid]


def network_of(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a network with random weights, and a batch of its inputs."""
    if name in PUBLISHED:
        return randomize(PUBLISHED[name]()), (torch.randn(2, 3, 32, 32),)
    if name in NETWORKS:
        model, x = build(name, batch=8)
        return model, (x,)
    return construct(name, 8)


def grids_of(kernel: str) -> list[Grids]:
    """Return grids of int8 codes with ratios of small integers, on which many results are ties, and others."""
    rng = np.random.default_rng(0)
    units = [*(rng.uniform(0.001, 0.01) * rng.integers(1, 8, 3) for _ in range(4)), *rng.uniform(0.005, 0.06, (4, 3))]
    found = []
    for x, z, y in units:
        scales = x, z, x * z * 60 if kernel == "mul" else y
        zeros = rng.integers(-128, 128, 3)
        made = (CodeGrid(float(np.float32(s)), int(v), -128, 127, -128) for s, v in zip(scales, zeros, strict=True))
        found.append(tuple(made))
    return found  # type: ignore[return-value]


def images_of() -> NDArray[Any]:
    """Return int8 codes of images with means of all sizes, [1, 4096, SIDE, SIDE]."""
    rng = np.random.default_rng(0)
    images = rng.integers(-128, 128, (1, 4096, SIDE, SIDE)) * rng.random((1, 4096, 1, 1))
    return images.astype(np.int8)
