"""Rounding of one weight that changes its output least: errors are passed on to the weights still to be rounded.

The output of a layer for inputs X [columns, positions] changes by (W - Wq) X, whose energy is tr(E H E^T) / 2 with
E = W - Wq and H = 2 X X^T. Columns are rounded one after the other, and later columns compensate for the errors as far
as possible. Output channels are independent of each other, and so are the groups of a convolution.

source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
algorithm 1; Frantar and Alistarh 2022, "Optimal Brain Compression", for the update it comes from.
Departs: H is a mean over positions; weights of inputs that are always zero are rounded to nearest instead of zeroed,
because other data may use them; the factor of the inverse comes from one Cholesky decomposition of H in reversed order;
a channel whose error would exceed that of nearest rounding keeps nearest rounding; scales of blocks stay as chosen for
the original weight.

Must not know: methods, how activations are computed and cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrators.grid.limits import Limits, within
from calibrators.grid.numerics import code_limits, dequantize, grid_of, quantize, round_codes
from calibrators.grid.spec import QParams
from calibrators.reconstruction.output_target import damped_cholesky

__all__ = ["Rounded", "Rounder"]

BLOCK = 128
"""Columns whose errors reach later columns together, as one matrix product."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes of a weight, and the relative errors of its output with nearest rounding and with these codes.

    kept: output channels that keep nearest rounding.
    """

    codes: Tensor
    nearest: float
    error: float
    kept: int


class Rounder:
    """The Hessian of a layer, prepared for rounding its weight.

    hessian:      [groups, columns, columns], finite.
    damping:      added to the diagonal, in means of it; raised tenfold, up to 1, while H is not positive definite.
    act_order:    round columns in the order of their inputs' energy, the largest first.
    shared_order: the same order in all groups, which limits of pairs need.
    raises:       DataError where no damping makes H positive definite.
    """

    def __init__(
        self, hessian: Tensor, *, damping: float = 0.01, act_order: bool = False, shared_order: bool = False
    ) -> None:
        self.matrix = hessian.double()
        self.groups, self.columns = hessian.shape[:2]
        energy = self.matrix.diagonal(dim1=1, dim2=2)
        if not act_order:
            energy = torch.zeros_like(energy)
        elif shared_order:
            energy = energy.sum(0, keepdim=True).expand_as(energy)
        self.order = energy.argsort(dim=1, descending=True, stable=True)  # int64 [groups, columns]
        rows = self.matrix.take_along_dim(self.order[:, :, None], 1)
        self.factor = _factor(rows.take_along_dim(self.order[:, None, :], 2), damping)

    def round(
        self, weight: Tensor, qparams: QParams, *, target: Tensor | None = None, limits: Limits | None = None
    ) -> Rounded:
        """Round a weight, under fixed parameters, to codes that lower the error of its output.

        weight:  [out, ...], its elements in the order of the columns; qparams: per tensor, or along axis 0.
        target:  [groups, out / groups, columns]: weights to come close to instead (output_target); None: the weight's.
        limits:  codes that the target allows, kept while other codes compensate.
        """
        rows = weight.double().reshape(self.groups, -1, self.columns)
        wanted = rows if target is None else target
        nearest = quantize(weight, qparams)
        if limits is not None:
            nearest = within(nearest, weight, qparams, limits)
        codes = (
            self._feed_errors(wanted, _Grid.of(weight, qparams, limits, self.order)).reshape(weight.shape).to(nearest)
        )
        before, after = (self._energy(wanted - dequantize(c, qparams).reshape(rows.shape)) for c in (nearest, codes))
        worse = after > before
        codes[worse.flatten()] = nearest[worse.flatten()]
        energy = float(self._energy(rows).sum()) or 1.0
        kept = int(worse.sum())
        return Rounded(codes, float(before.sum()) / energy, float(before.minimum(after).sum()) / energy, kept)

    def _energy(self, rows: Tensor) -> Tensor:
        """Return twice the mean squared output of every row, [groups, rows]."""
        return (rows @ self.matrix * rows).sum(2)

    def _feed_errors(self, rows: Tensor, grid: _Grid) -> Tensor:
        """Round column after column, passing errors on; return codes, float64 [groups, rows, columns]."""
        groups, count, columns = rows.shape
        left = rows.take_along_dim(self.order[:, None], 2).mT.contiguous()  # [groups, columns, rows]
        codes = torch.empty_like(left)
        for start in range(0, columns, BLOCK):
            end = min(start + BLOCK, columns)
            errors = left.new_empty(groups, end - start, count)
            for j in range(start, end):
                codes[:, j] = grid.round(j, left, codes)
                rounded = (codes[:, j] - grid.zero_point[:, j]) * grid.scale[:, j]
                errors[:, j - start] = (left[:, j] - rounded) / self.factor[:, j, j, None]
                left[:, j + 1 : end] -= self.factor[:, j, j + 1 : end, None] * errors[:, j - start, None]
            left[:, end:] -= self.factor[:, start:end, end:].mT @ errors
        return codes.take_along_dim(self.order.argsort(1)[:, :, None], 1).mT


def _factor(matrix: Tensor, damping: float) -> Tensor:
    """Return the upper U with U^T U = (H + damping * mean(diag H))^-1, [groups, columns, columns].

    With J the reversal of columns and J H J = L L^T, H is V V^T for the upper V = J L J, and U its inverse.
    """
    lower = damped_cholesky(matrix.flip(1, 2), damping)
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    upper: Tensor = torch.linalg.solve_triangular(lower.flip(1, 2), identity, upper=True)
    return upper


@dataclass(frozen=True, eq=False)
class _Grid:
    """The grid of every element, float64 [groups, columns, rows] in the order of rounding.

    partners: places in the order of the partners of each column, for each way to pair them.
    """

    scale: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor
    limits: Limits
    partners: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, weight: Tensor, qparams: QParams, limits: Limits | None, order: Tensor) -> _Grid:
        """Return the grid of a weight within the limits of its codes; with pairs all groups have one order."""
        limits = limits or Limits()
        scale, zero_point = grid_of(weight, qparams)
        lowest, highest = (torch.as_tensor(code, device=weight.device) for code in code_limits(weight, qparams))
        lowest = torch.maximum(lowest, limits.lowest + zero_point)
        highest = torch.minimum(highest, limits.highest + zero_point)

        def ordered(x: Tensor) -> Tensor:
            x = x.expand_as(weight).double().reshape(len(order), -1, order.shape[1])
            return x.take_along_dim(order[:, None], 2).mT.contiguous()

        scale, zero_point, lowest, highest = map(ordered, (scale, zero_point, lowest, highest))
        first = order[0].cpu()
        place = first.argsort()
        pairings = () if limits.partners is None else limits.partners
        partners = tuple(tuple(place[pairing[first]].tolist()) for pairing in pairings)
        return cls(scale, zero_point, lowest, highest, limits, partners)

    def round(self, j: int, left: Tensor, codes: Tensor) -> Tensor:
        """Return the codes of column j of the weights `left`, [groups, rows], with `codes` of earlier columns given.

        Of two partners the first leaves the second half of what the two have to give up.
        """
        scale, zero_point, lowest, highest = (x[:, j] for x in (self.scale, self.zero_point, self.lowest, self.highest))
        top, bottom = self.limits.pair_highest, self.limits.pair_lowest
        for places in self.partners:
            k = places[j]
            if k == j:
                continue
            if k < j:
                other = codes[:, k] - self.zero_point[:, k]
                above, below = top - other.clamp(min=0), bottom - other.clamp(max=0)
            else:
                own, other = (left[:, j] / scale).round(), (left[:, k] / self.scale[:, k]).round()
                middle = (own - other) / 2
                above = torch.where(other > 0, (top / 2 + middle).floor(), top).clamp(0, top)
                below = torch.where(other < 0, (bottom / 2 + middle).ceil(), bottom).clamp(bottom, 0)
            lowest, highest = lowest.maximum(zero_point + below), highest.minimum(zero_point + above)
        return round_codes(left[:, j], scale, zero_point, lowest, highest)
