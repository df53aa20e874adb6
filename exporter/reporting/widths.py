"""The bits of a file in words: those of its weights and of the activations that its layers read.

Must not know: pages, why a layer has its bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from exporter.reporting.layer_sections import LayerEntry
from exporter.reporting.number_format import significant
from exporter.reporting.schema import Report

__all__ = ["activation_bits", "weight_bits"]


def weight_bits(report: Report) -> str:
    """Return the bits of the weights, and their mean over all weights where they are mixed."""
    weights = _weights(report)
    values = sum(layer.values or 0 for layer in weights)
    mean = sum(layer.bits * (layer.values or 0) for layer in weights) / values if values else None
    return _mixed([layer.bits for layer in weights] or [report.bits.weight], mean)


def activation_bits(report: Report) -> str:
    """Return the bits of the activations that layers with weights read; "float" if no integer layer is there."""
    weights = _weights(report)
    found = [layer.input_bits for layer in weights if layer.input_bits is not None]
    return "float" if weights and not found else _mixed(found or [report.bits.activation], None)


def _weights(report: Report) -> list[LayerEntry]:
    return [layer for layer in report.layers or () if layer.kind == "weight"]


def _mixed(bits: Sequence[int], mean: float | None) -> str:
    low, high = min(bits), max(bits)
    if low == high:
        return f"{low} bits"
    return f"{low} to {high} bits" + (f", {significant(mean, 3)} on average" if mean is not None else "")
