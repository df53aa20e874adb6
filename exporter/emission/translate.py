"""Translate the nodes of a flat graph to ONNX operators with torch.onnx, without tracing the graph again.

torch.onnx reads an exported program: a graph whose constants are inputs, and whose values have types and shapes with a
free batch. A copy of the graph gets both. Only a graph with operators that torch.onnx has to take apart is traced.

Must not know: calibration, readable names, files.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import onnx_ir as ir
import onnxscript.function_libs.torch_lib.ops  # noqa: F401 (fills the registry)
import torch
from onnxscript.function_libs.torch_lib.registration import default_registry
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, ExportGraphSignature
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx.experimental._config import patch  # type: ignore[attr-defined]
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.onnx._internal.exporter._core import _exported_program_to_onnx_program, exported_program_to_ir
from torch.onnx._internal.exporter._fx_passes import insert_type_promotion_nodes
from torch.onnx._internal.exporter._registration import OnnxDecompMeta, ONNXRegistry
from torch.onnx._internal.exporter._torchlib._torchlib_registry import get_torchlib_ops

from calibrators.graph.aten import outputs_of
from exporter.emission.onnx_forms import ONNX_FORMS
from exporter.frontend.recurrences import recurrences_by_shape
from exporter.frontend.reference import export_program

__all__ = ["translate"]

aten = torch.ops.aten


def translate(program: fx.GraphModule, *, opset: int) -> ir.Model:
    """Return the ONNX model of a flat graph whose outputs are distinct results of operators.

    raises: what torch.onnx raises for an operator that it cannot translate.
    """
    table = _Table(opset)
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"} - {operator.getitem}
    if all(map(table.is_registered, calls)):
        return _exported_program_to_onnx_program(_as_exported(program), registry=table).model
    return exported_program_to_ir(export_program(program), registry=_whole_table(opset))


class _Table(ONNXRegistry):
    """The translations of torch.onnx and ours, each made when it is asked for: all take a second and a half."""

    def __init__(self, opset: int) -> None:
        super().__init__()
        self._opset_version = opset

    def get_decomps(self, target: Any) -> list[OnnxDecompMeta]:
        """Return the translations of an operator, ours first."""
        return _translations(target, self.opset_version)


@functools.cache
def _translations(target: Any, opset: int) -> list[OnnxDecompMeta]:
    table = ONNXRegistry()
    table._opset_version = opset
    is_aten = isinstance(target, torch._ops.OpOverload)
    name = target.name() if is_aten else f"{target.__module__}::{target.__name__}"  # _operator::add
    for translation in get_torchlib_ops():
        if translation.fx_target is target:
            table._register(target, translation)
    if name in default_registry:
        entry = default_registry[name]
        for function in (*entry.overloads, *entry.complex):
            is_complex = function in entry.complex
            table._register(target, OnnxDecompMeta(function, target, signature=None, is_complex=is_complex))
    table._cleanup_registry_based_on_opset_version()
    if target in ONNX_FORMS:
        table.register_op(target, ONNX_FORMS[target])
    return table.get_decomps(target)


@functools.cache
def _whole_table(opset: int) -> ONNXRegistry:
    """Return all translations; which operators are among them decides what is taken apart."""
    table = ONNXRegistry.from_torchlib(opset)
    for target, translation in ONNX_FORMS.items():
        table.register_op(target, translation)
    return table


def _as_exported(program: fx.GraphModule) -> ExportedProgram:
    """Return a flat graph as an exported program: constants first among the inputs, then the graph's own."""
    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    graph, names = _with_constants_as_inputs(program, tensors)
    module = fx.GraphModule({}, graph)
    with torch.no_grad(), patch(backed_size_oblivious=True), recurrences_by_shape():
        _infer_shapes(module, [tensors[name] for name in names], program)
        insert_type_promotion_nodes(module)
    _reshape_by_views(graph)
    arguments = [TensorArgument(node.name) for node in graph.find_nodes(op="placeholder")]
    inputs = [
        InputSpec(
            InputKind.PARAMETER if isinstance(tensors[name], torch.nn.Parameter) else InputKind.BUFFER,
            argument,
            name,
            persistent=True,
        )
        for argument, name in zip(arguments, names, strict=False)
    ]
    inputs += [InputSpec(InputKind.USER_INPUT, argument, None) for argument in arguments[len(names) :]]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs_of(module)]
    constants = {name: tensors[name] for name in names}
    return ExportedProgram(module, graph, ExportGraphSignature(inputs, outputs), constants, {}, [ModuleCallEntry("")])


def _with_constants_as_inputs(program: fx.GraphModule, tensors: dict[str, Tensor]) -> tuple[fx.Graph, list[str]]:
    """Return a copy of the graph, and the names of the constants that are its first inputs, in the order of tensors."""
    readers: dict[int, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        readers.setdefault(id(operator.attrgetter(str(node.target))(program)), []).append(node)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    names = [name for name, tensor in tensors.items() if id(tensor) in readers]
    for name in names:
        copies |= dict.fromkeys(readers[id(tensors[name])], graph.placeholder(name))
    graph.output(graph.graph_copy(program.graph, copies))
    for node in graph.find_nodes(op="placeholder"):
        node.target = node.name  # which is an identifier of its own
    return graph, names


def _infer_shapes(module: fx.GraphModule, constants: list[Tensor], program: fx.GraphModule) -> None:
    """Store types and shapes of all values; one symbol stands for the batch of all inputs if it is free."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    free, first = program.meta.get("free_axes", {}), {0: DimDynamic.DUCK} if program.meta["dynamic_batch"] else {}
    inputs = []
    for name, x in zip(program.meta["input_names"], program.meta["example"], strict=True):
        dynamic = first | dict.fromkeys(free.get(name, {}), DimDynamic.DYNAMIC)
        sizes = [dynamic.get(axis, DimDynamic.STATIC) for axis in range(x.ndim)]
        inputs.append(mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes)))
    with enable_python_dispatcher():
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(
            *(mode.from_tensor(x, static_shapes=True) for x in constants), *inputs
        )


def _reshape_by_views(graph: fx.Graph) -> None:
    """Replace what reshapes by a view, which has one form in ONNX; only one free size stays open."""
    for node in graph.nodes:
        if node.target is aten.flatten.using_ints:
            sizes = [-1 if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]
            if sizes.count(-1) < 2:
                node.target, node.args, node.kwargs = aten.view.default, (node.args[0], sizes), {}
        elif node.target is aten.reshape.default:
            node.target = aten.view.default
