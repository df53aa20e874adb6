"""Failed gates in words: what was found, what in the network causes it, and what to try, with arguments to paste.

Arguments are written as the caller gives them (calibrators.errors.argument): flags, or keywords of Python.

Must not know: pages, files, how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from calibrators.errors import argument, counted
from calibrators.ladder_record import CostlyLayers, Escape
from calibrators.targets import DEFAULT_TARGET
from exporter.reporting.gates import needs_baseline
from exporter.reporting.ladder import figure_text
from exporter.reporting.layer_sections import LayerEntry
from exporter.reporting.metrics import quantity_of
from exporter.reporting.number_format import count, differ, percent
from exporter.reporting.proofs import UNPROVED, not_proved
from exporter.reporting.quantities import written
from exporter.reporting.schema import GateResult, Report
from exporter.reporting.where import INEXACT, not_exact_here

__all__ = ["Failure", "failures", "found_by", "layer_advice", "layer_rules", "unplanned_kernels"]

NAMED: Final = 3
"""Layers or operators that a failure names."""

LISTED: Final = 8
"""Layers whose rules advice gives at most."""

INDICES: Final = ("INT32", "INT64")
"""Types of biases and shapes."""

WIDE_BITS: Final = 8
LEARNED: Final = "qdrop"
"""Method that loses least at few bits (docs/results.md); at 8 bits it is the default one."""
USUAL: Final = "gptq"


@dataclass(frozen=True)
class Failure:
    """A failed gate.

    found:  what was measured, and the limit.
    causes: what contributes most, as a phrase; empty where no part of the network does.
    advice: what to try, one sentence each.
    """

    gate: GateResult
    found: str
    causes: str
    advice: tuple[str, ...]


Cause: TypeAlias = tuple[str, Sequence[str]]


def failures(report: Report) -> tuple[Failure, ...]:
    """Return the failed gates of a report in their order."""
    found = []
    for gate in report.gates:
        if not gate.passed:
            causes, advice = _CAUSES[gate.name](report, gate) if gate.name in _CAUSES else ("", ())
            found.append(Failure(gate, found_by(gate, report), causes, tuple(advice)))
    return tuple(found)


def found_by(gate: GateResult, report: Report) -> str:
    """Return what a gate found, with units, or why it failed where that is more than a number."""
    reasons = {
        INEXACT: not_exact_here(report.holds or (), report.environment.processor if report.environment else None),
        UNPROVED: not_proved(report.proved_on or ()),
    }
    if reason := reasons.get(gate.name):
        return reason
    quantity = quantity_of(gate.name)
    found = "it was not measured" if gate.value is None else f"it is {written(gate.value, quantity)}"
    if gate.value is None and needs_baseline(gate) and report.baseline is not None and report.baseline.notes:
        found += f" ({' '.join(report.baseline.notes)})"
    return f"{found}, the limit is {written(gate.limit, quantity)}"


def unplanned_kernels(found: Mapping[str, int]) -> str:
    """Name the differences from the plan: {"QLinearConv": -1} -> 1 QLinearConv fewer than planned."""
    return ", ".join(f"{abs(n)} {name} {'more' if n > 0 else 'fewer'} than planned" for name, n in found.items())


def _listed(title: str, texts: Sequence[str]) -> str:
    return f"{title}: {', '.join(texts)}" if texts else ""


def layer_rules(settings: Mapping[str, Mapping[str, object]]) -> str:
    """Return the argument that gives layers settings: --layer 'head: float=true' --layer 'stem: weight_bits=8'."""
    return argument("layers", [f"{layer}: {', '.join(map(_setting, own.items()))}" for layer, own in settings.items()])


def _setting(pair: tuple[str, object]) -> str:
    return f"{pair[0]}={str(pair[1]).lower()}"


def _escapes(found: Iterable[Escape]) -> str:
    return layer_rules({escape.layer: escape.settings for escape in found})


def _same_for(layers: Iterable[LayerEntry], settings: Mapping[str, object]) -> str:
    return layer_rules(dict.fromkeys(map(_name_of, layers), settings))


def _name_of(layer: LayerEntry) -> str:
    return layer.module or layer.site


def _accuracy(report: Report, gate: GateResult) -> Cause:
    """Name the layers that cost most; advise on methods, bits, float layers and limits."""
    costs = _costs(report)
    total = sum(costs.values())
    causes = [f"{name} ({percent(cost / total, 0)})" for name, cost in [*costs.items()][:NAMED] if total]
    title = "layers that cost the prediction most" if report.costly_layers else "layers that add most of the noise"
    return _listed(title, causes), [*_accuracy_advice(report, gate)]


def _costs(report: Report) -> dict[str, float]:
    """Return the cost of layers by name, the costliest first: at the outputs of the network, or else at their own."""
    if report.costly_layers is not None:
        return {escape.layer: escape.cost for escape in report.costly_layers.layers}
    return {_name_of(layer): layer.noise_added or 0.0 for layer in _noisiest(report)}


def _noisiest(report: Report) -> list[LayerEntry]:
    return sorted((layer for layer in report.layers or () if layer.noise_added), key=lambda x: -(x.noise_added or 0.0))


def _accuracy_advice(report: Report, gate: GateResult) -> Iterator[str]:
    noisiest = _noisiest(report)[:NAMED]
    few = [layer for layer in noisiest if min(layer.bits, layer.input_bits or WIDE_BITS) < WIDE_BITS]
    better = LEARNED if few else USUAL
    if report.method not in (LEARNED, better, "auto"):
        yield f"another method: {argument('method', better)}"
    if report.costly_layers is not None:
        yield from layer_advice(report.costly_layers)
    elif few:
        wide = {"weight_bits": 8} | ({} if few[0].input_bits is None else {"activation_bits": 8})
        yield f"more bits for the layers named: {_same_for(few, wide)}"
    elif noisiest:
        yield f"the layers named in float: {_same_for(noisiest, {'float': True})}"
    if gate.name.endswith("agreement"):
        yield f"if the output is no score of classes, a gate on its noise: {argument('gates', ['sqnr_db>=15dB'])}"
    if gate.name.startswith("accuracy_drop") and gate.value is not None:
        limit = f"{gate.name}<={math.ceil(100 * gate.value)}pp"
        yield f"if this loss is acceptable, a limit of its own: {argument('gates', [limit])}"


def layer_advice(found: CostlyLayers) -> Iterator[str]:
    """Yield rules for the layers that cost most, ready to paste, with what they give on calibration samples."""
    escapes = found.layers[: min(found.advised or NAMED, LISTED)]
    if not escapes:
        return
    rules = _escapes(escapes)
    if found.advised is None:
        yield f"finer grids for the layers that cost most: {rules}"
    elif found.advised > LISTED:
        yield f"finer grids for {found.advised} layers, of which report.html lists all: {rules} ..."
    else:
        figures = " and ".join(map(figure_text, found.better or ()))
        layers = counted(len(escapes), "layer")
        yield f"finer grids for {layers}, with {figures} on {found.samples} calibration samples: {rules}"


def _differing(report: Report, _: GateResult) -> Cause:
    level = report.parity.optimized
    sites = [f"{node.site} ({node.kernel}, {differ(node)})" for node in level.nodes if not node.legal]
    outputs = [f"output {output.name}" for output in level.outputs if not output.legal]
    found = [*sites, *outputs] or [f"{node.site} ({node.kernel}, {differ(node)})" for node in level.worst]
    advice = ["another release of onnxruntime, to tell whether this one changed: intact verify DIR --on ort==VERSION"]
    return _listed("values that differ", found[:NAMED]), advice


def _unplanned(report: Report, _: GateResult) -> Cause:
    return _listed("kernels", [unplanned_kernels(report.parity.optimized.unplanned or {})]), ()


def _inexact(report: Report, _: GateResult) -> Cause:
    return "", [
        f"a form that is exact on this processor: {argument('target', DEFAULT_TARGET)}, or "
        f"{argument('portable', 'uint8')}"
    ]


def _lint(report: Report, _: GateResult) -> Cause:
    errors = [finding for finding in report.lint or () if finding.severity == "error"]
    texts = [f"{finding.rule} at {finding.where}: {finding.message}" for finding in errors[:NAMED]]
    return _listed("findings", texts), ()


FEW = 4
"""Bits that are advised where a file is too large."""


def _size(report: Report, gate: GateResult) -> Cause:
    largest = sorted(report.layers or (), key=lambda layer: -(layer.values or 0))[:NAMED]
    causes = [f"{layer.module or layer.site} ({count(layer.values)} of {layer.bits} bits)" for layer in largest]
    wide = [layer for layer in largest if layer.bits > FEW]
    advice = [f"fewer bits for layers named: {_same_for(wide, {'weight_bits': FEW})}"] if wide else []
    weights = sum(size for kind, size in report.size.by_type.items() if "INT" in kind and kind not in INDICES)
    if gate.name == "size" and (room := gate.limit - report.size.bytes + weights) > 0:
        advice.append(f"bits chosen per layer: {argument('budget', [f'weight_bytes<={room / 1000:.4g}k'])}")
    return _listed("largest weights", causes), advice


def _time(report: Report, _: GateResult) -> Cause:
    slowest = report.time_shares.slowest if report.time_shares else ()
    causes = [f"{each.op} ({percent(each.share, 0)} of the time)" for each in slowest]
    return _listed("slowest float operators", causes), [f"{each.op}: {each.advice}" for each in slowest]


def _in_float(report: Report, _: GateResult) -> Cause:
    nodes = sorted(report.coverage.float_nodes, key=lambda node: -(node.macs or 0))[:NAMED]
    placed = (report.config or {}).get("placement") == "fastest"
    advice = f"layers that are faster in float as integers all the same: {argument('placement', 'integer')}"
    causes = [f"{node.name} ({node.why})" for node in nodes]
    return _listed("largest operators in float", causes), [advice] if placed else ()


_CAUSES: Final[dict[str, Callable[[Report, GateResult], Cause]]] = {
    **dict.fromkeys(
        (
            "accuracy_drop",
            "accuracy_drop_lower",
            "accuracy_drop_upper",
            "reference_drop",
            "agreement",
            "lowest_agreement",
            "sqnr_db",
            "lowest_sqnr_db",
            "metric",
            "metric_drop",
        ),
        _accuracy,
    ),
    **dict.fromkeys(
        (
            "kernel_mismatched",
            "parity_violations",
            "mismatched",
            "max_lsb",
            "outputs_identical",
            "float_mismatch_rate",
        ),
        _differing,
    ),
    "unplanned_kernels": _unplanned,
    INEXACT: _inexact,
    "lint_errors": _lint,
    **dict.fromkeys(("size", "size_ratio"), _size),
    **dict.fromkeys(("latency", "latency_ratio", "integer_time"), _time),
    **dict.fromkeys(("integer_macs", "integer_nodes", "integer_node_share"), _in_float),
}
"""Functions that return the causes of a failure and the advice, by metric."""
