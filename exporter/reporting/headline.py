"""The sentence that every reader of the report sees first.

Must not know: pages, files, how anything was measured.
"""

from __future__ import annotations

from typing import Literal

from exporter.reporting.failures import failures
from exporter.reporting.number_format import count, differ
from exporter.reporting.schema import Report
from exporter.reporting.standing import remark
from runtime_tests.parity.results import Level

__all__ = ["headline", "tone", "verdict_title"]


def verdict_title(report: Report) -> str:
    """Return the verdict, and what a pass leaves open: "PASS (exact; accuracy not measured)"."""
    if report.verdict == "fail":
        return "FAIL"
    left_open = remark(report.accuracy_standing, report.accuracy, claimed=report.exported_on is not None)
    return f"PASS ({left_open})" if left_open else "PASS"


def tone(report: Report) -> Literal["pass", "part", "fail"]:
    """Return the colour of the verdict: "part" is a pass that leaves accuracy open."""
    return "part" if report.verdict == "pass" and report.accuracy_standing not in (None, "gated") else report.verdict


def headline(report: Report) -> str:
    """Return one sentence: what was proved, or the first gate that failed."""
    failed = failures(report)
    if not failed:
        return _proof(report.parity.optimized)
    more = f" {len(failed) - 1} more of {len(report.gates)} gates failed." if len(failed) > 1 else ""
    return f"Gate {failed[0].gate.expression} failed: {failed[0].found}.{more}"


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
