"""The Hessian of a loss from finite differences, and how much of it couples variables.

Must not know: networks, quantization.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from calibrators.record import Coupling

__all__ = ["coupling", "hessian", "hessian_evaluations"]

Vector = NDArray[np.float64]


def hessian_evaluations(size: int) -> int:
    """Return the number of evaluations that `hessian` needs."""
    return 1 + 2 * size + size * (size - 1)


def hessian(objective: Callable[[Vector], float], centre: Vector, step: float) -> Vector:
    """Return the second derivatives at `centre` [n], as [n, n]; exact for a cubic.

    A pair takes two evaluations: f(+,+) + f(-,-) against the four neighbours along the axes.
    """
    axes = step * np.eye(len(centre))
    middle = objective(centre)
    sides = [objective(centre + axis) + objective(centre - axis) for axis in axes]  # sums of opposite neighbours
    curvatures = np.array(sides) - 2.0 * middle
    matrix = np.diag(curvatures)
    for i, j in combinations(range(len(centre)), 2):
        both = objective(centre + axes[i] + axes[j]) + objective(centre - axes[i] - axes[j]) - 2.0 * middle
        matrix[i, j] = matrix[j, i] = (both - curvatures[i] - curvatures[j]) / 2.0
    return np.asarray(matrix / step**2)


def coupling(matrix: Vector) -> Coupling:
    """Return how far a Hessian [n, n] is from that of a separable loss."""
    size = len(matrix)
    diagonal = float(np.abs(np.diag(matrix)).mean())
    off = float(np.abs(matrix).sum() - size * diagonal) / max(1, size * (size - 1))
    eigenvalues = tuple(np.linalg.eigvalsh(matrix).tolist())
    return Coupling(eigenvalues, diagonal, off, share=off / diagonal if diagonal > 0.0 else 0.0)
