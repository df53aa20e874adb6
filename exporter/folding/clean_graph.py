"""Remove what changes nothing from the graph: constant subgraphs, operators that return their input, unused attributes.

Must not know: affine maps, quantization, ONNX.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from calibrators.graph.aten import bind, constant, is_constant, module_path, overloads, shape_of, whole
from calibrators.graph.operators import DROPOUTS, PADS, PRODUCTS, QUOTIENTS, REVERSED, SUMS
from calibrators.graph.rewrite import Rule, apply_rules, call_before, constant_before, replace_by
from calibrators.graph.walk import call

__all__ = [
    "Constants",
    "exact_value",
    "fill_borders",
    "fold_constants",
    "remove_identities",
    "varying_axes",
    "with_own_attributes",
]

aten = torch.ops.aten

LARGEST_CONSTANT = 1 << 20
"""Elements up to which a constant subgraph is always evaluated; above, only if it is not larger than its inputs."""

Constants = dict[fx.Node, Tensor]
"""Float64 values of those get_attr nodes that stand for a whole evaluated subgraph."""


def with_own_attributes(graph: fx.GraphModule, *, shared: bool = False) -> fx.GraphModule:
    """Return a copy of the graph that has the parameters and buffers it uses, on the same memory, and no others.

    shared: they are the same objects, so that a tensor with several names is known as one.
    """
    copied = fx.Graph()
    result = copied.graph_copy(graph.graph, {}, return_output_node=True)
    assert isinstance(result, tuple)
    value, output = result
    copied.output(value).meta = dict(output.meta)
    fresh = fx.GraphModule(graph, copied)
    fresh.meta = dict(graph.meta)
    if shared:
        return fresh
    for module in fresh.modules():
        for name, parameter in module._parameters.items():
            assert parameter is not None
            module._parameters[name] = nn.Parameter(whole(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            assert buffer is not None
            module._buffers[name] = whole(buffer)
    return fresh


# Constants -----------------------------------------------------------------------------------------------------------


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
            own[node] = call(node, own)
    used = [node for node in own if node.op != "get_attr" and any(user not in own for user in node.users)]
    used = [node for node in used if isinstance(own[node], Tensor) and _is_small(node, own)]
    for node in used:  # before the first is replaced: they may depend on each other
        _in_float64(node, own, exact)
    results: Constants = {}
    for node in used:
        made = constant_before(node, f"{module_path(node)}.{node.name}".lstrip("."), own[node].contiguous())
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        if own[node].is_floating_point():
            results[made] = exact[node].double()
    graph.graph.eliminate_dead_code()
    return results


def exact_value(graph: fx.GraphModule, node: fx.Node, constants: Constants) -> Tensor:
    """Return the float64 value of a get_attr node."""
    return constants[node] if node in constants else constant(graph, node).double()


def _is_pure(node: fx.Node) -> bool:
    """Return whether a node with constant inputs is itself a constant."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    varies = torch.Tag.nondeterministic_seeded in target.tags or target._schema.name.endswith("empty")
    return not target._schema.is_mutable and not varies


def _in_float64(node: fx.Node, own: dict[fx.Node, Any], exact: dict[fx.Node, Any]) -> Any:
    """Return the value in float64; the model's own where an operator insists on the dtype it was traced with."""
    if node not in exact:
        if node.op == "get_attr":
            exact[node] = own[node].double() if own[node].is_floating_point() else own[node]
        else:
            for source in node.all_input_nodes:
                _in_float64(source, own, exact)
            try:
                exact[node] = call(node, exact)
            except RuntimeError:
                exact[node] = own[node]
    return exact[node]


def _is_small(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    given = sum(values[source].numel() for source in node.all_input_nodes if isinstance(values[source], Tensor))
    return bool(values[node].numel() <= max(LARGEST_CONSTANT, given))


# Identities ----------------------------------------------------------------------------------------------------------


def remove_identities(graph: fx.GraphModule) -> None:
    """Replace every operator that returns its input unchanged by that input.

    Cases: dropout outside training, aliases and copies; casts to the dtype at hand; reshapes, expansions and slices
    that keep the shape; reshapes before reshapes; permutations in order; zero padding of width 0; + 0, - 0, * 1, / 1;
    a concatenation of one.
    """
    apply_rules(graph, IDENTITIES)


def _removed_if(changes_nothing: Callable[[fx.Node], bool], names: str) -> dict[Any, tuple[Rule, ...]]:
    """Return rules that remove calls of these operators which keep dtype and shape and change nothing else."""

    def rule(node: fx.Node) -> None:
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and _same_type(node, source) and changes_nothing(node):
            replace_by(node, source)

    return dict.fromkeys(overloads(names.split()), (rule,))


def _same_type(node: fx.Node, source: fx.Node) -> bool:
    """Return whether both values have one dtype and one shape for the example."""
    mine, theirs = (getattr(each.meta.get("tensor_meta"), "dtype", None) for each in (node, source))
    return mine is not None and mine == theirs and shape_of(node) == shape_of(source)


def _keeps_shape(node: fx.Node) -> bool:
    """Return whether a call keeps the shape of its input for every batch size, not only for the example's."""
    mine, theirs = (each.meta.get("val") for each in (node, node.args[0]))  # type: ignore[union-attr]
    return isinstance(mine, Tensor) and isinstance(theirs, Tensor) and str(mine.shape) == str(theirs.shape)


def _keeps_order(node: fx.Node) -> bool:
    order = bind(node)["dims"]
    return [axis % len(order) for axis in order] == list(range(len(order)))


def _reshape_again(node: fx.Node) -> None:
    """Read what the reshape before this one reads: the last sizes count."""
    before = node.args[0]
    if isinstance(before, fx.Node) and before.target is node.target and len(before.users) == 1:
        node.args = (before.args[0], *node.args[1:])


def _concatenation_of_one(node: fx.Node) -> None:
    match node.args[0]:
        case [fx.Node() as source]:
            replace_by(node, source)


IDENTITIES: dict[Any, tuple[Rule, ...]] = {
    **_removed_if(
        lambda node: True,
        "alias.default detach.default clone.default contiguous.default lift_fresh_copy.default positive.default "
        "to.dtype to.device to.dtype_layout to.other _to_copy.default type_as.default",
    ),
    **_removed_if(lambda node: not bind(node)["train"], " ".join(DROPOUTS)),
    **_removed_if(
        _keeps_shape,
        "reshape.default view.default expand.default flatten.using_ints squeeze.default squeeze.dim squeeze.dims "
        "expand_as.default view_as.default unflatten.int reshape_as.default slice.Tensor narrow.default",
    ),
    **_removed_if(_keeps_order, "permute.default"),
    **_removed_if(lambda node: not any(bind(node)["pad"]), " ".join(PADS)),
    **_removed_if(lambda node: bool(bind(node)["other"] == 0), " ".join(SUMS - REVERSED)),
    **_removed_if(lambda node: bool(bind(node)["other"] == 1), " ".join(PRODUCTS | QUOTIENTS)),
    aten.cat.default: (_concatenation_of_one,),
}
IDENTITIES[aten.reshape.default] = (_reshape_again, *IDENTITIES[aten.reshape.default])


# Borders -------------------------------------------------------------------------------------------------------------


def fill_borders(graph: fx.GraphModule, constants: Constants) -> None:
    """Rewrite "pad with zeros, then write a value into each side" as pad(x - value) + value.

    This is how a block that must be padded with the constant it would itself compute is written by hand; the sum says
    the same without writes. Only complete borders of one per-channel constant are rewritten.
    """

    def fill(padding: fx.Node) -> None:
        bound, rank = bind(padding), len(shape_of(padding))
        if bound.get("mode", "constant") != "constant" or bound["value"]:
            return
        sides, values, last = _written_sides(padding)
        widths = list(bound["pad"])
        wanted = {(rank - 1 - at // 2, at % 2, width) for at, width in enumerate(widths) if width}
        if not wanted or sides != wanted or min(widths) < 0:
            return
        exact = [exact_value(graph, value, constants).flatten() for value in values]
        if all(torch.equal(exact[0], other) for other in exact) and varying_axes(shape_of(values[0]), rank) in (
            [],
            [1],
        ):
            centred = call_before(last, aten.sub.Tensor, bound["self"], values[0])
            centred.meta = dict(bound["self"].meta)
            padded = call_before(last, aten.constant_pad_nd.default, centred, widths)
            filled = call_before(last, aten.add.Tensor, padded, values[0])
            padded.meta, filled.meta = dict(padding.meta), dict(last.meta)
            last.replace_all_uses_with(filled)

    apply_rules(graph, dict.fromkeys(overloads(PADS), (fill,)))


def varying_axes(shape: Sequence[int], rank: int) -> list[int]:
    """Return the axes along which a constant of that shape varies when it is broadcast to `rank` dimensions."""
    return [axis for axis, size in enumerate((1,) * (rank - len(shape)) + tuple(shape)) if size > 1]


def _written_sides(padding: fx.Node) -> tuple[set[tuple[int, int, int]], list[fx.Node], fx.Node]:
    """Return the sides (axis, 0 low or 1 high, width) that slice_scatter writes, the constants and the last write."""
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
