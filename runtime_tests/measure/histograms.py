"""Count the float values of a site and the codes that a program has in their place, on one axis.

Must not know: graphs, runtimes, files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrators.grid.numerics import code_limits, grid_of
from calibrators.grid.spec import QParams

__all__ = ["BEYOND", "Histograms", "RunningHistograms"]

BINS = 64
"""Bins over the range of a grid, at most."""

BEYOND = 4
"""Further bins of floats on either side of the range; the outermost hold everything beyond."""

PER_SAMPLE = 1024
"""Values of a site that are counted of each sample: all where there are no more."""

STRIDE = 2_654_435_761
"""Distance of the values counted, modulo their number: a large prime, which visits all places alike."""


@dataclass(frozen=True)
class Histograms:
    """The values of a site.

    clipped: share of the float values that lie beyond the range.
    floats:  their counts, BEYOND bins on either side of the range.
    codes:   counts of the codes, in bins over the range alone; each is as wide as one or more bins of `floats`.
    """

    clipped: float
    floats: tuple[int, ...]
    codes: tuple[int, ...]


class RunningHistograms:
    """Histograms of a site, which grow by up to PER_SAMPLE values of each sample; bins are steps of its grid."""

    def __init__(self, qparams: QParams) -> None:
        self.qparams, self.lowest = qparams, qparams.spec.qmin
        levels = qparams.spec.qmax - qparams.spec.qmin + 1
        self.group = -(-levels // BINS)  # codes in a bin
        self.parts = max(1, BINS // levels)  # bins of floats in a bin of codes
        self.codes = torch.zeros(-(-levels // self.group), dtype=torch.int64)
        self.floats = torch.zeros(self.parts * len(self.codes) + 2 * BEYOND, dtype=torch.int64)
        self.clipped = 0

    def add(self, exact: Tensor, value: Tensor, samples: int) -> None:
        """Count values of a site on `samples` samples: floats, and the dequantized codes in their place."""
        places, shape = _places(exact.numel(), samples * PER_SAMPLE), exact.shape
        grid = map(torch.as_tensor, (*grid_of(exact, self.qparams), *code_limits(exact, self.qparams)))
        scale, zero_point, low, high = (
            each.reshape(()) if each.numel() == 1 else each.broadcast_to(shape).reshape(-1)[places] for each in grid
        )
        steps, codes = (values.reshape(-1)[places] / scale + zero_point for values in (exact, value))
        self.clipped += int(((steps < low - 0.5) | (steps > high + 0.5)).sum())
        self.floats += self._counts(steps + 0.5, self.parts, len(self.floats), BEYOND)
        self.codes += self._counts(codes.round(), 1, len(self.codes), 0)

    def include(self, other: RunningHistograms) -> None:
        """Add what was counted on other samples."""
        self.clipped += other.clipped
        self.floats += other.floats
        self.codes += other.codes

    def _counts(self, steps: Tensor, parts: int, bins: int, before: int) -> Tensor:
        """Count steps of the grid in `bins` bins, `before` of them below the lowest code, `parts` bins to a group."""
        places = ((steps - self.lowest) * (parts / self.group)).floor().nan_to_num(0.0) + before
        return torch.bincount(places.clamp(0, bins - 1).long(), minlength=bins)

    def result(self) -> Histograms | None:
        """Return the histograms, None if no value was seen."""
        seen = int(self.floats.sum())
        if not seen:
            return None
        return Histograms(self.clipped / seen, tuple(self.floats.tolist()), tuple(self.codes.tolist()))


def _places(total: int, count: int) -> Tensor:
    """Return up to `count` indices below `total`, spread over all of it."""
    return torch.arange(total) if total <= count else torch.arange(count) * STRIDE % total
