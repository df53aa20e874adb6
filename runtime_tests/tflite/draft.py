"""The content of a LiteRT file in plain data, from which another process writes it.

Codes are int8. Names of operators, options and types are those of the schema of LiteRT.

Must not know: programs, how the file is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Draft"]

Array = NDArray[Any]

TYPES = {"float32": "FLOAT32", "int8": "INT8", "uint8": "UINT8", "int32": "INT32", "int64": "INT64"}


class Draft:
    """Tensors and operators in the order in which they run; a tensor is its index.

    inputs, outputs: tensors that a caller gives and gets.
    """

    def __init__(self) -> None:
        self.tensors: list[dict[str, Any]] = []
        self.operators: list[dict[str, Any]] = []
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self._arrays: dict[str, Array] = {}
        self._names: set[str] = set()
        self._counts: dict[str, int] = {}

    def value(self, name: str, shape: Sequence[int], dtype: str, quantization: Any = None) -> int:
        """Add a tensor that an operator computes, or an input; dtype: numpy's name. Its name is made unique."""
        return self._tensor(name, [*shape], dtype, quantization, None)

    def constant(self, name: str, data: Array, quantization: Any = None) -> int:
        """Add a constant tensor."""
        key = f"c{len(self._arrays)}"
        self._arrays[key] = np.ascontiguousarray(data)
        return self._tensor(name, [*data.shape], data.dtype.name, quantization, key)

    def _tensor(self, name: str, shape: list[int], dtype: str, quantization: Any, data: str | None) -> int:
        kind = {"type": TYPES[dtype], "quantization": quantization, "data": data}
        self.tensors.append({"name": self._unique(name), "shape": [*map(int, shape)], **kind})
        return len(self.tensors) - 1

    def _unique(self, name: str) -> str:
        count = self._counts.get(name, 0)
        unique = f"{name}_{count}" if count else name
        self._counts[name] = count + 1
        if unique in self._names:
            return self._unique(name)
        self._names.add(unique)
        return unique

    def add(
        self, op: str, version: int, inputs: Sequence[int], output: int, options: tuple[str, dict[str, Any]] | None
    ) -> int:
        """Add an operator with the table of its options by name; return its result."""
        self.operators.append(
            {"op": op, "version": version, "inputs": [*inputs], "outputs": [output], "options": options}
        )
        return output

    def name(self, tensor: int) -> str:
        """Return the name of a tensor."""
        return str(self.tensors[tensor]["name"])

    def rename(self, tensor: int, name: str) -> None:
        """Give a tensor another name, made unique."""
        self._names.discard(self.name(tensor))
        self.tensors[tensor]["name"] = self._unique(name)

    def shape(self, tensor: int) -> list[int]:
        """Return the shape of a tensor."""
        found: list[int] = self.tensors[tensor]["shape"]
        return found

    def save(self, folder: Path, description: str) -> None:
        """Write draft.json and draft.npz for the worker."""
        parts = {
            "description": description,
            "tensors": self.tensors,
            "operators": self.operators,
            "inputs": self.inputs,
            "outputs": self.outputs,
        }
        (folder / "draft.json").write_text(json.dumps(parts), encoding="utf-8")
        np.savez(folder / "draft.npz", allow_pickle=False, **self._arrays)
