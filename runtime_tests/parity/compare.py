"""The runtime against the reference program, value by value: every quantized tensor tapped, every code compared.

Two comparisons at once. *End to end* both sides start from the same input and run to the end. *Per node* the reference
is fed with the runtime's own codes, so that a difference belongs to the kernel at which it shows. Where all nodes
agree, both sides agree end to end: the second comparison therefore decides, and runs only if the first finds something.

The graph that the runtime executes is held against the plan too: an operator that should run on integers and does not,
or the other way round, is a surprise even where its numbers agree.

Integer kernels must agree in every code. Float operators between dequantize and quantize are computed by other code on
the two sides; they may differ by one code at the rare values next to a tie. Where a float kernel reads codes of its
weight alone, these are compared as the file holds them.

Must not know: how the model was made, accuracy, reports.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from calibrators.errors import DataError, IntactError
from runtime_tests.ort.sessions import Model, Source, session
from runtime_tests.parity.stored_weights import differing_weights
from runtime_tests.reference.execute import FLOAT, KernelPlan, plan, run

__all__ = [
    "Agreement",
    "Comparison",
    "OutputParity",
    "ParityError",
    "ParityReport",
    "Runtime",
    "SiteParity",
    "Validation",
    "distance",
    "largest_finite",
    "legal_rate",
    "parity",
    "unplanned",
    "validate",
]

FLOAT_LSB = 1
"""Largest legal step behind a float operator: two correctly computed floats lie on the two sides of one tie."""

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

LARGEST_BATCH = 64
"""Samples compared at once where the batch is free: both sides hold the codes of every site of one batch."""

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


class _Reference(Protocol):
    @property
    def program(self) -> fx.GraphModule: ...


def validate(path: Source, *, reference: _Reference, batches: Iterable[Sequence[Tensor] | Tensor]) -> Validation:
    """The file at `path` against the program of a calibration result, with optimisations off and on.

    batches: tensors or tuples with one tensor per input; read once.
    raises:  DataError for no batches.
    """
    levels = [_in_onnxruntime(path, reference.program, optimized=on, threads=1) for on in (False, True)]
    for batch in batches:
        inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        for level in levels:
            level.add(inputs)
    return Validation(*(level.report() for level in levels))


def parity(
    model: Source,
    program: fx.GraphModule,
    batches: Iterable[Sequence[Tensor]],
    *,
    optimized: bool,
    threads: int = 1,
) -> ParityReport:
    """`model` in onnxruntime against `program`: as integer kernels if optimized, literally as QDQ otherwise.

    batches: tuples with one tensor per input; memory does not grow with their number.
    raises:  DataError for no batches or a wrong number of inputs; ModelError if the runtime refuses the model;
             UnknownNameError if the model lacks one of the program's quantized values.
    """
    comparison = _in_onnxruntime(model, program, optimized=optimized, threads=threads)
    for batch in batches:
        comparison.add(tuple(batch))
    return comparison.report()


class Runtime(Protocol):
    """A file loaded into a runtime, with some of its values made visible.

    input_names, output_names: of the model itself.
    kernel_rate: legal share of codes that one of its integer kernels may have one step off; 0: none.
    """

    @property
    def name(self) -> str: ...
    @property
    def kernel_rate(self) -> float: ...
    @property
    def input_names(self) -> list[str]: ...
    @property
    def output_names(self) -> list[str]: ...
    def run(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """The model's outputs and the values made visible."""

    def unplanned(self, plan: KernelPlan) -> Mapping[str, int]:
        """Kernels that it executes minus those of the plan, by operator, where they differ and are known."""


class _OnnxRuntime:
    name = "onnxruntime"
    kernel_rate = 0.0

    def __init__(self, model: Source, taps: Sequence[str], *, optimized: bool, threads: int) -> None:
        self.model, self.optimized = model, optimized
        self.session = session(model, optimized=optimized, threads=threads, probes=taps)
        names = [info.name for info in self.session.get_outputs()]
        self.input_names = [info.name for info in self.session.get_inputs()]
        self.output_names, self.taps = [name for name in names if name not in set(taps)], list(taps)

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        feeds = {name: x.numpy(force=True) for name, x in zip(self.input_names, inputs, strict=True)}
        results = [torch.from_numpy(np.asarray(x)) for x in self.session.run([*self.output_names, *self.taps], feeds)]
        count = len(self.output_names)
        return results[:count], results[count:]

    def unplanned(self, plan: KernelPlan) -> Mapping[str, int]:
        """Those of the file as it is deployed, all optimisations on."""
        return unplanned(self.model, plan) if self.optimized else {}


def _in_onnxruntime(model: Source, program: fx.GraphModule, *, optimized: bool, threads: int) -> Comparison:
    def load(taps: Sequence[str]) -> Runtime:
        return _OnnxRuntime(model, taps, optimized=optimized, threads=threads)

    return Comparison(load, model, program, optimized=optimized)


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


class Comparison:
    """Running totals of one runtime at one optimisation level.

    load:      the model in the runtime, given the names of values to be made visible.
    optimized: whether integer kernels are the reference, or QDQ taken literally.
    """

    def __init__(
        self,
        load: Callable[[Sequence[str]], Runtime],
        model: Source,
        program: fx.GraphModule,
        *,
        optimized: bool = True,
    ) -> None:
        self.plan = plan(program, integer=optimized)
        self.runtime = load([f"{site}_quantized" for site in self.plan.sites])
        self.unplanned = self.runtime.unplanned(self.plan)
        self.weights = {site: _of_weight(site, found) for site, found in differing_weights(model, program).items()}
        self.optimized, self.samples = optimized, 0
        self.per_node = dict.fromkeys(self.plan.sites, Agreement())
        self.end_to_end = dict.fromkeys(self.plan.sites, Agreement())
        self.outputs = [_OutputTally() for _ in self.runtime.output_names]

    def add(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One batch on both sides; the reference's outputs, end to end, none for no samples."""
        names = self.runtime.input_names
        if len(inputs) != len(names):
            raise DataError(
                f"a batch holds {len(inputs)} tensors, the model has {len(names)} inputs: {', '.join(names)}"
            )
        samples = len(inputs[0])
        size = min(samples, LARGEST_BATCH) if self.plan.program.meta["dynamic_batch"] else samples
        if not samples:
            return ()
        self.samples += samples
        parts = [self._compare(part) for part in zip(*(torch.split(x, size) for x in inputs), strict=True)]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def _compare(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs, taps = self.runtime.run(inputs)
        theirs = dict(zip(self.plan.sites, taps, strict=True))
        codes, ours = run(self.plan, inputs)
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
        return ours

    def report(self) -> ParityReport:
        """What all batches together say."""
        if not self.samples:
            raise DataError("no batch to compare runtime and reference on: a proof needs at least one sample")
        weights = (SiteParity(site, WEIGHT, "", found, found) for site, found in self.weights.items())
        sites = (*weights, *(self._site(site) for site in self.plan.sites))
        same = not self.runtime.kernel_rate
        outputs = tuple(
            OutputParity(name, exact and same, t.identical, t.per_node_identical, t.max_abs, t.relative)
            for name, exact, t in zip(self.runtime.output_names, self.plan.exact_outputs, self.outputs, strict=True)
        )
        return ParityReport(self.optimized, self.samples, sites, outputs, self.unplanned, self.runtime.name)

    def _site(self, site: str) -> SiteParity:
        step = self.plan.by_site[site]
        rate = legal_rate(step.kernel, self.plan.container_bits[site], self.runtime.kernel_rate)
        return SiteParity(site, step.kernel, step.reason, self.per_node[site], self.end_to_end[site], rate)


def legal_rate(kernel: str, bits: int = 8, of_kernels: float = 0.0) -> float:
    """Share of the codes of a site that may be one step off: behind float operators, or where kernels may as well.

    bits: of the container of the codes.
    """
    return max(FLOAT_RATE if kernel == FLOAT else 0.0, of_kernels) * 2.0 ** (bits - 8)


def unplanned(model: Source, plan: KernelPlan) -> dict[str, int]:
    """Kernels on codes that the runtime executes, all optimisations on, minus those of the plan, where they differ."""
    executed = Counter(node.op_type for node in Model.of(model).optimized.proto.graph.node)
    return {name: executed[name] - count for name, count in plan.counts.items() if executed[name] != count}


def _of_weight(site: str, distance: Tensor | None) -> Agreement:
    if distance is None:
        raise ParityError(
            f"the file does not hold the codes of {site!r} in the shape that the reference has: it belongs to another "
            "program; emit it again."
        )
    return Agreement(distance.numel(), int(distance.count_nonzero()), int(distance.max()))


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
    alike = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return alike and ours.numpy().tobytes() == theirs.numpy().tobytes()


def largest_finite(x: Tensor) -> float:
    """Largest absolute value, infinities and NaN left out."""
    return float(x.double().abs().where(x.isfinite(), 0.0).max())


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of two tensors; infinite where shapes differ, or one is finite and the other is not."""
    if _same_bits(ours, theirs):
        return 0.0
    if ours.shape != theirs.shape:
        return math.inf
    ours, theirs = ours.double(), theirs.double()
    differ = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    largest = float((ours - theirs)[differ].abs().amax()) if bool(differ.any()) else 0.0
    return math.inf if math.isnan(largest) else largest
