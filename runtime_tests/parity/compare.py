"""Compare a runtime with the reference program at every quantized value, code by code.

There are two comparisons. *End to end* both sides start from the same input and run to the end. *Per node* the
reference reads the runtime's own codes, so that a difference belongs to the kernel at which it shows. Where all
nodes agree, both sides agree end to end. The second comparison decides; it runs only if the first finds a difference.

The graph that the runtime executes is also compared with the plan: an operator that should run on integers but does
not, or the other way round, is reported even if its numbers agree.

Integer kernels must agree in every code. Float operators between dequantize and quantize are computed by other code on
the two sides; they may differ by one code at the rare values next to a tie. Where a float kernel reads codes of its
weight alone, these are compared as the file holds them.

Must not know: how the model was made, accuracy, reports.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from calibrators.errors import DataError
from runtime_tests.ort.onnx_operators import DEQUANTIZE
from runtime_tests.ort.sessions import Model, Source, session
from runtime_tests.parity.results import Agreement, Level, NodeParity, OutputParity, ParityError, legal_rate
from runtime_tests.parity.stored_weights import differing_weights
from runtime_tests.reference.execute import KernelPlan, run

__all__ = [
    "Comparison",
    "OnnxRuntime",
    "Runtime",
    "distance",
    "largest_finite",
    "probes_of",
    "unplanned_kernels",
    "weight_agreements",
]


class Runtime(Protocol):
    """A file loaded into a runtime, with some of its values made visible as probes.

    kernel_rate: share of the codes of an integer kernel that may be one step off; 0: none.
    """

    @property
    def name(self) -> str: ...
    @property
    def kernel_rate(self) -> float: ...
    @property
    def output_names(self) -> list[str]: ...
    def run(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the model's outputs and the probes."""

    def unplanned(self, plan: KernelPlan) -> Mapping[str, int] | None:
        """Return executed minus planned kernels by operator, where the two differ; None if there is no plan."""


class OnnxRuntime:
    """A session of onnxruntime whose probes are the codes of every site."""

    name = "onnxruntime"
    kernel_rate = 0.0

    def __init__(self, model: Model, probes: Sequence[str], *, optimized: bool, threads: int) -> None:
        self.model, self.optimized, self.probes = model, optimized, list(probes)
        self.session = session(model, optimized=optimized, threads=threads, probes=probes)
        names = [info.name for info in self.session.get_outputs()]
        self.input_names = [info.name for info in self.session.get_inputs()]
        self.output_names = [name for name in names if name not in set(probes)]

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the model's outputs and the probes."""
        feeds = {name: x.numpy(force=True) for name, x in zip(self.input_names, inputs, strict=True)}
        results = [torch.from_numpy(np.asarray(x)) for x in self.session.run([*self.output_names, *self.probes], feeds)]
        count = len(self.output_names)
        return results[:count], results[count:]

    def unplanned(self, plan: KernelPlan) -> Mapping[str, int]:
        """Return the differences for the file as it is deployed, with all optimizations on."""
        return unplanned_kernels(self.model, plan) if self.optimized else {}


def unplanned_kernels(model: Source, plan: KernelPlan) -> dict[str, int]:
    """Count the integer kernels that the runtime executes, minus those of the plan, where the two differ."""
    executed = Counter(node.op_type for node in Model.of(model).optimized.proto.graph.node)
    return {name: executed[name] - count for name, count in plan.counts.items() if executed[name] != count}


@dataclass
class _OutputTally:
    identical: bool = True
    per_node_identical: bool = True
    max_abs: float = 0.0
    relative: float = 0.0

    def add(self, ours: Tensor, per_node: Tensor, theirs: Tensor) -> None:
        self.identical &= _same_bits(ours, theirs)
        self.per_node_identical &= _same_bits(per_node, theirs)
        self.max_abs = max(self.max_abs, distance(ours, theirs))
        difference = distance(per_node, theirs)
        if difference:
            largest = largest_finite(theirs)
            self.relative = max(self.relative, difference / largest if largest > 0 else math.inf)


def probes_of(plan: KernelPlan) -> list[str]:
    """Return the names that the codes of the sites have in the file."""
    return [f"{site}_quantized" for site in plan.sites]


class Comparison:
    """Running totals of one runtime at one optimization level.

    runtime: the runtime, with the probes of `probes_of(plan)`.
    plan:    the reference: integer kernels, or QDQ taken literally.
    weights: agreement of each weight of a float kernel with the reference, by site.
    """

    def __init__(self, runtime: Runtime, plan: KernelPlan, weights: Mapping[str, Agreement]) -> None:
        self.runtime, self.plan, self.weights = runtime, plan, weights
        self.unplanned = runtime.unplanned(plan)
        self.samples = 0
        self.per_node = dict.fromkeys(plan.sites, Agreement(0, 0, 0))
        self.end_to_end = dict.fromkeys(plan.sites, Agreement(0, 0, 0))
        self.outputs = [_OutputTally() for _ in runtime.output_names]

    def add(self, inputs: tuple[Tensor, ...], codes: Mapping[str, Tensor], ours: tuple[Tensor, ...]) -> None:
        """Run a batch and compare it with the codes and outputs of the reference."""
        self.samples += len(inputs[0])
        outputs, probes = self.runtime.run(inputs)
        theirs = dict(zip(self.plan.sites, probes, strict=True))
        end_to_end = {site: _agreement(site, codes[site], theirs[site]) for site in self.plan.sites}
        per_node, ours_per_node = end_to_end, ours
        if any(agreement.mismatched for agreement in end_to_end.values()):
            codes, ours_per_node = run(self.plan, inputs, theirs)
            per_node = {site: _agreement(site, codes[site], theirs[site]) for site in self.plan.sites}
        for site in self.plan.sites:
            self.end_to_end[site] += end_to_end[site]
            self.per_node[site] += per_node[site]
        for tally, *values in zip(self.outputs, ours, ours_per_node, outputs, strict=True):
            tally.add(*values)

    def report(self) -> Level:
        """Return the result over all batches."""
        return Level.of(**self._found())

    def _found(self) -> dict[str, Any]:
        """Return the arguments of `Level.of`.

        raises: DataError if there are no samples.
        """
        if not self.samples:
            raise DataError("there is no batch on which to compare runtime and reference; give at least one sample")
        outputs = zip(self.runtime.output_names, self.plan.exact_outputs, self.outputs, strict=True)
        return {
            "nodes": [
                *(NodeParity.of(site, DEQUANTIZE, found, found) for site, found in self.weights.items()),
                *map(self._node, self.plan.sites),
            ],
            "outputs": [
                OutputParity.of(name, exact=exact and not self.runtime.kernel_rate, **asdict(tally))
                for name, exact, tally in outputs
            ],
            "samples": self.samples,
            "unplanned": self.unplanned,
            "runtime": self.runtime.name,
            "optimized": self.plan.integer,
        }

    def _node(self, site: str) -> NodeParity:
        step = self.plan.by_site[site]
        rate = legal_rate(step.kernel, self.plan.container_bits[site], self.runtime.kernel_rate)
        found, end_to_end = self.per_node[site], self.end_to_end[site]
        return NodeParity.of(site, step.kernel, found, end_to_end, reason=step.reason, rate=rate)


def weight_agreements(model: Source, program: fx.GraphModule) -> dict[str, Agreement]:
    """Compare the weights of float kernels as the file holds them, by site.

    raises: ParityError for a weight that the file lacks.
    """
    found = {}
    for site, distance in differing_weights(model, program).items():
        if distance is None:
            raise ParityError(
                f"the file does not hold the codes of {site!r} in the shape that they have in the reference, so it "
                "belongs to another program; emit it again."
            )
        found[site] = Agreement(distance.numel(), int(distance.count_nonzero()), int(distance.max()))
    return found


def _agreement(site: str, ours: Tensor, theirs: Tensor) -> Agreement:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise ParityError(
            f"the codes of {site!r} are {theirs.dtype} {list(theirs.shape)} in the runtime and {ours.dtype} "
            f"{list(ours.shape)} in the reference, so the file belongs to another program; emit it again."
        )
    different = ours != theirs
    count = int(different.sum())
    if not count:
        return Agreement(ours.numel(), 0, 0)
    steps = (ours[different].to(torch.int32) - theirs[different].to(torch.int32)).abs()
    return Agreement(ours.numel(), count, int(steps.max()))


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether shape, dtype and bits are equal; NaN equals NaN, 0.0 does not equal -0.0."""
    same_form = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same_form and ours.numpy().tobytes() == theirs.numpy().tobytes()


def largest_finite(x: Tensor) -> float:
    """Return the largest absolute value other than infinity and NaN."""
    return float(x.double().abs().where(x.isfinite(), 0.0).max())


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of two tensors; infinite where shapes differ or only one is finite."""
    if _same_bits(ours, theirs):
        return 0.0
    if ours.shape != theirs.shape:
        return math.inf
    ours, theirs = ours.double(), theirs.double()
    differ = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    largest = float((ours - theirs)[differ].abs().amax()) if bool(differ.any()) else 0.0
    return math.inf if math.isnan(largest) else largest
