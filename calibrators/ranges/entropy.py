"""KL divergence between the observed and the quantized histogram, for many ranges at once.

Must not know: methods, graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrators.grid.spec import QuantSpec
from calibrators.ranges.histogram import BINS
from calibrators.ranges.range_search import RangeError, in_blocks, search_bounds
from calibrators.ranges.samples import BLOCK, Samples

__all__ = ["Histogram", "divergence", "entropy_bounds"]

WEIGHT_BINS = 2048
"""Bins on each side of zero for a row of weights, which holds thousands of values rather than millions."""


def entropy_bounds(samples: Samples, spec: QuantSpec, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the range with the least divergence, float64 [rows] each."""
    samples = samples.magnitudes() if spec.symmetric else samples
    error = divergence(Histogram.of(samples), spec, smoothing)
    return search_bounds(error, samples, symmetric=spec.symmetric)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Masses of equal bins, `bins` on each side of zero, without exact zeros; float64.

    mass:     [rows, 2 * bins].
    masses, filled, entropies: sums over the bins before each edge of mass, of (mass > 0), of mass * ln(mass);
              [rows, 2 * bins + 1].
    width:    width of a bin, a power of two, [rows].
    """

    mass: Tensor
    masses: Tensor
    filled: Tensor
    entropies: Tensor
    width: Tensor

    @property
    def bins(self) -> int:
        """Return the number of bins on each side of zero."""
        return self.mass.shape[1] // 2

    @classmethod
    def of(cls, samples: Samples) -> Histogram:
        """Return the histogram of each row, on the bins of the statistic that the samples come from, if any."""
        bins = BINS if samples.width else WEIGHT_BINS
        mantissa, exponent = torch.frexp(samples.reach)
        support = torch.ldexp(torch.ones_like(samples.reach), exponent - (mantissa == 0.5).to(exponent.dtype))
        width = torch.full_like(support, samples.width) if samples.width else support / bins
        values = samples.values.to(torch.float64)
        distance = (values.abs() / width[:, None]).ceil().to(torch.int64)  # 1 is the bin next to zero
        index = torch.where(values > 0.0, bins - 1 + distance, bins - distance)
        counted = torch.where(values == 0.0, 0.0, samples.counts.to(torch.float64).expand_as(values))
        mass = torch.zeros(len(values), 2 * bins, dtype=torch.float64)
        mass.scatter_add_(1, index.clamp(0, 2 * bins - 1), counted)
        filled, entropies = (mass > 0.0).to(mass.dtype), torch.xlogy(mass, mass)
        return cls(mass, _sums_before(mass), _sums_before(filled), _sums_before(entropies), width)


def divergence(histogram: Histogram, spec: QuantSpec, smoothing: float) -> RangeError:
    """Return KL(P, Q) as a function of ranges; infinite for a range with fewer bins than levels, 0 for a row of zeros.

    Sums over the bins before each edge make a range cost one look-up per level instead of one per bin.
    """
    levels = spec.qmax + 1 if spec.symmetric else spec.qmax - spec.qmin + 1
    rows = len(histogram.mass)
    total = histogram.masses[:, -1]

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        first = (histogram.bins - (-lo / histogram.width).ceil()).to(torch.int64)  # [candidates, rows]
        end = (histogram.bins + (hi / histogram.width).ceil()).to(torch.int64)
        cross = _cross_entropy(histogram, first, end, levels, smoothing)
        kl = (_clipped_entropy(histogram, first, end) - cross) / total - total.log()
        kl = torch.where((end - first >= levels) & kl.isfinite(), kl, torch.inf)
        return torch.where(total > 0.0, kl, 0.0)

    return in_blocks(error, max(1, BLOCK // (rows * levels)))


def _clipped_entropy(histogram: Histogram, first: Tensor, end: Tensor) -> Tensor:
    """Return the sum of P ln P over the bins [first, end), P not normalized; [candidates, rows]."""
    left, right = _at(histogram.masses, first), histogram.masses[:, -1] - _at(histogram.masses, end)
    inside = _at(histogram.entropies, end) - _at(histogram.entropies, first)
    for clipped, bin_index in ((left, first), (right, end - 1)):
        mass = _at(histogram.mass, bin_index)
        inside += torch.xlogy(mass + clipped, mass + clipped) - torch.xlogy(mass, mass)
    return inside


def _cross_entropy(histogram: Histogram, first: Tensor, end: Tensor, levels: int, smoothing: float) -> Tensor:
    """Return the sum of P ln Q over the bins [first, end), with only Q normalized, and smoothed; [candidates, rows]."""
    span = (end - first)[..., None]
    edges = (
        first[..., None] + (torch.arange(levels + 1) * span + levels - 1) // levels
    )  # [candidates, rows, levels + 1]
    masses, filled = _at(histogram.masses, edges), _at(histogram.filled, edges).diff(dim=-1)
    inside = (masses[..., -1:] - masses[..., :1]).clamp(min=1.0)
    empty = smoothing / span.to(torch.float64)  # Q of a bin without mass
    q = (1.0 - smoothing) * masses.diff(dim=-1) / (filled.clamp(min=1.0) * inside) + empty  # Q of the others, per level
    cross = torch.xlogy(masses.diff(dim=-1), q).sum(-1)
    left, right = masses[..., 0], histogram.masses[:, -1] - masses[..., -1]
    for clipped, bin_index, level in ((left, first, 0), (right, end - 1, -1)):
        of_bin = torch.where(_at(histogram.mass, bin_index) > 0.0, q[..., level], empty[..., 0])
        cross += torch.xlogy(clipped, of_bin)
    return cross


def _at(table: Tensor, index: Tensor) -> Tensor:
    """Return the entries of each row of `table` [rows, m] at `index` [candidates, rows] or [candidates, rows, k]."""
    deep = index if index.ndim == 3 else index[..., None]
    found = table.expand(len(index), -1, -1).gather(2, deep)
    return found if index.ndim == 3 else found[..., 0]


def _sums_before(values: Tensor) -> Tensor:
    """Return the sums of the values before each of the n + 1 edges, [rows, n] -> [rows, n + 1]."""
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))
