"""Measure a metric of the user's: a function of all outputs and labels, such as mAP, mIoU or a word error rate.

The outputs of all samples are kept, since such metrics are no means over samples.

Must not know: where the outputs and labels come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_tests.measure.accuracy import Triple

__all__ = ["MetricFunction", "RunningMetric", "UserMetric", "arguments_of"]

Array = NDArray[Any]

MetricFunction = Callable[[Any, Any], float]
"""A function of the outputs, an array [n, ...] or several by name, and the labels."""


@dataclass(frozen=True)
class UserMetric(Triple):
    """The metric of the float model, the runtime and, if it ran on all samples, the reference program.

    name: what the user calls it.
    """

    name: str
    samples: int


def arguments_of(names: Sequence[str], outputs: Sequence[Array]) -> Any:
    """Return the outputs as a metric takes them: a single one as it is, several by name."""
    return outputs[0] if len(outputs) == 1 else dict(zip(names, outputs, strict=True))


class RunningMetric:
    """The outputs of all samples so far, by network."""

    def __init__(self, name: str, function: MetricFunction, outputs: Sequence[str]) -> None:
        self.name, self.function, self.outputs = name, function, tuple(outputs)
        self.samples = 0
        self._kept: dict[str, list[Sequence[Array]]] = {"float": [], "reference": [], "runtime": []}

    def update(self, networks: Mapping[str, Sequence[Array]], samples: int) -> None:
        """Add the outputs of one batch by network."""
        self.samples += samples
        for name, outputs in networks.items():
            self._kept[name].append(outputs)

    def result(self, labels: Any) -> UserMetric:
        """Return the metric on all samples; labels: of all of them, as the user's data gives them.

        raises: what the function raises.
        """
        complete = {name: kept for name, kept in self._kept.items() if len(kept) == len(self._kept["float"])}
        values = {
            name: self.function(
                arguments_of(self.outputs, [np.concatenate(each) for each in zip(*kept, strict=True)]), labels
            )
            for name, kept in complete.items()
        }
        return UserMetric(**dict.fromkeys(self._kept) | values, name=self.name, samples=self.samples)
