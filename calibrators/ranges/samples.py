"""Choose QParams from values: the values of a tensor as the criterion of a range method sees them.

A range method chooses the interval [lo, hi] that an integer grid should span, for rows of weighted values: the bins of
an activation's statistic are one row, and the channels of a weight are rows.

Must not know: which methods there are, graphs, ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibrators.errors import DataError, InputError, ModelError
from calibrators.grid.numerics import SMALLEST_SCALE, code_limits, grid_of, middle_diagonal, qparams_from_range
from calibrators.grid.spec import QParams, QuantSpec
from calibrators.ranges.histogram import Statistic

if TYPE_CHECKING:
    from calibrators.ranges.range_method import RangeMethod

__all__ = ["BLOCK", "Samples", "activation_qparams", "weight_qparams"]

BLOCK = 1 << 17
"""Values per vectorized step, few enough for its temporaries to stay in the second-level cache."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Rows of finite values, each value standing for `counts` equal ones.

    values: [rows, n], float64 bin centres of a statistic or the float32 weights themselves.
    counts: [n] or [1], dtype of values.
    total:  number of values that one row represents.
    width:  width of the interval that each value represents; 0.0 for exact values. Zeros are always exact.
    lo, hi: exact extremes, float64 [rows].
    """

    values: Tensor
    counts: Tensor
    total: int
    width: float
    lo: Tensor
    hi: Tensor

    @classmethod
    def of_statistic(cls, statistic: Statistic) -> Samples:
        """Return the non-empty bins as one row.

        raises: DataError if no finite value was seen.
        """
        if not statistic.count:
            seen = f"{statistic.nonfinite} values, none of them finite" if statistic.nonfinite else "no value at all"
            raise DataError(f"an activation to calibrate has {seen}; check the calibration data and the float model")
        filled = statistic.counts > 0
        values, counts = statistic.centers()[None, filled], statistic.counts[filled].to(torch.float64)
        lo, hi = torch.tensor([[statistic.lo], [statistic.hi]], dtype=torch.float64)
        return cls(values, counts, statistic.count, statistic.width, lo, hi)

    @classmethod
    def of_rows(cls, rows: Tensor) -> Samples:
        """Return the samples of `rows`, float32 [rows, n]."""
        lo, hi = rows.aminmax(dim=1)
        return cls(rows, rows.new_ones(1), rows.shape[1], 0.0, lo.to(torch.float64), hi.to(torch.float64))

    @property
    def reach(self) -> Tensor:
        """Return the largest magnitude of each row, float64 [rows]."""
        return torch.maximum(-self.lo, self.hi).clamp(min=0.0)

    @property
    def crosses_zero(self) -> Tensor:
        """Return which rows hold values of both signs, bool [rows]."""
        return (self.lo < 0.0) & (self.hi > 0.0)

    def magnitudes(self) -> Samples:
        """Return the samples without their signs."""
        return replace(self, values=self.values.abs(), lo=torch.zeros_like(self.lo), hi=self.reach)

    def negated(self) -> Samples:
        """Return the samples with the other sign."""
        return replace(self, values=-self.values, lo=-self.hi, hi=-self.lo)

    def sum(self, quantity: Tensor) -> Tensor:
        """Sum a quantity of the values over each row, [..., n] -> float64 [...]."""
        return (quantity * self.counts).sum(-1, dtype=torch.float64)


def activation_qparams(method: RangeMethod, statistic: Statistic, spec: QuantSpec) -> QParams:
    """Return the parameters of an activation, scale and zero point [].

    raises: DataError if the statistic holds no finite value; InputError if spec.axis is set.
    """
    if spec.axis is not None:
        raise InputError(f"activations have one scale per tensor, but axis is {spec.axis}; set it to None")
    lo, hi = method.bounds(Samples.of_statistic(statistic), spec)
    return qparams_from_range(lo[0], hi[0], spec)


def weight_qparams(method: RangeMethod, weight: Tensor, spec: QuantSpec) -> QParams:
    """Return the parameters of a weight; scales and zero points are [channels], [channels, blocks] or [].

    A weight with one scale and more than BLOCK values is read through a Statistic, in one pass.

    raises: ModelError for an empty weight or values that are not finite.
    """
    values = weight.detach().to(torch.float32)
    if not values.numel() or not bool(torch.stack(values.aminmax()).isfinite().all()):
        bad = values.numel() - int(values.isfinite().sum())
        seen = f"{bad} of its {values.numel()} values are NaN or infinite" if bad else "it is empty"
        raise ModelError(f"a weight of shape {list(weight.shape)} cannot be quantized: {seen}; load other weights")
    if spec.tap_bits is not None:
        return _beside_taps(method, values, spec)
    if spec.axis is None and values.numel() > BLOCK:
        statistic = Statistic()
        statistic.update(values)
        return activation_qparams(method, statistic, spec)
    if spec.block_size is not None:
        return qparams_from_range(*_bounds_of_blocks(method, values, spec), spec)
    axis = spec.axis
    rows = values.reshape(1, -1) if axis is None else values.movedim(axis, 0).flatten(1)  # [channels, n]
    lo, hi = _bounds_of_rows(method, rows, spec)
    return qparams_from_range(lo[0], hi[0], spec) if axis is None else qparams_from_range(lo, hi, spec)


def _beside_taps(method: RangeMethod, values: Tensor, spec: QuantSpec) -> QParams:
    """Return the parameters of the values off the middle diagonal, with a scale that also holds the diagonal."""
    middle = middle_diagonal(values.shape)
    others = torch.ones(values.shape, dtype=torch.bool)
    others[middle] = False
    rest = values[others].reshape(len(values), -1)
    chosen = replace(weight_qparams(method, rest, replace(spec, tap_bits=None)), spec=spec)
    lowest, highest = code_limits(values, chosen)
    zero_point = grid_of(values, chosen)[1]
    room = torch.where(values < 0, zero_point - lowest, highest - zero_point)[middle]
    needed, found = values[middle].abs() / room, rest.any(1)
    if spec.axis is None:
        needed, found = needed.max(), found.any()
    alone = ~found & (needed > 0)  # rows with no values but taps
    scale = torch.maximum(torch.where(alone, 0.0, chosen.scale), needed)
    return replace(chosen, scale=scale.clamp(min=SMALLEST_SCALE))


def _bounds_of_blocks(method: RangeMethod, values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the bounds of every block of a matrix, [channels, blocks]; each block is a row of samples."""
    assert spec.block_size is not None
    whole = values.shape[1] // spec.block_size * spec.block_size
    parts = values[:, :whole].reshape(-1, spec.block_size), values[:, whole:]
    of_row = replace(spec, block_size=None)
    bounds = (_bounds_of_rows(method, rows, of_row) for rows in parts if rows.numel())
    lo, hi = zip(*([end.reshape(len(values), -1) for end in ends] for ends in bounds), strict=True)
    return torch.cat(lo, 1), torch.cat(hi, 1)


def _bounds_of_rows(method: RangeMethod, rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the bounds of rows, which are independent of each other, some rows at a time."""
    height = max(1, BLOCK // rows.shape[1])
    blocks = torch.split(rows, height)
    lo, hi = zip(*(method.bounds(Samples.of_rows(block), spec) for block in blocks), strict=True)
    return torch.cat(lo), torch.cat(hi)
