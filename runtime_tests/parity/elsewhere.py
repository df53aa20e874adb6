"""Compare a file in a runtime outside this process, where a refusal is a result like any other.

Must not know: which runtimes there are, how they are started.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from calibrators.errors import ModelError
from runtime_tests.parity.compare import Comparison
from runtime_tests.parity.results import Agreement, Level, ProvedOn, unplanned_text
from runtime_tests.reference.execute import KernelPlan, run
from runtime_tests.workers.runtime import Artifact, Runtime

__all__ = ["Elsewhere", "proved_on"]


class Elsewhere:
    """Running totals of one runtime.

    plan:    the kernels of the reference; own: those of the runtime, where it has others.
    samples: number of samples, from the first on, that it compares.
    """

    def __init__(
        self,
        runtime: Runtime,
        artifact: Artifact,
        plan: KernelPlan,
        weights: Mapping[str, Agreement],
        *,
        own: KernelPlan | None = None,
        samples: float,
    ) -> None:
        self.runtime, self.samples = runtime, samples
        self.refused = ""
        self._own = own
        try:
            start = partial(runtime.open, artifact, threads=1)
            exact = not (runtime.kernel_rate or runtime.lowers)  # a lowered program offers the codes alone
            self._comparison = Comparison(start, artifact.model, own or plan, weights, exact=exact)
            if self._comparison.unplanned:
                raise ModelError(
                    f"{runtime.name} runs other kernels than planned: {unplanned_text(self._comparison.unplanned)}; "
                    "look for what stays in float there with `intact lint`, and exclude it."
                )
        except ModelError as error:
            self._refuse(error)

    def _refuse(self, error: ModelError) -> None:
        self.refused, self.samples = str(error), 0

    def add(self, inputs: tuple[Tensor, ...], codes: Mapping[str, Tensor], ours: tuple[Tensor, ...]) -> None:
        """Run a batch and compare it with the codes and outputs of the reference."""
        try:
            if self._own is not None:
                codes, ours = run(self._own, inputs, with_floats=True)
            self._comparison.add(inputs, codes, ours)
        except ModelError as error:
            self._refuse(error)

    @property
    def counts(self) -> tuple[str, dict[str, Any]]:
        """The counts, for `include`."""
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
