"""The outcome of a dry run, and its box in the terminal.

Must not know: how anything is found out, the command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields

from rich.markup import escape
from rich.panel import Panel

from calibrators.errors import counted
from exporter.folding.fold_regions import FoldReport
from exporter.reporting.number_format import compared, duration, size
from exporter.reporting.outcome import Boxed
from exporter.reporting.schema import Bits, Times
from exporter.reporting.terminal import box, integer_share, warning_rows
from runtime_tests.measure.size import Size
from runtime_tests.ort.coverage import Coverage

__all__ = ["Forecast"]

SHOWN = 5
"""Refused folds, and groups of float operators, that the box shows."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Forecast(Boxed):
    """The outcome of a dry run.

    samples: of calibration and evaluation data.
    time_s:  estimated seconds per step; capture, fold and emit are measured.
    memory:  estimated bytes at the peak, None where the system does not tell.
    """

    target: str
    method: str
    bits: Bits
    fold: FoldReport
    coverage: Coverage
    size: Size
    samples: tuple[int, int]
    time_s: Times
    memory: int | None
    warnings: tuple[str, ...]

    def panel(self) -> Panel:
        return box(_rows(self), "[bold]DRY RUN[/bold] (nothing was written)", "blue")


def _rows(found: Forecast) -> Iterator[tuple[str, str]]:
    yield "target", f"{found.target}, method {found.method}, W{found.bits.weight}A{found.bits.activation}"
    yield "folded", counted(found.fold.regions, "region")
    for each in found.fold.refused[:SHOWN]:
        yield "not folded", escape(f"{each.where}: {each.why}")
    yield "integer MACs", integer_share(found.coverage)
    reasons: dict[str, Counter[str]] = {}
    for node in found.coverage.float_nodes:
        reasons.setdefault(node.why, Counter())[node.op] += 1
    for reason in sorted(reasons, key=lambda reason: -reasons[reason].total())[:SHOWN]:
        operators = ", ".join(counted(number, operator) for operator, number in reasons[reason].most_common())
        yield "in float", escape(f"{operators}: {reason}")
    if (more := len(reasons) - SHOWN) > 0:
        yield "", f"{counted(more, 'more reason')} for float operators, which the JSON form lists"
    shrink = compared(found.size.float_bytes, found.size.bytes, "smaller", "larger")
    yield "size", f"{size(found.size.bytes)}, {shrink} than float"
    calibration, evaluation = found.samples
    yield "data", f"{counted(calibration, 'sample')} for calibration, {evaluation} for evaluation"
    steps = {each.name: getattr(found.time_s, each.name) for each in fields(found.time_s)}
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in steps.items())
    yield "time", f"about {duration(sum(steps.values()))}: {parts}"
    if found.memory is not None:
        yield "memory", f"about {size(found.memory)}"
    yield from warning_rows(found.warnings)
