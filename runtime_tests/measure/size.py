"""Count the bytes of an ONNX file by their type.

Must not know: what the initialisers mean.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

__all__ = ["Size", "size_by_type"]


@dataclass(frozen=True)
class Size:
    """Size of one model.

    file_bytes: the .onnx file and every external data file it refers to, on disk.
    by_type:    bytes of the initialisers' values by ONNX type name, 4- and 2-bit types counted packed; largest first.
    """

    file_bytes: int
    by_type: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.file_bytes, "by_type": dict(self.by_type)}


def size_by_type(path: str | Path) -> Size:
    """Measure the model at `path`, without reading external weights."""
    path = Path(path)
    initializers = [value for graph in ir.load(path).graphs() for value in graph.initializers.values()]
    tensors = [value.const_value for value in initializers if value.const_value is not None]
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype.name] += tensor.nbytes
    external = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    files = [path, *external]
    return Size(sum(file.stat().st_size for file in files), dict(counts.most_common()))
