"""Compare a file in a runtime outside this process, where a refusal is a result like any other.

Must not know: which runtimes there are, how they are started.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from calibrators.errors import ModelError
from runtime_tests.ort.sessions import Model
from runtime_tests.parity.compare import Comparison
from runtime_tests.parity.results import Agreement, Level, ProvedOn
from runtime_tests.reference.execute import KernelPlan
from runtime_tests.workers.runtime import Runtime

__all__ = ["Elsewhere", "proved_on"]


class Elsewhere:
    """Running totals of one runtime.

    samples: number of samples, from the first on, that it compares.
    """

    def __init__(
        self, runtime: Runtime, model: Model, plan: KernelPlan, weights: Mapping[str, Agreement], *, samples: float
    ) -> None:
        self.runtime, self.samples = runtime, samples
        self.refused = ""
        try:
            start = partial(runtime.open, model, threads=1)
            self._comparison = Comparison(start, model, plan, weights, exact=not runtime.kernel_rate)
        except ModelError as error:
            self._refuse(error)

    def _refuse(self, error: ModelError) -> None:
        self.refused, self.samples = str(error), 0

    def add(self, inputs: tuple[Tensor, ...], codes: Mapping[str, Tensor], ours: tuple[Tensor, ...]) -> None:
        """Run a batch and compare it with the codes and outputs of the reference."""
        try:
            self._comparison.add(inputs, codes, ours)
        except ModelError as error:
            self._refuse(error)

    @property
    def counts(self) -> tuple[str, dict[str, Any]]:
        """What was counted, for `include`."""
        return self.refused, {} if self.refused else self._comparison.counts

    def include(self, counts: tuple[str, Mapping[str, Any]]) -> None:
        """Add what another process counted on other samples; what one of them is refused, all are."""
        self.refused = self.refused or counts[0]
        if not self.refused:
            self._comparison.include(counts[1])

    def report(self) -> ProvedOn:
        """Return what all batches together say.

        raises: DataError if there are no samples.
        """
        if self.refused:
            return proved_on(self.runtime, Level.of((), (), samples=0), refused=self.refused)
        return proved_on(self.runtime, self._comparison.report())


def proved_on(runtime: Runtime, level: Level, *, refused: str | None = None) -> ProvedOn:
    """Return the entry of a runtime in which a level was compared, or of one that refused the file."""
    return ProvedOn.of(
        level,
        runtime=runtime.name,
        version=runtime.version,
        processor=runtime.family,
        flags=runtime.flags,
        refused=refused,
    )
