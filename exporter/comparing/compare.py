"""Find the differences of two bundles, from their reports and the scores of their evaluation samples.

Must not know: how differences look, torch, runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.intervals import Interval, ratio
from exporter.handover.bundle import check_bundle, verify_manifest
from exporter.handover.scores import read_scores
from exporter.reporting.difference import Difference, Figure, GateChange, LayerChange, Unit, ValueChange
from exporter.reporting.layer_sections import LayerEntry
from exporter.reporting.schema import Report, read_report
from runtime_tests.measure.paired import Change, SampleScores, change

__all__ = ["Export", "compare", "read_export", "value_changes"]

SAME_SCALE = 1e-6
"""Scales that differ by less, as a share, count as equal."""
SAME_NOISE = 0.05
"""Signal-to-noise ratios that differ by less, in dB, count as equal."""
MODEL = "model.onnx"


@dataclass(frozen=True, eq=False)
class Export:
    """The parts of an export that are compared; sha256: of its model file."""

    name: str
    report: Report
    scores: SampleScores | None
    sha256: str


def read_export(folder: Path) -> Export:
    """Read a bundle.

    raises: InputError for a folder that is no bundle, or one that was changed or damaged.
    """
    check_bundle(folder)
    manifest = verify_manifest(folder)
    sha256 = str(manifest["files"].get(MODEL, {}).get("sha256"))
    return Export(str(folder), read_report(folder / "report.json"), read_scores(folder), sha256)


def _at(part: str, name: str) -> Callable[[Report], float | None]:
    """Return a reader of a number in a part of the report, which may be missing."""

    def read(report: Report) -> float | None:
        value = getattr(getattr(report, part), name, None)
        return None if value is None else float(value)

    return read


def _score(network: str) -> Callable[[Report], float | None]:
    """Return a reader of a score that is a share."""
    read = _at("accuracy", network)
    return lambda report: read(report) if report.accuracy and report.accuracy.metric != "sqnr_db" else None


FIGURES: tuple[tuple[str, Unit, Callable[[Report], float | None]], ...] = (
    ("score in the runtime", "share", _score("runtime")),
    ("score of the float model", "share", _score("float")),
    ("agreement with the float model", "share", _at("accuracy", "agreement")),
    ("SQNR", "dB", _at("accuracy", "sqnr_db")),
    ("KL divergence", "nats", _at("accuracy", "mean_kl")),
    ("size", "bytes", lambda report: float(report.size.bytes)),
    ("latency", "ms", _at("latency_ms", "quantized")),
    ("latency over that of the float model", "ratio", _at("latency_ms", "ratio")),
    ("integer MACs", "share", _at("coverage", "integer_macs")),
    ("integer nodes", "share", lambda report: report.coverage.integer_nodes / max(report.coverage.compute_nodes, 1)),
    ("integer time", "share", _at("time_shares", "integer")),
    ("differing integers", "count", lambda report: float(report.parity.optimized.mismatched)),
)
"""The figures of a report: name, unit, and how to read them."""


def compare(before: Export, after: Export) -> Difference:
    """Return how a later export differs from an earlier one.

    Scores are compared by sample where both were evaluated on the same data; else only their values are given.
    """
    old, new = before.report, after.report
    unpaired = _unpaired(before, after)
    drop, error = (None, None) if unpaired else _scores(before.scores, after.scores)
    were, are = (_float_nodes(report) for report in (old, new))
    return Difference(
        before=before.name,
        after=after.name,
        identical=before.sha256 == after.sha256,
        verdicts=(old.verdict, new.verdict),
        metric=new.accuracy.metric if new.accuracy else None,
        drop=drop,
        error=error,
        figures=tuple(_figures(old, new)),
        gates=tuple(_gates(old, new)),
        layers=tuple(_layers(old.layers or (), new.layers or ())),
        now_float=tuple(sorted(are - were)),
        now_integer=tuple(sorted(were - are)),
        settings=tuple(value_changes(_settings(old), _settings(new))),
        origins=tuple(value_changes(_origins(old), _origins(new))),
        unpaired=unpaired or None,
        notes=tuple(filter(None, (unpaired, _other_processor(old, new), _doubt(old, new)))),
    )


OTHER_DATA = "The evaluation data differ, so the scores are not compared by sample."
NO_SCORES = "One of the exports has no scores by sample, so the scores are not compared by sample."
OTHER_PROCESSOR = "The exports were timed on different processors: compare latencies with care."
TIMED_APART = (
    "The exports were timed at different times, so that latencies also differ by what else the machine did; those over "
    "the float model, timed in the same rounds, differ less by that."
)
UNRELIABLE = "A latency is unreliable, so latencies are not compared; time both exports on an idle machine."


def _unpaired(before: Export, after: Export) -> str:
    """Return why scores cannot be compared by sample, empty where they can or where there are none."""
    evaluations = [each.report.data.evaluation if each.report.data else None for each in (before, after)]
    if evaluations == [None, None]:
        return ""
    if None in evaluations or evaluations[0].sha256 != evaluations[1].sha256:  # type: ignore[union-attr]
        return OTHER_DATA
    if before.scores is None or after.scores is None or before.scores.error.shape != after.scores.error.shape:
        return NO_SCORES
    return ""


def _other_processor(old: Report, new: Report) -> str:
    machines = old.environment, new.environment
    return OTHER_PROCESSOR if all(machines) and machines[0].cpu != machines[1].cpu else ""  # type: ignore[union-attr]


def _is_unreliable(report: Report) -> bool:
    return report.latency_ms is not None and report.latency_ms.reliable is False


def _doubt(old: Report, new: Report) -> str:
    """Return how far different latencies compare, empty where there are none."""
    if old.latency_ms is None or new.latency_ms is None or old.latency_ms.quantized == new.latency_ms.quantized:
        return ""
    return UNRELIABLE if _is_unreliable(old) or _is_unreliable(new) else TIMED_APART


def _scores(before: SampleScores | None, after: SampleScores | None) -> tuple[Change | None, Interval | None]:
    if before is None or after is None or not len(before.error):
        return None, None
    drop = None if before.right is None or after.right is None else change(before.right, after.right)
    return drop, ratio([(after.error, before.error)]) if np.any(before.error) else None


def _figures(old: Report, new: Report) -> Iterator[Figure]:
    """Yield the numbers that at least one export has."""
    unreliable = _is_unreliable(old) or _is_unreliable(new)
    for name, unit, read in FIGURES:
        before, after = read(old), read(new)
        if before is not None or after is not None:
            doubtful = unreliable and unit in ("ms", "ratio")
            quotient = after / before if before and after is not None and not doubtful else None
            yield Figure(name, unit, before, after, quotient)


def _gates(old: Report, new: Report) -> Iterator[GateChange]:
    before, after = ({gate.expression: gate.passed for gate in report.gates} for report in (old, new))
    for expression in dict.fromkeys([*after, *before]):
        if before.get(expression) != after.get(expression):
            yield GateChange(expression, before.get(expression), after.get(expression))


def _layers(old: Iterable[LayerEntry], new: Iterable[LayerEntry]) -> Iterator[LayerChange]:
    """Yield the sites that differ, in the order of the later export."""
    before, after = ({(layer.kind, layer.site): layer for layer in layers} for layers in (old, new))
    for key in dict.fromkeys([*after, *before]):
        was, now = before.get(key), after.get(key)
        bits = (was.bits if was else None, now.bits if now else None)
        noise = (was.sqnr_db if was else None, now.sqnr_db if now else None)
        scale = now.scale_max / was.scale_max if was and now and was.scale_max else None
        found = LayerChange(key[1], key[0], bits, scale, noise)
        moved = scale is not None and abs(scale - 1) > SAME_SCALE
        if bits[0] != bits[1] or moved or abs(found.noise_added_db) > SAME_NOISE:
            yield found


def _float_nodes(report: Report) -> set[str]:
    return {f"{node.op} {node.name}" for node in report.coverage.float_nodes}


def _settings(report: Report) -> Mapping[str, Any]:
    config = {name: value for name, value in (report.config or {}).items() if name != "baseline"}
    options = config.pop("options", {})
    return config | {f"options.{name}": value for name, value in options.items()}


def _origins(report: Report) -> Mapping[str, Any]:
    """Return versions, machine, and where model and data are from."""
    found: dict[str, Any] = {"intact": report.tool.version if report.tool else None}
    if report.environment:
        machine = report.environment
        names = ("torch", "onnxruntime", "onnx", "onnxscript", "onnxsim", "numpy", "python", "cpu")
        found |= {name: getattr(machine, name) for name in names}
    if report.model:
        found |= {"model": report.model.source, "parameters": report.model.parameters}
    for name in ("calibration", "evaluation"):
        source = getattr(report.data, name, None)
        if source:
            found |= {f"{name} data": source.source, f"{name} samples": source.samples}
            found[f"{name} sha256"] = source.sha256[:12]
    return found


def value_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[ValueChange]:
    """Yield the values that differ, in the order of the later mapping."""
    for name in dict.fromkeys([*after, *before]):
        if before.get(name) != after.get(name):
            yield ValueChange(name, before.get(name), after.get(name))
