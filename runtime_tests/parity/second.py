"""Compare OpenVINO, kernel by kernel, with the reference program of the same file.

Its kernels multiply by float32 scales that were merged, so that a result next to a tie may be rounded to the
other side: codes may rarely differ by one. A wrong scale, zero point, weight or bias changes far more than that.
OpenVINO does not fuse across probes, so the file also runs as it is deployed, without them. Its outputs then are
reported but not judged, because single steps travel through the network.

Must not know: how the model was made, reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calibrators.execution.losses import is_logits
from runtime_tests.ort.sessions import Model
from runtime_tests.parity.compare import Comparison, distance, largest_finite
from runtime_tests.parity.results import Agreement, SecondLevel
from runtime_tests.reference.execute import KernelPlan
from runtime_tests.runtimes.openvino import RUNTIME
from runtime_tests.workers.runtime import Artifact

__all__ = ["SecondComparison"]

TINY = 1e-30


class SecondComparison(Comparison):
    """Running totals of OpenVINO, with probes and as the file is deployed."""

    def __init__(self, model: Model, plan: KernelPlan, weights: Mapping[str, Agreement], threads: int) -> None:
        self.deployed = RUNTIME.open(Artifact(model), (), threads)
        super().__init__(
            lambda probes: RUNTIME.open(Artifact(model), probes, threads), model, plan, weights, exact=False
        )
        self.differences, self.largest = [0.0] * len(self.outputs), [0.0] * len(self.outputs)
        self.agreeing = self.decided = 0

    def add(self, inputs: tuple[Tensor, ...], codes: Mapping[str, Tensor], ours: tuple[Tensor, ...]) -> None:
        """Run a batch with and without probes, and compare it with the codes and outputs of the reference."""
        super().add(inputs, codes, ours)
        found, _ = self.deployed.run([x.numpy(force=True) for x in inputs])
        theirs = [torch.from_numpy(y) for y in found]
        for index, (y, t) in enumerate(zip(ours, theirs, strict=True)):
            self.differences[index] = max(self.differences[index], distance(y, t))
            self.largest[index] = max(self.largest[index], largest_finite(y))
        if is_logits(ours[0]):
            self.agreeing += int((ours[0].argmax(1) == theirs[0].argmax(1)).sum())
            self.decided += len(ours[0])

    @property
    def counts(self) -> dict[str, Any]:
        deployed = self.differences, self.largest, self.agreeing, self.decided
        return {**super().counts, "deployed": deployed}

    def include(self, counts: Mapping[str, Any]) -> None:
        super().include(counts)
        differences, largest, agreeing, decided = counts["deployed"]
        self.differences, self.largest = [*map(max, self.differences, differences)], [*map(max, self.largest, largest)]
        self.agreeing, self.decided = self.agreeing + agreeing, self.decided + decided

    def report(self) -> SecondLevel:
        """Return what all batches together say."""
        pairs = zip(self.differences, self.largest, strict=True)
        return SecondLevel.of(
            **self._found(),
            version=RUNTIME.version,
            executed=self.deployed.layers(),
            relative=max(d / max(most, TINY) if d else 0.0 for d, most in pairs),
            agreement=self.agreeing / self.decided if self.decided else None,
        )
