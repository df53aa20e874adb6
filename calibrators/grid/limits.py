"""Limits of codes that a kernel sets, and weights within them.

x86 CPUs with AVX2 but without VNNI multiply uint8 activations with int8 weights by VPMADDUBSW, which adds the products
of two neighbouring weights in a saturating int16. A file gives the same integers there as everywhere else if and only
if no pair of weights of one sign times the highest activation code exceeds int16.

Must not know: graphs, targets, methods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibrators.grid.numerics import by_rows, grid_of, quantize
from calibrators.grid.spec import QParams

__all__ = ["Limits", "coarsened", "pairings", "within"]

FACTOR = 1 + 2.0**-10
"""Smallest factor by which a scale grows that still has a pair beyond its limit."""


@dataclass(frozen=True, eq=False)
class Limits:
    """Codes that a target allows besides those of the grid; zero points count as code 0 here.

    lowest, highest: of one code, for every element of the weight or broadcast against it.
    partners:        int64 [pairings, columns]: for each way to pair the columns of a group, the column whose code
                     shares a limit with that of this one, itself where there is none. Partners name each other.
    pair_lowest, pair_highest: of the sum of two partners of one sign; 0 lies between them.
    """

    lowest: int | Tensor = -(2**20)
    highest: int | Tensor = 2**20
    partners: Tensor | None = None
    pair_lowest: int = -(2**20)
    pair_highest: int = 2**20

    def __post_init__(self) -> None:
        """Raise ValueError for limits that leave nothing, or partners that do not name each other."""
        if not self.pair_lowest <= 0 <= self.pair_highest or bool(
            torch.any(torch.as_tensor(self.lowest > self.highest))
        ):
            raise ValueError("limits leave no code")
        if self.partners is not None:
            columns = torch.arange(self.partners.shape[1]).expand_as(self.partners)
            if not torch.equal(self.partners.take_along_dim(self.partners, 1), columns):
                raise ValueError("partners do not name each other")


def pairings(shape: Sequence[int]) -> Tensor:
    """Return the partner of each column of a weight [out, in / groups, *kernel], int64 [pairings, columns].

    Kernels pack the reduction in steps of two, an odd rest alone: over (channel, *kernel) in NCHW layout, and over
    (*kernel, channel) in the NHWC layout of integer networks. Which of them runs depends on the neighbours.
    """
    columns = torch.arange(math.prod(shape[1:])).reshape(*shape[1:])
    orders = [columns.flatten()]
    if math.prod(shape[2:]) > 1 and shape[1] > 1:
        orders.append(columns.movedim(0, -1).flatten())
    return torch.stack([_partners(order) for order in orders])


def _partners(order: Tensor) -> Tensor:
    """Return the partner of each column when they are packed in this order."""
    partners = torch.arange(len(order))
    first, second = order[: len(order) // 2 * 2].view(-1, 2).T
    partners[first], partners[second] = second, first
    return partners


def coarsened(weight: Tensor, qparams: QParams, limits: Limits) -> QParams:
    """Return the smallest scales from those given up at which nearest rounding keeps the limits of pairs.

    weight: [out, ...]; qparams: per tensor or along axis 0.
    """
    scale = qparams.scale.double()
    while True:
        found = replace(qparams, scale=scale.to(torch.float32))
        codes = quantize(weight, found)
        excess = torch.cat([_excess(_centred(codes[rows], own), limits) for rows, own in by_rows(codes, found)])
        excess = excess.max() if scale.ndim == 0 else excess
        if not bool((excess > 1).any()):
            return found
        scale = torch.where(excess > 1, scale * excess.clamp(min=FACTOR), scale)


def _centred(codes: Tensor, qparams: QParams) -> Tensor:
    """Return the codes less their zero points, int32 [out, columns]."""
    return (codes.to(torch.int32) - grid_of(codes, qparams)[1].to(torch.int32)).flatten(1)


def _excess(rows: Tensor, limits: Limits) -> Tensor:
    """Return the largest sum of a pair of each channel, int32 [out, columns], in units of its limit, float64 [out]."""
    worst = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    assert limits.partners is not None
    for partner in limits.partners.to(rows.device):
        lone = partner == torch.arange(len(partner), device=rows.device)
        for ends, limit in (({"min": 0}, limits.pair_highest), ({"max": 0}, limits.pair_lowest)):
            parts = rows.clamp(**ends)  # int32, as in float64 a large layer takes gigabytes
            sums = parts.index_select(1, partner).masked_fill_(lone, 0).add_(parts)
            outermost = sums.amax(1) if "min" in ends else sums.amin(1)
            worst = torch.maximum(worst, outermost.double() / limit)
    return worst


def within(codes: Tensor, weight: Tensor, qparams: QParams, limits: Limits) -> Tensor:
    """Return codes that keep the limits: of a pair beyond its limit, the code above its weight moves towards 0.

    codes, weight: [out, ...].
    """
    ends = tuple(torch.as_tensor(end).to(codes.device).expand(codes.shape) for end in (limits.lowest, limits.highest))
    parts = (
        _rows_within(codes[rows], weight[rows], own, limits, tuple(end[rows] for end in ends))
        for rows, own in by_rows(codes, qparams)
    )
    return torch.cat([*parts])


def _rows_within(codes: Tensor, weight: Tensor, qparams: QParams, limits: Limits, ends: tuple[Tensor, ...]) -> Tensor:
    scale, zero_point = grid_of(weight, qparams)
    lowest, highest = (zero_point.to(torch.int32) + end for end in ends)
    codes = codes.to(torch.int32).clamp(lowest, highest).to(codes.dtype)
    if limits.partners is None:
        return codes
    exact, rows = (weight / scale).flatten(1), _centred(codes, qparams)
    columns = torch.arange(rows.shape[1], device=rows.device)
    while bool((_excess(rows, limits) > 1).any()):
        for partner in limits.partners.to(rows.device):
            other = torch.where(partner == columns, 0, rows[:, partner])
            same = torch.sign(rows) == torch.sign(other)
            sums = torch.where(same, rows + other, rows)
            beyond = (sums > limits.pair_highest) | (sums < limits.pair_lowest)
            grown = (rows - exact) * torch.sign(rows)
            first = (grown > grown[:, partner]) | ((grown == grown[:, partner]) & (columns < partner))
            lone = partner == columns
            rows = rows - torch.where(beyond & (first | lone | ~same), torch.sign(rows), 0)
    return (rows.reshape(codes.shape) + zero_point.to(torch.int32)).to(codes.dtype)
