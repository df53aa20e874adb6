"""Write and read the reference program of a bundle, with which the bundle is proved again on another machine.

Must not know: ONNX, runtimes.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, ExportGraphSignature
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx.experimental._config import patch  # type: ignore[attr-defined]
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges

from calibrators.errors import ModelError
from calibrators.graph.aten import outputs_of
from exporter.frontend.calling import user_inputs
from exporter.frontend.capture import capture, quiet
from exporter.frontend.load import load_model
from exporter.frontend.recurrences import recurrences_by_shape

__all__ = ["export_program", "load_reference", "save_reference"]

BATCHES = ValueRanges(1, 2**20)
"""Sizes that a free batch may have."""

ORIGIN = ("stack_trace", "from_node", "nn_module_stack", "custom")
"""Metadata of nodes that say where on this machine they come from."""


def export_program(program: fx.GraphModule) -> ExportedProgram:
    """Return a flat graph as an ExportedProgram with the same inputs, free axes and outputs, without tracing it again.

    Its graph is a copy, whose constants are inputs and whose values have types and shapes.
    """
    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    graph, names = _with_constants_as_inputs(program, tensors)
    module = fx.GraphModule({}, graph)
    shapes = ShapeEnv()
    with quiet(), torch.no_grad(), patch(backed_size_oblivious=True), recurrences_by_shape():
        _infer_shapes(module, [tensors[name] for name in names], program, shapes)
    example = tuple(program.meta["example"])
    ranges: dict[Any, Any] = dict(shapes.var_to_range)
    arguments = [TensorArgument(node.name) for node in graph.find_nodes(op="placeholder")]
    constants, inputs = arguments[: len(names)], arguments[len(names) :]
    if program.meta["dynamic_batch"]:
        first = next(node for node in graph.nodes if node.name == inputs[0].name).meta["val"].shape[0]
        ranges |= dict.fromkeys(first.node.expr.free_symbols, BATCHES)
    results = [TensorArgument(node.name) for node in outputs_of(module)]
    signature = ExportGraphSignature(
        [
            *(_constant(argument, name, tensors[name]) for argument, name in zip(constants, names, strict=True)),
            *(InputSpec(InputKind.USER_INPUT, argument, None) for argument in inputs),
        ],
        [OutputSpec(OutputKind.USER_OUTPUT, argument, None) for argument in results],
    )
    called = ModuleCallSignature(
        [*inputs],
        [*results],
        in_spec=pytree.tree_structure((example, {})),
        out_spec=pytree.tree_structure(tuple(range(len(results)))),
        forward_arg_names=program.meta["input_names"],
    )
    state = {name: tensors[name] for name in names}
    exported = ExportedProgram(module, graph, signature, state, ranges, [ModuleCallEntry("", called)], (example, {}))
    exported._guards_code = []  # shape checks as Python source, which loading refuses to run
    return exported


def _constant(argument: TensorArgument, name: str, tensor: Tensor) -> InputSpec:
    kind = InputKind.PARAMETER if isinstance(tensor, torch.nn.Parameter) else InputKind.BUFFER
    return InputSpec(kind, argument, name, persistent=True)


def _with_constants_as_inputs(program: fx.GraphModule, tensors: Mapping[str, Tensor]) -> tuple[fx.Graph, list[str]]:
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


def _infer_shapes(module: fx.GraphModule, constants: list[Tensor], program: fx.GraphModule, shapes: ShapeEnv) -> None:
    """Store types and shapes of all values; one symbol stands for the batch of all inputs if it is free."""
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
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


def save_reference(exported: ExportedProgram, path: Path) -> None:
    """Write an exported reference program as .pt2: the same program gives the same bytes on any machine."""
    origins = {node: {key: node.meta.pop(key) for key in ORIGIN if key in node.meta} for node in exported.graph.nodes}
    content = io.BytesIO()  # torch's own writer ends the process when the disk is full
    with quiet(), torch.no_grad():
        torch.export.save(exported, content)
    for node, origin in origins.items():
        node.meta |= origin
    path.write_bytes(content.getvalue())


def load_reference(path: Path) -> fx.GraphModule:
    """Return the program that `save_reference` wrote.

    raises: ModelError if the file is missing or damaged.
    """
    program = load_model(str(path))
    if not isinstance(program, ExportedProgram):
        raise ModelError(f"{path} holds no reference program; export the model again")
    example = program.example_inputs[0] if program.example_inputs else ()
    if len(example) != len(user_inputs(program)) or not all(isinstance(x, torch.Tensor) for x in example):
        raise ModelError(f"{path} holds no inputs of its program; export the model again")
    return capture(program, tuple(example))
