"""Find initializers whose values are missing, or have another size than type and shape say.

Must not know: what the values mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from runtime_tests.ort.sessions import Model

__all__ = ["faults"]


def faults(model: Model) -> Iterator[tuple[str, str]]:
    """Yield name and fault of each stored tensor, wherever it is; no values are read."""
    folder = Path() if isinstance(model.source, onnx.ModelProto) else Path(model.source).resolve().parent
    proto = model.proto
    nodes = (node for function in proto.functions for node in function.node)
    for tensor in (*_tensors(proto.graph), *_attached(nodes)):
        if fault := _fault(tensor, folder):
            yield tensor.name or "a constant", fault


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    yield from _attached(graph.node)


def _attached(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Yield the tensors in attributes, and in the graphs that are attributes."""
    for node in nodes:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _tensors(body)


def _fault(tensor: onnx.TensorProto, folder: Path) -> str | None:
    if min(tensor.dims, default=0) < 0:
        return f"its shape {list(tensor.dims)} has a negative size"
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        return f"its type {tensor.data_type} is none of ONNX"
    if dtype is ir.DataType.UNDEFINED:
        return "its type is not stated"
    count = math.prod(tensor.dims)
    if dtype is ir.DataType.STRING:
        found = len(tensor.string_data)
        return None if found == count else f"it has {count} strings, but {found} are stored; export the file again"
    expected = math.ceil(count * dtype.bitwidth / 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _external_fault(tensor, folder, expected)
    if tensor.HasField("raw_data"):
        found, unit = len(tensor.raw_data), "bytes"
    else:
        fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
        found, unit = sum(len(getattr(tensor, name)) for name in fields), "values"
        expected = count if dtype.bitwidth >= 8 else expected
        expected *= 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
    if found != expected:
        return f"{dtype} {list(tensor.dims)} has {expected} {unit}, but {found} are stored; export the file again"
    return None


def _external_fault(tensor: onnx.TensorProto, folder: Path, expected: int) -> str | None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        path = (folder / entries.get("location", "")).resolve()
    except (ValueError, OSError, RuntimeError) as error:
        return f"its file {entries.get('location')!r} has no possible name ({error})"
    if not path.is_relative_to(folder.resolve()):
        return f"its file {entries.get('location')!r} lies outside the folder of the model; move it there"
    if not path.is_file():
        return f"its file {entries.get('location')!r} is missing; copy it beside the model"
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", 0)) or path.stat().st_size - offset
    except ValueError:
        return f"its offset {entries.get('offset')!r} or length {entries.get('length')!r} is no number"
    if offset < 0 or length != expected or offset + length > path.stat().st_size:
        return (
            f"{expected} bytes are expected, but {length} from {offset} on are stated in {path.name}, which has "
            f"{path.stat().st_size}; copy the file again"
        )
    return None
