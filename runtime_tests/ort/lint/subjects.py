"""Find the parts of a QDQ graph that rules speak about: quantizers, products, activation functions before quantizers.

Must not know: what is good or bad about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime_tests.ort.operands import (
    Product,
    array,
    code_type,
    flag,
    inputs,
    products,
    qparams,
    quantizers_after,
    type_range,
)

__all__ = [
    "BYTE",
    "FOUR_BIT",
    "NARROW",
    "TWO_BIT",
    "WIDE",
    "Merge",
    "Quantizer",
    "biased",
    "merges",
    "nodes",
    "quantizers",
    "weighted",
]

Array = NDArray[Any]

WIDE = (ir.DataType.INT16, ir.DataType.UINT16)
FOUR_BIT = (ir.DataType.INT4, ir.DataType.UINT4)
TWO_BIT = (ir.DataType.INT2, ir.DataType.UINT2)
NARROW = (*FOUR_BIT, *TWO_BIT)
BYTE = (ir.DataType.INT8, ir.DataType.UINT8)


def nodes(*ops: str) -> Callable[[ir.Model], Iterator[ir.Node]]:
    """Return a search for the nodes of these types, in every graph of a model."""
    return lambda model: (node for graph in model.graphs() for node in graph if node.op_type in ops)


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear; dtype: of its codes."""

    node: ir.Node
    scale: Array | None
    zero_point: Array | None
    dtype: ir.DataType | None

    @property
    def is_activation(self) -> bool:
        return array(self.node.inputs[0]) is None

    @property
    def is_bias(self) -> bool:
        """Whether it reads constant int32 codes, which kernels add whatever the form of scale and zero point."""
        return self.dtype == ir.DataType.INT32 and not self.is_activation

    @property
    def is_one_channel(self) -> bool:
        """Whether parameters of shape [1] are per channel, because their constant has one channel."""
        data = array(self.node.inputs[0])
        return data is not None and data.ndim > 0 and data.shape[flag(self.node, "axis", 1 % data.ndim)] == 1


def quantizers(*ops: str) -> Callable[[ir.Model], Iterator[Quantizer]]:
    """Return a search for the quantizers of these types."""

    def find(model: ir.Model) -> Iterator[Quantizer]:
        for node in nodes(*ops)(model):
            scale, zero_point = (array(value) for value in inputs(node, 3)[1:])
            yield Quantizer(node, scale, zero_point, code_type(node))

    return find


def weighted(model: ir.Model) -> Iterator[Product]:
    """Yield the products of quantized activations and quantized weights."""
    return products(node for graph in model.graphs() for node in graph)


def biased(model: ir.Model) -> Iterator[Product]:
    """Yield those that have a bias."""
    return (found for found in weighted(model) if found.node.op_type != "MatMul" and found.bias_value is not None)


@dataclass(frozen=True, eq=False)
class Merge:
    """A Relu or Clip and a QuantizeLinear that reads it, into which the runtime may merge it."""

    node: ir.Node
    quantizer: ir.Node

    @property
    def dtype(self) -> ir.DataType | None:
        return code_type(self.quantizer)

    def holds(self, low: Array | float | None, high: Array | float | None) -> bool:
        """Return whether the quantizer saturates at these bounds or within them."""
        return self._saturates(low, 0) and self._saturates(high, 1)

    def _saturates(self, bound: Array | float | None, end: int) -> bool:
        if bound is None:
            return True
        scale, zero_point = qparams(self.quantizer)
        if scale is None or zero_point is None or {scale.size, zero_point.size} != {1}:
            return False
        code = float((np.rint(np.float32(bound) / scale.astype(np.float32)) + zero_point).reshape(()))
        limit = type_range(self.dtype)[end]
        return code >= limit if end else code <= limit


def merges(op: str) -> Callable[[ir.Model], Iterator[Merge]]:
    """Return a search for nodes of type `op` before quantizers, except for 16-bit ones, into which none is merged."""

    def find(model: ir.Model) -> Iterator[Merge]:
        pairs = (Merge(node, after) for node in nodes(op)(model) for after in quantizers_after(node.outputs[0]))
        return (pair for pair in pairs if pair.dtype not in WIDE)

    return find
