"""Compare a runtime with the reference program at every quantized value, code by code.

There are two comparisons. *End to end* both sides start from the same input and run to the end. *Per node* the
reference is fed with the runtime's own codes, so that a difference belongs to the kernel at which it shows. Where all
nodes agree, both sides agree end to end: the second comparison decides, and runs only if the first finds something.

The graph that the runtime executes is compared with the plan too: an operator that should run on integers and does not,
or the other way round, is reported even where its numbers agree.

Integer kernels must agree in every code. Float operators between dequantize and quantize are computed by other code on
the two sides; they may differ by one code at the rare values next to a tie. Where a float kernel reads codes of its
weight alone, these are compared as the file holds them.

Must not know: how the model was made, accuracy, reports.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from calibrators.errors import DataError, IntactError
from runtime_tests.ort.sessions import Model, Source, session
from runtime_tests.parity.stored_weights import differing_weights
from runtime_tests.reference.execute import FLOAT, KernelPlan, run

__all__ = [
    "Agreement",
    "Comparison",
    "OnnxRuntime",
    "OutputParity",
    "ParityError",
    "ParityReport",
    "Runtime",
    "SiteParity",
    "Validation",
    "distance",
    "largest_finite",
    "legal_rate",
    "probes_of",
    "unplanned_kernels",
    "weight_agreements",
]

FLOAT_LSB = 1
"""Largest legal step after a float operator: two correctly computed floats lie on the two sides of one tie."""

FLOAT_RATE = 1e-4
"""Largest legal share of such values, per site of 8 bits. Float32 results that differ in their last bits fall on two
sides of a tie in up to 2e-5 of the values; integer sums computed in float32 (optimisations off) did so in 1e-6 to 3e-5.
A finer grid over the same range has as many more ties: 256 times at 16 bits, where up to 2e-3 were seen."""

FLOAT_CHANCE = 4
"""Differences allowed at a site whatever the rate: a small tensor holds a rare tie by chance."""

FLOAT_OUTPUT_ERROR = 1e-4
"""Largest legal difference of a float output, relative to its largest value: some hundred roundings of float32."""

WEIGHT = "DequantizeLinear"
"""What reads the codes of a weight that are compared as the file holds them."""

WORST = 5
"""Sites that a summary names."""


class ParityError(IntactError):
    """The runtime computes something else than the reference program."""

    exit_code = 1


@dataclass(frozen=True)
class Agreement:
    """How many codes were compared, how many differ, and by how many steps at most."""

    values: int = 0
    mismatched: int = 0
    max_lsb: int = 0

    def __add__(self, other: Agreement) -> Agreement:
        worst = max(self.max_lsb, other.max_lsb)
        return Agreement(self.values + other.values, self.mismatched + other.mismatched, worst)

    def to_dict(self) -> dict[str, int]:
        return {"values": self.values, "mismatched": self.mismatched, "max_lsb": self.max_lsb}


@dataclass(frozen=True)
class SiteParity:
    """One quantized value.

    kernel: the runtime's operator that writes it, "float" for float arithmetic; reason says why it is float.
    rate:   legal share of codes that are one step off; 0: none may differ.
    """

    site: str
    kernel: str
    reason: str
    per_node: Agreement
    end_to_end: Agreement
    rate: float = 0.0

    @property
    def is_legal(self) -> bool:
        """Whether the node computes what the reference computes, from the same inputs."""
        found = self.per_node
        if not self.rate:
            return found.mismatched == 0
        return found.max_lsb <= FLOAT_LSB and found.mismatched <= FLOAT_CHANCE + self.rate * found.values

    def to_dict(self) -> dict[str, Any]:
        """Per node; what travelled through the network is under end_to_end."""
        return {
            "site": self.site,
            "kernel": self.kernel,
            "reason": self.reason,
            "legal": self.is_legal,
            **self.per_node.to_dict(),
            "end_to_end": self.end_to_end.to_dict(),
        }


@dataclass(frozen=True)
class OutputParity:
    """One float output of the network.

    exact:      an integer kernel writes it, so that its bits must agree.
    identical:  its bits agree end to end; per_node: from the runtime's own codes.
    max_abs:    largest difference end to end; relative: per node, as a share of the largest value.
    """

    name: str
    exact: bool
    identical: bool
    per_node_identical: bool
    max_abs: float
    relative: float

    @property
    def is_legal(self) -> bool:
        return self.per_node_identical if self.exact else self.relative <= FLOAT_OUTPUT_ERROR

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "exact": self.exact,
            "legal": self.is_legal,
            "identical": self.identical,
            "per_node_identical": self.per_node_identical,
            "max_abs": self.max_abs,
            "relative": self.relative,
        }


@dataclass(frozen=True)
class ParityReport:
    """Everything that was compared in one runtime at one optimisation level, sites in the order of computation.

    unplanned: kernels executed minus kernels planned, by operator, where they differ; nothing with optimisations off.
    """

    optimized: bool
    samples: int
    sites: tuple[SiteParity, ...]
    outputs: tuple[OutputParity, ...]
    unplanned: Mapping[str, int] = field(default_factory=dict)
    runtime: str = "onnxruntime"

    @property
    def end_to_end(self) -> Agreement:
        return sum((site.end_to_end for site in self.sites), Agreement())

    @property
    def per_node(self) -> Agreement:
        return sum((site.per_node for site in self.sites), Agreement())

    @property
    def outputs_identical(self) -> bool:
        """Whether the bits of all outputs agree end to end."""
        return all(output.identical for output in self.outputs)

    @property
    def violations(self) -> int:
        """Number of sites and outputs that are not what the reference computes from the same inputs."""
        return sum(not site.is_legal for site in self.sites) + sum(not output.is_legal for output in self.outputs)

    @property
    def worst(self) -> tuple[SiteParity, ...]:
        """Sites with per-node differences: illegal ones first, then by the share of their values."""
        found = [site for site in self.sites if site.per_node.mismatched]
        found.sort(key=lambda s: (s.is_legal, -s.per_node.mismatched / s.per_node.values))
        return tuple(found[:WORST])

    def to_dict(self) -> dict[str, Any]:
        integer = sum((s.per_node for s in self.sites if s.kernel != FLOAT), Agreement())
        floating = sum((s.per_node for s in self.sites if s.kernel == FLOAT), Agreement())
        return {
            **self.end_to_end.to_dict(),
            "forced": self.per_node.to_dict(),
            "outputs_identical": self.outputs_identical,
            "violations": self.violations,
            "unplanned": dict(self.unplanned),
            "kernel_mismatched": integer.mismatched,
            "kernel_values": integer.values,
            "float_mismatched": floating.mismatched,
            "float_values": floating.values,
            "samples": self.samples,
            "kernels": dict(Counter(site.kernel for site in self.sites)),
            "outputs": [output.to_dict() for output in self.outputs],
            "worst": [site.to_dict() for site in self.worst],
            "nodes": [site.to_dict() for site in self.sites],
        }

    def raise_for_mismatch(self) -> None:
        """Nothing if every node computes what the reference computes, in the kernel that was planned.

        raises: ParityError naming the first node that does not, and how far off it is.
        """
        level = f"in {self.runtime} with optimisations {'on' if self.optimized else 'off'}"
        illegal = [site for site in self.sites if not site.is_legal]
        if illegal:
            first, found = illegal[0], illegal[0].per_node
            raise ParityError(
                f"{found.mismatched} of {found.values} codes of {first.site!r} ({first.kernel}) differ from the "
                f"reference by up to {found.max_lsb}, on the runtime's own input codes, {level}; "
                f"{len(illegal)} of {len(self.sites)} sites are affected. The file and the program disagree there "
                "(scale, zero point, weight or bias), or this runtime computes otherwise: compare its version and CPU."
            )
        for output in self.outputs:
            if not output.is_legal:
                raise ParityError(
                    f"output {output.name!r} differs from the reference by {output.relative:.3g} of its largest value "
                    f"{level}, though all codes before it agree: look at the operators behind "
                    f"{self.sites[-1].site!r}."
                )
        if self.unplanned:
            kernels = ", ".join(f"{abs(n)} {'more' if n > 0 else 'fewer'} {name}" for name, n in self.unplanned.items())
            raise ParityError(
                f"the runtime executes other kernels than planned: {kernels}. The coverage names what is left in float "
                "and why; what the runtime quantizes by itself was never calibrated."
            )


@dataclass(frozen=True)
class Validation:
    """Both optimisation levels of one file."""

    unoptimized: ParityReport
    optimized: ParityReport

    def to_dict(self) -> dict[str, Any]:
        return {"unoptimized": self.unoptimized.to_dict(), "optimized": self.optimized.to_dict()}

    def raise_for_mismatch(self) -> None:
        """Nothing if both levels agree with the reference.

        raises: ParityError as ParityReport.raise_for_mismatch, the integer kernels first.
        """
        self.optimized.raise_for_mismatch()
        self.unoptimized.raise_for_mismatch()


class Runtime(Protocol):
    """A file loaded into a runtime, with some of its values made visible as probes.

    kernel_rate: legal share of codes that one of its integer kernels may have one step off; 0: none.
    """

    @property
    def name(self) -> str: ...
    @property
    def kernel_rate(self) -> float: ...
    @property
    def output_names(self) -> list[str]: ...
    def run(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the model's outputs and the probes."""

    def unplanned(self, plan: KernelPlan) -> Mapping[str, int]:
        """Return the kernels executed minus those planned, by operator, where they differ and are known."""


class OnnxRuntime:
    """A session, its probes being the codes of every site."""

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
        """Return those of the file as it is deployed, all optimisations on."""
        return unplanned_kernels(self.model, plan) if self.optimized else {}


def unplanned_kernels(model: Source, plan: KernelPlan) -> dict[str, int]:
    """Count the kernels on codes that the runtime executes, minus those of the plan, where the two differ."""
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
    """Running totals of one runtime at one optimisation level.

    runtime: with the probes of `probes_of(plan)`.
    plan:    the reference: integer kernels, or QDQ taken literally.
    weights: how far each weight of a float kernel is from the reference, by site.
    """

    def __init__(self, runtime: Runtime, plan: KernelPlan, weights: Mapping[str, Agreement]) -> None:
        self.runtime, self.plan, self.weights = runtime, plan, weights
        self.unplanned = runtime.unplanned(plan)
        self.samples = 0
        self.per_node = dict.fromkeys(plan.sites, Agreement())
        self.end_to_end = dict.fromkeys(plan.sites, Agreement())
        self.outputs = [_OutputTally() for _ in runtime.output_names]

    def add(self, inputs: tuple[Tensor, ...], codes: Mapping[str, Tensor], ours: tuple[Tensor, ...]) -> None:
        """Run a batch and compare it with the codes and outputs that the reference has for it."""
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

    def report(self) -> ParityReport:
        """Return what all batches together say."""
        if not self.samples:
            raise DataError("no batch to compare runtime and reference on: a proof needs at least one sample")
        weights = (SiteParity(site, WEIGHT, "", found, found) for site, found in self.weights.items())
        sites = (*weights, *(self._site(site) for site in self.plan.sites))
        same = not self.runtime.kernel_rate
        outputs = tuple(
            OutputParity(name, exact and same, t.identical, t.per_node_identical, t.max_abs, t.relative)
            for name, exact, t in zip(self.runtime.output_names, self.plan.exact_outputs, self.outputs, strict=True)
        )
        return ParityReport(self.plan.integer, self.samples, sites, outputs, self.unplanned, self.runtime.name)

    def _site(self, site: str) -> SiteParity:
        step = self.plan.by_site[site]
        rate = legal_rate(step.kernel, self.plan.container_bits[site], self.runtime.kernel_rate)
        return SiteParity(site, step.kernel, step.reason, self.per_node[site], self.end_to_end[site], rate)


def legal_rate(kernel: str, bits: int = 8, of_kernels: float = 0.0) -> float:
    """Return the share of a site's codes that may be one step off: after float operators, or if kernels may as well.

    bits: of the container of the codes.
    """
    return max(FLOAT_RATE if kernel == FLOAT else 0.0, of_kernels) * 2.0 ** (bits - 8)


def weight_agreements(model: Source, program: fx.GraphModule) -> dict[str, Agreement]:
    """Compare the weights of float kernels as the file holds them, by site.

    raises: ParityError for a weight that the file lacks.
    """
    found = {}
    for site, distance in differing_weights(model, program).items():
        if distance is None:
            raise ParityError(
                f"the file does not hold the codes of {site!r} in the shape that the reference has: it belongs to "
                "another program; emit it again."
            )
        found[site] = Agreement(distance.numel(), int(distance.count_nonzero()), int(distance.max()))
    return found


def _agreement(site: str, ours: Tensor, theirs: Tensor) -> Agreement:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise ParityError(
            f"the codes of {site!r} are {theirs.dtype} {list(theirs.shape)} in the runtime and {ours.dtype} "
            f"{list(ours.shape)} in the reference: the file belongs to another program; emit it again."
        )
    different = ours != theirs
    count = int(different.sum())
    if not count:
        return Agreement(ours.numel())
    steps = (ours[different].to(torch.int32) - theirs[different].to(torch.int32)).abs()
    return Agreement(ours.numel(), count, int(steps.max()))


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equal shape, dtype and bits; NaN equals NaN, 0.0 does not equal -0.0."""
    same_form = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same_form and ours.numpy().tobytes() == theirs.numpy().tobytes()


def largest_finite(x: Tensor) -> float:
    """Return the largest absolute value, infinities and NaN left out."""
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
