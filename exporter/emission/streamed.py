"""Write a model file weight by weight, in the bytes that protobuf would write: it takes three times their size at once.

Must not know: what the weights are, programs, runtimes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

__all__ = ["write"]

Parts = list["bytes | ir.TensorProtocol"]

LENGTH_DELIMITED = 2
"""Wire type of messages and bytes (protobuf, "Encoding")."""


def write(model: onnx.ModelProto, data: Mapping[str, ir.TensorProtocol], path: Path) -> None:
    """Write a model whose initializers `data`, by name, lack their raw data."""
    initializers: Parts = []
    for tensor in model.graph.initializer:
        content: Parts = [tensor.SerializeToString()]
        if (values := data.get(tensor.name)) is not None:
            content = _around(tensor, "raw_data", [_start(tensor, "raw_data", values.nbytes), values])
        initializers += [_start(model.graph, "initializer", _size(content)), *content]
    graph = _around(model.graph, "initializer", initializers)
    with path.open("wb") as file:
        for part in _around(model, "graph", [_start(model, "graph", _size(graph)), *graph]):
            file.write(part if isinstance(part, bytes) else part.tobytes())


def _around(message: Any, name: str, content: Parts) -> Parts:
    """Return the parts of a message, whose fields are in the order of their numbers, with `content` for one field."""
    fields = message.DESCRIPTOR.fields
    number = message.DESCRIPTOR.fields_by_name[name].number
    ends = []
    for dropped in ([f for f in fields if f.number >= number], [f for f in fields if f.number <= number]):
        part = type(message)()
        part.CopyFrom(message)
        for field in dropped:
            part.ClearField(field.name)
        ends.append(part.SerializeToString())
    return [ends[0], *content, ends[1]]


def _start(message: Any, name: str, size: int) -> bytes:
    """Return the tag and the length before the content of a field."""
    return _varint(message.DESCRIPTOR.fields_by_name[name].number << 3 | LENGTH_DELIMITED) + _varint(size)


def _varint(number: int) -> bytes:
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def _size(parts: Parts) -> int:
    return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts)
