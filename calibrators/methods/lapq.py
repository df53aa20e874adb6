"""Ranges that minimize the loss of the whole network, searched in three phases.

1. The range of every tensor that minimizes the mean |error| ** p, for several p, next to min-max and percentile.
2. The loss of the network over p, the vertex of the parabola near the best p, then one p for weights and another for
   activations.
3. From the best of these a joint search: one multiplier per activation and one per weight tensor, which moves both
   ends of a range, or the ranges of all channels, together; the ratio of the ends, hence the zero point, stays.

source: Nahshan et al., Loss Aware Post-training Quantization (2019), sections 3 and 4.
Departs: the loss needs no labels; p from 1 to 5 with a guarded parabola near the best one, not one parabola over 2 to
4; two powers; multipliers in logarithms, within [0.4, 2.5]; COBYQA over groups and then parabolas, tensor by tensor,
instead of Powell; the result is the best point that was evaluated, so it is no worse than any range compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibrators.errors import InputError
from calibrators.options import Options, option
from calibrators.ranges.range_method import POWERS

if TYPE_CHECKING:
    from calibrators.execution.task import Problem
    from calibrators.program.freeze import CalibrationResult

__all__ = ["LAPQ"]

FIRST_EVALUATIONS = len(POWERS) + 3
"""The smallest budget: every power, min-max, percentile and the vertex."""

EVALUATION = 2.0
"""Effort of an evaluation for a sample: the network with quantizers."""


@dataclass(frozen=True)
class LAPQ(Options):
    """Ranges that minimize the loss of the whole network, by a joint search over all scales."""

    loss: str = option(
        "auto", "kl, ce (needs labels) or mse; auto: kl for [n, classes]", choices=("auto", "kl", "ce", "mse")
    )
    temperature: float = option(1.0, "temperature of both predictions in kl", minimum=0.1, maximum=100.0)
    optimizer: str = option(
        "cobyqa",
        "parabola: tensor by tensor; cobyqa: groups of tensors, then parabola; powell: as published",
        choices=("parabola", "cobyqa", "powell"),
    )
    max_evals: int = option(
        300, "evaluations of the network; a partial one counts by its share of the work", minimum=FIRST_EVALUATIONS
    )
    max_seconds: float = option(0.0, "seconds after which the joint search ends; 0: no limit", minimum=0.0)
    samples: int = option(512, "samples on which the loss is measured, drawn with the seed", minimum=1)
    sweeps: int = option(10, "largest number of sweeps over all tensors", minimum=0)
    percentile: float = option(99.99, "percentile among the ranges compared", minimum=50.0, maximum=100.0)

    slow = True

    @property
    def needs_labels(self) -> bool:
        """Whether the loss compares with labels."""
        return self.loss == "ce"

    def effort(self, samples: int) -> float:
        return super().effort(samples) + EVALUATION * self.max_evals * min(samples, self.samples)

    def fit(self, problem: Problem) -> CalibrationResult:
        """Return the network at the best scales that the search found, with a record of the search.

        raises: InputError if labels or outputs do not fit the loss, DataError if the data cannot be read again.
        """
        if self.loss == "ce" and problem.labels is None:
            raise InputError("loss 'ce' of method 'lapq' needs labels, but the calibration data has none; use loss=kl.")
        from calibrators.optimize.scale_search import ScaleSearch

        return ScaleSearch(problem, self).run()
