"""Bring an emitted model to its normal form, and give its nodes and values readable names and metadata.

Nothing of the machine that exported stays in it.

Must not know: calibration, runtimes, files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants
from torch import fx

from calibrators.graph.aten import free_name
from exporter.emission.onnx_forms import NAME
from exporter.emission.packing import set_opset

__all__ = ["annotate", "normalize"]


def normalize(model: ir.Model) -> None:
    """Turn constants into initializers, store weights transposed, make reshapes static, drop unused values."""
    passes.RemoveUnusedNodesPass()(model)
    fold_constants(model, should_fold=_may_fold)
    _drop_identities(model.graph)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _store_transposed(model.graph)
    _fold_reshape_targets(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    set_opset(model, model.opset_imports[""])
    for part in (model, model.graph):
        part.doc_string = None
        part.metadata_props.clear()


def annotate(model: ir.Model, program: fx.GraphModule, metadata: Mapping[str, str]) -> None:
    """Name nodes and values after module paths, and record in each node the module it comes from."""
    names = _Names(model.graph)
    readable = program.meta.get("names", {})
    for buffer, name in readable.items():
        if buffer in model.graph.initializers:
            names.rename(model.graph.initializers[buffer], name)
    outputs = set(model.graph.outputs)
    for node in model.graph:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        path = scopes[-2] if len(scopes) > 1 else ""
        name = node.metadata_props.get(NAME) or (f"{path}.{node.op_type}" if path else node.op_type)
        if node.outputs[0] not in outputs:
            names.rename(node.outputs[0], name)
        names.rename_node(node, name)
        node.doc_string = None
        node.metadata_props.clear()
        node.metadata_props["intact.module"] = path
    own = {name for name, _ in [*program.named_parameters(), *program.named_buffers()]} | {*readable.values()}
    _name_constants(model, own, names)
    for value in _values(model.graph):
        value.metadata_props.clear()
    model.metadata_props.update({f"intact.{key}": value for key, value in metadata.items()})
    model.producer_name, model.producer_version = "intact", metadata.get("version", "")
    _name_free_sizes(model.graph, program)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]


def _may_fold(node: ir.Node) -> bool | None:
    """Return False for dequantizers, so that no dequantized weight is ever stored; None leaves the default."""
    return False if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None


def _drop_identities(graph: ir.Graph) -> None:
    """Make readers of a copy read the original; a copy that is an output keeps its name and stays."""
    outputs = set(graph.outputs)
    for node in list(graph):
        if node.op_type == "Identity" and node.inputs[0] is not None and node.outputs[0] not in outputs:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)


def _store_transposed(graph: ir.Graph) -> None:
    """Replace Transpose(DequantizeLinear(codes)) of a weight by DequantizeLinear of the transposed codes."""
    for codes in list(graph.initializers.values()):
        readers = [use.node for use in codes.uses()]
        transposes = [_only_transpose(reader, codes) for reader in readers]
        if not transposes or None in transposes:
            continue
        for value in dict.fromkeys(value for reader in readers for value in reader.inputs if value is not None):
            if value.const_value is not None and value.const_value.numpy().ndim > 1:  # codes, parameters of blocks
                array = np.ascontiguousarray(value.const_value.numpy().T)
                value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
        for reader, transpose in zip(readers, transposes, strict=True):
            assert transpose is not None
            if "axis" in reader.attributes:
                reader.attributes["axis"] = ir.AttrInt64("axis", 1 - reader.attributes["axis"].as_int())
            transpose.outputs[0].replace_all_uses_with(reader.outputs[0])
            reader.outputs[0].shape = codes.shape
            graph.remove(transpose, safe=True)


def _only_transpose(reader: ir.Node, codes: ir.Value) -> ir.Node | None:
    """Return the Transpose that alone reads what `reader` dequantizes from `codes`."""
    if reader.op_type != "DequantizeLinear" or reader.inputs[0] is not codes:
        return None
    nodes = [use.node for use in reader.outputs[0].uses()]
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == "Transpose" else None


def _fold_reshape_targets(graph: ir.Graph) -> None:
    """Replace the computed target of a Reshape by a constant one, with -1 for its one unknown dimension."""
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        if (shape := node.outputs[0].shape) is None:
            continue
        dims = [dim if isinstance(dim, int) else -1 for dim in shape]
        if dims.count(-1) > 1 or 0 in dims:
            continue
        name = f"{node.outputs[0].name}_shape"
        target = ir.Value(name=name, shape=ir.Shape([len(dims)]), type=ir.TensorType(ir.DataType.INT64))
        target.const_value = ir.tensor(np.array(dims, dtype=np.int64), name=name)
        graph.register_initializer(target)
        node.replace_input_with(1, target)


def _name_constants(model: ir.Model, own: set[str], names: _Names) -> None:
    """Name constants, except the program's `own` parameters, after the first node and input that read them."""
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.name in own:
                continue
            ports = onnx.defs.get_schema(node.op_type, model.opset_imports[""], node.domain).inputs
            names.rename(value, f"{node.name}_{ports[min(index, len(ports) - 1)].name}")
            own.add(str(value.name))


def _name_free_sizes(graph: ir.Graph, program: fx.GraphModule) -> None:
    """Call the free sizes of inputs 'batch' or by the names of their axes, wherever they occur; others stay."""
    named = program.meta.get("free_axes", {})
    names: dict[str, str] = {}
    for value in graph.inputs:
        axes = ({0: "batch"} if program.meta["dynamic_batch"] else {}) | named.get(value.name, {})
        for axis, name in axes.items():
            if value.shape is not None and axis < len(value.shape):
                names.setdefault(str(value.shape[axis]), name)
    for value in _values(graph):
        for index, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value is not None:
                assert value.shape is not None
                text = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), str(dim))
                value.shape[index] = ir.SymbolicDim(text)


class _Names:
    """The names of a graph, under which renaming finds free ones."""

    def __init__(self, graph: ir.Graph) -> None:
        self.initializers = graph.initializers
        self.values = {value.name for value in _values(graph)}
        self.nodes: set[str | None] = set()

    def rename(self, value: ir.Value, name: str) -> None:
        """Name a value `name`, followed by a number if another value has that name."""
        if value.name == name:
            return
        name = free_name(name, self.values.__contains__)
        self.values.add(name)
        if not value.is_initializer():
            value.name = name
            return
        del self.initializers[str(value.name)]
        value.name = name
        if value.const_value is not None:
            value.const_value.name = name
        self.initializers[name] = value

    def rename_node(self, node: ir.Node, name: str) -> None:
        """Name a node `name`, followed by a number if another node has that name."""
        node.name = free_name(name, self.nodes.__contains__)
        self.nodes.add(node.name)
