"""Reading one edge of a QDQ graph: the codes behind a DequantizeLinear and what is known about them.

Must not know: which kernels a runtime has, what is good or bad about an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "DEQUANTIZE",
    "QUANTIZE",
    "Operand",
    "array",
    "consumers",
    "inputs",
    "operand",
    "qparams",
    "stated_type",
    "where",
]

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Operand:
    """The codes that a DequantizeLinear turns into floats.

    node:       the DequantizeLinear.
    codes:      its first input.
    data:       the codes themselves where they are constant (weights, biases), else None.
    scale:      constant scale, None where computed.
    zero_point: constant zero point as int64, None where absent or computed.
    dtype:      type of the codes, None where nothing in the file says it.
    lo, hi:     lowest and highest code that can be stored: the type's range, narrowed by a Clip of the codes.
    """

    node: ir.Node
    codes: ir.Value
    data: Array | None
    scale: Array | None
    zero_point: Array | None
    dtype: ir.DataType | None
    lo: int
    hi: int

    @property
    def is_constant(self) -> bool:
        return self.data is not None


def operand(value: ir.Value | None) -> Operand | None:
    """The codes behind `value`, or None where no DequantizeLinear makes it."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != DEQUANTIZE:
        return None
    codes = node.inputs[0]
    if codes is None:
        return None
    scale, zero_point = qparams(node)
    dtype = _code_type(node)
    lo, hi = _bounds(codes, dtype)
    return Operand(node, codes, array(codes), scale, zero_point, dtype, lo, hi)


def qparams(node: ir.Node) -> tuple[Array | None, Array | None]:
    """Constant scale and zero point (int64) of a QuantizeLinear or DequantizeLinear; None where not constant."""
    scale, zero_point = (array(value) for value in inputs(node, 3)[1:])
    return scale, None if zero_point is None else zero_point.astype(np.int64)


def inputs(node: ir.Node, count: int) -> list[ir.Value | None]:
    """The first `count` inputs of `node`, absent ones as None."""
    return [*node.inputs, *[None] * count][:count]


def array(value: ir.Value | None) -> Array | None:
    """Constant behind `value`: an initialiser, a Constant node, or packed codes that are unpacked; None otherwise."""
    if value is None:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant" and "value" in node.attributes:
        return np.asarray(node.attributes["value"].as_tensor().numpy())
    return _unpacked(node)


def _unpacked(node: ir.Node) -> Array | None:
    """What the operators that unpack codes (exporter.emission.packing) make of constant integers."""
    made = _UNPACKING.get(node.op_type)
    if made is None:
        return None
    constants = [array(value) for value in node.inputs]
    known = [each for each in constants if each is not None]
    return made(node, *known) if len(known) == len(constants) else None


def _cast(node: ir.Node, codes: Array) -> Array:
    return codes.astype(ir.DataType(node.attributes["to"].as_int()).numpy())


def _scatter(node: ir.Node, codes: Array, places: Array, updates: Array) -> Array:
    scattered, axis = codes.copy(), node.attributes.get("axis")
    np.put_along_axis(scattered, places, updates, 0 if axis is None else axis.as_int())
    return scattered


_UNPACKING: dict[str, Callable[..., Array]] = {
    "Cast": _cast,
    "Sub": lambda _, left, right: np.asarray(left - right),
    "Reshape": lambda _, codes, shape: codes.reshape(shape),
    "ScatterElements": _scatter,
}


def consumers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read `value`, each once."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def where(node: ir.Node) -> str:
    """Name of a node, or of the value it makes."""
    return node.name or next((value.name for value in node.outputs if value.name), node.op_type)


def stated_type(value: ir.Value | None) -> ir.DataType | None:
    """Type of a value as its initialiser, its QuantizeLinear or the file says it; None where nothing does."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.dtype
    node = value.producer()
    if node is None or node.op_type != QUANTIZE:
        return value.dtype
    stated = node.attributes.get("output_dtype")
    if stated is not None and stated.as_int():
        return ir.DataType(stated.as_int())
    return stated_type(inputs(node, 3)[2]) or ir.DataType.UINT8


def _code_type(node: ir.Node) -> ir.DataType | None:
    """Type of the codes a DequantizeLinear reads, from whatever states it nearest."""
    codes, _, zero_point = inputs(node, 3)
    return next((dtype for value in (zero_point, *_upstream(codes)) if (dtype := stated_type(value))), None)


def _upstream(value: ir.Value | None) -> Iterator[ir.Value]:
    """`value` and what it was before operators that keep codes as they are or clip them."""
    while value is not None:
        yield value
        node = value.producer()
        if node is None or node.op_type not in KEEPS_CODES:
            return
        value = node.inputs[0]


KEEPS_CODES = frozenset(
    ("Clip", "Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "MaxPool")
)
"""Operators whose output codes are input codes, or the bounds of a Clip."""


def _bounds(codes: ir.Value, dtype: ir.DataType | None) -> tuple[int, int]:
    lo, hi = type_range(dtype)
    for value in _upstream(codes):
        node = value.producer()
        if node is not None and node.op_type == "Clip":
            low, high = (array(bound) for bound in inputs(node, 3)[1:])
            lo = lo if low is None else max(lo, int(low))
            hi = hi if high is None else min(hi, int(high))
    return lo, hi


def type_range(dtype: ir.DataType | None) -> tuple[int, int]:
    """Lowest and highest code of an integer type; 8 bits unsigned where unknown."""
    name = (dtype or ir.DataType.UINT8).name
    bits = int("".join(filter(str.isdigit, name)) or 8)
    return (0, 2**bits - 1) if name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
