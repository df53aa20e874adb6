"""The parts of report.json that describe: tool, model, folds, file, machine.

Must not know: how anything is computed, how pages look.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import fx

from calibrators.record import Record
from exporter.folding.fold_regions import FoldReport
from runtime_tests.ort.saturation import Saturation

__all__ = [
    "emission_entry",
    "environment",
    "fold_entry",
    "method_entries",
    "model_entry",
    "saturation_entry",
    "storage_entry",
]


def fold_entry(report: FoldReport) -> dict[str, Any]:
    """What folding did and what it refused."""
    return asdict(report)


def method_entries(record: Record) -> dict[str, Any]:
    """Return the records of preparations and of methods that train or search; empty for other methods."""
    parts: dict[str, Any] = _without_defaults(record)
    return {name: part for name, part in parts.items() if name != "notes"}


def _without_defaults(value: Any) -> Any:
    """Return dataclasses as dictionaries, without the fields that are None by default."""
    if is_dataclass(value):
        found = {field.name: (getattr(value, field.name), field.default) for field in fields(value)}
        return {k: _without_defaults(v) for k, (v, default) in found.items() if v is not None or default is not None}
    if isinstance(value, Mapping):
        return {key: _without_defaults(item) for key, item in value.items()}
    return [_without_defaults(item) for item in value] if isinstance(value, tuple) else value


def model_entry(source: str, graph: fx.GraphModule, model: ir.Model) -> dict[str, Any]:
    """Interface of the model: inputs, outputs, parameters."""

    def ports(values: Iterable[ir.Value]) -> list[dict[str, Any]]:
        return [
            {
                "name": value.name,
                "shape": [dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()],
                "dtype": value.dtype.name if value.dtype else "?",
            }
            for value in values
        ]

    return {
        "source": source,
        "inputs": ports(model.graph.inputs),
        "outputs": ports(model.graph.outputs),
        "parameters": sum(parameter.numel() for parameter in graph.parameters()),
        "dynamic_batch": graph.meta["dynamic_batch"],
        "notes": list(graph.meta["notes"]),
    }


def emission_entry(model: ir.Model) -> dict[str, Any]:
    """Opset, IR version and operators of the file."""
    counts: dict[str, int] = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return {"opset": model.opset_imports.get("", 0), "ir_version": model.ir_version, "nodes": counts}


def storage_entry(storage: str, alternatives: Mapping[str, Path], timing: Mapping[str, Any] | None) -> dict[str, Any]:
    """How weights are stored, and what the file would cost otherwise: bytes, and milliseconds where runs were timed."""
    others = [
        {"storage": name, "bytes": path.stat().st_size, "latency_ms": timing[name] if timing else None}
        for name, path in alternatives.items()
    ]
    return {"storage": storage, "alternatives": others}


def environment(saturating: Saturation, threads: int) -> dict[str, Any]:
    """Machine and libraries."""
    return {
        "cpu": saturating.cpu.brand,
        "flags": list(saturating.cpu.flags),
        "torch": str(torch.__version__),
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
        "threads": threads,
        **{name: importlib.metadata.version(name) for name in ("onnxscript", "onnxsim", "numpy")},
    }


def saturation_entry(saturating: Saturation) -> dict[str, Any]:
    """Layers that could saturate 16-bit sums on a CPU without VNNI."""
    return {
        "safe_without_vnni": not saturating.risks,
        "affected_here": saturating.affects_this_cpu,
        "layers": [{"name": r.name, "worst": float(r.worst), "limit": 32767.0} for r in saturating.risks],
    }
