"""Find the layer of the file that each executed node comes from, and what the layer reads, writes and stores.

The optimizer names a kernel after the node that it replaces, followed by a mark of its own. A node whose name is of
another form belongs to no layer. Nothing that decides a verdict depends on these names.

Must not know: which kernels are integer, how shapes were found, how long anything takes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from runtime_tests.ort.onnx_operators import DEQUANTIZE, KEEP_CODES, MOVE_DATA, QUANTIZE
from runtime_tests.ort.operands import consumers, where
from runtime_tests.ort.sessions import Model

__all__ = ["ComputeNode", "compute_nodes"]

MARKS = re.compile(r"(_token_\d+)+$|/.*$")
"""Ends of the names of fused nodes: "conv_token_2", "matmul/MatMulAddFusion"."""

CODES, VALUES = "_quantized", "_dequantized"
"""Ends of the names of a site's codes and of their dequantized values in the file."""

PASSED = MOVE_DATA | KEEP_CODES


@dataclass(frozen=True)
class ComputeNode:
    """A node that the runtime executes and that computes.

    name:   in the optimized graph; module: path of the module that it comes from, "" for the root or unknown.
    kernel: operator that the runtime executes; layer: name of the node of the file, "" if none is found.
    macs:   multiply-accumulates of one run, None if they cannot be counted.
    bytes:  of the constants that it reads, as the file stores them.
    reads:  sites of its quantized operands; writes: site of its result; None where the result is not quantized.
    """

    name: str
    module: str
    kernel: str
    layer: str
    integer: bool
    macs: int | None
    bytes: int
    reads: tuple[str, ...]
    writes: str | None


def compute_nodes(
    model: Model, counts: Mapping[ir.Node, int | None], integer: Collection[ir.Node]
) -> tuple[ComputeNode, ...]:
    """Describe nodes of the optimized graph, given with their multiply-accumulates.

    integer: those that run on codes.
    """
    layers = {str(node.name): node for node in model.graph_model.graph}
    own = {node: layers.get(where(node)) or layers.get(MARKS.sub("", where(node))) for node in counts}
    executed = {node for node in own.values() if node is not None}
    stored = _from_initializers(model.graph_model.graph)
    return tuple(
        ComputeNode(
            name=where(node),
            module=layer.metadata_props.get("intact.module", "") if layer is not None else "",
            kernel=node.op_type,
            layer=str(layer.name) if layer is not None else "",
            integer=node in integer,
            macs=counts[node],
            bytes=_bytes(layer, stored) if layer is not None else 0,
            reads=_reads(layer) if layer is not None else (),
            writes=_writes(layer, executed) if layer is not None else None,
        )
        for node, layer in own.items()
    )


def _from_initializers(graph: ir.Graph) -> dict[ir.Value, dict[str, int]]:
    """Return the values that depend on no input, each with the bytes of the initializers it is computed from, by name.

    One pass over the nodes, which stand in order: there are too many paths through residual blocks to follow each.
    """
    tensors = ((value, value.const_value) for value in graph.initializers.values())
    found = {value: {str(value.name): tensor.nbytes} for value, tensor in tensors if tensor is not None}
    for node in graph:
        sources = [value for value in node.inputs if value is not None]
        if all(value in found for value in sources):
            merged = {name: size for value in sources for name, size in found[value].items()}
            found |= dict.fromkeys(node.outputs, merged)
    return found


def _bytes(layer: ir.Node, stored: Mapping[ir.Value, Mapping[str, int]]) -> int:
    """Return the bytes of the initializers from which alone operands of a node are computed, each counted once."""
    operands = (stored.get(value, {}) for value in layer.inputs if value is not None)
    return sum({name: size for each in operands for name, size in each.items()}.values())


def _reads(layer: ir.Node) -> tuple[str, ...]:
    producers = (value.producer() for value in layer.inputs if value is not None)
    names = (str(node.outputs[0].name) for node in producers if node is not None and node.op_type == DEQUANTIZE)
    return tuple(name.removesuffix(VALUES) for name in names)


def _writes(layer: ir.Node, executed: Collection[ir.Node]) -> str | None:
    """Return the site of the codes that a node's result becomes, after activations, bounds and moves alone."""
    node = layer
    while not str(node.outputs[0].name).endswith(CODES):
        readers = consumers(node.outputs[0])
        quantizers = [reader for reader in readers if reader.op_type == QUANTIZE]
        if not quantizers and (len(readers) != 1 or (readers[0] in executed and readers[0].op_type not in PASSED)):
            return None
        node = [*quantizers, *readers][0]
    return str(node.outputs[0].name).removesuffix(CODES)
