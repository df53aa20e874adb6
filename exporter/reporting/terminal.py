"""The verdict box: the report in a few lines of a terminal.

Must not know: how anything is computed, the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from calibrators.errors import counted, printable
from exporter.reporting.number_format import compared, percent, significant
from exporter.reporting.proofs import UNPROVED, not_proved, proof_rows
from exporter.reporting.where import INEXACT, not_exact_here, where_rows
from runtime_tests.parity.results import ProvedOn
from runtime_tests.reference.where_exact import Holds

__all__ = ["summary_rows", "verdict_panel"]

WARNINGS = 5
"""Warnings that the box shows; the report has all."""

_percent = partial(percent, missing="not measured", rounded=True)
_whole = partial(percent, digits=0, rounded=True)
_number = partial(significant, digits=6, missing="not measured", minus="-")


def verdict_panel(report: Mapping[str, Any], folder: Path, *, page: str = "report") -> Panel:
    """Sum up a report in a box; page: title of the line that names the page in the bundle."""
    table = Table.grid(padding=(0, 2))
    for name, value in (*summary_rows(report), (page, escape(str(folder / "report.html")))):
        table.add_row(f"[bold]{printable(name)}[/bold]", printable(value))
    title, colour = ("PASS", "green") if report["verdict"] == "pass" else ("FAIL", "red")
    return Panel(table, title=f"[bold]{title}[/bold]", title_align="left", border_style=colour, expand=False)


def summary_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines of the box, names and values in rich's markup."""
    entries = [Holds(**each) for each in report.get("holds", ())]
    proofs = TypeAdapter(list[ProvedOn]).validate_python(report.get("proved_on", []))
    accuracy, latency, size = report["accuracy"], report["latency_ms"], report["size"]
    if accuracy is not None:
        yield escape(accuracy["metric"]), _accuracy(accuracy)
        yield from _others(accuracy)
    if metric := report.get("metric"):
        values = ", ".join(
            f"{_number(metric[key])} {words}" for key, words in (("float", "float"), ("runtime", "in the runtime"))
        )
        yield escape(metric["name"]), f"{values}, {counted(metric['samples'], 'sample')}"
    yield "parity", _parity(report["parity"]["optimized"])
    yield from where_rows(entries, report.get("emission", {}).get("min_onnxruntime"))
    yield from proof_rows(proofs)
    if sizes := report.get("sizes"):
        yield "sizes", escape("; ".join(_sizes(sizes)))
    if "openvino" in report["parity"]:
        yield "OpenVINO", _second(report["parity"]["openvino"])
    yield "integer MACs", _integer_share(report["coverage"])
    if report["coverage"].get("weight_only_macs"):
        yield "weight-only MACs", _weight_only(report["coverage"])
    if shares := report.get("time_shares"):
        yield "integer time", _time(shares)
    if portable := "; ".join(_levers(report)):
        yield "portable by", portable
    shrink = compared(size["float_bytes"], size["bytes"], "smaller", "larger")
    yield "size", f"{size['bytes'] / 1000:,.0f} kB, {shrink} than float"
    if latency is not None:
        speed = compared(latency["float"], latency["quantized"], "faster", "slower")
        yield "latency", f"{latency['quantized']:.2f} ms, {speed} than float"
    yield from _warnings(report.get("warnings", ()))
    reasons = {
        INEXACT: not_exact_here(entries, report.get("environment", {}).get("processor")),
        UNPROVED: not_proved(proofs),
    }
    for gate in (gate for gate in report["gates"] if not gate["passed"]):
        found = f"{gate['name']} is {_number(gate['value'])}, the limit is {_number(gate['limit'])}"
        yield "failed gate", reasons.get(gate["name"]) or found


def _warnings(warnings: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the first warnings, and how many more there are."""
    more = len(warnings) - WARNINGS
    shown = [*map(escape, warnings[:WARNINGS]), *([f"{more} more in the report"] if more > 0 else [])]
    yield from (("[yellow]warning[/yellow]", text) for text in shown)


def _sizes(sizes: Mapping[str, Any]) -> Iterator[str]:
    """Yield for each input with free axes the shapes of samples on which the file was proved."""
    for name, axes in sizes["axes"].items():
        shapes = dict.fromkeys(" x ".join(map(str, each[name])) for each in sizes["proved"])
        yield f"{name}: {', '.join(shapes)} (free: {', '.join(axes.values())})"


def _others(accuracy: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line with the noise of each output, if there are several."""
    outputs = accuracy.get("outputs") or ()
    if len(outputs) > 1:
        texts = (f"{each['name']} {_decibels(each['runtime'])}" for each in outputs)
        yield "outputs", escape(", ".join(texts))


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{_number(value)} dB"


def _levers(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what makes the file give the same integers on all processors of the target, and what it does not reach."""
    if limited := report.get("limited_weights"):
        raised, total = (sum(weight[key] for weight in limited) for key in ("channels", "channels_total"))
        factor = sum(weight["factor_mean"] * weight["channels_total"] for weight in limited) / total
        yield f"{raised:,} of {total:,} channels {significant(factor, 3)} times coarser on average"
    if unsigned := report.get("unsigned_weights"):
        yield counted(len(unsigned), "uint8 weight")
    if settled := report.get("settled"):
        moved, left, kernels = len(settled["moved"]), len(settled["left"]), settled["kernels"]
        if moved:
            yield f"{counted(moved, 'scale')} moved off ties"
        if left:
            yield f"[red]{left} of {kernels} sums, products and sigmoids differ at ties[/red]"
    if cost := report.get("portability"):
        portable, free = (significant(cost[key]["sqnr_db"], 3) for key in ("portable", "free"))
        yield f"SQNR on calibration data {portable} dB, {free} dB without these limits"


def _integer_share(coverage: Mapping[str, Any]) -> str:
    """Return the share of the multiply-accumulates, or why it is not known, and that of the nodes."""
    macs = _percent(coverage["integer_macs"])
    if uncounted := coverage.get("uncounted"):
        macs += f": {counted(len(uncounted), 'operator')} cannot be counted"
    return f"{macs}; {coverage['integer_nodes']} of {coverage['compute_nodes']} compute nodes"


def _time(shares: Mapping[str, Any]) -> str:
    """Return where the time of a run goes, with the float operator that takes most of it."""
    rest = {"float operators": shares["float"], "quantizers": shares["quantizers"], "moves": shares["moves"]}
    names = {name: f"{name} {_whole(share)}" for name, share in rest.items()}
    if shares["slowest"]:
        first = shares["slowest"][0]
        names["float operators"] += f" ({escape(first['op'])} {_whole(first['share'])})"
    return f"{_whole(shares['integer'])}; {', '.join(names.values())}"


def _weight_only(coverage: Mapping[str, Any]) -> str:
    return f"{_percent(coverage['weight_only_macs'])}, float kernels at accuracy level {coverage['accuracy_level']}"


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    if accuracy["metric"] == "sqnr_db":
        return f"{_number(accuracy['runtime'])} dB over {counted(accuracy['samples'], 'sample')}"
    values = f"{_percent(accuracy['float'])} float, {_percent(accuracy['runtime'])} in the runtime"
    return f"{values}, {counted(accuracy['samples'], 'sample')}"


def _parity(level: Mapping[str, Any]) -> str:
    """Sum up parity end to end where all values are equal, else node by node, where no difference travels."""
    if not level["mismatched"]:
        return f"0 of {level['values']:,} integers differ"
    text = f"{level['kernel_mismatched']:,} integers differ in integer kernels"
    if level["float_values"]:
        text += f", {level['float_mismatched']:,} of {level['float_values']:,} after float operators"
    return f"{text} (node by node; largest step {level['forced']['max_lsb']})"


def _second(level: Mapping[str, Any]) -> str:
    differ, most = level["forced"]["mismatched"], level["forced"]["max_lsb"]
    text = (
        f"{differ:,} of {level['values']:,} integers differ kernel by kernel{f', by {most} at most' if differ else ''}"
    )
    agreement = (
        f"; as deployed it makes the decision of the reference for {_percent(level['agreement'])} of the samples"
    )
    return text if level["agreement"] is None else text + agreement
