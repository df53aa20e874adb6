"""Store the codes of weights in 4 or 2 bits each.

onnxruntime has integer kernels for 8-bit codes only, and expands a typed INT4 weight to floats at every run. But it
computes what has constant inputs once, before it looks for integer kernels. So operators that unpack the codes are
placed after the packed ones; they run while the session is made, and every session computes with the same int8 codes:

    int8 codes = Cast(packed codes)                                     where the packed codes are the codes
    int8 codes = Cast(Cast(packed codes) - Cast(packed zero point))     where channels are shifted into the packed range

Wide identity taps are stored as int8 and scattered among the other codes:

    int8 codes = Reshape(ScatterElements(int8 codes of the others, places of the taps, taps))

The float kernel of a weight-only layer reads packed codes itself: there only the type of codes and zero points changes.

Must not know: programs, methods, how the bits were chosen: the codes alone say what they fit into.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibrators.grid.numerics import has_middle_diagonal, middle_diagonal
from runtime_tests.ort.onnx_operators import DEQUANTIZE
from runtime_tests.ort.operands import consumers, operand
from runtime_tests.ort.sessions import loads
from runtime_tests.ort.versions import Version, first_version, parse_version

__all__ = [
    "STORAGES",
    "alternatives",
    "first_release",
    "ir_version_of",
    "pack",
    "refused_opset",
    "set_opset",
    "small",
    "stored_bytes",
]

Array = NDArray[Any]

STORAGES: Final[Mapping[str, tuple[int, ...]]] = {"auto": (4,), "int8": (), "int4": (4,), "int2": (2, 4)}
"""Widths that a weight may be packed to, narrowest first. auto: what loads everywhere at the speed of int8."""

WHOLE_BYTES = {2: 4, 4: 1}
"""The outputs of a float kernel's weight must be a multiple of this: onnxruntime 1.32 silently transposes 2-bit codes
wrongly where the last byte of a row is not full."""

TYPES: Final = {4: ir.DataType.INT4, 2: ir.DataType.INT2}
SINCE: Final = {4: 21, 2: 25}
"""Opsets that introduced the types."""

IR_VERSIONS: Final = {20: 10, 25: 13}
"""ONNX IR version of each opset, and of those up to the next one listed."""

OVERHEAD = 1024
"""Bytes of the nodes and names that unpack a weight: a weight that would save less stays as it is."""

TAP_BYTES, TAPS_OVERHEAD = 5, 1024
"""Bytes of a wide tap with its place, and of the nodes and names that scatter those of one weight."""

BEYOND = 128
"""A number larger than every int8 code."""


@dataclass(frozen=True, eq=False)
class _Weight:
    """A DequantizeLinear of constant int8 codes.

    axis: the axis of its scales, None for one scale.
    taps: the codes that are not packed, bool in the shape of the codes: none, or the middle diagonal of a kernel.
    """

    node: ir.Node
    codes: ir.Value
    array: Array
    axis: int | None
    taps: NDArray[np.bool_]

    @functools.cached_property
    def reads_floats(self) -> bool:
        """Whether a float kernel multiplies with the weight, and so reads the packed codes itself."""
        products = [node for node in consumers(self.node.outputs[0]) if node.op_type in ("Gemm", "MatMul")]
        return bool(products) and all(operand(node.inputs[0]) is None for node in products)

    @functools.cached_property
    def extremes(self) -> tuple[Array, Array]:
        """Lowest and highest packed code under each scale, int64, shaped to broadcast against the codes."""
        others = tuple(axis for axis in range(self.array.ndim) if axis != self.axis)
        codes = self.array.astype(np.int64)
        return (
            codes.min(others, keepdims=True, where=~self.taps, initial=BEYOND),
            codes.max(others, keepdims=True, where=~self.taps, initial=-BEYOND),
        )

    @property
    def integers(self) -> list[ir.Value]:
        """Codes and zero points."""
        return [value for value in (self.node.inputs[0], *self.node.inputs[2:]) if value is not None]

    def variants(self) -> Iterator[_Weight]:
        """Yield the weight, and the weight with its middle diagonal left unpacked if it can have wide taps."""
        yield self
        if has_middle_diagonal(self.array.shape):
            taps = np.zeros_like(self.taps)
            taps[middle_diagonal(self.array.shape)] = True
            yield replace(self, taps=taps)

    def widths(self, storage: str, min_ort: str | None) -> tuple[int, ...]:
        """Return the widths of a storage whose packed form the oldest onnxruntime runs."""
        return _widths_in(storage, min_ort, reads_floats=self.reads_floats)

    def saving(self, widths: tuple[int, ...]) -> int:
        """Return the bytes that packing saves, 0 if the codes do not fit."""
        width = self.width(widths)
        if width is None:
            return 0
        return _saving(self.array.size, width) - (0 if self.reads_floats else _overhead(int(self.taps.sum())))

    def width(self, widths: tuple[int, ...]) -> int | None:
        """Return the narrowest of `widths` that holds codes and offsets under every scale, None if none does."""
        return next(filter(self._fits_as_stored if self.reads_floats else self._fits_shifted, widths), None)

    def offsets(self, width: int) -> Array:
        """Return the number under each scale, nearest to 0, whose subtraction brings the codes into `width` bits."""
        low, high = self.extremes
        limit = 1 << (width - 1)
        return np.asarray(np.clip(0, high - (limit - 1), low + limit))

    def _fits_shifted(self, width: int) -> bool:
        low, high = self.extremes
        offsets, limit = self.offsets(width), 1 << (width - 1)
        return bool((high - low).max() < 2 * limit and -limit < offsets.min() and offsets.max() <= limit)

    def _fits_as_stored(self, width: int) -> bool:
        """Return whether codes and zero points fit unchanged into a width that a float kernel can read."""
        limit = 1 << (width - 1)
        stored = (value.const_value.numpy() for value in self.integers if value.const_value is not None)
        fit = all(int(array.min(initial=0)) >= -limit and int(array.max(initial=0)) < limit for array in stored)
        return fit and self.array.shape[1] % WHOLE_BYTES[width] == 0


def pack(model: ir.Model, storage: str, min_ort: str | None = None) -> dict[str, int]:
    """Pack the weights of `model` as STORAGES[storage] says and return the bits of each, by the name of its codes.

    The opset of the model is raised to the first that has their types.

    min_ort: release of onnxruntime that has to load the file: weights whose packed form it does not run stay int8.
    """
    packable = _packable(model.graph, storage, min_ort)
    for weight, width in packable:
        (_retype if weight.reads_floats else _pack)(model.graph, weight, width)
    set_opset(model, max([model.opset_imports[""], *(SINCE[width] for _, width in packable)]))
    return _widths(packable)


def alternatives(model: ir.Model, storage: str) -> dict[str, ir.Model]:
    """Return a copy of the unpacked `model` in every other storage, by name.

    Storages equal to `storage` and those that the installed onnxruntime does not load are left out.
    """
    proto = ir.to_proto(model)
    known = [_widths(_packable(model.graph, storage))]
    others = {}
    for name in ("int8", "int4", "int2"):
        widths = _widths(_packable(model.graph, name))
        if widths not in known and refused_opset(name) is None:
            known.append(widths)
            others[name] = ir.from_proto(proto)
            pack(others[name], name)
    return others


def small(model: ir.Model, storage: str) -> list[str]:
    """Return the names of weights that fit into a width of the storage, but are smaller as int8."""
    widths = STORAGES[storage]
    return [str(w.codes.name) for w in _weights(model.graph) if w.width(widths) is not None and w.saving(widths) <= 0]


def first_release(width: int, *, reads_floats: bool = False) -> Version:
    """Return the first release of onnxruntime that runs weights packed to `width` bits.

    reads_floats: a float kernel reads them; for integer kernels they are unpacked by a Cast.
    """
    return first_version(DEQUANTIZE if reads_floats else "Cast", TYPES[width], SINCE[width])


def _widths_in(storage: str, min_ort: str | None, *, reads_floats: bool = False) -> tuple[int, ...]:
    oldest = None if min_ort is None else parse_version(min_ort)
    return tuple(
        width
        for width in STORAGES[storage]
        if oldest is None or first_release(width, reads_floats=reads_floats) <= oldest
    )


def refused_opset(storage: str) -> int | None:
    """Return the opset that `storage` needs if the installed onnxruntime does not load it, else None."""
    opsets = [SINCE[width] for width in STORAGES[storage]]
    return next((opset for opset in opsets if not loads(opset=opset, ir_version=ir_version_of(opset))), None)


def set_opset(model: ir.Model, opset: int) -> None:
    """Set the opset of the model, and the IR version that goes with it."""
    model.opset_imports[""] = opset
    model.ir_version = ir_version_of(opset)


def stored_bytes(size: int, bits: int, taps: int, storage: str, min_ort: str | None = None) -> int:
    """Return the bytes in the file of a weight of `size` codes of `bits` bits that an integer kernel reads.

    taps: number of wide taps among the codes.
    """
    width = next((width for width in _widths_in(storage, min_ort) if bits <= width), 8)
    saving = _saving(size, width)
    return size - saving + TAP_BYTES * taps if saving > _overhead(taps) else size


def ir_version_of(opset: int) -> int:
    """Return the IR version of files of an opset."""
    return max(version for first, version in IR_VERSIONS.items() if first <= opset)


def _overhead(taps: int) -> int:
    """Return the bytes that unpacking a weight with so many wide taps adds to the file."""
    return OVERHEAD + bool(taps) * TAPS_OVERHEAD + TAP_BYTES * taps


def _saving(size: int, width: int) -> int:
    """Return the bytes saved by packing `size` codes into `width` bits each."""
    return size * (8 - width) // 8


def _packable(graph: ir.Graph, storage: str, min_ort: str | None = None) -> list[tuple[_Weight, int]]:
    """Return the weights that are worth packing, with the bits they are packed to."""
    found = []
    for weight in _weights(graph):
        widths = weight.widths(storage, min_ort)
        saving, best = max(((each.saving(widths), each) for each in weight.variants()), key=operator.itemgetter(0))
        if saving > 0:
            found.append((best, best.width(widths) or 8))
    return found


def _widths(packable: list[tuple[_Weight, int]]) -> dict[str, int]:
    return {str(weight.codes.name): width for weight, width in packable}


def _weights(graph: ir.Graph) -> Iterator[_Weight]:
    """Yield the weights of at least two dimensions that exactly one DequantizeLinear reads."""
    for node in graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.const_value is None or len(codes.uses()) > 1:
            continue
        array = codes.const_value.numpy()
        if array.dtype == np.int8 and array.ndim > 1:
            yield _Weight(node, codes, array, _axis(node), np.zeros(array.shape, np.bool_))


def _axis(node: ir.Node) -> int | None:
    """Return the axis of the scales of a DequantizeLinear, None for a single scale."""
    scale = node.inputs[1]
    if scale is not None and scale.const_value is not None and not len(scale.const_value.shape):
        return None
    return node.attributes.get_int("axis", 1)


def _pack(graph: ir.Graph, weight: _Weight, width: int) -> None:
    """Replace the codes by packed ones and the nodes that unpack them."""
    offsets, scattered = weight.offsets(width), weight.taps.any()
    name = str(weight.codes.name)
    del graph.initializers[name]
    codes = weight.array.clip(*weight.extremes) - offsets  # any value fits where a tap is scattered later
    if scattered:
        codes, offsets = (each.reshape(len(each), -1) for each in (codes, offsets))
    packed = _initializer(graph, f"{name}_packed", _narrow(codes, width))
    nodes = []
    if offsets.any():
        zeros = _initializer(graph, f"{name}_packed_zero_point", _narrow(-offsets, width))
        nodes += [_node("Cast", [value], f"{value.name}_int32", weight, ir.DataType.INT32) for value in (packed, zeros)]
        nodes.append(_node("Sub", [node.outputs[0] for node in nodes], f"{name}_int32", weight, ir.DataType.INT32))
    source = nodes[-1].outputs[0] if nodes else packed
    nodes.append(_node("Cast", [source], f"{name}_others" if scattered else name, weight, ir.DataType.INT8))
    if scattered:
        nodes += _scatter_taps(graph, weight, nodes[-1].outputs[0])
    graph.insert_before(weight.node, nodes)
    weight.node.replace_input_with(0, nodes[-1].outputs[0])


def _scatter_taps(graph: ir.Graph, weight: _Weight, others: ir.Value) -> list[ir.Node]:
    """Return nodes that put the taps among the other codes [channels, inputs x kernel] and restore the shape."""
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
    """Store codes and zero points in a narrower type, under the same names unless they are shared."""
    for index, value in zip((0, 2), weight.integers, strict=False):
        assert value.const_value is not None
        name = f"{weight.codes.name}_zero_point"
        if len(value.uses()) == 1:
            name = str(value.name)
            del graph.initializers[name]
        narrow = _narrow(value.const_value.numpy(), width)
        weight.node.replace_input_with(index, _initializer(graph, name, narrow))


def _narrow(codes: Array, width: int) -> Array:
    return codes.astype(TYPES[width].numpy())


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _node(op: str, inputs: list[ir.Value], name: str, weight: _Weight, dtype: ir.DataType) -> ir.Node:
    """Return a node that yields integers of type `dtype` and belongs to the module of the weight."""
    attributes = [ir.AttrInt64("to", dtype.value)] if op == "Cast" else []
    output = ir.Value(name=name, shape=ir.Shape(inputs[0].shape or ()), type=ir.TensorType(dtype))
    node = ir.Node("", op, inputs, attributes, outputs=[output], name=name)
    node.metadata_props.update(weight.node.metadata_props)
    return node
