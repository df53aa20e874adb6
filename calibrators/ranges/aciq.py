"""Optimal clips of Laplace and Gauss distributions, and the moments that decide between the two.

Must not know: methods, graphs.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy.optimize import brentq
from scipy.special import erfc, lambertw
from torch import Tensor

from calibrators.grid.spec import QuantSpec
from calibrators.ranges.samples import Samples

__all__ = ["aciq_bounds", "gauss_clip", "laplace_clip", "moments"]

RATIO = 0.5 * (math.sqrt(0.5) + math.sqrt(2.0 / math.pi))
"""The middle between mean |x| / std of a Laplace (0.707) and of a Gauss (0.798) distribution."""


def aciq_bounds(samples: Samples, spec: QuantSpec, law: str) -> tuple[Tensor, Tensor]:
    """Return the ends of the range that is optimal under `law` ("laplace", "gauss", "auto"), float64 [rows] each."""
    centre, mean_abs, std = moments(samples, centred=not spec.symmetric)
    half = ~samples.crosses_zero & ~torch.tensor(spec.symmetric and spec.signed)  # rows that use the whole grid
    laplace = torch.where(half, laplace_clip(spec.bits + 1), laplace_clip(spec.bits)) * mean_abs
    gauss = torch.where(half, gauss_clip(spec.bits + 1), gauss_clip(spec.bits)) * std
    is_laplace = mean_abs < RATIO * std if law == "auto" else torch.tensor(law == "laplace")
    clip = torch.where(is_laplace, laplace, gauss)
    return torch.maximum(centre - clip, samples.lo), torch.minimum(centre + clip, samples.hi)


def moments(samples: Samples, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centre, mean distance from it and standard deviation of each row, float64 [rows] each.

    The centre is the mean if `centred`, otherwise 0. Rows of one sign count as a distribution around 0 after a ReLU:
    their centre is 0 and their zeros are left out.
    """
    values = samples.values.to(torch.float64)
    present = samples.sum((values != 0.0).to(values.dtype))
    number = torch.where(samples.crosses_zero, float(samples.total), present).clamp(min=1.0)
    mean = samples.sum(values) / number
    centre = torch.where(samples.crosses_zero & torch.tensor(centred), mean, 0.0)
    distance = torch.where(samples.crosses_zero[:, None] | (values != 0.0), values - centre[:, None], 0.0).abs()
    return centre, samples.sum(distance) / number, (samples.sum(distance.square()) / number).sqrt()


def laplace_clip(bits: int) -> float:
    """Return the best clip in units of mean |x| of a Laplace distribution: W(3 * 4^bits)."""
    return float(lambertw(3.0 * 4.0**bits).real)


@lru_cache
def gauss_clip(bits: int) -> float:
    """Return the best clip in units of sigma of a Gauss distribution: the root of the squared error's derivative.

    With Q the upper tail and phi the density, the derivative is 4 t Q(t) - 4 phi(t) + 2 t / (3 * 4^bits).
    """

    def slope(t: float) -> float:
        upper_tail = 0.5 * float(erfc(t / math.sqrt(2.0)))
        density = math.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
        return 4.0 * t * upper_tail - 4.0 * density + 2.0 * t / (3.0 * 4.0**bits)

    return float(brentq(slope, 0.1, 20.0))
