"""Warnings that follow from the numbers of a report.

Must not know: files, graphs, how a number was measured, pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from calibrators.errors import counted
from exporter.reporting.number_format import compared, percent
from exporter.reporting.schema import Report
from exporter.reporting.speed import is_slower, other_runtime, speed

__all__ = ["cautions"]


def cautions(report: Report) -> Iterator[str]:
    """Yield what the numbers of a report say against its file, one sentence each."""
    if other_runtime(report.target) is None and report.latency_ms is not None and is_slower(report.latency_ms):
        yield f"the file is {speed(report.latency_ms)[0]}{_slowest(report)}"
    if report.size.bytes > report.size.float_bytes:
        larger = compared(report.size.float_bytes, report.size.bytes, "smaller", "larger")
        yield f"the file is {larger} than the float model: its quantizers outweigh what 8-bit weights save"
    if report.coverage.uncounted:
        yield f"multiply-accumulates that cannot be counted: {', '.join(report.coverage.uncounted)}"
    if report.saturation is not None and report.saturation.affected_here:
        layers = counted(len(report.saturation.layers), "layer")
        yield f"sums of two products can saturate on this processor in {layers}"
    found = [finding for finding in report.lint or () if finding.severity == "warning"]
    for rule, times in Counter(finding.rule for finding in found).items():
        first = next(finding for finding in found if finding.rule == rule)
        more = f", and in {counted(times - 1, 'more place')}" if times > 1 else ""
        yield f"lint, {rule}: {first.message} (at {first.where}{more})"


NOTABLE = 0.01
"""Share of the time below which quantizers explain nothing."""


def _slowest(report: Report) -> str:
    """Name what makes a file slow: the integer kernels if they alone do, else what takes most of the other time."""
    shares, latency = report.time_shares, report.latency_ms
    if shares is None:
        return ""
    ratio = latency.ratio if latency is not None else None
    if ratio is not None and shares.integer * ratio > 1:
        alone = f"its integer kernels alone, {percent(shares.integer, 0)} of its time,"
        return f": {alone} take longer than the float model"
    if not shares.slowest and shares.quantizers < NOTABLE:
        return ""
    if not shares.slowest or shares.slowest[0].share < shares.quantizers:
        return f": quantizers take {percent(shares.quantizers, 0)} of its time"
    first = shares.slowest[0]
    return f": {first.op} takes {percent(first.share, 0)} of its time in float ({first.advice})"
