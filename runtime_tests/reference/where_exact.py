"""Derive from arithmetic on which processors a file computes the integers of its reference program.

The reference computes as x86 CPUs with VNNI do, for a lowered file in the arithmetic of its target. Another family of
processors computes the same integers in every integer kernel if no sum of two products saturates there, and if no
kernel whose steps it takes in another order gives another code. Both can be decided from the constants of the file,
whatever the inputs are. Float operators round as their library does, so values after them may differ everywhere.

Must not know: what ran where, reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from calibrators.errors import counted
from calibrators.grid.processors import FAMILIES, PROCESSORS, REFERENCE, Processor
from calibrators.grid.target import Target
from runtime_tests.ort.saturation import Saturation
from runtime_tests.reference.kernel_plan import KernelPlan
from runtime_tests.reference.kernel_plan import plan as planned
from runtime_tests.reference.ties import ties_of

__all__ = ["IN_FLOAT", "Holds", "exact_on", "holds_on", "with_proofs"]

RUNTIME: Final = "onnxruntime"
"""The runtime to whose processors calibrators.grid.processors gives arithmetics; onnxruntime-web has them too."""

IN_FLOAT = "values after float operators may differ"


@dataclass(frozen=True)
class Holds:
    """Whether a file computes the calibrated integers on a family of processors, whatever its inputs.

    status:    "proved" by running it there, "follows" from arithmetic, "unknown", or "differs" for some inputs.
    condition: why, and what is left out.
    """

    processor: str
    status: Literal["proved", "follows", "unknown", "differs"]
    condition: str


def holds_on(plan: KernelPlan, saturation: Saturation, target: Target) -> tuple[Holds, ...]:
    """Return for every family of processors whether the file is exact there, as far as arithmetic decides it.

    saturation: of the file, which need not be the one that the plan expects.
    target:     what runs the file; nothing follows for runtimes whose arithmetic is not known.
    """
    if {*target.exact_on} <= {*PROCESSORS}:
        return tuple(_holds(family, plan, saturation, target) for family in PROCESSORS.values())
    own = planned(plan.program, target, own=True)
    return tuple(
        _holds(FAMILIES[name], plan if name in PROCESSORS else own, saturation, target) for name in target.exact_on
    )


def exact_on(entries: Iterable[Holds]) -> tuple[str, ...]:
    """Return the families on which exactness follows from arithmetic or is proved."""
    return tuple(each.processor for each in entries if each.status in ("follows", "proved"))


def with_proofs(entries: Sequence[Holds], proved: Mapping[str, str], refuted: Mapping[str, str]) -> tuple[Holds, ...]:
    """Return the entries with what running the file has shown.

    A proof on samples says nothing about other inputs, so that it leaves an entry that differs as it is.

    proved:  by family, in what the file ran there without a difference beyond what float operators explain.
    refuted: by family, in what it differed by more.
    """

    def proof(entry: Holds) -> Holds:
        if entry.status == "differs" or entry.processor not in {**proved, **refuted}:
            return entry
        if entry.processor in refuted:
            return replace(
                entry, status="differs", condition=f"codes or outputs differed in {refuted[entry.processor]}"
            )
        why = "" if entry.status == "unknown" else f"; {entry.condition}"
        return replace(entry, status="proved", condition=f"in {proved[entry.processor]}{why}")

    return tuple(map(proof, entries))


def _holds(family: Processor, plan: KernelPlan, saturation: Saturation, target: Target) -> Holds:
    if target.runtime != RUNTIME and target.runtime not in target.exact_on:
        return Holds(family.name, "unknown", f"the arithmetic of {target.runtime} is not known")
    if found := _differs(family, plan, saturation, target):
        return Holds(family.name, "differs", found)
    condition = "the reference has its arithmetic"
    if family.pair_sum is not None and saturation.checked:
        layers = counted(saturation.checked, "layer")
        condition = f"no pair of weights saturates in any of {layers}, and no tie rounds otherwise"
    elif family.name not in (REFERENCE, target.arithmetic):
        condition = "no tie rounds otherwise"
    if family.name not in PROCESSORS:
        condition = f"{condition}; inputs next to ties may be quantized one step off"
    return Holds(family.name, "follows", condition if _is_all_integer(plan) else f"{condition}; {IN_FLOAT}")


def _differs(family: Processor, plan: KernelPlan, saturation: Saturation, target: Target) -> str:
    """Return why a family computes other codes for some inputs, '' if it does not."""
    layers, reasons = saturation.layers, []
    if family.pair_sum is not None and layers:
        reasons.append(f"pairs of weights can saturate in {counted(len(layers), 'layer')}, first in {layers[0].name}")
    if family.name != target.arithmetic and (tied := ties_of(plan, (REFERENCE, family.name))):
        first, kernels = tied[0], counted(len(tied), "kernel")
        reasons.append(
            f"ties round otherwise in {kernels}, first for {first.differing:,} of {first.total:,} sets of codes "
            f"at {first.site}"
        )
    return ", and ".join(reasons)


def _is_all_integer(plan: KernelPlan) -> bool:
    """Return whether integer kernels alone compute everything from the inputs to the outputs."""
    computed = (step for step in plan.steps if step.op.op == "call_function")
    return all(step.is_integer for step in computed) and all(plan.exact_outputs)
