"""Measure how much of a network onnxruntime computes in integers, on the graph that it executes.

Every number comes from the optimized graph itself: shapes and types from running it once, reductions from the shapes of
its weights. Nothing is matched with the file by name, so nothing can be matched wrongly.

Must not know: how the file was made, what its codes should be.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibrators.errors import DataError
from runtime_tests.ort.layers import ComputeNode, compute_nodes
from runtime_tests.ort.macs import macs, reads_shapes
from runtime_tests.ort.onnx_operators import (
    ELEMENTWISE,
    FLOAT_PRODUCTS,
    INTEGER_INSIDE,
    MOVE_DATA,
    QUANTIZE,
    WEIGHT_ONLY,
)
from runtime_tests.ort.operands import (
    Operand,
    array,
    consumers,
    flag,
    inputs,
    operand,
    quantizers_after,
    stated_type,
    where,
)
from runtime_tests.ort.sessions import Model, Source, run, session

__all__ = ["READS_BYTES", "Coverage", "FloatNode", "coverage"]

Array = NDArray[Any]


@dataclass(frozen=True)
class FloatNode:
    """A node that computes in float.

    name: node name in the optimized graph.
    op:   operator type.
    why:  the reason, as far as the graph shows it.
    macs: multiply-accumulates of one run, None if they cannot be counted.
    """

    name: str
    op: str
    why: str
    macs: int | None


@dataclass(frozen=True)
class Coverage:
    """The share of the model that onnxruntime computes in integer kernels.

    integer_nodes, compute_nodes: counts over the nodes that compute (no data movement, Q/DQ, shape arithmetic).
    macs:         multiply-accumulates of one run with the sample inputs (batch 1 by default), as far as counted.
    integer_macs: share of them in integer kernels, 0..1; 1 where there are none, None where any cannot be counted.
    weight_only_macs: share of them in float kernels that read codes of the weight alone; None likewise.
    accuracy_level: type to which those kernels may round activations, the coarsest of all: 0 (unset) and 1 float32,
                  2 float16, 3 bfloat16, 4 int8; None where there are none.
    nodes:        every compute node, in the order of the graph.
    float_nodes:  the rest by name and reason, most expensive first.
    uncounted:    nodes whose multiply-accumulates cannot be counted, by operator and name: operators without a known
                  formula, loops over nodes with products.
    by_op:        how often each operator type occurs in the optimized graph.
    """

    integer_nodes: int
    compute_nodes: int
    macs: int
    integer_macs: float | None
    weight_only_macs: float | None
    accuracy_level: int | None
    float_nodes: tuple[FloatNode, ...]
    uncounted: tuple[str, ...]
    by_op: dict[str, int]
    nodes: tuple[ComputeNode, ...] = ()


def coverage(model: Source, *, sample: Mapping[str, Array] | None = None) -> Coverage:
    """Return the integer coverage of `model` in the installed onnxruntime with all optimizations on.

    sample: inputs for the one run that yields shapes; zeros of batch 1 if None.
    raises: ModelError if onnxruntime refuses the model; DataError if it needs a sample and has none.
    """
    optimized = Model.of(model).optimized
    graph = optimized.graph_model.graph
    nodes = [node for node in graph if node.op_type not in MOVE_DATA]
    values = _run(optimized, graph, nodes, sample)
    computing = [node for node in nodes if _computes(node, values)]
    counts = _counted(computing, values)
    integer = {node for node in computing if node.op_type in INTEGER_INSIDE or _output(node, values).dtype in CODES}
    weight_only = [node for node in computing if node.op_type == WEIGHT_ONLY]
    rest = [FloatNode(where(node), node.op_type, _why(node), counts[node]) for node in computing if node not in integer]
    return Coverage(
        integer_nodes=len(integer),
        compute_nodes=len(computing),
        macs=sum(filter(None, counts.values())),
        integer_macs=_share(integer, counts, empty=1.0),
        weight_only_macs=_share(weight_only, counts, empty=0.0),
        accuracy_level=max((flag(node, "accuracy_level") for node in weight_only), default=None),
        float_nodes=tuple(sorted(rest, key=lambda node: -math.inf if node.macs is None else -node.macs)),
        uncounted=tuple(f"{node.op_type} {where(node)}" for node, count in counts.items() if count is None),
        by_op=dict(Counter(node.op_type for node in graph).most_common()),
        nodes=compute_nodes(Model.of(model), counts, integer),
    )


def _counted(nodes: Iterable[ir.Node], values: Mapping[str, Any]) -> dict[ir.Node, int | None]:
    shapes = {name: value.shape for name, value in values.items() if isinstance(value, np.ndarray)}
    return {node: macs(node, shapes) for node in nodes}


def _share(chosen: Iterable[ir.Node], counts: Mapping[ir.Node, int | None], *, empty: float) -> float | None:
    """Return the share of nodes in all multiply-accumulates, `empty` if there are none, None if one is unknown."""
    known = [count for count in counts.values() if count is not None]
    if len(known) < len(counts):
        return None
    return sum(counts[node] or 0 for node in chosen) / sum(known) if sum(known) else empty


# ---- values and shapes

CODES = (np.dtype(np.int8), np.dtype(np.uint8))
INDICES = (np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.bool_))


def _computes(node: ir.Node, values: Mapping[str, Any]) -> bool:
    """Return whether a node computes more than indices, conditions, or a list of tensors (a sequence)."""
    if node.op_type in INTEGER_INSIDE:
        return True
    value = values[_first_name(node)]
    return isinstance(value, np.ndarray) and value.dtype not in INDICES


def _output(node: ir.Node, values: Mapping[str, Array]) -> Array:
    return values[_first_name(node)]


def _run(model: Model, graph: ir.Graph, nodes: list[ir.Node], sample: Mapping[str, Array] | None) -> dict[str, Array]:
    """Run the model once; return the nodes' first outputs and the computed operands of products, by value name."""
    feed = dict(sample) if sample is not None else {value.name or "": _zeros(value) for value in graph.inputs}
    probes = {_first_name(node): None for node in nodes}
    operands = (value for node in nodes if reads_shapes(node) for value in node.inputs)
    probes |= {str(value.name): None for value in operands if value is not None and value.producer() is not None}
    runner = session(model, optimized=False, probes=list(probes))
    names = [output.name for output in runner.get_outputs()]
    return feed | dict(zip(names, run(runner, names, feed), strict=True))


def _first_name(node: ir.Node) -> str:
    return str(next(value.name for value in node.outputs if value.name))


def _zeros(value: ir.Value) -> Array:
    """Return zeros for a graph input, its free first dimension set to 1."""
    dims = list(value.shape.dims) if value.shape is not None else [None]
    sizes = [dim if isinstance(dim, int) else None for dim in dims]
    if sizes and sizes[0] is None:
        sizes[0] = 1
    fixed = [size for size in sizes if size is not None]
    if value.shape is None or len(fixed) < len(sizes) or value.dtype is None:
        raise DataError(
            f"input {value.name!r} of the model has shape {value.shape}, but only the first dimension may be free; "
            "pass a sample of every input."
        )
    return np.zeros(fixed, value.dtype.numpy())


# ---- reasons

NO_KERNEL = "onnxruntime has no integer kernel for this operator"
FREE_SIZES = "a transposed convolution becomes a convolution, which has an integer kernel, only if sizes are fixed"
NOT_FUSED = "onnxruntime did not fuse it"
READS_BYTES = (
    "normalization of the bytes of an input, as the export was told; with one mean and one deviation for all channels "
    "bytes can be codes as they are, without an operator"
)
WIDE = "16-bit activations have no integer kernels"
SIGNED = "int8 activations: on x86, only chains without fan-out are moved to the uint8 kernels"
TYPE_REASONS = {ir.DataType.INT16: WIDE, ir.DataType.UINT16: WIDE, ir.DataType.INT8: SIGNED}


def _why(node: ir.Node) -> str:
    """Return the first reason that the graph shows for a node being in float."""
    if node.op_type == WEIGHT_ONLY:
        level = flag(node, "accuracy_level")
        return f"only the weights are quantized: a float kernel expands them, at accuracy level {level}"
    if _reads_bytes(node):
        return READS_BYTES
    if node.op_type == "ReduceMean":
        return "ReduceMean has no integer kernel; GlobalAveragePool has"
    if node.op_type in FLOAT_PRODUCTS:
        return _why_product(node)
    if node.op_type in ELEMENTWISE:
        return _why_elementwise(node)
    return NO_KERNEL


NORMALIZING = frozenset({"Cast", "Div", "Sub", "Transpose"})
"""Operators between the bytes of an input and the network."""


def _reads_bytes(node: ir.Node) -> bool:
    """Return whether a node only normalizes bytes that the graph takes."""
    value: ir.Value | None = node.outputs[0]
    while value is not None and (maker := value.producer()) is not None and maker.op_type in NORMALIZING:
        value = maker.inputs[0]
    return value is not None and value.is_graph_input() and value.dtype == ir.DataType.UINT8


def _why_product(node: ir.Node) -> str:
    x, weight, bias = (operand(value) for value in inputs(node, 3))
    if node.op_type == "ConvTranspose":
        return FREE_SIZES if _has_free_sizes(node.graph) else NO_KERNEL
    if x is None:
        return "its input is not quantized"
    if weight is None:
        is_constant = array(node.inputs[1]) is not None
        return "its weights are not stored as codes" if is_constant else "its second input is float"
    if weight.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return f"{weight.dtype} weights have no integer kernel and are expanded to float at every run"
    reason = _why_types(node, x)
    if reason is None and x.dtype != ir.DataType.UINT8:
        reason = f"{x.dtype} activations have no integer kernel"
    reason = reason or _why_bias(node, x, weight, bias) or _why_activation(node)
    if reason is None and "Conv" in node.op_type and not _is_quantized(node):
        reason = "its output is not quantized"
    return reason or NOT_FUSED


def _why_types(node: ir.Node, *operands: Operand) -> str | None:
    """Return why codes of these types are computed in float, None if they are not; checks operands and quantizers."""
    after = [stated_type(reader.outputs[0]) for reader in quantizers_after(node.outputs[0])]
    found = {TYPE_REASONS.get(dtype) for dtype in (*after, *(each.dtype for each in operands)) if dtype is not None}
    return next((reason for reason in (WIDE, SIGNED) if reason in found), None)


def _why_activation(node: ir.Node) -> str | None:
    """Return why an activation function was fused into a float convolution, None if none was."""
    stated = node.attributes.get("activation")
    if stated is None:
        return None
    name = stated.as_string()
    if name not in ("Relu", "Clip"):
        return f"its output is not quantized before {name}"
    return (
        f"{name} cannot be merged into the quantizer after it, whose zero point is not the lowest code "
        "or whose range is wider than that of the activation"
    )


def _why_bias(node: ir.Node, x: Operand, weight: Operand, bias: Operand | None) -> str | None:
    if inputs(node, 3)[2] is None:
        return None
    if bias is None:
        takes_floats = "Conv" in node.op_type or _is_quantized(node)
        return None if takes_floats else "its bias is float and its output is not quantized"
    if bias.dtype != ir.DataType.INT32:
        return f"its bias has codes of type {bias.dtype}, not INT32"
    if x.scale is None or weight.scale is None or bias.scale is None:
        return "a scale is computed, not constant"
    if not np.array_equal(np.float32(x.scale) * weight.scale, bias.scale):
        return "the scale of its bias is not exactly float32(input scale * weight scale)"
    return None


def _why_elementwise(node: ir.Node) -> str:
    operands = [each for each in (operand(value) for value in node.inputs) if each is not None]
    if len(operands) < sum(value is not None for value in node.inputs):
        return "not all of its inputs are quantized"
    if not _is_quantized(node):
        return "its output is not quantized"
    if reason := _why_types(node, *operands):
        return reason
    if node.op_type == "MaxPool":
        return "the quantizers before and after it have different parameters"
    return NOT_FUSED


def _has_free_sizes(graph: Any) -> bool:
    """Return whether an input of the graph has a free size besides the batch."""
    return any(not isinstance(size, int) for value in graph.inputs for size in (value.shape or ())[1:])


def _is_quantized(node: ir.Node) -> bool:
    """Return whether every reader of the node's output quantizes it."""
    readers = consumers(node.outputs[0])
    return bool(readers) and all(reader.op_type == QUANTIZE for reader in readers)
