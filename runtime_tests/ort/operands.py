"""Read one edge of a QDQ graph: the codes that a DequantizeLinear reads, and what the file says about them.

Must not know: which kernels a runtime has, what is good or bad about an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime_tests.ort.onnx_operators import DEQUANTIZE, KEEP_CODES, PRODUCTS, QUANTIZE

__all__ = [
    "Operand",
    "Product",
    "array",
    "code_bounds",
    "code_type",
    "consumers",
    "flag",
    "inputs",
    "operand",
    "products",
    "qparams",
    "quantizers_after",
    "stated_type",
    "type_range",
    "where",
]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Operand:
    """The codes that a DequantizeLinear turns into floats.

    node:       the DequantizeLinear.
    data:       the codes if they are constant (weights, biases), else None.
    scale:      constant scale, None if it is computed.
    zero_point: constant zero point as int64, None if it is absent or computed.
    dtype:      type of the codes, None if nothing in the file states it.
    lo, hi:     lowest and highest code that can be stored: the type's range, narrowed by a Clip of the codes.
    """

    node: ir.Node
    data: Array | None
    scale: Array | None
    zero_point: Array | None
    dtype: ir.DataType | None
    lo: int
    hi: int

    @property
    def is_constant(self) -> bool:
        return self.data is not None


@dataclass(frozen=True, eq=False)
class Product:
    """A Conv, Gemm or MatMul of quantized activations and constant quantized weights.

    bias_value: the third input, None if there is none.
    bias:       the codes of that input, None if it is float.
    """

    node: ir.Node
    x: Operand
    weight: Operand
    bias_value: ir.Value | None
    bias: Operand | None


def products(nodes: Iterable[ir.Node]) -> Iterator[Product]:
    """Yield every Product among `nodes`."""
    for node in nodes:
        if node.op_type not in PRODUCTS:
            continue
        values = inputs(node, 3)
        x, weight, bias = map(operand, values)
        if x is not None and weight is not None and weight.is_constant and not x.is_constant:
            yield Product(node, x, weight, values[2], bias)


def operand(value: ir.Value | None) -> Operand | None:
    """Return the codes from which `value` was dequantized, or None if no DequantizeLinear makes it."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != DEQUANTIZE or node.inputs[0] is None:
        return None
    scale, zero_point = qparams(node)
    dtype = code_type(node)
    lo, hi = code_bounds(node.inputs[0], dtype)
    return Operand(node, array(node.inputs[0]), scale, zero_point, dtype, lo, hi)


def qparams(node: ir.Node) -> tuple[Array | None, Array | None]:
    """Return scale and zero point (int64) of a QuantizeLinear or DequantizeLinear, each None unless constant."""
    scale, zero_point = (array(value) for value in inputs(node, 3)[1:])
    return scale, None if zero_point is None else zero_point.astype(np.int64)


def inputs(node: ir.Node, count: int) -> list[ir.Value | None]:
    """Return the first `count` inputs of `node`, None for absent ones."""
    return [*node.inputs, *[None] * count][:count]


def flag(node: ir.Node, name: str, default: int = 0) -> int:
    """Return an integer attribute."""
    stated = node.attributes.get(name)
    return default if stated is None else stated.as_int()


def array(value: ir.Value | None) -> Array | None:
    """Return the constant in `value`: an initializer, a Constant node, or packed codes, unpacked; else None."""
    if value is None:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant" and "value" in node.attributes:
        return np.asarray(node.attributes["value"].as_tensor().numpy())
    if node.op_type not in _UNPACKING:
        return None
    constants = [array(value) for value in node.inputs]
    known = [each for each in constants if each is not None]
    return _UNPACKING[node.op_type](node, *known) if len(known) == len(constants) else None


def _cast(node: ir.Node, codes: Array) -> Array:
    return codes.astype(ir.DataType(node.attributes["to"].as_int()).numpy())


def _scatter(node: ir.Node, codes: Array, places: Array, updates: Array) -> Array:
    scattered = codes.copy()
    np.put_along_axis(scattered, places, updates, flag(node, "axis"))
    return scattered


_UNPACKING: dict[str, Callable[..., Array]] = {
    "Cast": _cast,
    "Sub": lambda _, left, right: np.asarray(left - right),
    "Reshape": lambda _, codes, shape: codes.reshape(shape),
    "ScatterElements": _scatter,
}
"""The operators that unpack codes (exporter.emission.packing), on constants."""


def consumers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read `value`, without repetition."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def quantizers_after(value: ir.Value) -> list[ir.Node]:
    """Return the QuantizeLinear nodes that read `value`."""
    return [node for node in consumers(value) if node.op_type == QUANTIZE]


def where(node: ir.Node) -> str:
    """Return the name of a node, or of its first output if it has none."""
    return node.name or next((value.name for value in node.outputs if value.name), node.op_type)


def stated_type(value: ir.Value | None) -> ir.DataType | None:
    """Return the type that the initializer, the QuantizeLinear or the file states for a value; None if none does."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.dtype
    node = value.producer()
    if node is None or node.op_type != QUANTIZE:
        return value.dtype
    if number := flag(node, "output_dtype"):
        return ir.DataType(number) if number in list(ir.DataType) else None
    return stated_type(inputs(node, 3)[2]) or ir.DataType.UINT8


def code_type(node: ir.Node) -> ir.DataType | None:
    """Return the type of the codes that a QuantizeLinear makes or a DequantizeLinear reads."""
    if node.op_type == QUANTIZE:
        return stated_type(node.outputs[0])
    codes, _, zero_point = inputs(node, 3)
    return next((dtype for value in (zero_point, *_upstream(codes)) if (dtype := stated_type(value))), None)


def _upstream(value: ir.Value | None) -> Iterator[ir.Value]:
    """Yield `value`, then the values from which operators that keep or clip codes made it, backwards."""
    while value is not None:
        yield value
        node = value.producer()
        if node is None or node.op_type not in KEEP_CODES:
            return
        value = node.inputs[0]


def code_bounds(codes: ir.Value, dtype: ir.DataType | None) -> tuple[int, int]:
    """Return lowest and highest code that a value can hold: those of a constant, else what type and Clip leave."""
    lo, hi = type_range(dtype)
    for value in _upstream(codes):
        constant, stated = array(value), stated_type(value)
        if constant is not None and constant.size and stated is not None and stated.is_integer():
            lo, hi = max(lo, int(constant.min())), min(hi, int(constant.max()))
        node = value.producer()
        if node is not None and node.op_type == "Clip":
            low, high = (array(bound) for bound in inputs(node, 3)[1:])
            lo = lo if low is None else max(lo, int(low))
            hi = hi if high is None else min(hi, int(high))
    return lo, hi


def type_range(dtype: ir.DataType | None) -> tuple[int, int]:
    """Return the lowest and highest code of an integer type; those of uint8 if it is unknown."""
    dtype = dtype if dtype is not None and dtype.is_integer() else ir.DataType.UINT8
    bits = dtype.bitwidth
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.is_signed() else (0, 2**bits - 1)
