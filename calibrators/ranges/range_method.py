"""The interface of range methods; listing methods imports it, so it loads no torch.

Must not know: which methods there are, graphs, ONNX.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from calibrators.options import Options

if TYPE_CHECKING:
    from torch import Tensor

    from calibrators.execution.task import Problem
    from calibrators.grid.spec import QParams, QuantSpec
    from calibrators.program.freeze import CalibrationResult
    from calibrators.ranges.histogram import Statistic
    from calibrators.ranges.samples import Samples

__all__ = ["POWERS", "PowerRange", "RangeMethod"]

POWERS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
"""Powers of the error that a search over ranges compares."""


class RangeMethod(Options, abc.ABC):
    """A method that chooses ranges from values alone; a subclass is a frozen dataclass whose fields are its options."""

    parallel = True

    @abc.abstractmethod
    def bounds(self, samples: Samples, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Return the ends of the range of each row, float64 [rows] each; values beyond them will be clipped."""

    def fit(self, problem: Problem) -> CalibrationResult:
        """Calibrate every tensor on its own, with weights rounded to nearest."""
        return problem.solve(self)

    def activation(self, statistic: Statistic, spec: QuantSpec) -> QParams:
        """Return the parameters of an activation, scale and zero point [].

        raises: DataError if the statistic holds no finite value; InputError if spec.axis is set.
        """
        from calibrators.ranges.samples import activation_qparams

        return activation_qparams(self, statistic, spec)

    def weight(self, weight: Tensor, spec: QuantSpec) -> QParams:
        """Return the parameters of a weight: scales, zero points [channels] along spec.axis, [channels, blocks] or [].

        raises: ModelError for an empty weight or values that are not finite.
        """
        from calibrators.ranges.samples import weight_qparams

        return weight_qparams(self, weight, spec)


class PowerRange(RangeMethod):
    """Range with the least mean |error| ** power of quantizing and dequantizing.

    source: search over the clipping range as in BRECQ's code (Li et al., 2021: 80 fractions) and MQBench's
    observer. Departs: golden section after the scan; both ends searched separately where the grid is asymmetric; errors
    of an activation are taken over all batches at once, at the bin centres of its statistic; exact zeros cost nothing.
    """

    power: float

    def bounds(self, samples: Samples, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        from calibrators.ranges.range_search import lp_bounds

        return lp_bounds(samples, spec, self.power)
