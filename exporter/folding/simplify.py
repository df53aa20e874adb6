"""The graph without what changes nothing: constant subgraphs, operators that return their input, unused attributes.

Must not know: tap maps, quantization, ONNX.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import Tensor, fx, nn

from calibrators.graph.aten import add_constant, bind, constant, is_constant, module_path, shape_of
from calibrators.graph.operators import PADS

__all__ = [
    "Constants",
    "evaluate",
    "exact_value",
    "fill_borders",
    "fold_constants",
    "remove_identities",
    "with_own_attributes",
]

aten = torch.ops.aten

LARGEST_CONSTANT = 1 << 20
"""Elements up to which a constant subgraph is always evaluated; beyond, only if it makes its inputs no larger."""

ALWAYS_IDENTITY = {aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default}
ALWAYS_IDENTITY |= {aten.lift_fresh_copy.default, aten.positive.default}
DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
DROPOUTS |= {aten.feature_alpha_dropout.default}
RESHAPES = {aten.reshape.default, aten.view.default, aten.expand.default, aten.flatten.using_ints}
RESHAPES |= {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand_as.default, aten.view_as.default}
RESHAPES |= {aten.unflatten.int, aten.reshape_as.default, aten.slice.Tensor, aten.narrow.default}
CASTS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
ADDS = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}
MULS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}

Constants = dict[fx.Node, Tensor]
"""Float64 values of those get_attr nodes that stand for a whole evaluated subgraph."""


def with_own_attributes(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that holds clones of the parameters and buffers it uses, and nothing else."""
    copied = fx.Graph()
    result = copied.graph_copy(graph.graph, {}, return_output_node=True)
    assert isinstance(result, tuple)
    value, output = result
    copied.output(value).meta = dict(output.meta)
    root = nn.Module()
    for node in copied.nodes:
        if node.op == "get_attr":
            _assign(root, str(node.target), graph)
    fresh = fx.GraphModule(root, copied)
    fresh.meta = dict(graph.meta)
    return fresh


def _assign(root: nn.Module, target: str, source: nn.Module) -> None:
    """Clone source's attribute `target` (a dotted path) to the same place under root."""
    *path, name = target.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner, source = owner.get_submodule(part), getattr(source, part)
    value = getattr(source, name)
    if hasattr(owner, name):
        return
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
    else:
        owner.register_buffer(name, value.detach().clone())


def fold_constants(graph: fx.GraphModule) -> Constants:
    """Replace what depends on get_attr nodes only by its value.

    returns: float64 values of the new get_attr nodes. The value that stays in the graph is computed in the model's own
             dtype; this one in float64 from the same parameters, for exact algebra.
    """
    own: dict[fx.Node, Any] = {}
    exact: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            own[node] = constant(graph, node)
        elif _is_pure(node) and all(source in own for source in node.all_input_nodes):
            own[node] = evaluate(node, own)
    results: Constants = {}
    for node, value in own.items():
        is_used = node.op != "get_attr" and any(user not in own for user in node.users)
        if is_used and isinstance(value, Tensor) and _is_small(node, own):
            replaced = _replace_by_constant(graph, node, value)
            if value.is_floating_point():
                results[replaced] = _in_float64(node, own, exact).double()
    graph.graph.eliminate_dead_code()
    return results


def exact_value(graph: fx.GraphModule, node: fx.Node, constants: Constants) -> Tensor:
    """Float64 value of a get_attr node."""
    return constants[node] if node in constants else constant(graph, node).double()


def _is_pure(node: fx.Node) -> bool:
    """Whether a node with constant inputs is itself a constant."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    varies = torch.Tag.nondeterministic_seeded in target.tags or target._schema.name.endswith("empty")
    return not target._schema.is_mutable and not varies


def evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Value of a call from those of its inputs."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _in_float64(node: fx.Node, own: dict[fx.Node, Any], exact: dict[fx.Node, Any]) -> Any:
    """The value in float64; the model's own value where an operator insists on the dtype it was traced with."""
    if node not in exact:
        if node.op == "get_attr":
            exact[node] = own[node].double() if own[node].is_floating_point() else own[node]
        else:
            for source in node.all_input_nodes:
                _in_float64(source, own, exact)
            try:
                exact[node] = evaluate(node, exact)
            except RuntimeError:
                exact[node] = own[node]
    return exact[node]


def _is_small(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    given = sum(values[source].numel() for source in node.all_input_nodes if isinstance(values[source], Tensor))
    return bool(values[node].numel() <= max(LARGEST_CONSTANT, given))


def _replace_by_constant(graph: fx.GraphModule, node: fx.Node, value: Tensor) -> fx.Node:
    name = add_constant(graph, f"{module_path(node)}.{node.name}".lstrip("."), value.contiguous())
    with graph.graph.inserting_before(node):
        replaced = graph.graph.get_attr(name)
    replaced.meta = dict(node.meta)
    node.replace_all_uses_with(replaced)
    return replaced


def remove_identities(graph: fx.GraphModule) -> None:
    """Replace every operator that returns its input unchanged by that input.

    Cases: dropout outside training, aliases and copies; casts to the dtype at hand; reshapes, expansions and slices
    that keep the shape; permutations in order; zero padding of width 0; + 0, - 0, * 1, / 1; a concatenation of one.
    """
    for node in list(graph.graph.nodes):
        source = _same_as(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _same_as(node: fx.Node) -> fx.Node | None:
    """The input that `node` returns unchanged, None if it does something."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return None
    first = node.args[0]
    if node.target is aten.cat.default and isinstance(first, (list, tuple)) and len(first) == 1:
        return first[0] if isinstance(first[0], fx.Node) else None
    if not isinstance(first, fx.Node) or not _same_type(node, first):
        return None
    return first if _changes_nothing(node) else None


def _changes_nothing(node: fx.Node) -> bool:
    target, first = node.target, node.args[0]
    if target in ALWAYS_IDENTITY or target in CASTS:
        return True
    if target in DROPOUTS:
        return not bool(bind(node)["train"])
    if target in RESHAPES:
        return _same_symbolic_shape(node, first)  # type: ignore[arg-type]
    if target is aten.permute.default:
        order = bind(node)["dims"]
        return [axis % len(order) for axis in order] == list(range(len(order)))
    if target in PADS:
        return not any(bind(node)["pad"])
    if target in ADDS:
        return bool(bind(node)["other"] == 0)
    return target in MULS and bool(bind(node)["other"] == 1)


def _same_type(node: fx.Node, source: fx.Node) -> bool:
    """Whether both values have one dtype and one shape for the example."""
    mine, theirs = (getattr(each.meta.get("tensor_meta"), "dtype", None) for each in (node, source))
    return mine is not None and mine == theirs and shape_of(node) == shape_of(source)


def _same_symbolic_shape(node: fx.Node, source: fx.Node) -> bool:
    """Whether the shapes agree for every batch size, not only for the example's."""
    mine, theirs = node.meta.get("val"), source.meta.get("val")
    return isinstance(mine, Tensor) and isinstance(theirs, Tensor) and str(mine.shape) == str(theirs.shape)


def fill_borders(graph: fx.GraphModule, constants: Constants) -> None:
    """Rewrite "pad with zeros, then write a value into each side" as pad(x - value) + value.

    That is how a block that must be padded with the constant it would itself produce is written by hand; the sum says
    the same without writes. Only complete borders of one per-channel constant are rewritten.
    """
    for node in list(graph.graph.nodes):
        if node.target in PADS and bind(node).get("mode", "constant") == "constant" and not bind(node)["value"]:
            _fill_border(graph, node, constants)
    graph.graph.eliminate_dead_code()


def _fill_border(graph: fx.GraphModule, padding: fx.Node, constants: Constants) -> None:
    sides, values, last = _written_sides(padding)
    widths = list(bind(padding)["pad"])
    axes = [len(shape_of(padding)) - 1 - index // 2 for index in range(len(widths))]
    wanted = {(axis, index % 2, width) for index, (axis, width) in enumerate(zip(axes, widths, strict=True)) if width}
    if not wanted or sides != wanted or min(widths) < 0:
        return
    exact = [exact_value(graph, value, constants) for value in values]
    if not all(torch.equal(exact[0].flatten(), other.flatten()) for other in exact):
        return
    if not _is_per_channel(exact[0], len(shape_of(padding))):
        return
    source, value = padding.args[0], values[0]
    with graph.graph.inserting_before(last):
        centred = graph.graph.call_function(aten.sub.Tensor, (source, value))
        padded = graph.graph.call_function(aten.constant_pad_nd.default, (centred, widths))
        filled = graph.graph.call_function(aten.add.Tensor, (padded, value))
    centred.meta = dict(source.meta)  # type: ignore[union-attr]
    padded.meta, filled.meta = dict(padding.meta), dict(last.meta)
    last.replace_all_uses_with(filled)


def _is_per_channel(value: Tensor, rank: int) -> bool:
    """Whether a constant varies along axis 1 only of a value of that rank."""
    shape = (1,) * (rank - value.ndim) + tuple(value.shape)
    return [axis for axis, size in enumerate(shape) if size > 1] in ([], [1])


def _written_sides(padding: fx.Node) -> tuple[set[tuple[int, int, int]], list[fx.Node], fx.Node]:
    """Sides (axis, 0 low or 1 high, width) that slice_scatter writes after padding, the constants, the last write."""
    sides: set[tuple[int, int, int]] = set()
    values: list[fx.Node] = []
    last = padding
    while True:
        writes = [user for user in last.users if user.target is aten.slice_scatter.default and user.args[0] is last]
        value = _broadcast_constant(writes[0].args[1]) if len(writes) == 1 else None
        others = [user for user in last.users if user not in writes and user.target is not aten.slice.Tensor]
        if value is None or others or bind(writes[0])["step"] != 1:
            return sides, values, last
        given = bind(writes[0])
        start, end, axis = given["start"] or 0, given["end"], given["dim"]
        low = start == 0
        if not low and end is not None and end < sys.maxsize:  # not up to the border
            return sides, values, last
        sides.add((axis, 0 if low else 1, end if low else -start))
        values.append(value)
        last = writes[0]


def _broadcast_constant(value: Any) -> fx.Node | None:
    """Return the constant under expand() and copy() onto a slice."""
    while isinstance(value, fx.Node) and value.target in (aten.copy.default, aten.expand.default):
        value = value.args[1] if value.target is aten.copy.default else value.args[0]
    return value if is_constant(value) else None
