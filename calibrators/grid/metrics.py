"""Measures of error: energies, relative errors and decibels.

Must not know: graphs, grids, methods.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LEAST_ENERGY", "SignalAndNoise", "alike", "decibels", "energy", "mean_energy", "relative_error"]

LEAST_ENERGY = 1e-30
"""Lower bound of an energy that something is divided by."""


def energy(values: Tensor) -> float:
    """Return the sum of squares, added up in float64."""
    return float(values.square().sum(dtype=torch.float64))


def mean_energy(values: Tensor) -> float:
    """Return the mean square, added up in float64; at least LEAST_ENERGY."""
    return max(float(values.square().mean(dtype=torch.float64)), LEAST_ENERGY)


def relative_error(values: Tensor, exact: Tensor, unit: float) -> Tensor:
    """Return the mean squared error of every sample [n, ...] in units of an energy, as [n]."""
    return (values - exact).square().reshape(len(values), -1).mean(1) / unit


def alike(expected: Tensor, found: Tensor, limit: float) -> bool:
    """Return whether an output is as expected, up to `limit` of each value and of the largest finite one."""
    expected, found = expected.double(), found.double()
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return expected.shape == found.shape and torch.allclose(found, expected, limit, limit * largest, equal_nan=True)


def decibels(signal: float, noise: float) -> float:
    """Return the ratio of two energies in decibels, infinite without noise."""
    return 10 * math.log10(max(signal, sys.float_info.min) / noise) if noise > 0 else math.inf


@dataclass
class SignalAndNoise:
    """Running energies of exact values and of the errors of other ones; their sums do not depend on any order.

    signals, noises: the energies of each batch.
    """

    signals: list[float] = field(default_factory=list)
    noises: list[float] = field(default_factory=list)

    def add(self, values: Tensor, exact: Tensor) -> None:
        """Add the energies of more values."""
        self.signals.append(energy(exact))
        self.noises.append(energy(values - exact))

    def include(self, other: SignalAndNoise) -> None:
        """Add what was found on other values."""
        self.signals += other.signals
        self.noises += other.noises

    @property
    def relative(self) -> float:
        """Noise in units of the signal; 0 without a signal."""
        signal = math.fsum(self.signals)
        return math.fsum(self.noises) / signal if signal > 0 else 0.0

    @property
    def decibels(self) -> float:
        """Ratio of signal to noise, infinite without noise."""
        return decibels(math.fsum(self.signals), math.fsum(self.noises))
