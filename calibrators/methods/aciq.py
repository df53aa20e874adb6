"""The range that is optimal for a Laplace or Gauss distribution with the observed moments.

source: Banner et al., Post training 4-bit quantization of convolutional networks for rapid-deployment (ACIQ, 2019),
section 2: the expected squared error of clipping at a is, for M bits, 2 b^2 exp(-a/b) + a^2 / (3 * 4^M) under a Laplace
law with mean distance b, and has a like form under a Gauss law; data after a ReLU count as M + 1 bits.
Departs: the minimum is solved (Lambert's W, a root of the derivative) instead of tabulated; "auto" chooses the law by
mean |x| / std; a symmetric signed grid that sees one sign only has M bits, not M + 1. As in the source the range is cut
into 2^M intervals, which is coarse below 4 bits: prefer mse there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.optimize import brentq
from scipy.special import erfc, lambertw
from torch import Tensor

from calibrators.grid.spec import QuantSpec
from calibrators.options import option
from calibrators.ranges.range_method import RangeMethod, Samples

__all__ = ["ACIQ"]

RATIO = 0.5 * (math.sqrt(0.5) + math.sqrt(2.0 / math.pi))
"""Half way between mean |x| / std of a Laplace (0.707) and of a Gauss (0.798) distribution."""


@dataclass(frozen=True)
class ACIQ(RangeMethod):
    """Range that is optimal for a Laplace or Gauss distribution with the observed moments, without a search."""

    law: str = option("auto", "distribution of the values", choices=("auto", "laplace", "gauss"))

    def bounds(self, samples: Samples, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        centre, mean_abs, std = moments(samples, centred=not spec.symmetric)
        half = ~samples.crosses_zero & ~torch.tensor(spec.symmetric and spec.signed)  # rows that use the whole grid
        laplace = torch.where(half, laplace_clip(spec.bits + 1), laplace_clip(spec.bits)) * mean_abs
        gauss = torch.where(half, gauss_clip(spec.bits + 1), gauss_clip(spec.bits)) * std
        is_laplace = mean_abs < RATIO * std if self.law == "auto" else torch.tensor(self.law == "laplace")
        clip = torch.where(is_laplace, laplace, gauss)
        return torch.maximum(centre - clip, samples.lo), torch.minimum(centre + clip, samples.hi)


def moments(samples: Samples, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, mean distance from it and standard deviation of each row, float64 [rows] each.

    The centre is the mean if `centred`, else 0. Rows of one sign are taken for what a ReLU left of a distribution
    around 0: their centre is 0 and their zeros do not count.
    """
    values = samples.values.to(torch.float64)
    present = samples.sum((values != 0.0).to(values.dtype))
    number = torch.where(samples.crosses_zero, float(samples.total), present).clamp(min=1.0)
    mean = samples.sum(values) / number
    centre = torch.where(samples.crosses_zero & torch.tensor(centred), mean, 0.0)
    distance = torch.where(samples.crosses_zero[:, None] | (values != 0.0), values - centre[:, None], 0.0).abs()
    return centre, samples.sum(distance) / number, (samples.sum(distance.square()) / number).sqrt()


def laplace_clip(bits: int) -> float:
    """Best clip in units of mean |x| of a Laplace distribution: W(3 * 4^bits)."""
    return float(lambertw(3.0 * 4.0**bits).real)


@lru_cache
def gauss_clip(bits: int) -> float:
    """Best clip in units of sigma of a Gauss distribution, where the derivative of the squared error is 0.

    With Q the upper tail and phi the density it is 4 t Q(t) - 4 phi(t) + 2 t / (3 * 4^bits).
    """

    def slope(t: float) -> float:
        upper_tail = 0.5 * float(erfc(t / math.sqrt(2.0)))
        density = math.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
        return 4.0 * t * upper_tail - 4.0 * density + 2.0 * t / (3.0 * 4.0**bits)

    return float(brentq(slope, 0.1, 20.0))
