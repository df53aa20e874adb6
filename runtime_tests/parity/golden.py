"""State how far the outputs of other correct runtimes may lie from the golden ones.

Integer kernels compute the same codes everywhere. Float operators do not: their last bits differ between libraries and
processors, so that rare codes after them are one step off, and all that follows differs a little. The tolerance is
measured: the reference runs again and again while some codes after each float operator, taken at random, are one step
off, as many as the proof allows. What onnxruntime makes of the golden inputs here, with optimizations on and off, is
measured too. The tolerance is MARGIN times the largest of all these differences, and what the last bits of a float
output may differ by.

Must not know: bundles, reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from calibrators.graph.aten import layer_name, outputs_of
from calibrators.program.qdq_program import QUANTIZE
from runtime_tests.ort.sessions import Source, session
from runtime_tests.ort.sessions import run as run_session
from runtime_tests.parity.compare import distance, largest_finite
from runtime_tests.parity.probes import codes_of
from runtime_tests.parity.results import FLOAT_OUTPUT_ERROR, legal_rate
from runtime_tests.reference.execute import FLOAT, KernelPlan, run
from runtime_tests.reference.kernel_plan import site_of
from runtime_tests.reference.kernel_rules import output_grid
from runtime_tests.reference.ties import ties_of

__all__ = ["GoldenOutput", "GoldenValue", "golden_outputs", "golden_values", "within"]

RUNS = 16
"""Runs of the reference with codes that are one step off."""

MARGIN = 2.0
"""The tolerance over the largest difference that was measured."""

SEED = 0

GoldenSet = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Inputs of one size, and the reference's outputs."""


@dataclass(frozen=True)
class GoldenOutput:
    """One output of the golden sets.

    tolerance: largest legal difference from it, absolute; 0: the bits are the same in every correct runtime.
    measured:  largest difference that was measured.
    largest:   largest value of the output.
    """

    name: str
    tolerance: float
    measured: float
    largest: float


@dataclass(frozen=True, eq=False)
class GoldenValue:
    """The codes of a quantized value for the golden inputs.

    name:   of the codes in the file; layer: the module that computes them; kernel: the operator that writes them.
    codes:  in their container dtype; scale, zero_point: of the value that they stand for.
    exact:  whether every correct runtime computes these codes: no float operator and no tie comes before.
    """

    name: str
    layer: str
    kernel: str
    codes: Tensor
    scale: float
    zero_point: int
    exact: bool


def golden_values(plan: KernelPlan, codes: Mapping[str, Tensor], *, processors: Iterable[str]) -> list[GoldenValue]:
    """Return the codes of every quantized value, in the order in which they are computed.

    codes: of the reference for the golden inputs, by site; plan, processors: as of `golden_outputs`.
    """
    unsure, names = _unsure_sites(plan, processors), codes_of(plan)
    found = []
    for node in plan.program.graph.nodes:
        if node.target is QUANTIZE:
            site, grid = site_of(node), output_grid(plan.program, node)
            exact = not unsure & _sites_before(node)
            step = plan.by_site[site]
            where = names[site], layer_name(step.op), step.kernel
            found.append(GoldenValue(*where, codes[site], float(grid.scale), grid.zero_point, exact))
    return found


def golden_outputs(
    model: Source, plan: KernelPlan, sets: Sequence[GoldenSet], *, processors: Iterable[str]
) -> tuple[GoldenOutput, ...]:
    """Return the tolerance of each output of the reference on the golden inputs.

    plan:       the integer kernels of the program.
    sets:       inputs, and the outputs of the reference in the order of the program's.
    processors: families (calibrators.grid.processors) for which the file is made.
    """
    names, unsure = plan.program.meta["output_names"], _unsure_sites(plan, processors)
    identical = [_is_identical(plan, index, unsure) for index in range(len(names))]
    others = [
        [] if all(identical) else [*_disturbed(plan, inputs, unsure), *_in_onnxruntime(model, inputs)]
        for inputs, _ in sets
    ]
    found = []
    for index, name in enumerate(names):
        pairs = [
            (outputs[index], other[index]) for (_, outputs), runs in zip(sets, others, strict=True) for other in runs
        ]
        largest = max(largest_finite(outputs[index]) for _, outputs in sets)
        measured = 0.0 if identical[index] else max(distance(*pair) for pair in pairs)
        is_float = sets[0][1][index].is_floating_point()
        rounding = FLOAT_OUTPUT_ERROR * largest if is_float else 0.0
        allowed = 0.0 if identical[index] else _rounded_up(MARGIN * measured + rounding)
        found.append(GoldenOutput(name, allowed, measured, largest))
    return tuple(found)


def within(golden: GoldenOutput, expected: Tensor, found: Tensor) -> bool:
    """Return whether an output lies within the tolerance of the golden one."""
    return distance(expected, found) <= golden.tolerance


def _rounded_up(value: float) -> float:
    """Return the next number with two significant digits."""
    if not 0 < value < math.inf:
        return value
    exponent = math.floor(math.log10(value)) - 1
    return float(f"{math.ceil(value / 10.0**exponent)}e{exponent}")


def _unsure_sites(plan: KernelPlan, processors: Iterable[str]) -> frozenset[str]:
    """Return the sites whose codes may be one step off elsewhere: after float operators, and at ties that are left."""
    floats = {step.site for step in plan.steps if step.kernel == FLOAT and step.quantized}
    return frozenset(floats | {tie.site for tie in ties_of(plan, processors)})


def _is_identical(plan: KernelPlan, index: int, unsure: frozenset[str]) -> bool:
    """Return whether integer kernels alone compute an output."""
    return plan.exact_outputs[index] and not unsure & _sites_before(outputs_of(plan.program)[index])


def _sites_before(node: fx.Node) -> set[str]:
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return {site_of(each) for each in seen if each.target is QUANTIZE}


def _disturbed(plan: KernelPlan, inputs: Sequence[Tensor], unsure: frozenset[str]) -> list[Sequence[Tensor]]:
    """Return the outputs of runs in which codes of the unsure sites are one step off."""
    generator = torch.Generator().manual_seed(SEED)

    def disturb(site: str, codes: Tensor) -> Tensor:
        if site not in unsure:
            return codes
        count = max(1, round(legal_rate(FLOAT, plan.container_bits[site], depth=plan.depths[site]) * codes.numel()))
        places = torch.randint(codes.numel(), (count,), generator=generator)
        steps = 2 * torch.randint(2, (count,), generator=generator, dtype=torch.int32) - 1
        limits, flat = torch.iinfo(codes.dtype), codes.flatten().to(torch.int32)
        flat[places] = (flat[places] + steps).clamp(limits.min, limits.max)
        return flat.reshape(codes.shape).to(codes.dtype)

    return [run(plan, inputs, disturb=disturb)[1] for _ in range(RUNS)]


def _in_onnxruntime(model: Source, inputs: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return the outputs of onnxruntime with optimizations on and off."""
    found: list[Sequence[Tensor]] = []
    for optimized in (True, False):
        runtime = session(model, optimized=optimized)
        names = [info.name for info in runtime.get_inputs()]
        feeds = {name: x.numpy(force=True) for name, x in zip(names, inputs, strict=True)}
        found.append([torch.from_numpy(y) for y in run_session(runtime, None, feeds)])
    return found
