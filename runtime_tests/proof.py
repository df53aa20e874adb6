"""Prove a file on data, in one pass: the reference runs once per batch, and all measurements read that run.

    proof = Proof("model.onnx", result.program)
    for inputs in batches:
        proof.add(inputs)
    proof.levels["optimized"].raise_for_mismatch()

Only counts, sums and the golden sets are kept from batch to batch, so memory does not grow with their number.

Must not know: how the model was made, reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, fx

from calibrators.errors import DataError
from calibrators.execution.ranks import ALONE, Ranks
from calibrators.graph.aten import example_batch, shape_of
from calibrators.program.qdq_program import QUANTIZE
from runtime_tests.measure.accuracy import Accuracy, RunningAccuracy
from runtime_tests.measure.metric import MetricFunction, RunningMetric
from runtime_tests.measure.noise import Noise
from runtime_tests.measure.outputs import RunningOutputs
from runtime_tests.ort.meant_for import target_of
from runtime_tests.ort.sessions import Model, Source
from runtime_tests.parity.compare import Comparison, weight_agreements
from runtime_tests.parity.elsewhere import Elsewhere, proved_on
from runtime_tests.parity.golden import GoldenOutput, GoldenValue, golden_outputs, golden_values
from runtime_tests.parity.results import Level, Parity, ProvedOn, SecondLevel
from runtime_tests.parity.second import SecondComparison
from runtime_tests.reference.execute import KernelPlan, plan, run
from runtime_tests.runtimes import get_runtime
from runtime_tests.runtimes.ort import OnnxRuntimeSession
from runtime_tests.workers.runtime import Artifact, Runtime

__all__ = ["Measurements", "Proof", "parity", "samples_at_once", "second_parity", "validate"]

Batches = Iterable[Sequence[Tensor] | Tensor]

LEVEL_OF = {"ort": "optimized", "openvino": "openvino"}
"""Runtimes of this process whose comparison is a level of its own."""

LARGEST_BATCH, LARGEST_CODES = 64, 1 << 25
"""Samples, and codes of all sites, run at once if the batch is free: both sides hold the codes of one batch."""

IN_CACHE = 1 << 23
"""Elements of the largest value up to which more samples run at once: a pass over them stays in the last cache, and
with fewer the calls would take more time than the passes (MobileNetV2 at 32 x 32: 3.8 ms a sample for 8 at once, 3.3 ms
for 64)."""


@dataclass(frozen=True, eq=False)
class Measurements:
    """The measurements of a proof. A batch whose size is free is cut where one of these numbers of samples is reached.

    The golden samples are never cut.

    parity_samples: number of samples, from the first on, whose codes are compared.
    reference_samples: number of samples, from the first on, on which accuracy is measured of the reference too; those
                    that are compared are among them in any case.
    golden_samples: number of samples whose inputs and reference outputs are kept.
    noise_samples:  number of samples that `noise` reads.
    float_model:    if given, accuracy is measured on all samples against its outputs, with labels of the first one.
    metric:         a metric of the user's by name, measured on all samples too.
    """

    parity_samples: float = math.inf
    reference_samples: float = math.inf
    golden_samples: int = 0
    noise_samples: int = 0
    noise: Noise | None = None
    float_model: fx.GraphModule | None = None
    metric: tuple[str, MetricFunction] | None = None

    @property
    def limits(self) -> tuple[float, ...]:
        limits = [self.golden_samples, self.noise_samples if self.noise else 0, self.parity_samples]
        if self.float_model is not None:
            limits.append(max(self.parity_samples, self.reference_samples))
        return tuple(max(limit, self.golden_samples) for limit in limits)


class _Part(NamedTuple):
    """Samples that run together; first: the number of samples before them."""

    first: int
    inputs: tuple[Tensor, ...]
    labels: Any


class Proof:
    """The proof of one file against its program, for the target that its metadata name, else the default.

    levels:   any of "unoptimized" (QDQ taken literally), "optimized" (integer kernels) and "openvino".
    runtimes: further runtimes in which the file is compared. One that refuses the file is a result, not an error.
    ranks:    processes that prove the file together, each with all the data; each runs some of the batches, and after
              `gather` the first holds all results.
    golden:   sets of inputs and reference outputs: of the first samples, and of `add_golden`.
    measured: what to measure; if None, parity on all samples.
    lowered:  what the target's runtime made of the program, if it is compared in it; None: it makes it again.
    raises:   ModelError if a runtime refuses the model; UnknownNameError if the model lacks one of the program's
              quantized values; ParityError if it lacks a weight; InputError if OpenVINO is not installed.
    """

    def __init__(  # noqa: PLR0913 (what a proof needs)
        self,
        model: Source,
        program: fx.GraphModule,
        levels: Sequence[str] = ("unoptimized", "optimized"),
        *,
        runtimes: Sequence[Runtime] = (),
        threads: int = 1,
        measured: Measurements | None = None,
        ranks: Ranks = ALONE,
        lowered: Path | None = None,
    ) -> None:
        self.model, self.program, self.threads, self.ranks = Model.of(model), program, threads, ranks
        self._artifact = Artifact(self.model, program, lowered)
        self.target = target_of(self.model)
        self.measured = measured or Measurements()
        self._at_once = samples_at_once(program)
        self.samples = 0
        self.golden: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
        self._golden_codes: dict[str, Tensor] = {}  # of the first set, by site
        names = program.meta["output_names"]
        self.accuracy = RunningAccuracy() if self.measured.float_model is not None else None
        self.outputs = RunningOutputs(names)
        self.metric = RunningMetric(*self.measured.metric, names) if self.measured.metric is not None else None
        self._weights = weight_agreements(self.model, program)
        levels = [*levels, *(LEVEL_OF[each.name] for each in runtimes if each.name in LEVEL_OF)]
        self._comparisons = {name: self._comparison(name) for name in dict.fromkeys(levels)}
        self._elsewhere = [self._started(each) for each in runtimes if each.name not in LEVEL_OF]
        self._limits = *self.measured.limits, *(each.samples for each in self._elsewhere)
        self._waiting: list[_Part] = []

    @cached_property
    def kernels(self) -> KernelPlan:
        """The integer kernels that the target makes of the program."""
        return plan(self.program, self.target)

    @cached_property
    def _literal(self) -> KernelPlan:
        return plan(self.program, self.target, integer=False)

    @cached_property
    def _deployed(self) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(self.model, (), optimized=self.kernels.integer, threads=self.threads)

    def _comparison(self, level: str) -> Comparison:
        if level == "openvino":
            return SecondComparison(self.model, self.kernels, self._weights, self.threads)
        kernels = self._literal if level == "unoptimized" else self.kernels
        start = partial(OnnxRuntimeSession, self.model, optimized=kernels.integer, threads=self.threads)
        return Comparison(start, self.model, kernels, self._weights)

    def _started(self, runtime: Runtime) -> Elsewhere:
        samples = min(math.inf if runtime.samples is None else runtime.samples, self.measured.parity_samples)
        limit = max(samples, self.measured.golden_samples)
        own = plan(self.program, self.target, own=True) if runtime.lowers else None
        return Elsewhere(runtime, self._artifact, self.kernels, self._weights, own=own, samples=limit)

    @property
    def is_done(self) -> bool:
        """Whether more samples would change nothing."""
        return self.accuracy is None and self.samples >= max(self._limits)

    @property
    def levels(self) -> dict[str, Level]:
        """The parity at each level.

        raises: DataError if there are no samples.
        """
        return {name: each.report() for name, each in self._comparisons.items()}

    @property
    def parity(self) -> Parity:
        """The levels together; both levels of onnxruntime must be among them."""
        return Parity(**cast(dict[str, Any], self.levels))

    @property
    def proved_on(self) -> tuple[ProvedOn, ...]:
        """Results of every runtime, this process's onnxruntime first.

        raises: DataError if there are no samples.
        """
        levels = self.levels
        here = (proved_on(get_runtime(name), levels[level]) for name, level in LEVEL_OF.items() if level in levels)
        return *here, *(each.report() for each in self._elsewhere)

    def golden_outputs(self, processors: Iterable[str]) -> tuple[GoldenOutput, ...]:
        """Return the tolerance of each golden output; processors: families for which the file is made."""
        return golden_outputs(self.model, self.kernels, self.golden, processors=processors)

    def golden_values(self, processors: Iterable[str]) -> list[GoldenValue]:
        """Return the codes of every quantized value for the first golden set; processors: as of `golden_outputs`."""
        return golden_values(self.kernels, self._golden_codes, processors=processors)

    def add(self, batch: Sequence[Tensor] | Tensor, labels: Any = None) -> None:
        """Run and measure a batch: one tensor per input, or a tensor; labels: [n] array of classes.

        raises: DataError for a wrong number of inputs, or what `Accuracy` refuses.
        """
        inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        names = [value.name for value in self.model.proto.graph.input]
        if len(inputs) != len(names):
            raise DataError(
                f"a batch holds {len(inputs)} tensors, but the model has {len(names)} inputs: {', '.join(names)}"
            )
        for cut in self._cuts(len(inputs[0])):
            if self.is_done:
                return
            part = _Part(self.samples, tuple(x[cut] for x in inputs), None if labels is None else labels[cut])
            self.samples += len(part.inputs[0])
            self._waiting.append(part)
            if len(self._waiting) == self.ranks.count:
                self._run_waiting()

    def gather(self) -> None:
        """Bring the results of all processes together in the first; nothing is added after that."""
        self._run_waiting()
        running: list[Any] = [*self._comparisons.values(), *self._elsewhere, *filter(None, [self.measured.noise])]
        _, *others = self.ranks.gathered([each.counts for each in running])
        for counts in others if self.ranks.is_first else []:
            for each, theirs in zip(running, counts, strict=True):
                each.include(theirs)

    def _run_waiting(self) -> None:
        """Run one part in each process; the first adds up the scores of all in their order."""
        parts = [*self._waiting]
        self._waiting.clear()
        for part, networks in zip(parts, self.ranks.spread(self._run, parts), strict=True):
            if networks is not None and self.accuracy is not None and self.ranks.is_first:
                references = networks.get("reference", [None])
                self.accuracy.update(networks["float"][0], references[0], networks["runtime"][0], part.labels)
                self.outputs.update(networks)
                if self.metric is not None:
                    self.metric.update(networks, len(part.inputs[0]))

    def add_golden(self, inputs: tuple[Tensor, ...]) -> None:
        """Compare a batch, however many samples were compared, and keep it as another golden set."""
        integer = run(self.kernels, inputs, with_floats=True)
        for name, comparison in self._comparisons.items():
            comparison.add(inputs, *(run(self._literal, inputs) if name == "unoptimized" else integer))
        for each in self._elsewhere:
            each.add(inputs, *integer)
        self._keep_golden(inputs, *integer)

    def _keep_golden(
        self, inputs: tuple[Tensor, ...], codes: Mapping[str, Tensor], outputs: tuple[Tensor, ...]
    ) -> None:
        """Keep a golden set, and the codes of the first."""
        if not self.golden:
            self._golden_codes = {site: codes[site] for site in self.kernels.sites}
        self.golden.append((inputs, outputs))

    def add_all(self, batches: Batches) -> None:
        """Run and measure batches without labels."""
        for batch in batches:
            self.add(batch)

    def _cuts(self, count: int) -> Iterator[slice]:
        """Yield the slices of a batch, cut where a limit is reached unless the program fixes its size."""
        start = 0
        while start < count:
            rooms = [int(limit - self.samples) for limit in self._limits if self.samples < limit < math.inf]
            together = 0 if self.samples else self.measured.golden_samples
            size = min(count - start, max(self._at_once, together), *rooms)
            size = size if self.program.meta["dynamic_batch"] else count
            yield slice(start, start + size)
            start += size

    def _run(self, part: _Part) -> dict[str, list[Any]] | None:
        """Run a part and compare it; return the outputs by network where accuracy is measured."""
        (first, inputs, _), measured = part, self.measured
        compared = self._comparisons if first < measured.parity_samples else {}
        elsewhere = [each for each in self._elsewhere if first < each.samples]
        noise = measured.noise if first < measured.noise_samples else None
        wants_golden = not first and not self.golden and measured.golden_samples > 0
        if noise is not None:
            noise.start(inputs)
        if noise is not None or "unoptimized" in compared:
            literal = run(self._literal, inputs, see=noise.see if noise is not None else None)
            if "unoptimized" in compared:
                compared["unoptimized"].add(inputs, *literal)
            del literal  # its codes go before those of the kernels come
        scored = self.accuracy is not None and first < max(measured.reference_samples, measured.parity_samples)
        if wants_golden or scored or elsewhere or compared.keys() - {"unoptimized"}:
            integer = run(self.kernels, inputs, with_floats=True)
        for name, comparison in compared.items():
            if name != "unoptimized":
                comparison.add(inputs, *integer)
        for each in elsewhere:
            each.add(inputs, *integer)
        if wants_golden:
            self._keep_golden(inputs, *integer)
        if measured.float_model is None:
            return None
        return self._outputs(measured.float_model, inputs, integer[1] if scored else None)

    def _outputs(
        self, float_model: fx.GraphModule, inputs: tuple[Tensor, ...], ours: tuple[Tensor, ...] | None
    ) -> dict[str, list[Any]]:
        """Return the outputs of each network; ours: those of the reference, None where it did not run."""
        with torch.no_grad():
            exact = float_model(*inputs)
        deployed, _ = self._deployed.run([x.numpy(force=True) for x in inputs])
        networks = {"float": [y.numpy() for y in exact], "runtime": self._values(deployed)}
        if ours is not None:
            networks["reference"] = self._values([y.numpy() for y in ours])
        return networks

    def _values(self, outputs: Sequence[Any]) -> list[Any]:
        """Return outputs of which those that are codes are dequantized."""
        grids = self.program.meta.get("output_codes", {})
        return [
            (y - np.float32(grids[name][1])) * np.float32(grids[name][0]) if name in grids else y
            for name, y in zip(self.program.meta["output_names"], outputs, strict=True)
        ]

    @property
    def scores(self) -> Accuracy | None:
        """The accuracy on all samples, None if it was not measured."""
        return None if self.accuracy is None else replace(self.accuracy.result(), outputs=self.outputs.result())


def samples_at_once(program: fx.GraphModule) -> int:
    """Return how many samples to run at once: as many as leave the largest value in a cache and memory free, or one."""
    sizes = {node: math.prod(shape_of(node)) for node in program.graph.nodes if node.op == "call_function"}
    largest, codes = max(sizes.values(), default=0), sum(sizes[node] for node in sizes if node.target is QUANTIZE)
    batch = example_batch(program)
    return max(min(LARGEST_BATCH, IN_CACHE * batch // max(largest, 1), LARGEST_CODES * batch // max(codes, 1)), 1)


class _Reference(Protocol):
    @property
    def program(self) -> fx.GraphModule: ...


def validate(path: Source, *, reference: _Reference, batches: Batches) -> Parity:
    """Compare the file at `path` with the program of a calibration result, with optimizations off and on.

    batches: tensors, or tuples with one tensor per input; read once.
    raises:  DataError if there are no batches.
    """
    proof = Proof(path, reference.program)
    proof.add_all(batches)
    return proof.parity


def parity(model: Source, program: fx.GraphModule, batches: Batches, *, optimized: bool, threads: int = 1) -> Level:
    """Compare `model` in onnxruntime with `program`: as integer kernels if optimized, else literally as QDQ.

    raises: DataError if there are no batches or a wrong number of inputs, and the errors of Proof.
    """
    proof = Proof(model, program, ["optimized" if optimized else "unoptimized"], threads=threads)
    proof.add_all(batches)
    return next(iter(proof.levels.values()))


def second_parity(model: Source, program: fx.GraphModule, batches: Batches, *, threads: int = 1) -> SecondLevel:
    """Compare `model` in OpenVINO with the integer kernels of `program`.

    raises: InputError if OpenVINO is not installed; ModelError if it refuses the file; also the errors of `parity`.
    """
    proof = Proof(model, program, ["openvino"], threads=threads)
    proof.add_all(batches)
    return cast(SecondLevel, proof.levels["openvino"])
