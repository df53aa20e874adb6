"""Conditions on the report that decide the verdict: `accuracy_drop<=0.01`.

A metric is a short name (METRICS) or the dotted path of a number in report.json. What was not measured never passes.

Must not know: how a number was measured, files, the command line.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from calibrators.errors import InputError, UnknownNameError, argument
from calibrators.goal import DEFAULT_GOAL, DROPS, FIGURES, Goal, agreement_for, reaches, with_room
from calibrators.goal import DROP as ONE_POINT
from exporter.reporting.metrics import METRICS, Report, is_path, quantity_of, unlabelled_outputs, value_at
from exporter.reporting.quantities import units_of
from exporter.reporting.schema import GateResult, metric_paths
from exporter.reporting.where import INEXACT

__all__ = [
    "AGREEMENT",
    "DEFAULT_GATES",
    "DROP",
    "SQNR",
    "Gate",
    "accuracy_gates",
    "check_measurable",
    "evaluate",
    "goal_of",
    "judges_accuracy",
    "leaves_room",
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
_WORDS = {"true": 1.0, "false": 0.0}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*(%|[A-Za-z]+)")
_SAME_FIGURE = {"accuracy.agreement": "agreement", "accuracy.sqnr_db": "sqnr_db"}
_RENAMED = {"kernel_surprises": "unplanned_kernels"}
"""Old names of metrics, which are accepted for one release."""


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
    if name not in METRICS and not is_path(name):
        near = difflib.get_close_matches(name, metric_paths(), n=3)
        raise UnknownNameError("gate metric", name, {*METRICS, *near})
    return Gate(name, compare, _limit(limit, name, expression), old_name=given if given != name else "")


def renamed(gates: Iterable[Gate]) -> list[str]:
    """Return one warning per gate that was given by the old name of its metric."""
    return [
        f"the gate metric {gate.old_name!r} is now called {gate.name!r}: use the new name, as the next release drops "
        "the old one"
        for gate in gates
        if gate.old_name
    ]


def _limit(text: str, metric: str, expression: str) -> float:
    """Return the number of a limit such as 0.01, 1%, 1pp, 300kB or 2ms, in the unit of the report."""
    if match := _NUMBER.fullmatch(text):
        units = units_of(quantity_of(metric))
        if match[2] not in units:
            raise InputError(
                f"gate {expression!r}: {match[2]} is no unit of {metric}; its units are: {', '.join(units)}."
            )
        limit = float(Decimal(match[1]) * units[match[2]])  # as decimals, since 0.3 / 100 is not 0.003
    else:
        try:
            limit = _WORDS[text.lower()] if text.lower() in _WORDS else float(text)
        except ValueError as error:
            raise InputError(f"gate {expression!r}: the limit {text!r} is not a number.") from error
    if not math.isfinite(limit):
        raise InputError(f"gate {expression!r}: the limit {text!r} is not finite, so the gate would prove nothing.")
    return limit


def check_measurable(
    gates: Iterable[Gate],
    *,
    has_eval: bool,
    has_labels: bool,
    has_metric: bool = False,
    has_baseline: bool = False,
    why: str = "",
) -> None:
    """Raise InputError, naming gate and data, unless the data at hand can answer every gate.

    Call it before the work starts.

    why: evaluation data or labels are missing, where nothing can be given any more.
    """
    for gate in gates:
        needs_eval, needs_labels = _needs(gate.name)
        if why and ((needs_eval and not has_eval) or (needs_labels and not has_labels)):
            raise InputError(f"gate {gate.expression!r} cannot be answered. {why}")
        if needs_eval and not has_eval:
            raise InputError(
                f"gate {gate.expression!r} needs held-out data; give it with {argument('eval_data')}, or drop the gate."
            )
        if gate.name in METRICS and METRICS[gate.name].needs_metric and not has_metric:
            raise InputError(
                f"gate {gate.expression!r} needs a metric of yours; give {argument('metric', 'file.py:function')}, "
                "or gate on "
                "accuracy_drop, agreement or sqnr_db."
            )
        if needs_baseline(gate) and not has_baseline:
            raise InputError(f"gate {gate.expression!r} needs an earlier bundle; give it with {argument('baseline')}.")
        if needs_labels and not has_labels:
            raise InputError(
                f"gate {gate.expression!r} needs labels in the {argument('eval_data')} data; add them (`labels` in "
                "an .npz, or "
                "(x, labels) pairs), or gate on agreement or sqnr_db instead."
            )


def needs_labels(gate: Gate) -> bool:
    """Return whether a gate is on a score that is measured with labels."""
    return _needs(gate.name)[1]


def needs_baseline(gate: Gate | GateResult) -> bool:
    """Return whether a gate is on a difference from an earlier export."""
    return METRICS[gate.name].needs_baseline if gate.name in METRICS else gate.name.startswith("baseline.")


def _needs(name: str) -> tuple[bool, bool]:
    if name in METRICS:
        return METRICS[name].needs_eval, METRICS[name].needs_labels
    free_of_labels = ("accuracy.agreement", "accuracy.sqnr_db", "accuracy.samples")
    needs_eval = name.startswith(("accuracy.", "metric.", "data.evaluation."))
    return needs_eval, name.startswith("accuracy.") and name not in free_of_labels


def accuracy_gates(report: Report) -> list[Gate]:
    """Return the gates on accuracy of an export that names none: for each output, what was measured of it decides."""
    unlabelled = [each["agreement"] is not None for each in unlabelled_outputs(report)]
    wanted = {
        DROP: (report["accuracy"] or {}).get("metric") == "top1",
        AGREEMENT: any(unlabelled),
        SQNR: not all(unlabelled),
    }
    return [gate for gate, applies in wanted.items() if applies]


def judges_accuracy(gate: Gate | GateResult) -> bool:
    """Return whether a gate is on what the runtime makes of held-out data, whatever an earlier export made of them."""
    return (
        _needs(gate.name)[0] and not needs_baseline(gate) and gate.name.rpartition(".")[2] not in ("float", "samples")
    )


def goal_of(gates: Iterable[Gate], *, accuracy_gate: bool) -> Goal | None:
    """Return what calibration should reach so that the gates pass: their limits on figures that it can measure.

    For limits on a drop, which needs labels, agreement stands in.

    accuracy_gate: whether the default gates apply where none of `gates` is on accuracy.
    """
    on_accuracy = [gate for gate in gates if judges_accuracy(gate)]
    if not on_accuracy:
        return DEFAULT_GOAL if accuracy_gate else None
    limits: dict[str, float] = {}
    for gate in on_accuracy:
        name = "agreement" if gate.name in DROPS else _SAME_FIGURE.get(gate.name, gate.name)
        if name in FIGURES:
            limit = agreement_for(gate.limit) if gate.name in DROPS else gate.limit
            limits[name] = max(limit, limits.get(name, -math.inf))
    return limits or None


def leaves_room(result: GateResult) -> bool:
    """Return whether a gate on accuracy passed with room (calibrators.goal) to spare, or is of another kind."""
    name = _SAME_FIGURE.get(result.name, result.name)
    if not result.passed or result.value is None or name not in {*FIGURES, *DROPS}:
        return result.passed or not judges_accuracy(result)
    return reaches(name, result.value, with_room(name, result.limit))


def evaluate(gates: Iterable[Gate], report: Report) -> tuple[GateResult, ...]:
    """Return one result per gate, on the content of report.json; an unmeasured or NaN value does not pass."""
    return tuple(_evaluate(gate, report) for gate in gates)


def _evaluate(gate: Gate, report: Report) -> GateResult:
    value = METRICS[gate.name].value(report) if gate.name in METRICS else value_at(report, gate.name)
    if gate.name in METRICS and (ends := METRICS[gate.name].interval(report)) is not None:
        value = {"<": ends[1], ">": ends[0]}.get(gate.compare[0], value)
    passed = value is not None and _COMPARE[gate.compare](value, gate.limit)  # every comparison with NaN is False
    finite = value if value is not None and math.isfinite(value) else None
    return GateResult(gate.name, gate.limit, finite, passed, gate.expression)


def verdict(results: Iterable[GateResult]) -> Literal["pass", "fail"]:
    """Return "pass" if every gate passed."""
    return "pass" if all(result.passed for result in results) else "fail"


DEFAULT_GATES = tuple(
    parse(f"{metric}==0")
    for metric in ("kernel_mismatched", "parity_violations", "unplanned_kernels", INEXACT, "lint_errors")
)
"""Conditions of every export. With optimizations off all arithmetic is float: that level is reported, not gated."""

DROP, AGREEMENT, SQNR = (
    parse(f"{condition}{limit:.15g}")
    for condition, limit in (
        ("accuracy_drop_lower<=", ONE_POINT),
        *((f"{name}>=", limit) for name, limit in DEFAULT_GOAL.items()),
    )
)
"""Conditions where none is on accuracy: with labels, for decisions without labels, for all other outputs."""
