"""Codes of weights stored in 4 or 2 bits each.

onnxruntime has integer kernels for 8-bit codes only, and expands a typed INT4 weight to floats at every run. But it
computes what has constant inputs once, before it looks for integer kernels. So operators follow the packed codes
that unpack them while the session is made, and every session computes with the same int8 codes:

    int8 codes = Cast(packed codes)                                     where the packed codes are the codes
    int8 codes = Cast(Cast(packed codes) - Cast(packed zero point))     where channels are shifted into the packed range

Wide taps, the one code per channel that an identity branch became (identity_taps), are stored as int8 and put into
their places:

    int8 codes = Reshape(ScatterElements(int8 codes of the others, place of the tap, tap))

Float kernels of layers that have nothing but their weight quantized read packed codes themselves: there codes and zero
points change their type, and nothing else changes.

Must not know: programs, methods, how the bits were chosen: the codes alone say what they fit into.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibrators.grid.numerics import has_middle_diagonal, middle_diagonal
from runtime_tests.ort.operands import consumers, operand
from runtime_tests.ort.sessions import loads

__all__ = ["STORAGES", "alternatives", "pack", "refused_opset", "set_opset", "stored_bytes"]

Array = NDArray[Any]

STORAGES: Final[Mapping[str, tuple[int, ...]]] = {"auto": (4,), "int8": (), "int4": (4,), "int2": (2, 4)}
"""Widths that a weight may be packed to, narrowest first. auto: what loads everywhere at the speed of int8."""

WHOLE_BYTES = {2: 4, 4: 1}
"""Outputs of a float kernel's weight must be a multiple of this: onnxruntime 1.32 transposes 2-bit codes wrongly
where the last byte of a row is not full, and says nothing."""

TYPES: Final = {4: ir.DataType.INT4, 2: ir.DataType.INT2}
SINCE: Final = {4: 21, 2: 25}
"""The opsets that brought the types."""

IR_VERSIONS: Final = {20: 10, 25: 13}
"""ONNX IR versions that go with opsets, from the one named on."""

OVERHEAD = 1024
"""Bytes that the nodes and names of unpacking take: weights that save less stay as they are."""

WIDEST = 128
"""Beyond every int8 code."""

TAP_BYTES, TAPS_OVERHEAD = 5, 1024
"""Bytes of a wide tap and its place, and of the nodes and names that put all of a weight into their places."""


@dataclass(frozen=True, eq=False)
class _Weight:
    """A DequantizeLinear of constant int8 codes, and the axis of its scales, None for one scale.

    taps: the codes that are not packed, bool in their shape: none, or all of the middle diagonal of a kernel.
    """

    node: ir.Node
    codes: ir.Value
    array: Array
    axis: int | None
    taps: NDArray[np.bool_]

    @functools.cached_property
    def reads_floats(self) -> bool:
        """Whether what multiplies with the weight is float, so that the kernel reads the packed codes."""
        products = [node for node in consumers(self.node.outputs[0]) if node.op_type in ("Gemm", "MatMul")]
        return bool(products) and all(operand(node.inputs[0]) is None for node in products)

    @property
    def overhead(self) -> int:
        """Bytes that packing itself takes."""
        return 0 if self.reads_floats else _overhead(int(self.taps.sum()))

    def beside_taps(self) -> Iterator[_Weight]:
        """The weight with the middle diagonal unpacked, if it is a kernel that may have wide taps."""
        if has_middle_diagonal(self.array.shape):
            taps = np.zeros_like(self.taps)
            taps[middle_diagonal(self.array.shape)] = True
            yield replace(self, taps=taps)

    def saving(self, widths: tuple[int, ...]) -> int:
        """Bytes that packing takes off, 0 where the codes do not fit."""
        width = self.width(widths)
        return _saving(self.array.size, width) - self.overhead if width else 0

    @functools.cached_property
    def extremes(self) -> tuple[Array, Array]:
        """Lowest and highest code under each scale but for taps, int64, shaped to be broadcast against the codes."""
        others = tuple(axis for axis in range(self.array.ndim) if axis != self.axis)
        codes = self.array.astype(np.int64)
        return (
            codes.min(others, keepdims=True, where=~self.taps, initial=WIDEST),
            codes.max(others, keepdims=True, where=~self.taps, initial=-WIDEST),
        )

    def offsets(self, width: int) -> Array:
        """Return the offset to subtract under each scale, nearest to 0, so that the codes fit into `width` bits."""
        low, high = self.extremes
        least, most = -(1 << (width - 1)), (1 << (width - 1)) - 1
        return np.asarray(np.clip(0, high - most, low - least))

    def width(self, widths: tuple[int, ...]) -> int | None:
        """The narrowest of `widths` that holds the codes under every scale and what they are shifted by."""
        if self.reads_floats:
            return next((width for width in widths if self._holds(width)), None)
        low, high = self.extremes
        spread = int((high - low).max(initial=0))
        return next((width for width in widths if spread < 1 << width and self._shifts_fit(width)), None)

    def _shifts_fit(self, width: int) -> bool:
        offsets = self.offsets(width)
        return int(offsets.max()) <= 1 << (width - 1) and int(offsets.min()) > -(1 << (width - 1))

    def _holds(self, width: int) -> bool:
        """Whether a float kernel reads codes and zero points of that width, and they fit as they are."""
        if self.array.shape[1] % WHOLE_BYTES[width]:
            return False
        limit = 1 << (width - 1)
        stored = (value.const_value.numpy() for value in self.integers if value.const_value is not None)
        return all(int(array.min(initial=0)) >= -limit and int(array.max(initial=0)) < limit for array in stored)

    @property
    def integers(self) -> list[ir.Value]:
        """Codes and zero points."""
        return [value for value in (self.node.inputs[0], *self.node.inputs[2:]) if value is not None]


def pack(model: ir.Model, storage: str) -> dict[str, int]:
    """Pack the weights of `model` as STORAGES[storage] says; the bits of those that were packed, by name of the codes.

    The opset of the model becomes the first that has their types.
    """
    packable = _packable(model.graph, storage)
    for weight, width in packable:
        (_retype if weight.reads_floats else _pack)(model.graph, weight, width)
    set_opset(model, max([model.opset_imports[""], *(SINCE[width] for _, width in packable)]))
    return _widths(packable)


def alternatives(model: ir.Model, storage: str) -> dict[str, ir.Model]:
    """The unpacked `model` as the other storages would have it, by their names.

    Left out are those equal to `storage` and those that the installed onnxruntime does not load.
    """
    proto = ir.to_proto(model)
    known = [_widths(_packable(model.graph, storage))]
    others = {}
    for name in ("int8", "int4", "int2"):
        widths = _widths(_packable(model.graph, name))
        if widths in known or refused_opset(name) is not None:
            continue
        known.append(widths)
        others[name] = ir.from_proto(proto)
        pack(others[name], name)
    return others


def refused_opset(storage: str) -> int | None:
    """The opset that brought the types of `storage` where the installed onnxruntime does not load it, else None."""
    opsets = [SINCE[width] for width in STORAGES[storage]]
    return next((opset for opset in opsets if not loads(opset=opset, ir_version=_ir_version(opset))), None)


def set_opset(model: ir.Model, opset: int) -> None:
    """Say which opset the model is of, and the IR version that goes with it."""
    model.opset_imports[""] = opset
    model.ir_version = _ir_version(opset)


def _ir_version(opset: int) -> int:
    return max(version for first, version in IR_VERSIONS.items() if first <= opset)


def _packable(graph: ir.Graph, storage: str) -> list[tuple[_Weight, int]]:
    """The weights that are worth packing, and the bits that they are packed to."""
    widths = STORAGES[storage]
    found = []
    for plain in _weights(graph):
        weight = max((plain, *plain.beside_taps()), key=lambda weight: weight.saving(widths))
        if weight.saving(widths) > 0 and (width := weight.width(widths)):
            found.append((weight, width))
    return found


def stored_bytes(size: int, bits: int, taps: int, storage: str) -> int:
    """Bytes that a weight of `size` codes of `bits` bits takes in the file, if an integer kernel reads it.

    taps: how many of the codes are wide.
    """
    width = next((width for width in STORAGES[storage] if bits <= width), 8)
    saving = _saving(size, width)
    return size - saving + TAP_BYTES * taps if saving > _overhead(taps) else size


def _overhead(taps: int) -> int:
    """Bytes that packing itself takes, with so many wide taps."""
    return OVERHEAD + bool(taps) * TAPS_OVERHEAD + TAP_BYTES * taps


def _saving(size: int, width: int) -> int:
    """Bytes that packing takes off so many codes."""
    return size * (8 - width) // 8


def _widths(packable: list[tuple[_Weight, int]]) -> dict[str, int]:
    return {str(weight.codes.name): width for weight, width in packable}


def _weights(graph: ir.Graph) -> Iterator[_Weight]:
    """Weights of at least two dimensions that one DequantizeLinear reads."""
    for node in graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.const_value is None or len(codes.uses()) > 1:
            continue
        array = codes.const_value.numpy()
        if array.dtype != np.int8 or array.ndim < 2:
            continue
        yield _Weight(node, codes, array, _axis(node), np.zeros(array.shape, np.bool_))


def _axis(node: ir.Node) -> int | None:
    """The axis of the scales of a DequantizeLinear, None for one scale, whatever its attribute says then."""
    scale, axis = node.inputs[1], node.attributes.get("axis")
    if scale is not None and scale.const_value is not None and not len(scale.const_value.shape):
        return None
    return 1 if axis is None else axis.as_int()


def _pack(graph: ir.Graph, weight: _Weight, width: int) -> None:
    offsets, flat = weight.offsets(width), weight.taps.any()
    name = str(weight.codes.name)
    del graph.initializers[name]
    low, high = weight.extremes
    codes = weight.array.clip(low, high) - offsets  # taps are put into their places below
    if flat:
        codes, offsets = (each.reshape(len(each), -1) for each in (codes, offsets))
    packed = _constant(graph, f"{name}_packed", codes, width)
    nodes = []
    if offsets.any():
        zeros = _constant(graph, f"{name}_packed_zero_point", -offsets, width)
        nodes += [_node("Cast", [value], f"{value.name}_int32", weight, ir.DataType.INT32) for value in (packed, zeros)]
        nodes.append(_node("Sub", [node.outputs[0] for node in nodes], f"{name}_int32", weight, ir.DataType.INT32))
    source = nodes[-1].outputs[0] if nodes else packed
    nodes.append(_node("Cast", [source], f"{name}_others" if flat else name, weight, ir.DataType.INT8))
    if flat:
        nodes += _put_taps(graph, weight, nodes[-1].outputs[0])
    graph.insert_before(weight.node, nodes)
    weight.node.replace_input_with(0, nodes[-1].outputs[0])


def _put_taps(graph: ir.Graph, weight: _Weight, others: ir.Value) -> list[ir.Node]:
    """Return the nodes that insert the wide taps into the codes [channels, inputs x kernel] and reshape the result."""
    name, shape = str(weight.codes.name), weight.array.shape
    rows = weight.taps.reshape(len(weight.taps), -1)
    places = _initializer(graph, f"{name}_tap_places", rows.argmax(1)[:, None].astype(np.int32))
    taps = _initializer(graph, f"{name}_taps", weight.array[weight.taps][:, None])
    whole = _initializer(graph, f"{name}_shape", np.array(shape, np.int64))
    scattered = _node("ScatterElements", [others, places, taps], f"{name}_flat", weight, ir.DataType.INT8)
    scattered.attributes["axis"] = ir.AttrInt64("axis", 1)
    reshaped = _node("Reshape", [scattered.outputs[0], whole], name, weight, ir.DataType.INT8)
    reshaped.outputs[0].shape = ir.Shape(shape)
    return [scattered, reshaped]


def _retype(graph: ir.Graph, weight: _Weight, width: int) -> None:
    """Codes and zero points in another type, under the names they have."""
    for index, value in zip((0, 2), weight.integers, strict=False):
        assert value.const_value is not None
        if len(value.uses()) == 1:
            del graph.initializers[str(value.name)]
        name = str(value.name) if len(value.uses()) == 1 else f"{weight.codes.name}_zero_point"
        weight.node.replace_input_with(index, _constant(graph, name, value.const_value.numpy(), width))


def _constant(graph: ir.Graph, name: str, codes: Array, width: int) -> ir.Value:
    """An initialiser of packed codes."""
    return _initializer(graph, name, codes.astype(TYPES[width].numpy()))


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _node(op: str, inputs: list[ir.Value], name: str, weight: _Weight, dtype: ir.DataType) -> ir.Node:
    """A node that makes integers of type `dtype` and says that it belongs to the module of the weight."""
    attributes = [ir.AttrInt64("to", dtype.value)] if op == "Cast" else []
    output = ir.Value(name=name, shape=ir.Shape(inputs[0].shape or ()), type=ir.TensorType(dtype))
    node = ir.Node("", op, inputs, attributes, outputs=[output], name=name)
    node.metadata_props.update(weight.node.metadata_props)
    return node
