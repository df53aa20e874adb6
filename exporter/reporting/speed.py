"""Latency in words, which the terminal, the page and the warnings share. A time that was measured badly is no headline.

Must not know: pages, how times are measured.
"""

from __future__ import annotations

from typing import Final

from calibrators.errors import counted
from calibrators.grid.target import Target
from calibrators.targets import list_targets
from exporter.reporting.number_format import compared, percent, significant
from runtime_tests.measure.latency import LONGEST_S, Latency

__all__ = ["TIMED_IN", "is_slower", "latency_text", "other_runtime", "speed"]

TIMED_IN: Final = "onnxruntime"
"""Runtime whose times a report holds, whatever the target: figures of other runtimes cannot be had from them."""

NOISE: Final = 0.05
"""Share by which latencies may differ before one of them is called slower."""


def other_runtime(target: str) -> Target | None:
    """Return a target whose files another runtime executes; None for others, and for unknown names."""
    found = {each.name: each for each in list_targets() if each.runtime != TIMED_IN}
    return found.get(target)


def latency_text(latency: Latency) -> str:
    """Return the time of the quantized model with its interval, and how it compares with the float model."""
    interval = ""
    if latency.interval is not None:
        low, high = (significant(end, 3) for end in latency.interval["quantized"])
        interval = f" ({low} to {high})"
    runs = f"{counted(latency.runs, 'run')}{_limit(latency)}"
    headline, detail = speed(latency)
    return f"{significant(latency.quantized, 3)} ms{interval} in {runs}, {headline}{f' ({detail})' if detail else ''}"


def _limit(latency: Latency) -> str:
    """Return by which limit the measurement ended, '' if its intervals were tight before."""
    return {"runs": " (the limit)", "time": f" (the limit of {LONGEST_S:g} s)"}.get(latency.stopped or "", "")


def speed(latency: Latency) -> tuple[str, str]:
    """Return how many times faster or slower than the float model the file is, and the interval.

    Where that is not known, return why.
    """
    if latency.reliable is False:
        spread = percent(latency.spread, 0)
        return "unreliable", f"half of the times spread over {spread} of the median; measure on an idle machine"
    text = f"{compared(1, latency.ratio, 'faster', 'slower')} than float"
    if latency.ratio_interval is None:
        return text, ""
    low, high = latency.ratio_interval
    if low <= 1 <= high:
        return "as fast as float", f"{1 / high:.2f}x to {1 / low:.2f}x"
    ends = sorted((low, high) if low > 1 else (1 / low, 1 / high))
    return text, f"{ends[0]:.2f}x to {ends[1]:.2f}x"


def is_slower(latency: Latency) -> bool:
    """Return whether the file is slower than the float model by more than noise."""
    if latency.reliable is False or latency.ratio is None:
        return False
    low = latency.ratio if latency.ratio_interval is None else latency.ratio_interval[0]
    return low > 1 and latency.ratio > 1 / (1 - NOISE)
