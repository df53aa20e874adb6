"""Rounding of one weight that changes its output least: errors are passed on to the weights still to be rounded.

The output of a layer for inputs X [columns, positions] changes by (W - Wq) X, whose energy is tr(E H E^T) / 2 with
E = W - Wq and H = 2 X X^T. Columns are rounded one after the other, and later columns compensate for the errors as far
as possible. Output channels are independent of each other, and so are the groups of a convolution.

source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
algorithm 1; Frantar and Alistarh 2022, "Optimal Brain Compression", for the update it comes from.
Departs: H is a mean over positions; weights of inputs that are always zero are rounded to nearest instead of zeroed,
because other data may use them; the factor is that of H in reversed order, which tells what each error adds to the
columns after it, and no inverse is needed; a channel whose error would exceed that of nearest rounding keeps nearest
rounding; scales of blocks stay as chosen for the original weight.

Must not know: methods, how activations are computed and cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from calibrators.grid.limits import Limits, within
from calibrators.grid.numerics import code_limits, dequantize, grid_of, quantize, round_codes
from calibrators.grid.spec import QParams
from calibrators.reconstruction.output_target import damped_cholesky, raised

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
    sweeps:       how often every code is chosen again, given all others, after errors were passed on.
    raises:       DataError where no damping makes H positive definite.
    """

    def __init__(
        self,
        hessian: Tensor,
        *,
        damping: float = 0.01,
        act_order: bool = False,
        shared_order: bool = False,
        sweeps: int = 0,
    ) -> None:
        self.sweeps = sweeps
        self.groups, self.columns = hessian.shape[:2]
        energy = hessian.diagonal(dim1=1, dim2=2)
        if not act_order:
            energy = torch.zeros_like(energy)
        elif shared_order:
            energy = energy.sum(0, keepdim=True).expand_as(energy)
        self.order = energy.argsort(dim=1, descending=True, stable=True)  # int64 [groups, columns]
        rows = hessian.take_along_dim(self.order[:, :, None], 1)
        self.matrix = rows.take_along_dim(self.order[:, None, :], 2)
        self.ridge = raised(self.matrix, damping)
        self.factor = _factor(self.matrix, damping)

    def round(
        self, weight: Tensor, qparams: QParams, *, target: Tensor | None = None, limits: Limits | None = None
    ) -> Rounded:
        """Round a weight, under fixed parameters, to codes that lower the error of its output.

        weight:  [out, ...], its elements in the order of the columns; qparams: per tensor, or along axis 0.
        target:  [groups, out / groups, columns]: weights to come close to instead (output_target); None: the weight's.
        limits:  codes that the target allows, kept while other codes compensate.
        """
        (rounded,) = self.round_each(weight, [(qparams, limits)], target=target)
        return rounded

    def round_each(
        self, weight: Tensor, grids: Sequence[tuple[QParams, Limits | None]], *, target: Tensor | None = None
    ) -> list[Rounded]:
        """Round a weight as `round` does, under several parameters and limits in little more time than under one."""
        rows = weight.to(self.matrix.dtype).reshape(self.groups, -1, self.columns)
        wanted = rows if target is None else target.to(rows)
        grid = _Grid.joined([_Grid.of(weight, qparams, limits, self.order, rows.dtype) for qparams, limits in grids])
        fed = self._codes(wanted.repeat(1, len(grids), 1), grid).chunk(len(grids), 1)
        candidates = []
        for (qparams, limits), codes in zip(grids, fed, strict=True):
            nearest = quantize(weight, qparams)
            nearest = nearest if limits is None else within(nearest, weight, qparams, limits)
            candidates += [nearest, codes.reshape(weight.shape).to(nearest)]
        errors = [
            wanted - dequantize(codes, grids[index // 2][0]).reshape(rows.shape)
            for index, codes in enumerate(candidates)
        ]
        own, *energies = self._energies([rows, *errors])
        energy = float(own.sum()) or 1.0
        return [
            _better(nearest, codes, before / energy, after / energy)
            for nearest, codes, before, after in zip(
                candidates[::2], candidates[1::2], energies[::2], energies[1::2], strict=True
            )
        ]

    def _energies(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return twice the mean squared output of every row of weights [groups, rows, columns], [groups, rows] each."""
        rows = torch.cat([*weights], 1).take_along_dim(self.order[:, None], 2)
        return (rows @ self.matrix).mul_(rows).sum(2).chunk(len(weights), 1)

    def _codes(self, rows: Tensor, grid: _Grid) -> Tensor:
        """Return codes of weights to come close to, floats [groups, rows, columns]."""
        left = rows.take_along_dim(self.order[:, None], 2).mT.contiguous()  # [groups, columns, rows]
        codes, errors = self._feed_errors(left, grid.with_room(left))
        for _ in range(self.sweeps):
            self._descend(codes, errors, grid)
        codes += grid.zero_point
        return codes.take_along_dim(self.order.argsort(1)[:, :, None], 1).mT

    def _feed_errors(self, left: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
        """Round column after column, passing errors on; return codes less zero points and the errors of weights.

        left: weights [groups, columns, rows] in the order of rounding, which are changed.
        """
        codes, errors = torch.empty_like(left), left.clone()
        for start in range(0, self.columns, BLOCK):
            end = min(start + BLOCK, self.columns)
            for j in range(start, end):
                codes[:, j] = grid.round(j, left[:, j], codes[:, :j])
                errors[:, j].addcmul_(codes[:, j], grid.scale[:, j], value=-1)
                left[:, j + 1 : end].addcmul_(self.factor[:, j, j + 1 : end, None], errors[:, j, None])
            left[:, end:].baddbmm_(self.factor[:, start:end, end:].mT, errors[:, start:end])
        return codes, errors

    def _descend(self, codes: Tensor, errors: Tensor, grid: _Grid) -> None:
        """Change one code after the other to the one with the least error of the output, given all others; in place."""
        slope = torch.addcmul(self.matrix @ errors, self.ridge[:, :, None], errors)
        curvature = (self.matrix.diagonal(dim1=1, dim2=2) + self.ridge)[:, :, None]
        for start in range(0, self.columns, BLOCK):
            end = min(start + BLOCK, self.columns)
            before = errors[:, start:end].clone()
            for j in range(start, end):
                scale = grid.scale[:, j]
                found = grid.round(j, torch.addcdiv(codes[:, j] * scale, slope[:, j], curvature[:, j]), codes)
                step = (codes[:, j] - found) * scale
                codes[:, j] = found
                errors[:, j] += step
                slope[:, j + 1 : end].addcmul_(self.matrix[:, j, j + 1 : end, None], step[:, None])
            slope[:, end:].baddbmm_(self.matrix[:, start:end, end:].mT, errors[:, start:end] - before)


def _better(nearest: Tensor, codes: Tensor, before: Tensor, after: Tensor) -> Rounded:
    """Return the codes [out, ...], or of a channel the nearest ones where their error [groups, rows] is less."""
    worse = after > before
    codes = torch.where(worse.reshape(-1, *[1] * (codes.ndim - 1)), nearest, codes)
    return Rounded(codes, float(before.sum()), float(before.minimum(after).sum()), int(worse.sum()))


def _factor(matrix: Tensor, damping: float) -> Tensor:
    """Return how the error of each column changes those after it, [groups, columns, columns].

    With J the reversal of columns and J H J = L L^T, H is V V^T for the upper V = J L J. The energy of errors e is that
    of e V, whose entry j is least for e_j = -sum of e_i V_ij / V_jj over the columns i before j.
    """
    upper = damped_cholesky(matrix.flip(1, 2), damping).flip(1, 2)
    return upper / upper.diagonal(dim1=1, dim2=2)[:, None]


@dataclass(frozen=True, eq=False)
class _Grid:
    """The grid of every element, floats [groups, columns, rows] in the order of rounding.

    lowest, highest, pair_lowest, pair_highest: of codes less their zero points; those of pairs are [rows].
    partners: places in the order of the partners of each column, for each way to pair them.
    """

    scale: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor
    pair_lowest: Tensor
    pair_highest: Tensor
    partners: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, weight: Tensor, qparams: QParams, limits: Limits | None, order: Tensor, dtype: torch.dtype) -> _Grid:
        """Return the grid of a weight within the limits of its codes; with pairs all groups have one order."""
        limits = limits or Limits()
        scale, zero_point = grid_of(weight, qparams)
        lowest, highest = (torch.as_tensor(code, device=weight.device) for code in code_limits(weight, qparams))
        lowest = torch.maximum(lowest, limits.lowest + zero_point) - zero_point
        highest = torch.minimum(highest, limits.highest + zero_point) - zero_point

        def ordered(x: Tensor) -> Tensor:
            x = x.expand_as(weight).to(dtype).reshape(len(order), -1, order.shape[1])
            return x.take_along_dim(order[:, None], 2).mT.contiguous()

        scale, zero_point, lowest, highest = map(ordered, (scale, zero_point, lowest, highest))
        pair_lowest, pair_highest = (
            scale.new_full(scale.shape[2:], end) for end in (limits.pair_lowest, limits.pair_highest)
        )
        first = order[0].cpu()
        place = first.argsort()
        pairings = () if limits.partners is None else limits.partners
        partners = tuple(tuple(place[pairing[first]].tolist()) for pairing in pairings)
        return cls(scale, zero_point, lowest, highest, pair_lowest, pair_highest, partners)

    @classmethod
    def joined(cls, grids: Sequence[_Grid]) -> _Grid:
        """Return the grid of the rows of all the grids, which have equal partners, or none."""
        tensors = {
            field.name: torch.cat([getattr(grid, field.name) for grid in grids], -1)
            for field in fields(cls)
            if field.name != "partners"
        }
        return cls(**tensors, partners=max((grid.partners for grid in grids), key=len))

    def with_room(self, left: Tensor) -> _Grid:
        """Return the grid in which the first of two partners leaves the second half of what the two have to give up.

        left: the weights, [groups, columns, rows] in the order of rounding.
        """
        codes, lowest, highest = (left / self.scale).round_(), self.lowest, self.highest
        top, bottom = self.pair_highest, self.pair_lowest
        for places in map(torch.tensor, self.partners):
            first = (places > torch.arange(len(places)))[:, None].to(left.device)
            other = codes[:, places.to(left.device)]
            middle = (codes - other) / 2
            above = torch.where(first & (other > 0), (top / 2 + middle).floor_().clamp_(min=0), top)
            below = torch.where(first & (other < 0), (bottom / 2 + middle).ceil_().clamp_(max=0), bottom)
            lowest, highest = lowest.maximum(below), highest.minimum(above)
        return replace(self, lowest=lowest, highest=highest)

    def round(self, j: int, weights: Tensor, codes: Tensor) -> Tensor:
        """Return the codes of weights [groups, rows] of column j that the codes of other columns leave free.

        codes: less zero points, of the columns that are rounded: all or the first ones, [groups, columns, rows].
        """
        lowest, highest = self.lowest[:, j], self.highest[:, j]
        for places in self.partners:
            if places[j] != j and places[j] < codes.shape[1]:
                other = codes[:, places[j]]
                lowest = lowest.maximum(self.pair_lowest - other.clamp(max=0))
                highest = highest.minimum(self.pair_highest - other.clamp(min=0))
        return round_codes(weights, self.scale[:, j], self.scale.new_zeros(()), lowest, highest)
