from __future__ import annotations

from torch import Tensor

from calibrators.program.freeze import CalibrationResult
from runtime_tests.measure.noise import Noise
from runtime_tests.reference.execute import plan, run


def noise_of(result: CalibrationResult, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Return the signal-to-noise ratio of every site on one batch, in dB."""
    noise = Noise(result)
    noise.start(inputs)
    run(plan(result.program, integer=False), inputs, see=noise.see)
    return noise.decibels()
