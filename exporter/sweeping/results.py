"""The outcomes of a sweep: figures of every bundle, why a job left none, and which bundles others dominate.

A bundle dominates another one if it is better in one figure and worse in none: quality, size, latency. Latencies whose
95 % intervals meet or that are unreliable count as equal, and so do sizes that hardly differ.

Must not know: how jobs are run, terminals, pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from calibrators.errors import InputError, counted
from calibrators.targets import get_target
from exporter.reporting.difference_tables import Section
from exporter.reporting.metrics import METRICS, value_at
from exporter.reporting.number_format import DASH, decibel, percent, significant, size
from exporter.reporting.schema import read_json, validate_report
from exporter.sweeping.plan import Sweep, SweepJob, label_of

__all__ = ["PAGE", "QUALITIES", "Gathered", "Quality", "Result", "failed", "gather", "main_table", "summary"]

PAGE = "report.html"

SAME_SIZE = 1e-3
"""Sizes that differ by less, as a share, count as equal: the names of methods in a file have different lengths."""

State = Literal["pass", "fail", "error", "open"]
"""The verdict of a bundle; "error" where there is none that can be read, "open" where the job was not run."""


@dataclass(frozen=True)
class Result:
    """The outcome of a job; None for what was not measured.

    bundle:           folder of the bundle, beside the table.
    exit_code:        of a job without a bundle, negative if a signal ended it, or of reading its bundle; message: why.
    accuracy:         score in the runtime, with labels; accuracy_drop: the float model's minus it.
    kl, sqnr_db:      distance from the float model; infinite where outputs are identical.
    latency_ms:       of the runtime of the target on this machine; latency_interval: 95 % interval of the median.
    dominated_by:     key of a job that is better in one figure, and worse in none.
    """

    key: str
    values: dict[str, str]
    network: str
    state: State
    bundle: str | None = None
    exit_code: int | None = None
    message: str | None = None
    accuracy: float | None = None
    accuracy_drop: float | None = None
    kl: float | None = None
    sqnr_db: float | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None
    latency_interval: tuple[float, float] | None = None
    latency_ratio: float | None = None
    latency_reliable: bool | None = None
    evaluation_sha256: str | None = None
    dominated_by: str | None = None

    @property
    def label(self) -> str:
        """The values, for people."""
        return label_of(self.values)


@dataclass(frozen=True)
class Quality:
    """A figure that says how good a network is.

    title:    with the unit, for a plot; scale: its factor to that unit.
    of_float: whether it is a distance from the float network, so that only results of one network compare.
    """

    name: str
    field: str
    title: str
    scale: float
    higher_is_better: bool
    of_float: bool

    def value(self, result: Result) -> float | None:
        """Return the figure of a result."""
        found: float | None = getattr(result, self.field)
        return found


QUALITIES = (
    Quality("accuracy", "accuracy", "accuracy, %", 100.0, higher_is_better=True, of_float=False),
    Quality("KL", "kl", "KL divergence from float", 1.0, higher_is_better=False, of_float=True),
    Quality("SQNR", "sqnr_db", "SQNR, dB", 1.0, higher_is_better=True, of_float=True),
)
"""Figures that may judge the bundles: the first of these that all of them have does."""


@dataclass(frozen=True)
class Gathered:
    """All results of a sweep, in the order of its jobs; axes: what varies; quality: name of the figure that judges."""

    axes: tuple[str, ...]
    quality: str | None
    results: tuple[Result, ...]

    @property
    def judged_by(self) -> Quality | None:
        """The figure that judges, None without evaluation data."""
        return next((each for each in QUALITIES if each.name == self.quality), None)

    def number(self, key: str) -> int:
        """Return the number by which tables and plots call a job."""
        return next(number for number, each in enumerate(self.results, start=1) if each.key == key)


def gather(sweep: Sweep) -> Gathered:
    """Return what became of every job; a bundle that cannot be read is an error of its job."""
    results = [_result(each, sweep.axes) for each in sweep.jobs]
    finished = [each for each in results if each.bundle is not None]
    quality = next((q for q in QUALITIES if finished and all(q.value(each) is not None for each in finished)), None)
    if quality is not None:
        results = _judged(results, quality)
    return Gathered(sweep.axes, quality.name if quality else None, tuple(results))


def _result(job: SweepJob, axes: Sequence[str]) -> Result:
    values = {name: text for name, text in job.values.items() if name in axes}
    network = " ".join(filter(None, (job.job.model, job.job.checkpoint, job.job.checkpoint_key)))
    empty = Result(job.key, values, network, "open")
    try:
        if job.is_finished:
            return _of_bundle(empty, job)
        if not job.error.is_file():
            return empty
        code, message = _reason(job)
    except InputError as error:
        code, message = error.exit_code, f"{error} Another run with --overwrite makes it anew."
    return replace(empty, state="error", exit_code=code, message=message)


def _reason(job: SweepJob) -> tuple[int, str]:
    """Return exit code and message of a job that left no bundle.

    raises: InputError if the file does not hold them.
    """
    match read_json(job.error):
        case {"exit_code": int(code), "message": str(message)}:
            return code, message
    raise InputError(f"{job.error} does not say why there is no bundle.")


def _of_bundle(empty: Result, job: SweepJob) -> Result:
    """Return the result with the figures of the job's bundle.

    raises: InputError.
    """
    report = read_json(job.bundle / "report.json")
    validate_report(report)
    timed = report["latency_ms"] if get_target(report["target"]).runtime == "onnxruntime" else None
    labelled = report["accuracy"] is not None and report["accuracy"]["metric"] == "top1"
    return replace(
        empty,
        state=report["verdict"],
        bundle=job.bundle.name,
        accuracy=value_at(report, "accuracy.runtime") if labelled else None,
        accuracy_drop=METRICS["accuracy_drop"].value(report) if labelled else None,
        kl=value_at(report, "accuracy.mean_kl"),
        sqnr_db=METRICS["sqnr_db"].value(report),
        size_bytes=report["size"]["bytes"],
        latency_ms=timed and timed["quantized"],
        latency_interval=METRICS["latency"].interval(report) if timed else None,
        latency_ratio=timed and timed["ratio"],
        latency_reliable=timed and timed.get("reliable"),
        evaluation_sha256=_evaluation(report),
    )


def _evaluation(report: Mapping[str, Any]) -> str | None:
    data = report.get("data") or {}
    return (data.get("evaluation") or {}).get("sha256")


def _judged(results: Sequence[Result], quality: Quality) -> list[Result]:
    """Return the results with the keys of those that dominate them, one of which nothing dominates first."""
    alike: dict[tuple[Any, ...], list[Result]] = {}
    for each in results:
        if each.bundle is not None:
            network = each.network if quality.of_float else ""
            alike.setdefault((each.evaluation_sha256, each.latency_ms is None, network), []).append(each)
    dominated_by: dict[str, str] = {}
    for group in alike.values():
        low, high = np.array([_costs(each, quality) for each in group]).transpose(2, 0, 1)  # [results, figures] each
        above = [(low <= high[i]).all(1) & (high < low[i]).any(1) for i in range(len(group))]
        counts = np.array([np.count_nonzero(each) for each in above])
        for each, by in zip(group, map(np.flatnonzero, above), strict=True):
            if len(by):
                dominated_by[each.key] = group[by[counts[by].argmin()]].key
    return [replace(each, dominated_by=dominated_by.get(each.key)) for each in results]


def _costs(result: Result, quality: Quality) -> list[tuple[float, float]]:
    """Return quality, size and latency, each as an interval of which less is better.

    An unreliable latency may be any, so that it is no worse and no better than another one.
    """
    value, latency = quality.value(result), result.latency_ms
    assert value is not None and result.size_bytes is not None
    cost, room = -value if quality.higher_is_better else value, SAME_SIZE / 2
    sizes = result.size_bytes * (1 - room), result.size_bytes * (1 + room)
    if latency is None or result.latency_reliable is False:
        return [(cost, cost), sizes, (-math.inf, math.inf)]
    return [(cost, cost), sizes, result.latency_interval or (latency, latency)]


def _milliseconds(value: float | None) -> str:
    return DASH if value is None else f"{significant(value, 3)} ms"


FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("accuracy", "accuracy", percent),
    ("KL", "kl", lambda value: significant(value, 3)),
    ("SQNR", "sqnr_db", decibel),
    ("size", "size_bytes", size),
    ("latency", "latency_ms", _milliseconds),
)
"""Columns of the table: title, field, form."""


def main_table(found: Gathered, *, brief: bool = False) -> Section:
    """Return the table of all jobs; a column that is empty in all rows is left out, and SQNR where KL says more.

    brief: for a terminal: of the qualities only the one that judges.
    """
    known = [(*each, [getattr(result, each[1]) for result in found.results]) for each in FIGURES]
    shown = [each for each in known if any(value is not None for value in each[3])]
    qualities = [each.name for each in QUALITIES if each.name in (title for title, *_ in shown)]
    left_out = {*qualities} - {found.quality} if brief else {"SQNR"} & {*qualities[1:]} - {found.quality}
    shown = [each for each in shown if each[0] not in left_out]
    front = ("worse\nthan",) if found.quality else ()
    columns = ("#", *found.axes, "verdict", *(each[0] for each in shown), *front)
    rows = [
        (
            str(number),
            *(result.values[axis] for axis in found.axes),
            result.state,
            *(form(values[number - 1]) for _, _, form, values in shown),
            *([_place(found, result)] if front else []),
        )
        for number, result in enumerate(found.results, start=1)
    ]
    return Section("Jobs", columns, tuple(rows))


def _place(found: Gathered, result: Result) -> str:
    return DASH if result.dominated_by is None else str(found.number(result.dominated_by))


def failed(found: Gathered) -> Section:
    """Return the table of the jobs without a bundle that can be read."""
    rows = tuple(
        (str(number), result.label, str(result.exit_code), result.message or "")
        for number, result in enumerate(found.results, start=1)
        if result.state == "error"
    )
    return Section("Jobs without results", ("#", "job", "exit code", "message"), rows)


STATES: Mapping[State, str] = {
    "pass": "pass",
    "fail": "with a failed gate",
    "error": "without results",
    "open": "not run",
}


def summary(found: Gathered) -> list[str]:
    """Return the sentences above the table: how the jobs ended, what the last column says, what to beware of."""
    states = [each.state for each in found.results]
    counts = [f"{states.count(state)} {text}" for state, text in STATES.items() if state in states]
    sentences = [f"{counted(len(states), 'job')}: {', '.join(counts)}."]
    quality = found.judged_by
    if quality is not None:
        network = " exports the same network, and" if quality.of_float else ""
        sentences.append(
            f"Worse than N: job N{network} is better in {quality.name}, size or latency, and worse in none of them; "
            "latencies that are unreliable or whose 95 % intervals meet, and sizes within 0.1 %, count as equal."
        )
    elif any(each.bundle for each in found.results):
        sentences.append("Nothing says how good the bundles are in comparison: export all of them with `eval`.")
    numbers = [str(n) for n, each in enumerate(found.results, start=1) if each.latency_reliable is False]
    if numbers:
        sentences.append(
            f"Unreliable latencies: {', '.join(numbers)}. Time these jobs on an idle machine, one at a time."
        )
    return sentences
