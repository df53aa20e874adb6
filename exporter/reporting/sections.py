"""The parts of the report that describe the model, the file and the machine.

Must not know: how anything is computed, how pages look.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx

from exporter.inputs.raw import RawInput
from runtime_tests.measure.latency import Timings
from runtime_tests.ort.saturation import this_cpu
from runtime_tests.ort.versions import minimum_version

__all__ = [
    "Alternative",
    "Emission",
    "Environment",
    "Model",
    "Port",
    "Storage",
    "emission_of",
    "environment",
    "model_of",
    "storage_of",
]


@dataclass(frozen=True)
class Pixels:
    """What an input makes of bytes: (byte / 255 - mean) / std, each step in float32.

    layout:    order of the axes, "nchw" or "nhwc".
    mean, std: one number, or one per channel.
    """

    layout: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Codes:
    """What the codes of an output stand for: (code - zero_point) * scale."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Port:
    """One input or output of the model; a free dimension is given by its name, or None.

    pixels: of an input that takes bytes; codes: of an output that is not dequantized.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str
    pixels: Pixels | None = None
    codes: Codes | None = None


@dataclass(frozen=True)
class Model:
    """The model that was exported."""

    source: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameters: int
    dynamic_batch: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """Free axes besides the batch.

    axes:   names of their sizes in the file, by input and axis.
    proved: shapes of the samples of each input with which the file was compared with the reference.
    """

    axes: dict[str, dict[int, str]]
    proved: tuple[dict[str, tuple[int, ...]], ...]


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


def model_of(
    source: str,
    graph: fx.GraphModule,
    model: ir.Model,
    raws: Mapping[str, RawInput],
    grids: Mapping[str, tuple[float, int]],
) -> Model:
    """Describe the interface of a model; raws: inputs that are bytes; grids: of outputs that are codes."""
    pixels = {name: Pixels(raw.layout, raw.mean, raw.std) for name, raw in raws.items()}
    codes = {name: Codes(*grid) for name, grid in grids.items()}

    def ports(values: Iterable[ir.Value]) -> tuple[Port, ...]:
        return tuple(
            Port(
                value.name or "",
                tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()),
                value.dtype.name if value.dtype else "?",
                pixels.get(value.name or ""),
                codes.get(value.name or ""),
            )
            for value in values
        )

    parameters = sum(parameter.numel() for parameter in graph.parameters())
    dynamic_batch, notes = graph.meta["dynamic_batch"], tuple(graph.meta["notes"])
    return Model(source, ports(model.graph.inputs), ports(model.graph.outputs), parameters, dynamic_batch, notes)


def sizes_of(graph: fx.GraphModule, batches: Iterable[Sequence[Tensor]]) -> Sizes | None:
    """Describe the free axes of a graph, proved on batches; None where it has none."""
    if not graph.meta["free_axes"]:
        return None
    names = graph.meta["input_names"]
    proved = ({name: tuple(x.shape[1:]) for name, x in zip(names, batch, strict=True)} for batch in batches)
    return Sizes(graph.meta["free_axes"], tuple(proved))


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
