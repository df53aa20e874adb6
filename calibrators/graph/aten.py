"""Reading and editing the one graph: the flat ATen `GraphModule` that capture produces and everything shares.

The contract of that graph:
- nodes are placeholder (one per model input), get_attr (parameters, buffers, constants), call_function (ATen overloads
  and operator.getitem) and output; no call_module, no pytrees: it takes tensors and returns a tuple of tensors;
- `graph.meta["example"]` is a tuple of example inputs (batch size 2 where the batch is dynamic);
- `graph.meta["dynamic_batch"]` says whether the first dimension of every input is free;
- `graph.meta["free_axes"]` names the other free dimensions, by input and axis; {} where it is absent;
- `graph.meta["size_bounds"]` holds their bounds (exporter.frontend.free_sizes), by the name of the size;
- `graph.meta["coded_outputs"]` names the outputs that are given as codes; () where it is absent;
- `graph.meta["input_grids"]` holds scale and zero point of placeholders whose values lie on a grid; {} where absent;
- `graph.meta["other_examples"]` holds inputs in which every free size differs from the example's; () where absent;
- `node.meta["nn_module_stack"]` and `node.meta["stack_trace"]` say where a node comes from, where known;
- `node.meta["expected"]` holds what batch norms tell about a value, where any do (calibrators.graph.batch_norm).

Must not know: quantization, folding, ONNX.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from calibrators.graph.operators import CONVOLUTIONS, PADDED_BY_NAME, TRANSPOSED, facts

__all__ = [
    "add_constant",
    "batch_of",
    "bind",
    "coded_outputs",
    "constant",
    "convolution",
    "copy_graph",
    "example_batch",
    "fan_in",
    "free_name",
    "infer_shapes",
    "is_constant",
    "is_free",
    "layer_name",
    "macs",
    "module_path",
    "operator_name",
    "outputs_of",
    "overloads",
    "per_axis",
    "replace_args",
    "shape_of",
    "to_device",
    "where",
    "whole",
]

Module = TypeVar("Module", bound=torch.nn.Module)


def bind(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an ATen call by schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def replace_args(node: fx.Node, **changes: Any) -> None:
    """Set arguments of an ATen call by schema name."""
    bound = bind(node) | changes
    positional = [a for a in node.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]
    keywords = [a for a in node.target._schema.arguments if a.kwarg_only]  # type: ignore[union-attr]
    node.args = tuple(bound[a.name] for a in positional)
    node.kwargs = {a.name: bound[a.name] for a in keywords if bound[a.name] != a.default_value}


def is_constant(node: object) -> TypeGuard[fx.Node]:
    """Return whether an argument is a get_attr node: a parameter, buffer or constant."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def constant(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """Return the tensor of a get_attr node."""
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """Return the first of `name`, `name_1`, `name_2`, ... that is not taken."""
    numbered = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(free for free in numbered if not is_taken(free))


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of the graph that shares its tensors, which therefore must be replaced and never changed."""
    tensors = {id(tensor): tensor for tensor in (*graph.parameters(), *graph.buffers())}
    return copy.deepcopy(graph, tensors)


def whole(value: Tensor) -> Tensor:
    """Return a detached tensor on the same memory, or a copy if that memory holds more than the tensor."""
    fills = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value.detach() if fills else value.detach().clone()


def add_constant(graph: fx.GraphModule, name: str, value: Tensor, *, shared: bool = False) -> str:
    """Register `value` as a buffer under a free name near `name` (dots become underscores); return the name.

    shared: without a copy, for large tensors of which there is one elsewhere that stays as it is.
    """
    free = free_name(name.replace(".", "_") or "constant", lambda taken: hasattr(graph, taken))
    graph.register_buffer(free, whole(value) if shared else value.detach().clone())
    return free


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that made the node ('' for the root or unknown)."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def layer_name(node: fx.Node) -> str:
    """Return the module path of an operator, or its name where no module made it."""
    return module_path(node) or node.name


def operator_name(target: object) -> str:
    """Return the short name of an operator: 'conv2d' for aten.conv2d.default."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def where(node: fx.Node) -> str:
    """Return the node, module path and source line, for error messages: `conv2d_3 (stages.0.conv, zoo.py:31)`."""
    parts = [module_path(node)]
    lines = [line for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if "/torch/" not in line]  # a line of torch says less than the module path
    if own:
        file, line = own[-1].split(",")[:2]
        parts.append(f"{file.split('/')[-1].strip().strip(chr(34))}:{line.split()[-1]}")
    detail = ", ".join(part for part in parts if part)
    return f"{node.name} ({detail})" if detail else node.name


def fan_in(node: fx.Node) -> int:
    """Return the weights per output channel of a convolution or linear layer: its multiply-accumulates per output."""
    return math.prod(shape_of(bind(node)["weight"])[1:])


def macs(node: fx.Node) -> int:
    """Return the multiply-accumulates of one call for the whole example batch.

    Batch norm and products or quotients with a constant count one per element, other weightless operators none.
    """
    row, outputs = facts(node.target), math.prod(shape_of(node))
    if row.kind in ("convolution", "linear"):
        return outputs * fan_in(node)
    if row.kind == "transposed":
        return math.prod(shape_of(bind(node)["input"])) * fan_in(node)
    if row.kind == "pool":
        return outputs * math.prod(per_axis(bind(node)["kernel_size"], row.spatial))
    has_constant = any(not isinstance(argument, fx.Node) or is_constant(argument) for argument in node.args)
    scales = row.kind in ("product", "quotient") and has_constant
    return outputs if scales or node.target is torch.ops.aten.batch_norm.default else 0


def outputs_of(graph: fx.GraphModule) -> tuple[fx.Node, ...]:
    """Return the nodes whose values the graph returns, in order."""
    return tuple(graph.graph.output_node().args[0])  # type: ignore[arg-type]


def coded_outputs(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """Return the nodes of the outputs that are given as codes, by name."""
    named = graph.meta.get("coded_outputs", ())
    pairs = zip(graph.meta["output_names"], outputs_of(graph), strict=True) if named else ()
    return {name: node for name, node in pairs if name in named}


def per_axis(value: Any, spatial: int) -> tuple[int, ...]:
    """Return one number for each spatial axis of an argument that may give one for all."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * spatial if len(values) == 1 else values


def overloads(names: Iterable[str]) -> list[Any]:
    """Return the call targets with these names (operators.name_of): "conv2d.default" gives aten.conv2d.default."""
    return [operator.getitem if name == "getitem" else attrgetter(name)(torch.ops.aten) for name in names]


def convolution(spatial: int, *, transposed: bool = False) -> Any:
    """Return the target of the convolution with so many spatial dimensions, whose padding are numbers."""
    names = TRANSPOSED if transposed else CONVOLUTIONS - PADDED_BY_NAME
    (target,) = overloads(name for name in names if facts(name).spatial == spatial)
    return target


def batch_of(graph: fx.GraphModule, wanted: int) -> int:
    """Return the number of samples to run at a time: `wanted`, or the batch size that the graph fixes."""
    return wanted if graph.meta["dynamic_batch"] else example_batch(graph)


def example_batch(graph: fx.GraphModule) -> int:
    """Return the number of samples in the example."""
    return next((len(x) for x in graph.meta["example"] if x.ndim), 1)


def infer_shapes(graph: fx.GraphModule) -> None:
    """Run the example and store every node's shape and dtype in node.meta["tensor_meta"].

    The axes whose sizes differ in the other examples are stored in node.meta["free"].
    """
    sizes: dict[fx.Node, list[tuple[int, ...]]] = {}
    with torch.no_grad():
        for example in (*graph.meta.get("other_examples", ()), graph.meta["example"]):
            ShapeProp(graph).propagate(*example)
            for node in graph.graph.nodes:
                sizes.setdefault(node, []).append(shape_of(node))
    for node, found in sizes.items():
        node.meta["free"] = frozenset(axis for axis, each in enumerate(zip(*found, strict=True)) if len({*each}) > 1)


def is_free(node: fx.Node, axis: int) -> bool:
    """Return whether the size of an axis differs between calls: that of the batch, or of another free axis."""
    return axis % max(len(shape_of(node)), 1) in node.meta.get("free", ())


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's value for the example; () unless it is a single tensor."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else ()


def to_device(module: Module, device: torch.device) -> Module:
    """Move a module to a device: its parameters and buffers, and the tensors that its graphs create; return it."""

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            calls = [node for node in part.graph.nodes if _names_a_device(node)]
            for node in calls:
                node.args = tuple(map(moved, node.args))
                node.kwargs = {name: moved(argument) for name, argument in node.kwargs.items()}
            if calls:
                part.recompile()
    return module.to(device)


def _names_a_device(node: fx.Node) -> bool:
    return any(isinstance(argument, torch.device) for argument in (*node.args, *node.kwargs.values()))
