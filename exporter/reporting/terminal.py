"""The verdict box: the report in a few lines of a terminal.

Must not know: how anything is computed, the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from calibrators.errors import counted, printable
from exporter.reporting.failures import failures, found_by, layer_advice
from exporter.reporting.gates import judges_accuracy
from exporter.reporting.headline import tone, verdict_title
from exporter.reporting.interface import Sizes
from exporter.reporting.ladder import rung_rows
from exporter.reporting.number_format import compared, decibel, percent, significant, size
from exporter.reporting.proofs import OPENVINO_DIFFERS, proof_rows
from exporter.reporting.schema import Report
from exporter.reporting.sections import machine_of
from exporter.reporting.speed import TIMED_IN, is_slower, latency_text, other_runtime
from exporter.reporting.where import where_rows
from exporter.reporting.widths import activation_bits, weight_bits
from runtime_tests.measure.accuracy import Accuracy
from runtime_tests.measure.profile import TimeShares
from runtime_tests.ort.coverage import Coverage
from runtime_tests.parity.results import Level, SecondLevel

__all__ = ["box", "integer_share", "summary_rows", "verdict_panel", "warning_rows"]

WARNINGS = 5
"""Warnings that the box shows; the report has all."""

COLOURS = {"pass": "green", "part": "yellow", "fail": "red"}

Rows = Iterator[tuple[str, str]]

_percent = partial(percent, missing="not measured", rounded=True)
_whole = partial(percent, digits=0, rounded=True)
_number = partial(significant, digits=6, missing="not measured", minus="-")


def verdict_panel(report: Report, folder: Path, *, page: str = "report") -> Panel:
    """Sum up a report in a box; page: title of the line that names the page in the bundle."""
    verdict, _, left_open = verdict_title(report).partition(" ")
    rows = (*summary_rows(report), (page, escape(str(folder / "report.html"))))
    return box(rows, f"[bold]{verdict}[/bold] {left_open}".strip(), COLOURS[tone(report)])


def box(rows: Iterable[tuple[str, str]], heading: str, colour: str) -> Panel:
    """Return a box with a heading around names and their values, all in rich's markup."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(f"[bold]{printable(name)}[/bold]", printable(value))
    return Panel(table, title=heading, title_align="left", border_style=colour, expand=False)


def summary_rows(report: Report) -> Rows:
    """Yield the lines of the box, names and values in rich's markup; what was not measured here comes apart."""
    yield from _failed(report)
    if report.exported_on is not None:
        yield "measured on", escape(f"this machine: {machine_of(report.environment)}")
        yield from _proof(report)
        yield "[yellow]claimed[/yellow]", escape(f"by the exporter, measured on {report.exported_on}:")
        yield from _accuracy_rows(report)
    else:
        yield from _accuracy_rows(report)
        yield from _proof(report)
    yield from _costs(report)
    yield from warning_rows(report.warnings)


def _failed(report: Report) -> Rows:
    """Yield for every failed gate what was found, what causes it and what to try."""
    for failure in failures(report):
        yield "[red]failed gate[/red]", escape(f"{failure.gate.expression}: {failure.found}")
        if failure.causes:
            yield "", escape(failure.causes)
        yield from (("[red]try[/red]", escape(text)) for text in failure.advice)


def _accuracy_rows(report: Report) -> Rows:
    if (accuracy := report.accuracy) is not None:
        yield escape(accuracy.metric), _accuracy(accuracy)
        yield from _others(accuracy)
    if metric := report.metric:
        values = f"{_number(metric.float)} float, {_number(metric.runtime)} in the runtime"
        yield escape(metric.name), f"{values}, {counted(metric.samples, 'sample')}"
    for gate in report.gates:
        if gate.passed and judges_accuracy(gate):
            what = "lower end of its 95 % interval" if gate.name == "accuracy_drop_lower" else gate.name
            found = found_by(gate, report).removeprefix("it ")
            yield "accuracy gate", f"drop: {what} {found}" if what != gate.name else f"{what} {found}"
    yield from _method_rows(report)


def _method_rows(report: Report) -> Rows:
    """Yield what each rung of a ladder cost and gave, and what widens a gate's room where little is left."""
    for index, (name, text) in enumerate(rung_rows(report.ladder) if report.ladder is not None else ()):
        yield "" if index else "tried", escape(f"{name}: {text}")
    missed = any(not gate.passed and judges_accuracy(gate) for gate in report.gates)
    if report.costly_layers is not None and not missed:
        yield from (("[yellow]little room[/yellow]", escape(text)) for text in layer_advice(report.costly_layers))


def _proof(report: Report) -> Rows:
    yield "bits", f"weights {weight_bits(report)}; activations {activation_bits(report)}"
    yield "parity", _parity(report.parity.optimized)
    yield from where_rows(report.holds or (), report.emission.min_onnxruntime if report.emission else None)
    yield from proof_rows(report.proved_on or ())
    if report.sizes:
        yield "sizes", escape("; ".join(_sizes(report.sizes)))
    if report.parity.openvino:
        yield "OpenVINO", _second(report.parity.openvino)
    yield "integer MACs", integer_share(report.coverage)
    if report.coverage.weight_only_macs:
        yield "weight-only MACs", _weight_only(report.coverage)


def _costs(report: Report) -> Rows:
    other = other_runtime(report.target)
    timed = "" if other is None else f"; {TIMED_IN}, not {other.runtime}"
    if report.time_shares:
        yield "integer time", _time(report.time_shares) + timed
    if portable := "; ".join(_levers(report)):
        yield "portable by", portable
    found = report.size
    shrink = f"{size(found.bytes)}, {compared(found.float_bytes, found.bytes, 'smaller', 'larger')} than float"
    lowered = ""
    if other is not None and found.lowered_bytes is not None:
        lowered = f"; {other.lowered_file} {size(found.lowered_bytes)}"
    yield "size", _flagged(shrink, found.bytes > found.float_bytes) + lowered
    if (latency := report.latency_ms) is not None:
        yield "latency", _flagged(latency_text(latency), latency.reliable is False or is_slower(latency)) + timed


def _flagged(text: str, doubtful: bool) -> str:
    return f"[yellow]{text}[/yellow]" if doubtful else text


def warning_rows(warnings: Sequence[str] | None) -> Rows:
    """Yield the first warnings, and how many more there are."""
    warnings = warnings or ()
    more = len(warnings) - WARNINGS
    shown = [*map(escape, warnings[:WARNINGS]), *([f"{more} more in the report"] if more > 0 else [])]
    yield from (("[yellow]warning[/yellow]", text) for text in shown)


def _sizes(sizes: Sizes) -> Iterator[str]:
    """Yield for each input with free axes the shapes of samples on which the file was proved."""
    for name, axes in sizes.axes.items():
        shapes = dict.fromkeys(" x ".join(map(str, each[name])) for each in sizes.proved)
        yield f"{name}: {', '.join(shapes)} (free: {', '.join(axes.values())})"


def _others(accuracy: Accuracy) -> Rows:
    """Yield a line with the noise of each output, if there are several."""
    outputs = accuracy.outputs or ()
    if len(outputs) > 1:
        yield "outputs", escape(", ".join(f"{each.name} {_decibels(each.runtime)}" for each in outputs))


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{_number(value)} dB"


def _levers(report: Report) -> Iterator[str]:
    """Yield what makes the file give the same integers on all processors of the target, and what it does not reach."""
    if limited := report.limited_weights:
        raised, total = sum(weight.channels for weight in limited), sum(weight.channels_total for weight in limited)
        factor = sum(weight.factor_mean * weight.channels_total for weight in limited) / total
        yield f"{raised:,} of {total:,} channels {significant(factor, 3)} times coarser on average"
    if unsigned := report.unsigned_weights:
        yield counted(len(unsigned), "uint8 weight")
    if settled := report.settled:
        moved, left = len(settled.moved), len(settled.left)
        if moved:
            yield f"{counted(moved, 'scale')} moved off ties"
        if left:
            yield f"[red]{left} of {settled.kernels} sums, products and sigmoids differ at ties[/red]"
    if cost := report.portability:
        portable, free = (
            "identical" if each.sqnr_db is None else decibel(each.sqnr_db) for each in (cost.portable, cost.free)
        )
        yield f"SQNR on calibration data {portable}, {free} without these limits"


def integer_share(coverage: Coverage) -> str:
    """Return the share of the multiply-accumulates, or why it is not known, and that of the nodes."""
    macs = _percent(coverage.integer_macs)
    if uncounted := coverage.uncounted:
        macs += f": {counted(len(uncounted), 'operator')} cannot be counted"
    return f"{macs}; {coverage.integer_nodes} of {coverage.compute_nodes} compute nodes"


def _time(shares: TimeShares) -> str:
    """Return where the time of a run goes, with the float operator that takes most of it."""
    rest = {"float operators": shares.float, "quantizers": shares.quantizers, "moves": shares.moves}
    names = {name: f"{name} {_whole(share)}" for name, share in rest.items()}
    if shares.slowest:
        first = shares.slowest[0]
        names["float operators"] += f" ({escape(first.op)} {_whole(first.share)})"
    return f"{_whole(shares.integer)}; {', '.join(names.values())}"


def _weight_only(coverage: Coverage) -> str:
    return f"{_percent(coverage.weight_only_macs)}, float kernels at accuracy level {coverage.accuracy_level}"


def _accuracy(accuracy: Accuracy) -> str:
    samples, few = counted(accuracy.samples, "sample"), accuracy.reference_samples
    if few is not None and few < accuracy.samples:
        samples += f" (the reference on the first {few})"
    if accuracy.metric == "sqnr_db":
        return f"{_decibels(accuracy.runtime)} over {samples}"
    return f"{_percent(accuracy.float)} float, {_percent(accuracy.runtime)} in the runtime, {samples}"


def _parity(level: Level) -> str:
    """Sum up parity end to end where all values are equal, else node by node, where no difference travels."""
    if not level.mismatched:
        return f"0 of {level.values:,} integers differ"
    text = f"{level.kernel_mismatched:,} integers differ in integer kernels"
    if level.float_values:
        text += f", {level.float_mismatched:,} of {level.float_values:,} after float operators"
    return f"{text} (node by node; largest step {level.forced.max_lsb})"


def _second(level: SecondLevel) -> str:
    differ, most = level.forced.mismatched, level.forced.max_lsb
    text = f"{differ:,} of {level.values:,} integers differ kernel by kernel{f', by {most} at most' if differ else ''}"
    if differ:
        text += f" ({OPENVINO_DIFFERS})"
    agreement = f"; as deployed it makes the decision of the reference for {_percent(level.agreement)} of the samples"
    return text if level.agreement is None else text + agreement
