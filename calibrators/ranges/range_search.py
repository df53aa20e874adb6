"""The range that minimizes an error: a scan of fractions of the observed range, then golden section.

An error is at best piecewise smooth in the ends of the range, so the scan finds the valley and golden section only
refines inside it. All rows (channels) and many candidates are evaluated at once. Errors are summed in float64 and
compared in float32, so that the order of a sum, which depends on threads and vector width, does not choose the range.

Must not know: methods, statistics, graphs.
source: scan and golden section, as in the searches of BRECQ and Brevitas. Departs: both, one after the other; two free
ends are searched in turn, each over all its fractions, instead of over their product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from calibrators.grid.numerics import fake_quant, qparams_from_range
from calibrators.grid.spec import QParams, QuantSpec
from calibrators.ranges.samples import BLOCK, Samples

__all__ = ["FRACTIONS", "RangeError", "in_blocks", "lp_bounds", "lp_error", "search_bounds"]

RangeError = Callable[[Tensor, Tensor], Tensor]
"""Error of the ranges [lo, hi], both float64 [candidates, rows], as float64 [candidates, rows]."""

FRACTIONS = torch.cat(
    [
        torch.linspace(1.0, 0.1, 91, dtype=torch.float64),
        torch.logspace(-1.0, math.log10(0.005), 17, dtype=torch.float64)[1:],
    ]
)
"""Candidate ends as fractions of the observed ones: steps of one percent, then, for heavy tails, steps of a sixth down
to 1/200. The widest comes first, so that it is kept among equals."""

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
REFINEMENTS = 12
"""Steps of golden section, which narrow a bracket of two steps of the scan to 1/300 of it."""

ROUNDS = 3
"""Largest number of searches of each of two free ends; a round that changes nothing is the last."""


def lp_bounds(samples: Samples, spec: QuantSpec, p: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the range that minimizes the mean of |fake_quant(x) - x| ** p, float64 [rows] each."""
    return search_bounds(lp_error(samples, spec, p), samples, symmetric=spec.symmetric, refinements=REFINEMENTS)


def lp_error(samples: Samples, spec: QuantSpec, p: float) -> RangeError:
    """Return the error of ranges: mean of (|fake_quant(x) - x| / reach) ** p on the grid that the range gives."""
    rows, n = samples.values.shape
    reach = torch.where(samples.reach > 0.0, samples.reach, 1.0).to(samples.values.dtype)[:, None]

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        qparams = qparams_from_range(lo, hi, replace(spec, axis=0))  # [candidates, rows]
        flat = QParams(qparams.scale.flatten(), qparams.zero_point.flatten(), qparams.spec)
        values = samples.values.expand(len(lo), rows, n).reshape(-1, n)  # [candidates * rows, n]
        distance = fake_quant(values, flat).sub_(values).view(len(lo), rows, n).div_(reach)
        powered = distance.square_() if p == 2.0 else distance.abs_()
        if p not in (1.0, 2.0):
            powered = powered.to(torch.float64).pow_(p)  # a float32 power would depend on the vector width
        return samples.sum(powered) / samples.total

    return in_blocks(error, max(1, BLOCK // (rows * n)))


def search_bounds(
    error: RangeError, samples: Samples, *, symmetric: bool, refinements: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the ends of the best range evaluated, the observed one included; float64 [rows] each.

    symmetric: both ends shrink together. Otherwise each end is then searched by itself.
    """
    lo, hi = samples.lo.clamp(max=0.0), samples.hi.clamp(min=0.0)

    def of_ends(lower: Tensor, upper: Tensor) -> Tensor:
        candidates = (lower + upper).shape  # one of them may be [rows], the other is [candidates, rows]
        return error((lower * lo).expand(candidates), (upper * hi).expand(candidates)).to(torch.float32)

    both = _line_search(lambda f: of_ends(f, f), torch.ones_like(lo), refinements)
    lower, upper = both, both
    if symmetric or not bool(samples.crosses_zero.any()):
        return lower * lo, upper * hi
    for _ in range(ROUNDS):
        before = torch.stack([lower, upper])
        upper = _line_search(partial(of_ends, lower), upper, refinements)
        lower = _line_search(partial(of_ends, upper=upper), lower, refinements)
        if torch.equal(before, torch.stack([lower, upper])):
            break
    return lower * lo, upper * hi


def _line_search(error: Callable[[Tensor], Tensor], start: Tensor, refinements: int) -> Tensor:
    """Return the fraction with the smallest error, [rows]; `start` [rows] unless one is strictly better."""
    scan = FRACTIONS[:, None].expand(-1, len(start))  # [candidates, rows]
    errors = error(scan)
    best = errors.argmin(0)
    found, found_error = FRACTIONS[best], errors.amin(0)
    if refinements:
        left, right = FRACTIONS[(best + 1).clamp(max=len(FRACTIONS) - 1)], FRACTIONS[(best - 1).clamp(min=0)]
        found, found_error = _golden_section(error, left, right, (found, found_error), refinements)
    return torch.where(found_error < error(start[None])[0], found, start)


def _golden_section(
    error: Callable[[Tensor], Tensor], left: Tensor, right: Tensor, best: tuple[Tensor, Tensor], steps: int
) -> tuple[Tensor, Tensor]:
    """Narrow down the bracket (left, right) and return the best fraction and its error, `best` included; all [rows]."""
    found, found_error = best
    low, high = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
    low_error, high_error = error(torch.stack([low, high]))
    for _ in range(steps):
        lower = low_error < high_error  # the valley is left of `high`
        left, right = torch.where(lower, left, low), torch.where(lower, high, right)
        trial = torch.where(lower, right - GOLDEN * (right - left), left + GOLDEN * (right - left))
        trial_error = error(trial[None])[0]
        inner, inner_error = torch.where(lower, low, high), torch.where(lower, low_error, high_error)
        low, low_error = torch.where(lower, trial, inner), torch.where(lower, trial_error, inner_error)
        high, high_error = torch.where(lower, inner, trial), torch.where(lower, inner_error, trial_error)
        better = inner_error < found_error
        found, found_error = torch.where(better, inner, found), torch.where(better, inner_error, found_error)
    return found, found_error


def in_blocks(error: RangeError, height: int) -> RangeError:
    """Return the same error, evaluated for `height` candidates at a time."""

    def blocked(lo: Tensor, hi: Tensor) -> Tensor:
        pairs = zip(torch.split(lo, height), torch.split(hi, height), strict=True)
        return torch.cat([error(*pair) for pair in pairs])

    return blocked
