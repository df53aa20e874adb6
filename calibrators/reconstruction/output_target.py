"""Weights that give the float output on the inputs that quantization left: where rounding starts from.

A layer reads x^ where the float network has x. The weight W + D with the least |W x - (W + D) x^|^2 has
D = W E (H + ridge)^-1 for H = 2 x^ x^T and E = 2 (x - x^) x^T. It corrects the errors of all layers before as far as
this layer can, without labels or gradients.

Few positions, or inputs that hardly differ, make D fit noise. So its strength is chosen: with D fitted to one half of
the samples, the strength that is best on the other half is a quotient of two traces. The strength of the whole is
that quotient over both halves, between 0 (what is left of the output is noise) and 1.

source: the aim is that of Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
and Zhong et al. 2024, "ERQ: Error Reduction for Post-Training Quantization of Vision Transformers".
Departs: one step in closed form before the rounding, with a ridge, and a strength from held-out samples.

Must not know: methods, grids, how moments are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrators.errors import DataError
from calibrators.reconstruction.moments import HALVES, Moments

__all__ = ["Target", "damped_cholesky", "raised", "toward_float"]

LARGEST_DAMPING = 1.0


@dataclass(frozen=True, eq=False)
class Target:
    """The weights to round, [groups, rows, columns] float32, and the strength of the step that led to them."""

    rows: Tensor
    strength: float


def toward_float(rows: Tensor, moments: Moments, ridge: float, own: slice = slice(None)) -> Target:
    """Return weights that come closer to the float output than `rows` [groups, rows, columns], float32.

    ridge:  added to the diagonal of the moments, in means of it.
    own:    where `rows` stand among the weights that the moments were measured for.
    raises: DataError where the moments are not positive.
    """
    if not moments.has_error:
        return Target(rows, 0.0)
    halves = [moments.half(index, rows, own) for index in range(HALVES)]
    steps = [_step(*half, ridge) for half in halves]
    explained = energy = 0.0
    for step, (hessian, missed) in zip(steps, reversed(halves), strict=True):
        explained += float((missed * step).sum())
        energy += float((step @ hessian * step).sum())
    strength = min(1.0, max(0.0, explained / energy)) if energy > 0 else 0.0
    if not strength:
        return Target(rows, 0.0)
    return Target(rows + strength * _step(moments.hessian, moments.missed(rows, own), ridge), strength)


def _step(hessian: Tensor, missed: Tensor, ridge: float) -> Tensor:
    """Return the change of the weights, [groups, rows, columns]."""
    lower = damped_cholesky(hessian, ridge)
    step: Tensor = torch.cholesky_solve(missed.mT, lower).mT
    return step


def damped_cholesky(matrix: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of a matrix [groups, columns, columns] with a raised diagonal.

    damping: in means of the diagonal; raised tenfold, up to 1, while even in float64 the result is not positive
             definite.
    raises:  DataError where that is not enough.
    """
    dampings = matrix.new_full((len(matrix), 1), damping)
    while True:
        damped = matrix.clone()
        damped.diagonal(dim1=1, dim2=2).add_(raised(matrix, dampings))
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed.any() and damped.dtype == torch.float32:  # rounding errors alone can make it fail
            factor, failed = torch.linalg.cholesky_ex(damped.double())
        if not failed.any():
            return factor.to(matrix.dtype)
        if (dampings[failed > 0] >= LARGEST_DAMPING).any():
            raise DataError("second moments of a layer's inputs are not positive; check the calibration data")
        dampings = torch.where(failed[:, None] > 0, (10 * dampings).clamp(max=LARGEST_DAMPING), dampings)


def raised(matrix: Tensor, damping: Tensor | float) -> Tensor:
    """Return what damping adds to the diagonal of a matrix [groups, columns, columns], [groups, columns].

    Inputs that are always zero get the mean of the others, so that they have no part in anything.

    damping: in means of the diagonal over inputs that are not always zero, [groups, 1].
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    live = diagonal > 0
    mean = torch.where(live.any(1), diagonal.sum(1) / live.sum(1).clamp(min=1), 1.0)[:, None]
    return torch.where(live, damping * mean, mean)
