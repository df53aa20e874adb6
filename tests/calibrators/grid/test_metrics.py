"""Energies and decibels against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from calibrators.grid.metrics import SignalAndNoise, decibels, energy, mean_energy, relative_error


def test_signal_and_noise_add_up_over_batches(generator: torch.Generator) -> None:
    exact = torch.randn(6, 5, generator=generator)
    values = exact + 0.1 * torch.randn(6, 5, generator=generator)
    found = SignalAndNoise()
    for part in (slice(2), slice(2, 6)):
        found.add(values[part], exact[part])
    signal = np.square(exact.numpy(), dtype=np.float64).sum()
    noise = np.square((values - exact).numpy(), dtype=np.float64).sum()
    assert found.relative == pytest.approx(noise / signal)
    assert found.decibels == pytest.approx(10 * np.log10(signal / noise))
    assert relative_error(values, exact, mean_energy(exact)).mean() == pytest.approx(noise / signal, rel=1e-6)


def test_without_signal_or_noise() -> None:
    zeros = torch.zeros(3)
    assert energy(zeros) == 0.0 and mean_energy(zeros) > 0.0
    assert SignalAndNoise().relative == 0.0 and SignalAndNoise().decibels == math.inf
    assert math.isfinite(decibels(0.0, 1.0)) and decibels(0.0, 1.0) < -1000
