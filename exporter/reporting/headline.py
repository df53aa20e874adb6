"""Sentences that the report's readers share: what was proved, why a gate failed, which kernels were not planned.

Must not know: pages, files, how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from exporter.reporting.number_format import count, differ, significant
from exporter.reporting.proofs import UNPROVED, not_proved
from exporter.reporting.schema import GateResult, Report
from exporter.reporting.where import INEXACT, not_exact_here
from runtime_tests.parity.results import Level

__all__ = ["failure", "headline", "unplanned_kernels"]


def headline(report: Report) -> str:
    """Return one sentence: what was proved, or the first gate that failed."""
    failed = [gate for gate in report.gates if not gate.passed]
    if not failed:
        return _proof(report.parity.optimized)
    more = f" {len(failed) - 1} more of {len(report.gates)} gates failed." if len(failed) > 1 else ""
    return f"{failure(failed[0], report)}.{more}"


def _proof(level: Level) -> str:
    if not level.values:
        return "No value was compared."
    if not level.mismatched:
        outputs = ", and the outputs are identical bit for bit" if level.outputs_identical else ""
        return f"All {count(level.values)} integers in the runtime equal those of the calibrated model{outputs}."
    steps = "1 step" if level.max_lsb == 1 else f"{count(level.max_lsb)} steps"
    end_to_end = f"End to end, {differ(level)} integers differ, by at most {steps}."
    if not level.kernel_mismatched:
        return f"From its own inputs, every integer kernel computes the codes of the calibrated model. {end_to_end}"
    return end_to_end


def failure(gate: GateResult, report: Report) -> str:
    """Return which gate failed, and why or what was measured."""
    reasons = {
        INEXACT: not_exact_here(report.holds or (), report.environment.processor if report.environment else None),
        UNPROVED: not_proved(report.proved_on or ()),
    }
    found = "it was not measured" if gate.value is None else f"it is {significant(gate.value, 6)}"
    return f"Gate {gate.expression} failed: {reasons.get(gate.name) or found}"


def unplanned_kernels(found: Mapping[str, int]) -> str:
    """Name the differences from the plan: {"QLinearConv": -1} -> 1 QLinearConv fewer than planned."""
    return ", ".join(f"{abs(n)} {name} {'more' if n > 0 else 'fewer'} than planned" for name, n in found.items())
