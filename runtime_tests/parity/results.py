"""The results of comparing a runtime with the reference program, which are the "parity" part of report.json.

Must not know: how codes are computed and compared, runtimes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from calibrators.errors import IntactError
from runtime_tests.reference.execute import FLOAT

__all__ = [
    "FLOAT_OUTPUT_ERROR",
    "Agreement",
    "Level",
    "NodeParity",
    "OutputParity",
    "Parity",
    "ParityError",
    "ProvedOn",
    "SecondLevel",
    "legal_rate",
    "unplanned_text",
]

FLOAT_LSB = 1
"""Largest legal step after a float operator: two correctly computed floats may lie on the two sides of a tie."""

FLOAT_RATE = 1e-4
"""Largest legal share of such values, per site of 8 bits. Float32 results that differ in their last bits fall on two
sides of a tie in up to 2e-5 of the values; integer sums computed in float32 (optimizations off) did so in 1e-6 to 3e-5.
A finer grid over the same range has proportionally more ties: 256 times at 16 bits, where up to 2e-3 were seen."""

FLOAT_DEPTH = 16
"""Number of float operators, one after the other, up to which FLOAT_RATE holds; longer rows round proportionally more.
A bidirectional GRU over 40 steps, some 400 operators, put 1.4e-3 of its values on the other side of a tie."""

ONE_ROUNDING = 0.25
"""Largest share of the codes of a Concat that move by a step in a runtime that rounds once what the reference rounds
twice. In steps of the result, codes of the scale r <= 1 are up to r / 2 from the values of the layer that wrote them.
That crosses a tie with a probability of r / 4: the HTP simulator moved 22.2 % of the codes at r = 0.864."""

FLOAT_CHANCE = 4
"""Number of differences allowed at any site, because a small tensor may hold a rare tie by chance."""

FLOAT_OUTPUT_ERROR = 1e-4
"""Largest legal difference of a float output, relative to its largest value, or to the terms that make it where they
cancel: some hundred roundings of float32."""

WORST = 5
"""Number of sites that a summary names."""


class ParityError(IntactError):
    """The runtime computes something else than the reference program."""

    exit_code = 1


@dataclass(frozen=True)
class Agreement:
    """Number of codes that were compared and that differ, and the largest difference in steps."""

    values: int
    mismatched: int
    max_lsb: int

    @classmethod
    def total(cls, parts: Iterable[Agreement]) -> Agreement:
        """Return the agreement of all values of the parts."""
        return sum(parts, cls(0, 0, 0))

    def __add__(self, other: Agreement) -> Agreement:
        worst = max(self.max_lsb, other.max_lsb)
        return Agreement(self.values + other.values, self.mismatched + other.mismatched, worst)


def legal_rate(kernel: str, bits: int = 8, of_kernels: float = 0.0, depth: int = 1) -> float:
    """Return the share of a site's codes that may be one step off: after float operators, or after kernels.

    bits: of the container of the codes; of_kernels: legal share after integer kernels; depth: number of float
    operators, one after the other, before the codes.
    """
    if of_kernels and kernel == "QLinearConcat":
        of_kernels += ONE_ROUNDING
    of_floats = FLOAT_RATE * max(1.0, depth / FLOAT_DEPTH) if kernel == FLOAT else 0.0
    return max(of_floats, of_kernels) * 2.0 ** (bits - 8)


def unplanned_text(unplanned: Mapping[str, int]) -> str:
    """Return the kernels that a runtime executes minus those planned, in words."""
    return ", ".join(f"{abs(n)} {'more' if n > 0 else 'fewer'} {name}" for name, n in unplanned.items())


@dataclass(frozen=True, kw_only=True)
class NodeParity(Agreement):
    """One quantized value, compared from the runtime's own input codes, so that no error travels.

    kernel:     the runtime's operator that writes the value, "float" for float arithmetic.
    reason:     why the value is computed in float.
    rate:       legal share of codes that are one step off; 0: none may differ.
    legal:      whether its differences are allowed: none in an integer kernel, rare single steps after float operators.
    end_to_end: the same value with the errors that travelled through the network.
    """

    site: str
    kernel: str
    reason: str
    legal: bool
    rate: float = 0.0
    end_to_end: Agreement

    @classmethod
    def of(
        cls, site: str, kernel: str, found: Agreement, end_to_end: Agreement, *, reason: str = "", rate: float = 0.0
    ) -> NodeParity:
        """Judge the codes found at a site."""
        legal = found.mismatched == 0
        if rate:
            legal = found.max_lsb <= FLOAT_LSB and found.mismatched <= FLOAT_CHANCE + rate * found.values
        counts = found.values, found.mismatched, found.max_lsb
        return cls(*counts, site=site, kernel=kernel, legal=legal, reason=reason, rate=rate, end_to_end=end_to_end)

    @property
    def is_integer(self) -> bool:
        """Whether an integer kernel computed the value, so that no difference is allowed."""
        return not self.kernel.lower().startswith(FLOAT)


@dataclass(frozen=True)
class OutputParity:
    """One float output of the network.

    exact:              whether an integer kernel writes it, so that its bits must agree.
    identical:          whether its bits agree end to end.
    per_node_identical: whether its bits agree, computed from the runtime's own codes.
    max_abs:            largest difference end to end.
    relative:           largest difference, computed from the runtime's own codes, as a share of the largest value,
                        or of the largest sum of absolute terms (calibrators.graph.magnitude) where terms cancel.
    """

    name: str
    exact: bool
    legal: bool
    identical: bool
    per_node_identical: bool
    max_abs: float | None
    relative: float | None

    @classmethod
    def of(cls, name: str, *, exact: bool, factor: float = 1.0, **found: Any) -> OutputParity:
        """Judge an output: its bits where it is exact, else its relative difference.

        factor: of FLOAT_OUTPUT_ERROR; found: the remaining fields.
        """
        legal = found["per_node_identical"] if exact else found["relative"] <= factor * FLOAT_OUTPUT_ERROR
        return cls(name, exact=exact, legal=legal, **found)


@dataclass(frozen=True, kw_only=True)
class Level(Agreement):
    """Everything that was compared in one runtime at one optimization level; its counts are those end to end.

    forced:            counts of the comparison of every node from the runtime's own input codes.
    outputs_identical: whether the bits of all outputs agree end to end.
    violations:        number of sites and outputs that differ by more than is legal, computed from the same inputs.
    unplanned:         integer kernels executed minus planned, by operator, where they differ; left out without a plan.
    kernel_*, float_*: the counts of `forced` for integer kernels and for float arithmetic.
    kernels:           number of sites by the kernel that computes them.
    worst:             sites with differences in `forced`: illegal ones first, then by their share.
    nodes:             all sites in the order of computation.
    """

    forced: Agreement
    outputs_identical: bool
    violations: int
    unplanned: dict[str, int] | None = None
    kernel_mismatched: int
    kernel_values: int
    float_mismatched: int
    float_values: int
    samples: int
    kernels: dict[str, int]
    outputs: tuple[OutputParity, ...]
    worst: tuple[NodeParity, ...]
    nodes: tuple[NodeParity, ...]
    runtime: str = "onnxruntime"
    optimized: bool = True

    @classmethod
    def of(
        cls,
        nodes: Iterable[NodeParity],
        outputs: Iterable[OutputParity],
        *,
        samples: int,
        unplanned: Mapping[str, int] | None = None,
        **about: Any,
    ) -> Self:
        """Sum up the results of sites and outputs; about: the remaining fields."""
        nodes, outputs = tuple(nodes), tuple(outputs)
        total = Agreement.total(node.end_to_end for node in nodes)
        integer = Agreement.total(node for node in nodes if node.is_integer)
        floating = Agreement.total(node for node in nodes if not node.is_integer)
        differing = [node for node in nodes if node.mismatched]
        differing.sort(key=lambda node: (node.legal, -node.mismatched / node.values))
        return cls(
            total.values,
            total.mismatched,
            total.max_lsb,
            forced=integer + floating,
            outputs_identical=all(output.identical for output in outputs),
            violations=sum(not node.legal for node in nodes) + sum(not output.legal for output in outputs),
            unplanned=None if unplanned is None else dict(unplanned),
            kernel_mismatched=integer.mismatched,
            kernel_values=integer.values,
            float_mismatched=floating.mismatched,
            float_values=floating.values,
            samples=samples,
            kernels=dict(Counter(node.kernel for node in nodes)),
            outputs=outputs,
            worst=tuple(differing[:WORST]),
            nodes=nodes,
            **about,
        )

    def raise_for_mismatch(self) -> None:
        """Raise ParityError unless every node computes what the reference computes, in the kernel that was planned.

        The error names the first node that does not, and how far off it is.
        """
        level = f"in {self.runtime} with optimizations {'on' if self.optimized else 'off'}"
        illegal = [node for node in self.nodes if not node.legal]
        if illegal:
            first = illegal[0]
            raise ParityError(
                f"{first.mismatched} of {first.values} codes of {first.site!r} ({first.kernel}) differ from the "
                f"reference by up to {first.max_lsb}, computed from the runtime's own input codes, {level}; "
                f"sites affected: {len(illegal)} of {len(self.nodes)}. The file and the program disagree there "
                "(scale, zero point, weight or bias), or this runtime computes otherwise; compare its version and CPU."
            )
        for output in self.outputs:
            if not output.legal:
                raise ParityError(
                    f"output {output.name!r} differs from the reference by {output.relative:.3g} of its largest value "
                    f"{level}, although all codes before it agree; check the operators after {self.nodes[-1].site!r}."
                )
        if self.unplanned:
            raise ParityError(
                f"the runtime executes other kernels than planned: {unplanned_text(self.unplanned)}. Coverage names "
                "operators left in float and why; values that the runtime quantizes by itself were never calibrated."
            )


@dataclass(frozen=True, kw_only=True)
class SecondLevel(Level):
    """OpenVINO, every site compared from its own codes.

    executed:  number of layers of the file as it is deployed, by type and precision ("Convolution u8").
    relative:  largest difference of the outputs of that file from the reference's, as a share of the largest output.
    agreement: share of samples for which the first output, if it is [n, classes], is largest at the same class.
    """

    version: str
    executed: dict[str, int]
    relative: float | None
    agreement: float | None


@dataclass(frozen=True, kw_only=True)
class ProvedOn(Agreement):
    """A runtime in which the file ran and was compared with the reference; its counts are those end to end.

    runtime:            its name, as `intact runtimes` lists it.
    processor:          the family whose kernels it executed.
    flags:              what else decides how it computes: instruction sets, emulator, model of the processor.
    kernel_*, float_*:  counts of integer kernels and of float arithmetic, each value from the runtime's own codes.
    outputs_identical:  whether the bits of all outputs agree end to end.
    largest_difference: largest difference of an output, end to end.
    violations:         number of sites and outputs that differ by more than is legal, computed from the same codes.
    worst:              sites that differ most.
    refused:            why the runtime did not run the file; nothing was compared then.
    """

    runtime: str
    version: str
    processor: str
    flags: tuple[str, ...]
    samples: int
    kernel_values: int
    kernel_mismatched: int
    float_values: int
    float_mismatched: int
    outputs_identical: bool
    largest_difference: float | None
    violations: int
    worst: tuple[NodeParity, ...]
    refused: str | None = None

    @classmethod
    def of(cls, level: Level, **about: Any) -> Self:
        """Sum up a comparison; about: the remaining fields."""
        differences = [output.max_abs for output in level.outputs]
        return cls(
            level.values,
            level.mismatched,
            level.max_lsb,
            samples=level.samples,
            kernel_values=level.kernel_values,
            kernel_mismatched=level.kernel_mismatched,
            float_values=level.float_values,
            float_mismatched=level.float_mismatched,
            outputs_identical=level.outputs_identical and level.samples > 0,
            largest_difference=None if None in differences else max(filter(None, differences), default=0.0),
            violations=level.violations,
            worst=level.worst,
            **about,
        )

    @property
    def is_proved(self) -> bool:
        """Whether the file ran there and differed by no more than is legal."""
        return self.refused is None and not self.violations


@dataclass(frozen=True)
class Parity:
    """The two optimization levels of onnxruntime, and OpenVINO if it was asked for."""

    unoptimized: Level
    optimized: Level
    openvino: SecondLevel | None = None

    def raise_for_mismatch(self) -> None:
        """Raise ParityError, as `Level.raise_for_mismatch`, unless both levels of onnxruntime agree with the reference.

        The integer kernels are checked first.
        """
        self.optimized.raise_for_mismatch()
        self.unoptimized.raise_for_mismatch()
