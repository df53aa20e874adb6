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

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from calibrators.errors import DataError
from calibrators.graph.aten import bind, per_axis, shape_of
from calibrators.grid.numerics import code_limits, dequantize, grid_of, quantize, round_codes
from calibrators.grid.spec import QParams

__all__ = ["Hessian", "Im2col", "Rounded", "round_weight"]

BLOCK = 128
"""Columns whose errors reach later columns together, as one matrix product."""

LARGEST_DAMPING = 1.0

PIECE = 4096
"""Positions whose columns are copied at a time."""


@dataclass(frozen=True)
class Im2col:
    """The way a convolution or linear layer cuts its input into columns; a linear layer has no spatial dimensions.

    Layers that read the same value with equal `Im2col` share their Hessian.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, node: fx.Node) -> Im2col:
        """Return the `Im2col` of an ATen call."""
        bound = bind(node)
        kernel = shape_of(bound["weight"])[2:]
        if not kernel:
            return cls()
        stride, padding, dilation = (per_axis(bound[key], len(kernel)) for key in ("stride", "padding", "dilation"))
        return cls(kernel, stride, padding, dilation, bound["groups"])

    def cut(self, x: Tensor) -> Tensor:
        """Return the inputs of every position, [*positions, channels, *kernel], as a view of the padded input."""
        if not self.kernel:
            return x
        windows = F.pad(x, [width for width in reversed(self.padding) for _ in range(2)])
        for axis, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), start=2):
            windows = windows.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
        return windows.movedim(1, 1 + len(self.kernel))  # [n, *out, channels, *kernel]

    def take(self, x: Tensor, share: float, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield columns [groups, columns, positions] of a random share of the positions, at most PIECE at a time."""
        windows = self.cut(x)
        positions = windows.shape[: windows.ndim - 1 - len(self.kernel)]
        total = math.prod(positions)
        index = torch.arange(total)
        if share < 1:
            index = torch.randperm(total, generator=generator)[: math.ceil(share * total)].sort().values
        for piece in torch.split(index.to(x.device), PIECE):
            seen = windows[torch.unravel_index(piece, positions)]  # [positions, channels, *kernel]
            yield seen.reshape(len(piece), self.groups, -1).permute(1, 2, 0)


class Hessian:
    """Mean of 2 x x^T over the inputs of a layer, updated batch by batch.

    matrix: float32 [groups, columns, columns]; count: inputs so far.
    """

    def __init__(self, groups: int, columns: int, device: torch.device) -> None:
        self.matrix = torch.zeros(groups, columns, columns, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Include columns [groups, columns, positions]."""
        x = x.contiguous() if len(x) > 1 else x  # many times faster for batches of small products
        before, self.count = self.count, self.count + x.shape[-1]
        self.matrix.baddbmm_(x, x.mT, beta=before / self.count, alpha=2 / self.count)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes of a weight, and the relative errors of its output with nearest rounding and with these codes.

    kept: output channels that keep nearest rounding.
    """

    codes: Tensor
    nearest: float
    error: float
    kept: int


def round_weight(
    weight: Tensor, qparams: QParams, hessian: Tensor, *, damping: float = 0.01, act_order: bool = False
) -> Rounded:
    """Round a weight, under fixed parameters, to codes that lower the error of its output.

    weight:    [out, ...], its elements in the order of the columns; qparams: per tensor, or along axis 0.
    hessian:   [groups, columns, columns], finite.
    damping:   added to the diagonal, in units of its mean; raised tenfold, up to 1, while H is not positive definite.
    act_order: round columns in the order of their inputs' energy, the largest first.
    """
    matrix = hessian.double()
    groups, columns = matrix.shape[:2]
    order = _order(matrix, act_order)
    ordered = matrix.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None, :], 2)
    limits = (torch.as_tensor(limit, device=weight.device) for limit in code_limits(weight, qparams))
    rows, *grid = (
        x.expand_as(weight).double().reshape(groups, -1, columns) for x in (weight, *grid_of(weight, qparams), *limits)
    )  # [groups, out / groups, columns]
    first, *grid = (x.take_along_dim(order[:, None], 2) for x in (rows, *grid))
    fed = _feed_errors(first, grid, _factor(ordered, damping))
    nearest = quantize(weight, qparams)
    codes = fed.take_along_dim(order.argsort(1)[:, None], 2).reshape(weight.shape).to(nearest.dtype)
    before, after = (_energy(rows - dequantize(c, qparams).reshape(rows.shape), matrix) for c in (nearest, codes))
    worse = after > before
    codes[worse.flatten()] = nearest[worse.flatten()]
    energy = float(_energy(rows, matrix).sum()) or 1.0
    return Rounded(codes, float(before.sum()) / energy, float(before.minimum(after).sum()) / energy, int(worse.sum()))


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
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    live = diagonal > 0
    mean = torch.where(live.any(1), diagonal.sum(1) / live.sum(1).clamp(min=1), 1.0)[:, None]  # of live inputs
    dampings = torch.full_like(mean, damping)
    while True:
        damped = matrix + torch.diag_embed(torch.where(live, dampings * mean, mean))
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not failed.any():
            identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
            upper: Tensor = torch.linalg.solve_triangular(lower.flip(1, 2), identity, upper=True)
            return upper
        if (dampings[failed > 0] >= LARGEST_DAMPING).any():
            raise DataError("second moments of a layer's inputs are not positive; check the calibration data")
        dampings = torch.where(failed[:, None] > 0, (10 * dampings).clamp(max=LARGEST_DAMPING), dampings)


def _feed_errors(rows: Tensor, grid: Sequence[Tensor], factor: Tensor) -> Tensor:
    """Round column after column, passing errors on; return codes as float64 [groups, rows, columns].

    grid: scale, zero point, lowest and highest code of every element, in the shape of the rows.
    """
    groups, count, columns = rows.shape
    left, *grid = (x.mT.contiguous() for x in (rows, *grid))  # [groups, columns, rows]
    scale, zero_point, _, _ = grid
    codes = torch.empty_like(left)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = left.new_empty(groups, end - start, count)
        for j in range(start, end):
            codes[:, j] = round_codes(left[:, j], *(x[:, j] for x in grid))
            errors[:, j - start] = (left[:, j] - (codes[:, j] - zero_point[:, j]) * scale[:, j]) / factor[:, j, j, None]
            left[:, j + 1 : end] -= factor[:, j, j + 1 : end, None] * errors[:, j - start, None]
        left[:, end:] -= factor[:, start:end, end:].mT @ errors
    return codes.mT
