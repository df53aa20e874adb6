"""The streaming statistic of one activation tensor: everything that range criteria may read.

The result depends, bit for bit, on the values alone and not on their order or their split into batches: the support
[-R, R] has the smallest power of two R that holds the largest magnitude seen; growing R merges neighbouring bins in
pairs, which gives the bins of the larger R exactly; and the state holds only integers and extremes.

Must not know: criteria, quantization grids, graphs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["BINS", "Statistic"]

BINS = 8192
"""Bins on each side of zero. R is at most twice the largest magnitude, so at least 4096 are in use: 16 per step of an
8-bit grid that spans the data, 4 per step of one that spans a quarter of it."""

CHUNK = 1 << 15
"""Values binned at a time: temporaries stay in cache, and torch runs operations of this size on the calling thread.
Counting is serial anyway, and on a busy machine many short parallel sections would wait for each other."""

EXPONENT_FLOOR = -100
"""Smallest log2 of R, so that BINS / R is a float32 number."""


class Statistic:
    """Histogram with exact counts, extremes and the number of non-finite values.

    The index of a value is its distance from zero in bins, rounded away from zero: bin 0 holds exact zeros only, bin
    k > 0 holds ((k - 1) * width, k * width], bin -k mirrors it.

    lo, hi:    exact extremes of the finite values; +inf and -inf before the first one.
    counts:    int64 [2 * BINS + 1], bin k at index BINS + k.
    nonfinite: number of NaN and infinities, which are not counted anywhere else.
    """

    def __init__(self) -> None:
        self.lo = math.inf
        self.hi = -math.inf
        self.nonfinite = 0
        self.exponent = EXPONENT_FLOOR
        self.counts = torch.zeros(2 * BINS + 1, dtype=torch.int64)

    @property
    def width(self) -> float:
        """Return the width of a bin, a power of two."""
        return math.ldexp(1.0, self.exponent) / BINS

    @property
    def count(self) -> int:
        """Return the number of finite values seen."""
        return int(self.counts.sum())

    def centers(self) -> Tensor:
        """Return the centres of the bins, float64 [2 * BINS + 1]; those beyond an extreme are moved onto it."""
        index = torch.arange(-BINS, BINS + 1, dtype=torch.float64)
        centers = (index - 0.5 * index.sign()) * self.width
        return centers.clamp(self.lo, self.hi) if self.lo <= self.hi else centers

    def update(self, x: Tensor) -> None:
        """Count the values of `x`, of any shape and floating dtype, as float32."""
        values = _in_memory_order(x.detach()).to(torch.float32)
        if values.numel() == 0:
            return
        lo, hi = _extremes(values)
        if not (math.isfinite(lo) and math.isfinite(hi)):
            finite = values[values.isfinite()]
            self.nonfinite += values.numel() - finite.numel()
            self.update(finite)
            return
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self.widen(_exponent(max(-lo, hi)))
        self._count(values, signed=lo < 0.0)

    def widen(self, exponent: int) -> None:
        """Grow the support to R = 2**exponent, if it is smaller."""
        if exponent > self.exponent:
            self.counts = _coarsened(self.counts, exponent - self.exponent)
            self.exponent = exponent

    def _count(self, values: Tensor, *, signed: bool) -> None:
        first = -BINS if signed else 0
        counts = self.counts[first + BINS :]
        for chunk in torch.split(values, CHUNK):
            scaled = self._in_bins(chunk)
            inner = scaled.to(torch.int16).to(scaled.dtype)  # rounded towards zero,
            index = scaled.sub_(inner).sign_().add_(inner).to(torch.int16)  # and away from zero if that changed it
            counts += torch.bincount(index.sub_(first), minlength=len(counts))

    def _in_bins(self, values: Tensor) -> Tensor:
        """Return `values` in bin widths, exactly: in float64 where a division could underflow float32."""
        exact = values if self.width <= 1.0 else values.to(torch.float64)
        return exact * (1.0 / self.width)


def _exponent(magnitude: float) -> int:
    """Return the smallest k with 2**k >= magnitude, at least EXPONENT_FLOOR."""
    mantissa, exponent = math.frexp(magnitude)
    return max(exponent - 1 if mantissa == 0.5 else exponent, EXPONENT_FLOOR) if magnitude > 0.0 else EXPONENT_FLOOR


def _coarsened(counts: Tensor, doublings: int) -> Tensor:
    """Return counts on bins 2**doublings times as wide: bin k goes to bin sign(k) * ceil(|k| / 2**doublings)."""
    shift = min(doublings, BINS.bit_length())  # beyond it every bin but 0 is already in bin 1 or -1
    index = torch.arange(-BINS, BINS + 1)
    index = ((index.abs() + (1 << shift) - 1) >> shift) * index.sign() + BINS
    return torch.zeros_like(counts).index_add_(0, index, counts)


def _in_memory_order(x: Tensor) -> Tensor:
    """Flatten `x` in the order of memory, without a copy for any dense layout."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda axis: -strides[axis])
    return x.permute(order).reshape(-1)


def _extremes(values: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value, NaN if there is one, with 0.0 for -0.0."""
    ends = torch.stack([torch.stack(chunk.aminmax()) for chunk in torch.split(values, CHUNK)])  # [chunks, 2]
    return float(ends[:, 0].amin()) + 0.0, float(ends[:, 1].amax()) + 0.0
