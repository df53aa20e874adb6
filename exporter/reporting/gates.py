"""Conditions on the report that decide the verdict: `accuracy_drop<=0.01`.

A metric is a short name (METRICS) or the dotted path of a number in report.json. What was not measured never passes.

Must not know: how a number was measured, files, the command line.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from calibrators.errors import InputError, UnknownNameError
from exporter.reporting.proofs import UNPROVED
from exporter.reporting.schema import GateResult, metric_paths
from exporter.reporting.where import INEXACT, not_exact_here
from runtime_tests.parity.results import ProvedOn
from runtime_tests.reference.where_exact import Holds

__all__ = [
    "DEFAULT_GATES",
    "METRICS",
    "Gate",
    "Metric",
    "check_measurable",
    "evaluate",
    "needs_baseline",
    "needs_labels",
    "parse",
    "renamed",
    "verdict",
]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_EXPRESSION = re.compile(r"\s*([A-Za-z_][\w.*:-]*?)\s*(<=|>=|==|<|>)\s*([^<>=\s]+(?:\s+[A-Za-z]+)?)\s*")
# Scores are counts over samples: their difference carries float noise of 1e-16, which must not decide a gate.
_DECIMALS = 12
_WORDS = {"true": 1.0, "false": 0.0}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%|[A-Za-z]+)")
_UNITS = {
    **dict.fromkeys(("%", "pp"), ("share", "e-2")),
    "dB": ("dB", ""),
    **{unit: ("bytes", power) for unit, power in (("B", ""), ("kB", "e3"), ("MB", "e6"), ("GB", "e9"))},
    **{unit: ("ms", power) for unit, power in (("us", "e-3"), ("ms", ""), ("s", "e3"))},
}
"""The quantity that each unit of a limit measures, and its power of ten; powers are text, as 0.3 / 100 is not 0.003."""
_RENAMED = {"kernel_surprises": "unplanned_kernels"}
"""Old names of metrics, which are accepted for one release."""

Report = Mapping[str, Any]
"""The content of report.json."""


@dataclass(frozen=True)
class Metric:
    """A short name for a number of the report: its help, and how to read its value (None: not measured).

    quantity: what it measures, which decides the units of its limits: "share", "bytes", "ms", "dB" or a plain number.
    """

    help: str
    value: Callable[[Report], float | None]
    quantity: str = "share"
    needs_eval: bool = False
    needs_labels: bool = False
    needs_metric: bool = False
    needs_baseline: bool = False


@dataclass(frozen=True)
class Gate:
    """One parsed condition; `expression` is its normal form, `old_name` the metric's former name if that was given."""

    name: str
    compare: str
    limit: float
    old_name: str = field(default="", compare=False)

    @property
    def expression(self) -> str:
        return f"{self.name}{self.compare}{self.limit:.15g}"


def parse(expression: str) -> Gate:
    """Parse a text such as `accuracy_drop<=0.01`, `accuracy_drop<=1%` or `outputs_identical==true`.

    raises: InputError if the text is not a condition on a finite number, UnknownNameError if there is no such metric.
    """
    match = _EXPRESSION.fullmatch(expression)
    if match is None:
        raise InputError(f"gate {expression!r} is not METRIC OP NUMBER; write for example 'accuracy_drop<=0.01', "
                         f"where OP is one of {', '.join(_COMPARE)}.")  # fmt: skip
    given, compare, limit = match.groups()
    name = _RENAMED.get(given, given)
    if name not in METRICS and not _is_path(name):
        near = difflib.get_close_matches(name, metric_paths(), n=3)
        raise UnknownNameError("gate metric", name, {*METRICS, *near})
    quantity = METRICS[name].quantity if name in METRICS else "share"
    return Gate(name, compare, _limit(limit, quantity, expression), old_name=given if given != name else "")


def renamed(gates: Iterable[Gate]) -> list[str]:
    """Return one warning per gate that was given by the old name of its metric."""
    return [
        f"the gate metric {gate.old_name!r} is now called {gate.name!r}: use the new name, as the next release drops "
        "the old one"
        for gate in gates
        if gate.old_name
    ]


def _limit(text: str, quantity: str, expression: str) -> float:
    """Return the number of a limit such as 0.01, 1%, 1pp, 300kB or 2ms, in the unit of the report."""
    match = _NUMBER.fullmatch(text)
    number = text
    if match is not None and match[2] in _UNITS:
        measured, power = _UNITS[match[2]]
        if measured != quantity:
            units = ", ".join(unit for unit, (of, _) in _UNITS.items() if of == quantity) or "none"
            raise InputError(f"gate {expression!r}: {match[2]} is no unit of this metric; its units are: {units}.")
        number = f"{match[1]}{power}" if "e" not in match[1].lower() else str(float(match[1]) * float(f"1{power}"))
    try:
        limit = _WORDS[text.lower()] if text.lower() in _WORDS else float(number)
    except ValueError as error:
        raise InputError(f"gate {expression!r}: the limit {text!r} is not a number with a known unit.") from error
    if not math.isfinite(limit):
        raise InputError(f"gate {expression!r}: the limit {text!r} is not finite, so the gate would prove nothing.")
    return limit


def _is_path(name: str) -> bool:
    """Return whether a dotted path leads to a number; the last part is free below counts by operator or type."""
    return name in metric_paths() or ("." in name and f"{name.rpartition('.')[0]}.*" in metric_paths())


def check_measurable(
    gates: Iterable[Gate], *, has_eval: bool, has_labels: bool, has_metric: bool = False, has_baseline: bool = False
) -> None:
    """Raise InputError, naming gate and data, unless the data at hand can answer every gate.

    Call it before the work starts.
    """
    for gate in gates:
        needs_eval, needs_labels = _needs(gate.name)
        if needs_eval and not has_eval:
            raise InputError(f"gate {gate.expression!r} needs held-out data; give it with --eval, or drop the gate.")
        if gate.name in METRICS and METRICS[gate.name].needs_metric and not has_metric:
            raise InputError(
                f"gate {gate.expression!r} needs a metric of yours; give --metric file.py:function, or gate on "
                "accuracy_drop, agreement or sqnr_db."
            )
        if needs_baseline(gate) and not has_baseline:
            raise InputError(f"gate {gate.expression!r} needs an earlier bundle; give it with --baseline.")
        if needs_labels and not has_labels:
            raise InputError(
                f"gate {gate.expression!r} needs labels in the --eval data; add them (`labels` in an .npz, or "
                "(x, labels) pairs), or gate on agreement or sqnr_db instead."
            )


def needs_labels(gate: Gate) -> bool:
    """Return whether a gate is on a score that is measured with labels."""
    return _needs(gate.name)[1]


def needs_baseline(gate: Gate) -> bool:
    """Return whether a gate is on a difference from an earlier export."""
    return METRICS[gate.name].needs_baseline if gate.name in METRICS else gate.name.startswith("baseline.")


def _needs(name: str) -> tuple[bool, bool]:
    if name in METRICS:
        return METRICS[name].needs_eval, METRICS[name].needs_labels
    free_of_labels = ("accuracy.agreement", "accuracy.sqnr_db", "accuracy.samples")
    needs_eval = name.startswith(("accuracy.", "metric.", "data.evaluation."))
    return needs_eval, name.startswith("accuracy.") and name not in free_of_labels


def evaluate(gates: Iterable[Gate], report: Report) -> tuple[GateResult, ...]:
    """Return one result per gate, on the content of report.json; an unmeasured or NaN value does not pass."""
    return tuple(_evaluate(gate, report) for gate in gates)


def _evaluate(gate: Gate, report: Report) -> GateResult:
    value = METRICS[gate.name].value(report) if gate.name in METRICS else _leaf(report, gate.name)
    passed = value is not None and _COMPARE[gate.compare](value, gate.limit)  # every comparison with NaN is False
    finite = value if value is not None and math.isfinite(value) else None
    return GateResult(gate.name, gate.limit, finite, passed, gate.expression)


def verdict(results: Iterable[GateResult]) -> Literal["pass", "fail"]:
    """Return "pass" if every gate passed."""
    return "pass" if all(result.passed for result in results) else "fail"


def _leaf(report: Report, path: str) -> float | None:
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
    return lambda report: _leaf(report, path)


def _minus(minuend: str, subtrahend: str) -> Callable[[Report], float | None]:
    def value(report: Report) -> float | None:
        left, right = _leaf(report, minuend), _leaf(report, subtrahend)
        return None if left is None or right is None else round(left - right, _DECIMALS)

    return value


def _over(numerator: str, denominator: str) -> Callable[[Report], float | None]:
    def value(report: Report) -> float | None:
        top, bottom = _leaf(report, numerator), _leaf(report, denominator)
        return None if top is None or not bottom else top / bottom

    return value


def _float_mismatch_rate(report: Report) -> float | None:
    """Return the differing share of the values that float arithmetic computed; 0 where there are none."""
    mismatched, values = (_leaf(report, f"parity.optimized.float_{name}") for name in ("mismatched", "values"))
    if mismatched is None or values is None:
        return None
    return mismatched / values if values else 0.0


def _figure_ratio(name: str) -> Callable[[Report], float | None]:
    """Return a reader of the ratio of a figure to that of the baseline."""

    def value(report: Report) -> float | None:
        figures = (report.get("baseline") or {}).get("figures", ())
        return next((figure["ratio"] for figure in figures if figure["name"] == name), None)

    return value


def _now_float(report: Report) -> float | None:
    baseline = report.get("baseline")
    return None if baseline is None else float(len(baseline["now_float"]))


def _sqnr(report: Report) -> float | None:
    accuracy: Mapping[str, Any] = report["accuracy"] or {}
    identical = "sqnr_db" in accuracy and accuracy["sqnr_db"] is None
    return math.inf if identical else _leaf(report, "accuracy.sqnr_db")


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
        needs_eval=True,
        needs_labels=True,
    ),
    "accuracy_drop_upper": Metric(
        "upper end of the 95 % interval of accuracy_drop, so that few samples do not pass by luck",
        _path("accuracy.drop_ci.1"),
        needs_eval=True,
        needs_labels=True,
    ),
    "reference_drop": Metric(
        "score of the float model minus score of the reference program",
        _minus("accuracy.float", "accuracy.reference"),
        needs_eval=True,
        needs_labels=True,
    ),
    "agreement": Metric(
        "share of held-out samples for which float model and runtime make the same decision",
        _path("accuracy.agreement"),
        needs_eval=True,
    ),
    "sqnr_db": Metric(
        "signal over quantization noise at the outputs, in dB; infinite where they are identical",
        _sqnr,
        "dB",
        needs_eval=True,
    ),
    "metric": Metric(
        "value in the runtime of the metric that --metric names",
        _path("metric.runtime"),
        needs_eval=True,
        needs_metric=True,
    ),
    "metric_drop": Metric(
        "that metric of the float model minus its value in the runtime; negative where an error grew",
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
        "share of differing values after float operators, each from the runtime's own inputs", _float_mismatch_rate
    ),
    "max_lsb": Metric("largest difference end to end, in steps of the grid", _path("parity.optimized.max_lsb")),
    "outputs_identical": Metric(
        "1 if the outputs are bit-identical, else 0", _path("parity.optimized.outputs_identical")
    ),
    "integer_macs": Metric(
        "share of the multiply-accumulates in integer kernels; not measured where some cannot be counted",
        _path("coverage.integer_macs"),
    ),
    "weight_only_macs": Metric(
        "share of the multiply-accumulates in float kernels with quantized weights", _path("coverage.weight_only_macs")
    ),
    "integer_nodes": Metric("number of compute nodes in integer kernels", _path("coverage.integer_nodes")),
    "integer_node_share": Metric(
        "share of the compute nodes in integer kernels", _over("coverage.integer_nodes", "coverage.compute_nodes")
    ),
    "integer_time": Metric(
        "share of the runtime's time in integer kernels, as its profiler sees it", _path("time_shares.integer")
    ),
    "latency_ratio": Metric(
        "time of the quantized model over time of the float model", _over("latency_ms.quantized", "latency_ms.float")
    ),
    "latency": Metric("time of the quantized model, in ms", _path("latency_ms.quantized"), "ms"),
    "size": Metric("bytes of the quantized model", _path("size.bytes"), "bytes"),
    "size_ratio": Metric(
        "bytes of the quantized model over bytes of the float model", _over("size.bytes", "size.float_bytes")
    ),
    "baseline_drop": Metric(
        "score of the baseline minus this score, on the same samples",
        _path("baseline.drop.drop.value"),
        needs_eval=True,
        needs_labels=True,
        needs_baseline=True,
    ),
    "baseline_error": Metric(
        "error against the float model over that of the baseline, on the same samples",
        _path("baseline.error.value"),
        "number",
        needs_eval=True,
        needs_baseline=True,
    ),
    "baseline_size": Metric("bytes over bytes of the baseline", _figure_ratio("size"), "number", needs_baseline=True),
    "baseline_latency": Metric(
        "time over time of the baseline, each as its export measured it",
        _figure_ratio("latency"),
        "number",
        needs_baseline=True,
    ),
    "baseline_now_float": Metric(
        "compute nodes in float that the baseline lacks", _now_float, "number", needs_baseline=True
    ),
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

DEFAULT_GATES = tuple(
    parse(f"{metric}==0")
    for metric in ("kernel_mismatched", "parity_violations", "unplanned_kernels", INEXACT, "lint_errors")
)
"""Conditions of every export. With optimizations off all arithmetic is float: that level is reported, not gated."""
