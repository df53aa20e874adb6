"""Codes of weights stored in 4 or 2 bits each, in the file alone: every session computes with the same int8 codes.

onnxruntime has integer kernels for 8-bit codes only, and expands a typed INT4 weight to floats at every run. But it
computes what has constant inputs once, before it looks for integer kernels. So the packed codes stand behind operators
that unpack them while the session is made:

    int8 codes = Cast(packed codes)                                     where the packed codes are the codes
    int8 codes = Cast(Cast(packed codes) - Cast(packed zero point))     where channels are shifted into the packed range

A weight whose reader takes floats is dequantized from the packed codes directly: kernels that expand weights read them.

Must not know: programs, methods, how the bits were chosen: the codes alone say what they fit into.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["SINCE", "STORAGES", "alternatives", "pack", "set_opset"]

Array = NDArray[Any]

STORAGES: Final[Mapping[str, tuple[int, ...]]] = {"auto": (4,), "int8": (), "int4": (4,), "int2": (2, 4)}
"""Widths that a weight may be packed to, narrowest first. auto: what loads everywhere at the speed of int8."""

TYPES: Final = {4: ir.DataType.INT4, 2: ir.DataType.INT2}
SINCE: Final = {4: 21, 2: 25}
"""The opsets that brought the types."""

IR_VERSIONS: Final = {20: 10, 25: 13}
"""ONNX IR versions that go with opsets, from the one named on."""

OVERHEAD = 1024
"""Bytes that the nodes and names of unpacking take: weights that save less stay as they are."""


@dataclass(frozen=True, eq=False)
class _Weight:
    """A DequantizeLinear of constant int8 codes: the codes, and what it says about their scales.

    axis, block: of the scales; axis is None for one scale, block is 0 for one per index.
    """

    node: ir.Node
    codes: ir.Value
    array: Array
    axis: int | None
    block: int

    def extremes(self) -> tuple[Array, Array]:
        """Lowest and highest code under each scale, int64, shaped like the scales."""
        values = self.array.astype(np.int64)
        if self.axis is None:
            return values.min(), values.max()
        if self.block:
            starts = np.arange(0, values.shape[self.axis], self.block)
            low, high = (ufunc.reduceat(values, starts, self.axis) for ufunc in (np.minimum, np.maximum))
            return low, high
        others = tuple(axis for axis in range(values.ndim) if axis != self.axis)
        return values.min(others), values.max(others)

    def offsets(self, width: int) -> Array:
        """What to subtract under each scale, int64 and nearest to 0, so that the codes fit into `width` bits."""
        low, high = self.extremes()
        least, most = -(1 << (width - 1)), (1 << (width - 1)) - 1
        return np.asarray(np.clip(0, high - most, low - least))

    def width(self, widths: tuple[int, ...]) -> int | None:
        """The narrowest of `widths` that holds the codes under every scale and what they are shifted by."""
        low, high = self.extremes()
        spread = int((high - low).max(initial=0))
        return next((width for width in widths if spread < 1 << width and self._shifts_fit(width)), None)

    def _shifts_fit(self, width: int) -> bool:
        offsets = self.offsets(width)
        return int(offsets.max()) <= 1 << (width - 1) and int(offsets.min()) > -(1 << (width - 1))

    def spread(self, offsets: Array) -> Array:
        """Values given per scale, broadcastable against the codes."""
        if self.axis is None or not self.block:
            shape = [1] * self.array.ndim
            if self.axis is not None:
                shape[self.axis] = -1
            return offsets.reshape(shape)
        return np.repeat(offsets, self.block, self.axis).take(range(self.array.shape[self.axis]), self.axis)


def pack(model: ir.Model, storage: str) -> dict[str, int]:
    """Pack the weights of `model` as STORAGES[storage] says; the bits of those that were packed, by name of the codes.

    Types that the opset of the model does not have are left out.
    """
    opset = model.opset_imports[""]
    widths = tuple(width for width in STORAGES[storage] if SINCE[width] <= opset)
    packed = {}
    for weight in list(_weights(model.graph)):
        width = weight.width(widths)
        if width is not None and weight.array.size * (8 - width) // 8 > OVERHEAD:
            packed[str(weight.codes.name)] = width
            _pack(model.graph, weight, width)
    return packed


def alternatives(model: ir.Model, storage: str) -> dict[str, ir.Model]:
    """The unpacked `model` as the other storages would have it, by their names; those equal to `storage` left out."""
    proto = ir.to_proto(model)
    known = [pack(ir.from_proto(proto), storage)]
    others = {}
    for name in ("int8", "int4", "int2"):
        other = ir.from_proto(proto)
        set_opset(other, max([model.opset_imports[""], *(SINCE[width] for width in STORAGES[name])]))
        packed = pack(other, name)
        if packed not in known:
            known.append(packed)
            others[name] = other
    return others


def set_opset(model: ir.Model, opset: int) -> None:
    """Say which opset the model is of, and the IR version that goes with it."""
    model.opset_imports[""] = opset
    model.ir_version = max(version for first, version in IR_VERSIONS.items() if first <= opset)


def _weights(graph: ir.Graph) -> Iterator[_Weight]:
    """Weights of at least two dimensions that one DequantizeLinear reads."""
    for node in graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.const_value is None or len(codes.uses()) > 1:
            continue
        array = codes.const_value.numpy()
        if array.dtype != np.int8 or array.ndim < 2:
            continue
        axis, block = (node.attributes.get(name) for name in ("axis", "block_size"))
        yield _Weight(node, codes, array, None if axis is None else axis.as_int(), block.as_int() if block else 0)


def _pack(graph: ir.Graph, weight: _Weight, width: int) -> None:
    offsets = weight.offsets(width)
    name = str(weight.codes.name)
    del graph.initializers[name]
    packed = _constant(graph, f"{name}_packed", weight.array - weight.spread(offsets), width)
    if _reads_floats(weight.node):
        zero_point = weight.node.inputs[2]
        assert zero_point is not None and len(zero_point.uses()) == 1
        del graph.initializers[str(zero_point.name)]
        weight.node.replace_input_with(0, packed)
        weight.node.replace_input_with(2, _constant(graph, str(zero_point.name), -offsets, width))
        return
    nodes = []
    if offsets.any():
        zeros = _constant(graph, f"{name}_packed_zero_point", weight.spread(-offsets), width)
        nodes += [_node("Cast", [value], f"{value.name}_int32", weight, ir.DataType.INT32) for value in (packed, zeros)]
        nodes.append(_node("Sub", [node.outputs[0] for node in nodes], f"{name}_int32", weight, ir.DataType.INT32))
    source = nodes[-1].outputs[0] if nodes else packed
    nodes.append(_node("Cast", [source], name, weight, ir.DataType.INT8))
    graph.insert_before(weight.node, nodes)
    weight.node.replace_input_with(0, nodes[-1].outputs[0])


def _reads_floats(dequantize: ir.Node) -> bool:
    """Whether only matrix products of floats read the weight."""
    readers = [use.node for use in dequantize.outputs[0].uses()]
    sources = [node.inputs[0].producer() for node in readers if node.inputs[0] is not None]
    coded = any(source is not None and source.op_type == "DequantizeLinear" for source in sources)
    return not coded and all(node.op_type == "MatMul" for node in readers)


def _constant(graph: ir.Graph, name: str, codes: Array, width: int) -> ir.Value:
    """An initialiser of packed codes."""
    tensor = ir.tensor(codes.astype(TYPES[width].numpy()), name=name)
    value = ir.Value(name=name, shape=ir.Shape(codes.shape), type=ir.TensorType(TYPES[width]), const_value=tensor)
    graph.register_initializer(value)
    return value


def _node(op: str, inputs: list[ir.Value], name: str, weight: _Weight, dtype: ir.DataType) -> ir.Node:
    """A node that makes integers of type `dtype` and says that it belongs to the module of the weight."""
    attributes = [ir.AttrInt64("to", dtype.value)] if op == "Cast" else []
    output = ir.Value(name=name, shape=ir.Shape(inputs[0].shape or ()), type=ir.TensorType(dtype))
    node = ir.Node("", op, inputs, attributes, outputs=[output], name=name)
    node.metadata_props.update(weight.node.metadata_props)
    return node
