"""The numbers of a report on which gates may be put: short names, or dotted paths of report.json.

Must not know: how a number was measured, limits, files, the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exporter.reporting.proofs import UNPROVED
from exporter.reporting.quantities import Quantity
from exporter.reporting.schema import metric_paths
from exporter.reporting.where import INEXACT, not_exact_here
from runtime_tests.parity.results import ProvedOn
from runtime_tests.reference.where_exact import Holds

__all__ = ["METRICS", "Metric", "Report", "is_path", "quantity_of", "unlabelled_outputs", "value_at"]

# Scores are counts over samples: their difference carries float noise of 1e-16, which must not decide a gate.
_DECIMALS = 12

Report = Mapping[str, Any]
"""The content of report.json."""


@dataclass(frozen=True)
class Metric:
    """A short name for a number of the report: its help, and how to read its value (None: not measured).

    quantity: what it measures, which decides the units of its limits and how it is written.
    interval: for a value that varies from run to run, its 95 % interval; a gate compares the end that is worse for it.
    """

    help: str
    value: Callable[[Report], float | None]
    quantity: Quantity = "number"
    interval: Callable[[Report], tuple[float, float] | None] = field(default=lambda _: None)
    needs_eval: bool = False
    needs_labels: bool = False
    needs_metric: bool = False
    needs_baseline: bool = False


def is_path(name: str) -> bool:
    """Return whether a dotted path leads to a number; the last part is free below counts by operator or type."""
    return name in metric_paths() or ("." in name and f"{name.rpartition('.')[0]}.*" in metric_paths())


def quantity_of(name: str) -> Quantity:
    """Return what a metric measures; a path is a plain number."""
    return METRICS[name].quantity if name in METRICS else "number"


def value_at(report: Report, path: str) -> float | None:
    """Return the number at a dotted path, None where the report has none; a kind that was never counted counts 0."""
    *parents, last = path.split(".")
    here: Any = report
    for part in parents:
        here = _step(here, part)
    if isinstance(here, Mapping) and last not in here and f"{'.'.join(parents)}.*" in metric_paths():
        return 0.0
    found = _step(here, last)
    return float(found) if isinstance(found, (int, float)) else None


def _step(here: Any, part: str) -> Any:
    if isinstance(here, Mapping):
        return here.get(part)
    if isinstance(here, Sequence) and part.isdigit() and int(part) < len(here):
        return here[int(part)]
    return None


def _path(path: str) -> Callable[[Report], float | None]:
    return lambda report: value_at(report, path)


def _ends(path: str) -> Callable[[Report], tuple[float, float] | None]:
    def interval(report: Report) -> tuple[float, float] | None:
        low, high = value_at(report, f"{path}.0"), value_at(report, f"{path}.1")
        return None if low is None or high is None else (low, high)

    return interval


def _minus(minuend: str, subtrahend: str) -> Callable[[Report], float | None]:
    def value(report: Report) -> float | None:
        left, right = value_at(report, minuend), value_at(report, subtrahend)
        return None if left is None or right is None else round(left - right, _DECIMALS)

    return value


def _over(numerator: str, denominator: str) -> Callable[[Report], float | None]:
    def value(report: Report) -> float | None:
        top, bottom = value_at(report, numerator), value_at(report, denominator)
        return None if top is None or not bottom else top / bottom

    return value


def _float_mismatch_rate(report: Report) -> float | None:
    """Return the differing share of the values that float arithmetic computed; 0 where there are none."""
    mismatched, values = (value_at(report, f"parity.optimized.float_{name}") for name in ("mismatched", "values"))
    if mismatched is None or values is None:
        return None
    return mismatched / values if values else 0.0


def _sqnr(report: Report) -> float | None:
    accuracy: Mapping[str, Any] = report["accuracy"] or {}
    identical = "sqnr_db" in accuracy and accuracy["sqnr_db"] is None
    return math.inf if identical else value_at(report, "accuracy.sqnr_db")


def _figure_ratio(name: str) -> Callable[[Report], float | None]:
    """Return a reader of the ratio of a figure to that of the baseline."""

    def value(report: Report) -> float | None:
        figures = (report.get("baseline") or {}).get("figures", ())
        return next((figure["ratio"] for figure in figures if figure["name"] == name), None)

    return value


def _now_float(report: Report) -> float | None:
    baseline = report.get("baseline")
    return None if baseline is None else float(len(baseline["now_float"]))


def unlabelled_outputs(report: Report) -> list[Mapping[str, Any]]:
    """Return the entries of the outputs that are compared with the float model's, not with labels."""
    accuracy: Mapping[str, Any] = report["accuracy"] or {}
    outputs: Sequence[Mapping[str, Any]] = accuracy.get("outputs") or ()
    return [*outputs[accuracy["metric"] == "top1" :]] if outputs else []


def _lowest_agreement(report: Report) -> float | None:
    return min(
        (each["agreement"] for each in unlabelled_outputs(report) if each["agreement"] is not None), default=None
    )


def _lowest_sqnr(report: Report) -> float | None:
    found = [each["runtime"] for each in unlabelled_outputs(report) if each["agreement"] is None]
    return min((math.inf if each is None else each for each in found), default=None)


def _unplanned_kernels(report: Report) -> float | None:
    unplanned = report["parity"]["optimized"].get("unplanned")
    return None if unplanned is None else float(sum(map(abs, unplanned.values())))


def _unproved_runtimes(report: Report) -> float | None:
    entries = report.get("proved_on")
    return None if entries is None else float(sum(not ProvedOn(**each).is_proved for each in entries))


def _inexact_here(report: Report) -> float:
    entries = [Holds(**each) for each in report.get("holds", ())]
    return float(not_exact_here(entries, report.get("environment", {}).get("processor")) is not None)


def _lint_errors(report: Report) -> float:
    return float(sum(entry["severity"] == "error" for entry in report.get("lint", ())))


METRICS: dict[str, Metric] = {
    "accuracy_drop": Metric(
        "score of the float model minus score in the runtime (0.01 is one point)",
        _minus("accuracy.float", "accuracy.runtime"),
        "points",
        needs_eval=True,
        needs_labels=True,
    ),
    "accuracy_drop_lower": Metric(
        "lower end of the 95 % interval of accuracy_drop: above 0, the drop is more than chance",
        _path("accuracy.drop_ci.0"),
        "points",
        needs_eval=True,
        needs_labels=True,
    ),
    "accuracy_drop_upper": Metric(
        "upper end of the 95 % interval of accuracy_drop, so that few samples do not pass by luck",
        _path("accuracy.drop_ci.1"),
        "points",
        needs_eval=True,
        needs_labels=True,
    ),
    "reference_drop": Metric(
        "score of the float model minus score of the reference program, on the samples on which it ran",
        _path("accuracy.reference_drop"),
        "points",
        needs_eval=True,
        needs_labels=True,
    ),
    "agreement": Metric(
        "share of held-out samples for which float model and runtime make the same decision",
        _path("accuracy.agreement"),
        "share",
        needs_eval=True,
    ),
    "sqnr_db": Metric(
        "signal over quantization noise at the outputs, in dB; infinite where they are identical",
        _sqnr,
        "dB",
        needs_eval=True,
    ),
    "lowest_agreement": Metric(
        "agreement of the output where it is lowest; integer outputs agree element by element, a labelled one is left "
        "out",
        _lowest_agreement,
        "share",
        needs_eval=True,
    ),
    "lowest_sqnr_db": Metric(
        "sqnr_db of the output where it is lowest, of those without decisions",
        _lowest_sqnr,
        "dB",
        needs_eval=True,
    ),
    "metric": Metric(
        "value of your own metric in the runtime",
        _path("metric.runtime"),
        needs_eval=True,
        needs_metric=True,
    ),
    "metric_drop": Metric(
        "your own metric of the float model minus its value in the runtime; negative where an error grew",
        _minus("metric.float", "metric.runtime"),
        needs_eval=True,
        needs_metric=True,
    ),
    "mismatched": Metric("differing values end to end, optimizations on", _path("parity.optimized.mismatched")),
    "kernel_mismatched": Metric(
        "differing values of integer kernels, each from the runtime's own inputs, optimizations on",
        _path("parity.optimized.kernel_mismatched"),
    ),
    "parity_violations": Metric(
        "sites and outputs that differ by more than is allowed, each from the runtime's own inputs, optimizations on",
        _path("parity.optimized.violations"),
    ),
    "unplanned_kernels": Metric(
        "integer kernels that the runtime executes and the plan lacks, or the other way round",
        _unplanned_kernels,
    ),
    "float_mismatch_rate": Metric(
        "share of differing values after float operators, each from the runtime's own inputs",
        _float_mismatch_rate,
        "share",
    ),
    "max_lsb": Metric("largest difference end to end, in steps of the grid", _path("parity.optimized.max_lsb")),
    "outputs_identical": Metric(
        "1 if the outputs are bit-identical, else 0", _path("parity.optimized.outputs_identical")
    ),
    "integer_macs": Metric(
        "share of the multiply-accumulates in integer kernels; not measured where some cannot be counted",
        _path("coverage.integer_macs"),
        "share",
    ),
    "weight_only_macs": Metric(
        "share of the multiply-accumulates in float kernels with quantized weights",
        _path("coverage.weight_only_macs"),
        "share",
    ),
    "integer_nodes": Metric("number of compute nodes in integer kernels", _path("coverage.integer_nodes")),
    "integer_node_share": Metric(
        "share of the compute nodes in integer kernels",
        _over("coverage.integer_nodes", "coverage.compute_nodes"),
        "share",
    ),
    "integer_time": Metric(
        "share of the runtime's time in integer kernels, as its profiler sees it", _path("time_shares.integer"), "share"
    ),
    "latency_ratio": Metric(
        "time of the quantized model over time of the float model; the worse end of its interval",
        _path("latency_ms.ratio"),
        interval=_ends("latency_ms.ratio_interval"),
    ),
    "latency": Metric(
        "time of the quantized model, in ms; the worse end of its interval",
        _path("latency_ms.quantized"),
        "ms",
        interval=_ends("latency_ms.interval.quantized"),
    ),
    "size": Metric("bytes of the quantized model", _path("size.bytes"), "bytes"),
    "size_ratio": Metric(
        "bytes of the quantized model over bytes of the float model", _over("size.bytes", "size.float_bytes")
    ),
    "baseline_drop": Metric(
        "score of the baseline minus this score, on the same samples",
        _path("baseline.drop.drop.value"),
        "points",
        needs_eval=True,
        needs_labels=True,
        needs_baseline=True,
    ),
    "baseline_error": Metric(
        "error against the float model over that of the baseline, on the same samples",
        _path("baseline.error.value"),
        needs_eval=True,
        needs_baseline=True,
    ),
    "baseline_size": Metric("bytes over bytes of the baseline", _figure_ratio("size"), needs_baseline=True),
    "baseline_latency": Metric(
        "time over time of the baseline, each as its export measured it; not measured where either is unreliable",
        _figure_ratio("latency"),
        needs_baseline=True,
    ),
    "baseline_now_float": Metric("compute nodes in float that the baseline lacks", _now_float, needs_baseline=True),
    UNPROVED: Metric(
        "runtimes that refuse the file, or in which values differ by more than is allowed, each from the runtime's own "
        "inputs",
        _unproved_runtimes,
    ),
    INEXACT: Metric(
        "1 if this machine's processor computes other integers than the reference for some inputs, else 0",
        _inexact_here,
    ),
    "lint_errors": Metric("findings of severity error against the rules of the target", _lint_errors),
}
