"""Count the bytes of an ONNX file, in total and by type.

Must not know: what the initializers mean.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

__all__ = ["Size", "size_of"]


@dataclass(frozen=True)
class Size:
    """Bytes of the float and of the quantized model, each the .onnx file and its external data.

    by_type:       bytes of the quantized model's initializers by ONNX type name, 4- and 2-bit types counted packed;
                   largest first.
    lowered_bytes: of the file that the target's runtime executes, None where it executes the .onnx file.
    """

    float_bytes: int
    bytes: int
    by_type: dict[str, int]
    lowered_bytes: int | None = None


def size_of(path: str | Path, float_path: str | Path, lowered: Path | None = None) -> Size:
    """Measure the model at `path`, its float original and its lowered form, without reading external weights."""
    counts: Counter[str] = Counter()
    for tensor in _tensors(path):
        counts[tensor.dtype.name] += tensor.nbytes
    lowered_bytes = None if lowered is None else lowered.stat().st_size
    return Size(_bytes(float_path), _bytes(path), dict(counts.most_common()), lowered_bytes)


def _tensors(path: str | Path) -> list[ir.TensorProtocol]:
    initializers = [value for graph in ir.load(path).graphs() for value in graph.initializers.values()]
    return [value.const_value for value in initializers if value.const_value is not None]


def _bytes(path: str | Path) -> int:
    """Count the bytes on disk of the file and of every external data file that it names."""
    external = {Path(tensor.path) for tensor in _tensors(path) if isinstance(tensor, ir.ExternalTensor)}
    return sum(file.stat().st_size for file in (Path(path), *external))
