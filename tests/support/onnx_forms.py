"""One small file for each form whose first release of onnxruntime is known."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from exporter.emission.packing import ir_version_of
from runtime_tests.ort.versions import Form

value = helper.make_tensor_value_info


def plain_file(*, opset: int, ir_version: int) -> onnx.ModelProto:
    """Return a copy of its input, which every release can compute."""
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "plain", [value("x", 1, [1])], [value("y", 1, [1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = ir_version
    return model


def form_file(form: Form, dtype: ir.DataType | None = None) -> onnx.ModelProto:
    """Return a file whose only demand beyond its opset is the form, with one of its types."""
    code = (dtype or next(iter(sorted(form.types)), ir.DataType.INT8)).value
    opset = max(21, form.opset)
    inits = [
        helper.make_tensor("w", code, [4, 4], [1, 0] * 8),
        helper.make_tensor("z", code, [2, 4] if form.blocks else [], [0] * 8 if form.blocks else [0]),
        helper.make_tensor("s", TensorProto.FLOAT, [2, 4] if form.blocks else [], [0.5] * 8 if form.blocks else [0.5]),
    ]
    nodes = {
        "Cast": [
            helper.make_node("Cast", ["w"], ["c"], to=TensorProto.INT8),
            helper.make_node("Cast", ["c"], ["f"], to=1),
        ],
        "DequantizeLinear": [
            helper.make_node(
                "DequantizeLinear", ["w", "s", "z"], ["f"], **({"block_size": 2, "axis": 0} if form.blocks else {})
            )
        ],
        "QuantizeLinear": [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("Cast", ["q"], ["f"], to=1),
        ],
    }[form.op]
    used = {name for node in nodes for name in node.input}
    nodes.append(helper.make_node("MatMul", ["x", "f"], ["y"]))
    graph = helper.make_graph(
        nodes, "form", [value("x", 1, [4, 4])], [value("y", 1, [4, 4])], [each for each in inits if each.name in used]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = ir_version_of(opset)
    return model
