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

from calibrators.grid.numerics import code_limits, dequantize, grid_of, quantize, round_codes
from calibrators.grid.spec import QParams
from calibrators.reconstruction.output_target import damped_cholesky

__all__ = ["Limits", "Rounded", "round_weight"]

BLOCK = 128
"""Columns whose errors reach later columns together, as one matrix product."""


@dataclass(frozen=True, eq=False)
class Limits:
    """Codes that a target allows besides those of the grid; zero points count as code 0 here.

    lowest, highest: of one code, for every element of the weight or broadcast against it.
    partner:         int64 [groups, columns]: the column whose code shares a limit with that of this one, itself where
                     there is none. Partners name each other.
    pair_lowest, pair_highest: of the sum of two partners of one sign; 0 lies between them.
    """

    lowest: int | Tensor = -(2**20)
    highest: int | Tensor = 2**20
    partner: Tensor | None = None
    pair_lowest: int = -(2**20)
    pair_highest: int = 2**20

    def __post_init__(self) -> None:
        """Raise ValueError for limits that leave nothing, or partners that do not name each other."""
        if not self.pair_lowest <= 0 <= self.pair_highest or bool(
            torch.any(torch.as_tensor(self.lowest > self.highest))
        ):
            raise ValueError("limits leave no code")
        if self.partner is not None:
            columns = torch.arange(self.partner.shape[1]).expand_as(self.partner)
            if not torch.equal(self.partner.take_along_dim(self.partner, 1), columns):
                raise ValueError("partners do not name each other")


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes of a weight, and the errors of its output relative to its energy with nearest rounding and these codes.

    kept: output channels that keep nearest rounding; free: the error without `Limits`, None where there were none.
    """

    codes: Tensor
    nearest: float
    error: float
    kept: int
    free: float | None = None


def round_weight(
    weight: Tensor,
    qparams: QParams,
    hessian: Tensor,
    *,
    target: Tensor | None = None,
    limits: Limits | None = None,
    damping: float = 0.01,
    act_order: bool = False,
) -> Rounded:
    """Round a weight, under fixed parameters, to codes that lower the error of its output.

    weight:    [out, ...], its elements in the order of the columns; qparams: per tensor, or along axis 0.
    hessian:   [groups, columns, columns], finite.
    target:    [groups, out / groups, columns]: weights to come close to instead (output_target), None for the weight's.
    limits:    codes that the target allows, kept while other codes compensate.
    damping:   added to the diagonal, in units of its mean; raised tenfold, up to 1, while H is not positive definite.
    act_order: round columns in the order of their inputs' energy, the largest first.
    raises:    DataError where no damping makes H positive definite.
    """
    matrix = hessian.double()
    groups, columns = matrix.shape[:2]
    order = _order(matrix, act_order)
    factor = _factor(matrix.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None, :], 2), damping)
    rows = weight.double().reshape(groups, -1, columns)
    wanted = rows if target is None else target
    grid = _Grid.of(weight, qparams, limits, order)
    nearest = quantize(weight, qparams)
    if limits is not None:
        nearest = grid.round(rows, torch.eye(columns).to(factor).expand_as(factor)).reshape(weight.shape).to(nearest)
    codes = grid.round(wanted, factor).reshape(weight.shape).to(nearest)
    before, after = (_energy(wanted - dequantize(c, qparams).reshape(rows.shape), matrix) for c in (nearest, codes))
    worse = after > before
    codes[worse.flatten()] = nearest[worse.flatten()]
    energy = float(_energy(rows, matrix).sum()) or 1.0
    free = None
    if limits is not None:
        free = round_weight(weight, qparams, hessian, target=target, damping=damping, act_order=act_order).error
    error = float(before.minimum(after).sum()) / energy
    return Rounded(codes, float(before.sum()) / energy, error, int(worse.sum()), free)


def _energy(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return twice the mean squared output of every row, [groups, rows]."""
    return (rows @ matrix * rows).sum(2)


def _order(matrix: Tensor, act_order: bool) -> Tensor:
    """Return the columns of every group in the order of rounding, int64 [groups, columns]."""
    groups, columns = matrix.shape[:2]
    if act_order:
        return matrix.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    return torch.arange(columns, device=matrix.device).expand(groups, columns)


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

    order: int64 [groups, columns]; partner: the partner of each column by its place in the order.
    """

    scale: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor
    order: Tensor
    limits: Limits
    partner: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, qparams: QParams, limits: Limits | None, order: Tensor) -> _Grid:
        """Return the grid of a weight within the limits of its codes."""
        limits = limits or Limits()
        scale, zero_point = grid_of(weight, qparams)
        lowest, highest = (torch.as_tensor(code, device=weight.device) for code in code_limits(weight, qparams))
        lowest = torch.maximum(lowest, limits.lowest + zero_point)
        highest = torch.minimum(highest, limits.highest + zero_point)
        groups, columns = order.shape

        def ordered(x: Tensor) -> Tensor:
            x = x.expand_as(weight).double().reshape(groups, -1, columns)
            return x.take_along_dim(order[:, None], 2).mT.contiguous()

        place = order.argsort(1)
        partner = None if limits.partner is None else place.gather(1, limits.partner.to(place).gather(1, order))
        scale, zero_point, lowest, highest = map(ordered, (scale, zero_point, lowest, highest))
        return cls(scale, zero_point, lowest, highest, order, limits, partner)

    def round(self, rows: Tensor, factor: Tensor) -> Tensor:
        """Round column after column, passing errors on by `factor`; return codes, float64 [groups, rows, columns]."""
        groups, count, columns = rows.shape
        left = rows.take_along_dim(self.order[:, None], 2).mT.contiguous()
        codes = torch.empty_like(left)
        for start in range(0, columns, BLOCK):
            end = min(start + BLOCK, columns)
            errors = left.new_empty(groups, end - start, count)
            for j in range(start, end):
                lowest, highest = self._allowed(j, left, codes)
                codes[:, j] = round_codes(left[:, j], self.scale[:, j], self.zero_point[:, j], lowest, highest)
                rounded = (codes[:, j] - self.zero_point[:, j]) * self.scale[:, j]
                errors[:, j - start] = (left[:, j] - rounded) / factor[:, j, j, None]
                left[:, j + 1 : end] -= factor[:, j, j + 1 : end, None] * errors[:, j - start, None]
            left[:, end:] -= factor[:, start:end, end:].mT @ errors
        return codes.take_along_dim(self.order.argsort(1)[:, :, None], 1).mT

    def _allowed(self, j: int, left: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest code of column j, [groups, rows], with the codes of earlier columns given.

        Of two partners the first leaves the second half of what the two have to give up.
        """
        lowest, highest = self.lowest[:, j], self.highest[:, j]
        if self.partner is None:
            return lowest, highest
        at = self.partner[:, j, None, None]
        zero_point = self.zero_point[:, j]
        own = (left[:, j] / self.scale[:, j]).round()
        scale, zero, value, code = (x.take_along_dim(at, 1)[:, 0] for x in (self.scale, self.zero_point, left, codes))
        place = at[:, 0]
        other = torch.where(place < j, code - zero, (value / scale).round())
        top, bottom = self.limits.pair_highest, self.limits.pair_lowest
        above = torch.where(place < j, top - other, ((top + own - other) / 2).floor()).clamp(0, top)
        below = torch.where(place < j, bottom - other, ((bottom + own - other) / 2).ceil()).clamp(bottom, 0)
        above, below = torch.where(other > 0, above, top), torch.where(other < 0, below, bottom)
        lone = place == j
        return (
            torch.where(lone, lowest, lowest.maximum(zero_point + below)),
            torch.where(lone, highest, highest.minimum(zero_point + above)),
        )
