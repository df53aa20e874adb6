"""Measure every output of a network: its signal over quantization noise, and decisions where it has the form of logits.

Must not know: where the outputs come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.grid.metrics import decibels

__all__ = ["OutputAccuracy", "RunningOutputs", "masked"]

Array = NDArray[Any]


@dataclass(frozen=True)
class OutputAccuracy:
    """One output on held-out data.

    reference, runtime: signal over noise of the reference program, on the samples on which it ran, and of the runtime
                        in dB; None where they are equal to the float model.
    agreement:          share of the samples for which runtime and float model make the same decision, of an integer
                        output share of the equal elements; None for other outputs that are not [n, classes].
    """

    name: str
    reference: float | None
    runtime: float | None
    agreement: float | None


@dataclass
class _Sums:
    signal: dict[str, float] = field(default_factory=lambda: {"reference": 0.0, "runtime": 0.0})
    noise: dict[str, float] = field(default_factory=lambda: {"reference": 0.0, "runtime": 0.0})
    agreeing: int = 0
    decided: int = 0


class RunningOutputs:
    """Running sums of all outputs, which may have any shape."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums = [_Sums() for _ in names]

    def update(self, networks: Mapping[str, Sequence[Array]]) -> None:
        """Add the outputs of one batch by network: "float", "runtime" and, where it ran, "reference"."""
        for index, sums in enumerate(self._sums):
            outputs = {name: arrays[index] for name, arrays in networks.items()}
            truth = outputs["float"]
            hidden = masked(outputs) | np.all([np.isnan(each) for each in outputs.values()], axis=0)
            exact = {name: np.where(hidden, 0.0, each.astype(np.float64)) for name, each in outputs.items()}
            signal = float(np.sum(exact["float"] ** 2))
            for name in sums.noise.keys() & exact.keys():
                sums.signal[name] += signal
                sums.noise[name] += float(np.sum((exact[name] - exact["float"]) ** 2))
            same = _same_decisions(truth, outputs["runtime"])
            sums.agreeing += int(np.sum(same))
            sums.decided += same.size

    def result(self) -> tuple[OutputAccuracy, ...]:
        """Return the scores over all batches."""
        return tuple(
            OutputAccuracy(
                name,
                **{key: decibels(sums.signal[key], noise) if noise else None for key, noise in sums.noise.items()},
                agreement=sums.agreeing / sums.decided if sums.decided else None,
            )
            for name, sums in zip(self.names, self._sums, strict=True)
        )


def _same_decisions(truth: Array, found: Array) -> Array:
    """Return for every decision of an output whether both are the same; nothing for an output without decisions."""
    if not np.issubdtype(truth.dtype, np.floating):
        return np.asarray(truth == found)
    return truth.argmax(1) == found.argmax(1) if truth.ndim == 2 and truth.shape[1] > 1 else np.empty(0, bool)


def masked(outputs: Mapping[str, Array]) -> Array:
    """Return where all networks give the same infinity, as masks do."""
    truth = outputs["float"]
    return np.asarray(np.all([np.isinf(truth) & (each == truth) for each in outputs.values()], axis=0))
