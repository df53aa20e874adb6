"""Bring an emitted model to its normal form, and give its nodes and values readable names and metadata.

Nothing stays in it that belongs to the machine that exported.

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
from exporter.emission.packing import set_opset
from exporter.emission.translations import NAME

__all__ = ["annotate", "normalise"]


def normalise(model: ir.Model) -> None:
    """Constants as initialisers, transposed weights stored transposed, static reshapes, nothing unused or double."""
    passes.RemoveUnusedNodesPass()(model)
    fold_constants(model, should_fold=_may_fold)
    _drop_identities(model.graph)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _store_transposed(model.graph)
    _fold_reshape_targets(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    set_opset(model, model.opset_imports[""])
    model.doc_string = None
    model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _drop_identities(graph: ir.Graph) -> None:
    """Readers of a copy read the original; a copy that is an output keeps its name and stays."""
    outputs = set(graph.outputs)
    for node in list(graph):
        if node.op_type == "Identity" and node.inputs[0] is not None and node.outputs[0] not in outputs:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)


def _may_fold(node: ir.Node) -> bool | None:
    """Codes stay codes: no dequantized weight is ever stored."""
    return False if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None


def _store_transposed(graph: ir.Graph) -> None:
    """Transpose(DequantizeLinear(codes)) of a weight becomes DequantizeLinear of the transposed codes."""
    for codes in list(graph.initializers.values()):
        readers = [use.node for use in codes.uses()]
        transposes = [_transpose_behind(reader, codes) for reader in readers]
        if not transposes or None in transposes:
            continue
        for value in dict.fromkeys(value for reader in readers for value in reader.inputs if value is not None):
            if value.const_value is not None and value.const_value.numpy().ndim > 1:
                _transpose_constant(value)
        for reader, transpose in zip(readers, transposes, strict=True):
            assert transpose is not None
            if "axis" in reader.attributes:
                reader.attributes["axis"] = ir.AttrInt64("axis", 1 - reader.attributes["axis"].as_int())
            transpose.outputs[0].replace_all_uses_with(reader.outputs[0])
            reader.outputs[0].shape = codes.shape
            graph.remove(transpose, safe=True)


def _transpose_behind(reader: ir.Node, codes: ir.Value) -> ir.Node | None:
    """The Transpose that alone reads what `reader` dequantizes from `codes`."""
    uses = reader.outputs[0].uses() if reader.op_type == "DequantizeLinear" and reader.inputs[0] is codes else ()
    nodes = [use.node for use in uses]
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == "Transpose" else None


def _transpose_constant(value: ir.Value) -> None:
    """Codes, and parameters of blocks; others have one dimension or none."""
    assert value.const_value is not None
    array = np.ascontiguousarray(value.const_value.numpy().T)
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)


def _fold_reshape_targets(graph: ir.Graph) -> None:
    """A Reshape whose computed target has one unknown dimension gets a constant target with -1 there."""
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        shape = node.outputs[0].shape
        if shape is None:
            continue
        dims = [dim if isinstance(dim, int) else -1 for dim in shape]
        if dims.count(-1) > 1 or 0 in dims:
            continue
        name = f"{node.outputs[0].name}_shape"
        target = ir.Value(name=name, shape=ir.Shape([len(dims)]), type=ir.TensorType(ir.DataType.INT64))
        target.const_value = ir.tensor(np.array(dims, dtype=np.int64), name=name)
        graph.register_initializer(target)
        node.replace_input_with(1, target)


def annotate(model: ir.Model, program: fx.GraphModule, metadata: Mapping[str, str]) -> None:
    """Readable names from module paths, and metadata that says where each node comes from."""
    names = _Names(model.graph)
    for buffer, readable in program.meta.get("names", {}).items():
        if buffer in model.graph.initializers:
            names.rename(model.graph.initializers[buffer], readable)
    outputs = set(model.graph.outputs)
    for node in model.graph:
        scopes = _scopes(node)
        path = scopes[-2] if len(scopes) > 1 else ""
        readable = node.metadata_props.get(NAME) or (f"{path}.{node.op_type}" if path else node.op_type)
        if node.outputs[0] not in outputs:
            names.rename(node.outputs[0], readable)
        node.name = names.unique_node(readable)
        node.doc_string = None
        node.metadata_props.clear()
        node.metadata_props["intact.module"] = path
        for value in node.outputs:
            value.metadata_props.clear()
    _name_constants(model, program, names)
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.update({"intact." + key: value for key, value in metadata.items()})
    model.producer_name, model.producer_version = "intact", metadata.get("version", "")
    _name_batch(model, program)


def _name_constants(model: ir.Model, program: fx.GraphModule, names: _Names) -> None:
    """Constants that are no parameter of the program are called after the first node and input that read them."""
    own = {name for name, _ in [*program.named_parameters(), *program.named_buffers()]}
    own |= set(program.meta.get("names", {}).values())
    opset = model.opset_imports[""]
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.name in own:
                continue
            ports = onnx.defs.get_schema(node.op_type, opset, node.domain).inputs
            names.rename(value, f"{node.name}_{ports[min(index, len(ports) - 1)].name}")
            own.add(str(value.name))


def _scopes(node: ir.Node) -> list[str]:
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
    return re.findall(r"'([^']*)'", text)


class _Names:
    """Gives out names that no other value or node of the graph has."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.values: set[str | None] = {v.name for n in graph for v in n.outputs} | set(graph.initializers)
        self.values |= {v.name for v in graph.inputs}
        self.nodes: set[str | None] = set()

    def rename(self, value: ir.Value, readable: str) -> None:
        if value.name == readable:
            return
        name = free_name(readable, self.values.__contains__)
        if value.is_initializer():
            initializers = self.graph.initializers
            del initializers[str(value.name)]
            value.name = name
            if value.const_value is not None:
                value.const_value.name = name
            initializers[name] = value
        else:
            value.name = name
        self.values.add(name)

    def unique_node(self, readable: str) -> str:
        name = free_name(readable, self.nodes.__contains__)
        self.nodes.add(name)
        return name


def _name_batch(model: ir.Model, program: fx.GraphModule) -> None:
    """The free dimension is called 'batch'; static shapes stay numbers."""
    if not program.meta["dynamic_batch"]:
        return
    symbols = {str(value.shape[0]) for value in model.graph.inputs if value.shape and len(value.shape)}
    values = [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for index, dim in enumerate(value.shape):
            if not isinstance(dim, int) and str(dim) in symbols:
                value.shape[index] = ir.SymbolicDim("batch")
