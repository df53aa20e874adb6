"""Compare a runtime with the reference program at every quantized value, code by code.

There are two comparisons. *End to end* both sides start from the same input and run to the end. *Per node* the
reference reads the runtime's own codes, so that a difference belongs to the kernel at which it shows. Where all
nodes agree, both sides agree end to end. The second comparison decides; it runs only if the first finds a difference.

The graph that the runtime executes is also compared with the plan: an operator that should run on integers but does
not, or the other way round, is reported even if its numbers agree.

Integer kernels must agree in every code. Float operators between dequantize and quantize are computed by other code on
the two sides; they may differ by one code at the rare values next to a tie. Equal values, as those of padded or
repeated tokens, count once for that: they stand next to the same tie. Weights and biases are compared as the file
holds them.

Must not know: how the model was made, accuracy, reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.errors import DataError
from calibrators.graph.aten import bind
from calibrators.graph.magnitude import magnitudes
from runtime_tests.ort.onnx_operators import DEQUANTIZE
from runtime_tests.ort.sessions import Model, Source
from runtime_tests.parity.probes import choices_of, codes_of, results_of
from runtime_tests.parity.results import (
    FLOAT_OUTPUT_ERROR,
    Agreement,
    Level,
    NodeParity,
    OutputParity,
    ParityError,
    legal_rate,
)
from runtime_tests.parity.stored_constants import stored_constants
from runtime_tests.reference.execute import FLOAT, KernelPlan, floats_of, gap_of, rounded_in, run
from runtime_tests.reference.kernel_rules import is_weight_only
from runtime_tests.workers.runtime import Loaded

__all__ = [
    "Comparison",
    "distance",
    "largest_finite",
    "unplanned_kernels",
    "weight_agreements",
]


def unplanned_kernels(executed: Mapping[str, int] | None, plan: KernelPlan) -> dict[str, int] | None:
    """Count the integer kernels that run, minus those of the plan, where the two differ; None where that is unknown.

    executed: number of nodes by operator.
    """
    if executed is None:
        return None
    found = ((name, executed.get(name, 0) - count) for name, count in plan.counts.items())
    return {name: difference for name, difference in found if difference}


@dataclass
class _OutputTally:
    identical: bool = True
    per_node_identical: bool = True
    max_abs: float = 0.0
    relative: float = 0.0

    def add(self, ours: Tensor, per_node: Tensor, theirs: Tensor, scale: Callable[[], float] = lambda: 0.0) -> None:
        """Add an output; scale: returns the magnitude of what it is made of, for one that is small beside that."""
        self.identical &= _same_bits(ours, theirs)
        self.per_node_identical &= _same_bits(per_node, theirs)
        self.max_abs = max(self.max_abs, distance(ours, theirs))
        difference = distance(per_node, theirs)
        if difference:
            largest = largest_finite(theirs)
            if difference > FLOAT_OUTPUT_ERROR * largest:
                largest = max(largest, scale())
            self.relative = max(self.relative, difference / largest if largest > 0 else math.inf)

    def include(self, other: _OutputTally) -> None:
        """Add what was found on other samples."""
        self.identical &= other.identical
        self.per_node_identical &= other.per_node_identical
        self.max_abs, self.relative = max(self.max_abs, other.max_abs), max(self.relative, other.relative)


class Comparison:
    """Running totals of one runtime at one optimization level.

    start:   loads the file into a runtime, with some of its values as probes.
    model:   the file.
    exact:   whether the kernels of the runtime compute the bits of the reference.
    plan:    the reference: integer kernels, or QDQ taken literally.
    weights: agreement of weights and biases with the reference, by site.
    """

    def __init__(
        self,
        start: Callable[[Sequence[str]], Loaded],
        model: Model,
        plan: KernelPlan,
        weights: Mapping[str, Agreement],
        *,
        exact: bool = True,
    ) -> None:
        self.plan, self.weights = plan, weights
        self.results = results_of(model, plan) if exact else {}
        self.choices = choices_of(model, plan) if exact else {}
        outputs = {value.name for value in model.proto.graph.output}
        named = codes_of(plan) | self.results | self.choices
        self.probes = {key: name for key, name in named.items() if name not in outputs}
        self.given = {key: name for key, name in named.items() if name in outputs}
        self.runtime = runtime = start([*self.probes.values()])
        self.unplanned = unplanned_kernels(runtime.executed(), plan)
        self.samples = 0
        self.per_node = dict.fromkeys([*plan.sites, *self.results, *self.choices], Agreement(0, 0, 0))
        self.distinct = dict.fromkeys(plan.sites, Agreement(0, 0, 0))  # per node too, equal floats counted once
        self.end_to_end = dict.fromkeys(plan.sites, Agreement(0, 0, 0))
        self.outputs = [_OutputTally() for _ in runtime.output_names]

    def add(self, inputs: tuple[Tensor, ...], codes: Mapping[str, Tensor], ours: tuple[Tensor, ...]) -> None:
        """Run a batch and compare it with the codes and outputs of the reference."""
        self.samples += len(inputs[0])
        outputs, probes = self.runtime.run([x.numpy(force=True) for x in inputs])
        theirs = {name: torch.from_numpy(probe) for name, probe in zip(self.probes, probes, strict=True)}
        by_name = dict(zip(self.runtime.output_names, outputs, strict=True))
        theirs |= {key: torch.from_numpy(by_name[name]) for key, name in self.given.items()}
        end_to_end = {site: _agreement(site, codes[site], theirs[site]) for site in self.plan.sites}
        per_node, ours_per_node = end_to_end, ours
        chooses_alike = all(torch.equal(codes[key], theirs[key]) for key in self.choices)
        if not chooses_alike or any(agreement.mismatched for agreement in end_to_end.values()):
            codes, ours_per_node = run(self.plan, inputs, theirs, with_floats=True)
            per_node = {site: _agreement(site, codes[site], theirs[site]) for site in self.plan.sites}
        for site in self.plan.sites:
            self.end_to_end[site] += end_to_end[site]
            self.per_node[site] += per_node[site]
            distinct = per_node[site]
            if distinct.mismatched and rounded_in(site) in codes:
                distinct = _distinct(distinct, codes[rounded_in(site)], codes[site] != theirs[site])
            self.distinct[site] += distinct
        for name in self.results:
            self.per_node[name] += _agreement_of_floats(name, codes[name], theirs[name])
        for name in self.choices:
            self.per_node[name] += _agreement_of_choices(theirs[name], codes.get(gap_of(name)))
        scales = cache(partial(magnitudes, self.plan.program, inputs))
        for index, tally in enumerate(self.outputs):
            found = torch.from_numpy(outputs[index])
            tally.add(ours[index], ours_per_node[index], found, lambda index=index: scales()[index])  # type: ignore[misc]

    @property
    def counts(self) -> dict[str, Any]:
        """The counts, for `include`."""
        return {name: vars(self)[name] for name in ("samples", "per_node", "distinct", "end_to_end", "outputs")}

    def include(self, counts: Mapping[str, Any]) -> None:
        """Add what another process counted on other samples."""
        self.samples += counts["samples"]
        for name in ("per_node", "distinct", "end_to_end"):
            for site, agreement in counts[name].items():
                vars(self)[name][site] += agreement
        for tally, other in zip(self.outputs, counts["outputs"], strict=True):
            tally.include(other)

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
                *map(self._result, self.results),
                *map(self._choice, self.choices),
            ],
            "outputs": [
                OutputParity.of(
                    name,
                    exact=exact and not self.runtime.kernel_rate,
                    factor=self.runtime.float_factor,
                    **asdict(tally),
                )
                for name, exact, tally in outputs
            ],
            "samples": self.samples,
            "unplanned": self.unplanned,
            "runtime": self.runtime.name,
            "optimized": self.plan.integer,
        }

    def _node(self, site: str) -> NodeParity:
        step = self.plan.by_site[site]
        depth = self.plan.depths[site]
        rate = legal_rate(step.kernel, self.plan.container_bits[site], self.runtime.kernel_rate, depth)
        judged = partial(
            NodeParity.of, site, step.kernel, end_to_end=self.end_to_end[site], reason=step.reason, rate=rate
        )
        node = judged(self.per_node[site])
        return replace(node, legal=node.legal or judged(self.distinct[site]).legal)

    def _result(self, name: str) -> NodeParity:
        """Judge floats of an integer kernel, of which nothing travels that codes do not show."""
        kernel = next(step.kernel for step in self.plan.steps if not step.quantized and floats_of(step.site) == name)
        found = self.per_node[name]
        return NodeParity.of(self.results[name], kernel, found, found)

    def _choice(self, name: str) -> NodeParity:
        """Judge indices by their scores."""
        found = self.per_node[name]
        return NodeParity.of(self.choices[name], FLOAT, found, found, reason="chooses by floats")


def weight_agreements(model: Source, program: fx.GraphModule) -> dict[str, Agreement]:
    """Compare weights and biases as the file holds them, by site: those of float kernels, and others that differ.

    raises: ParityError for one that the file lacks.
    """
    of_float_kernels = {bind(bind(node)["weight"])["site"] for node in program.graph.nodes if is_weight_only(node)}
    found = {}
    for site, agreement in stored_constants(model, program).items():
        if agreement is None:
            raise ParityError(
                f"the file does not hold the codes of {site!r} in the shape that they have in the reference, so it "
                "belongs to another program; emit it again."
            )
        if agreement.mismatched or site in of_float_kernels:
            found[site] = agreement
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


def _distinct(found: Agreement, floats: Tensor, different: Tensor) -> Agreement:
    """Return an agreement that counts equal floats once, for the floats that were rounded and where codes differ."""
    values, mismatched = (torch.unique(each).numel() for each in (floats, floats[different]))
    return Agreement(values, mismatched, found.max_lsb)


def _agreement_of_floats(name: str, ours: Tensor, theirs: Tensor) -> Agreement:
    """Compare floats bit by bit; a step is a unit in the last place. The file may hold them in another shape."""
    if ours.numel() != theirs.numel() or ours.dtype != theirs.dtype:
        raise ParityError(
            f"the {name} are {theirs.dtype} {list(theirs.shape)} in the runtime and {ours.dtype} "
            f"{list(ours.shape)} in the reference, so the file belongs to another program; emit it again."
        )
    steps = (ours.flatten().view(torch.int32).long() - theirs.flatten().view(torch.int32)).abs()
    return Agreement(ours.numel(), int(steps.count_nonzero()), int(steps.max()))


def _agreement_of_choices(theirs: Tensor, gaps: Tensor | None) -> Agreement:
    """Count the indices whose scores are worse than roundings explain; none where both sides chose the same."""
    worse = 0 if gaps is None else int((gaps > FLOAT_OUTPUT_ERROR).sum())
    return Agreement(theirs.numel(), worse, int(worse > 0))


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
