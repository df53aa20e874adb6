"""The parts of the report that describe the file and the machine.

Must not know: how anything is computed, how pages look.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import torch

from runtime_tests.measure.latency import Timings
from runtime_tests.ort.saturation import this_cpu
from runtime_tests.ort.versions import minimum_version

__all__ = [
    "Alternative",
    "Emission",
    "Environment",
    "Storage",
    "emission_of",
    "environment",
    "machine_of",
    "storage_of",
]


@dataclass(frozen=True)
class Emission:
    """The file as written.

    nodes:           their number by operator.
    min_onnxruntime: the oldest release of onnxruntime that runs it, because of `needs`.
    """

    opset: int
    ir_version: int
    nodes: dict[str, int]
    min_onnxruntime: str | None = None
    needs: str | None = None


@dataclass(frozen=True)
class Alternative:
    """The file with weights stored in another type; latency_ms is None where nothing was timed."""

    storage: str
    bytes: int
    latency_ms: float | None


@dataclass(frozen=True)
class Storage:
    """The storage of weights below 8 bits, and the cost of other types; types that change nothing are left out."""

    storage: str
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class Environment:
    """The machine and the libraries of the measurement; processor: its family, None if not known."""

    cpu: str
    flags: tuple[str, ...]
    torch: str
    onnxruntime: str
    onnx: str
    python: str
    threads: int
    processor: str | None = None
    onnxscript: str | None = None
    onnxsim: str | None = None
    numpy: str | None = None


def emission_of(model: ir.Model) -> Emission:
    """Describe a file: opset, IR version, operators, the oldest onnxruntime that runs it."""
    nodes, need = dict(Counter(node.op_type for node in model.graph)), minimum_version(model)
    return Emission(model.opset_imports.get("", 0), model.ir_version, nodes, str(need.version), need.what)


def storage_of(storage: str, alternatives: Mapping[str, Path], timings: Timings | None) -> Storage:
    """Describe how weights are stored, and the cost of the files `alternatives`, which store them otherwise."""
    return Storage(
        storage,
        tuple(
            Alternative(name, path.stat().st_size, timings.median_ms(name) if timings else None)
            for name, path in alternatives.items()
        ),
    )


def machine_of(found: Environment | None) -> str:
    """Return the machine and the runtime of a measurement in words."""
    return f"{found.cpu}, onnxruntime {found.onnxruntime}" if found is not None else "a machine that is not named"


def environment(threads: int) -> Environment:
    """Describe this machine and its libraries."""
    return Environment(
        cpu=this_cpu().brand,
        flags=this_cpu().flags,
        processor=this_cpu().family,
        torch=str(torch.__version__),
        onnxruntime=onnxruntime.__version__,
        onnx=onnx.__version__,
        python=platform.python_version(),
        threads=threads,
        **{name: importlib.metadata.version(name) for name in ("onnxscript", "onnxsim", "numpy")},
    )
