"""Float64 NumPy oracles: each computes one thing in the most literal way and shares no code with the product."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def bin_counts(values: NDArray[np.float32], bins: int) -> tuple[float, NDArray[np.int64]]:
    """Return R (a power of two) and counts of bins -bins..bins of width R / bins, distances rounded away from zero."""
    exact = values.astype(np.float64)
    reach = 2.0**-100
    while reach < np.abs(exact).max(initial=0.0):
        reach *= 2.0
    index = np.sign(exact) * np.ceil(np.abs(exact) * (bins / reach))
    return reach, np.bincount(index.astype(np.int64) + bins, minlength=2 * bins + 1)


def round_trip(values: Array, scale: float, zero_point: int, qmin: int, qmax: int) -> Array:
    """Return the values after quantization and dequantization."""
    codes = np.clip(np.round(values / scale) + zero_point, qmin, qmax)
    return (codes - zero_point) * scale


def divergence(mass: Array, first: int, end: int, levels: int, smoothing: float) -> float:
    """Return KL(P, Q) of the window [first, end): P with the clipped mass in its end bins, Q averaged by level."""
    window = mass[first:end]
    p = window.copy()
    p[0] += mass[:first].sum()
    p[-1] += mass[end:].sum()
    q = np.zeros(len(window))
    for level in range(levels):
        members = [b for b in range(len(window)) if b * levels // len(window) == level]
        filled = [b for b in members if window[b] > 0]
        for b in filled:
            q[b] = window[members].sum() / len(filled)
    p = p / p.sum()
    q = (1.0 - smoothing) * q / q.sum() + smoothing / len(window)
    return float(sum(p[b] * np.log(p[b] / q[b]) for b in range(len(window)) if p[b] > 0))
