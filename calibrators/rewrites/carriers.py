"""Inputs of linear layers, and the operator before each whose constants can carry a factor and a shift per channel.

Between the carrier and the layers stand operators that keep channels apart: moves, ReLU, the product with the weights
of attention (which are the same for all channels of a head), the product with a gate. As in layer_pairs, which channel
of the carrier each column holds is observed, not derived: channel numbers and their inverses pass the operators, and
where channels mix, the product of both results is above 1. Where the weights of attention are a softmax, their rows add
up to one, so that a constant passes as well.

Must not know: data, scales, targets, methods, ONNX.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, constant, is_constant, layer_name, operator_name, shape_of
from calibrators.graph.operators import LISTS, MOVES, NORMS, Operators, facts
from calibrators.graph.walk import call

__all__ = ["REORDERS", "Carrier", "Value", "find_values"]

aten = torch.ops.aten

SELECTING = ("MaxPool", "ReduceMax", "ReduceMin", "Resize")

REORDERS = Operators(*(name for name in MOVES - LISTS - {"getitem"} if facts(name).onnx not in SELECTING))
"""Operators each of whose values is a value of the operand, chosen by its place alone."""

KEEPS = REORDERS | {"mean.dim"}
"""Operators with one operand that pass a constant unchanged; where they mix channels, that is observed."""

ATTENDS = Operators("matmul.default", "bmm.default")
ROUNDING = 1e-9
"""Tolerance for the rounding of averages of equal channel numbers."""


@dataclass(frozen=True, eq=False)
class Carrier:
    """An operator whose constants take a factor per channel, and, where `shifts`, a constant per channel.

    sources: [columns] the carrier's channel that each column of the value holds, each at most once.
    """

    node: fx.Node
    sources: Tensor
    shifts: bool


@dataclass(frozen=True, eq=False)
class Value:
    """The input of linear layers, [rows, columns].

    readers: the layers; nothing else reads their weights.
    carrier: what takes factors in, or why nothing does.
    """

    node: fx.Node
    readers: tuple[fx.Node, ...]
    carrier: Carrier | str


def find_values(graph: fx.GraphModule) -> list[Value]:
    """Return everything that linear layers with weights of their own read, in topological order.

    graph: in integer forms (calibrators.graph.canonical), with shapes.
    """
    reads = Counter(str(x.target) for node in graph.graph.nodes for x in node.all_input_nodes if is_constant(x))
    values = []
    for node in graph.graph.nodes:
        readers = tuple(user for user in node.users if _reads(user, node))
        if len(shape_of(node)) == 2 and readers:
            if any(reads[str(bind(reader)["weight"].target)] > 1 for reader in readers):
                continue
            is_shared = len(readers) < len(node.users)
            found = "other operators read it too" if is_shared else _find(graph, node, reads)
            values.append(Value(node, readers, found))
    return values


def _reads(reader: fx.Node, node: fx.Node) -> bool:
    if reader.target is not aten.linear.default:
        return False
    bound = bind(reader)
    return bound["input"] is node and is_constant(bound["weight"]) and is_constant(bound["bias"])


def _find(graph: fx.GraphModule, value: fx.Node, reads: Counter[str]) -> Carrier | str:
    """Return the nearest operator before a value that carries factors, or why there is none."""
    why = f"{operator_name(value.target)} takes no factors"
    for path in _paths(value, ()):
        first = path[0]
        if not _carries(graph, first, reads):
            why = f"{operator_name(first.target)} of {layer_name(first)} takes no factors"
        elif (sources := _sources(path)) is None:
            why = f"channels of {layer_name(first)} mix, or are read elsewhere"
        else:
            return Carrier(first, sources, _shifts(path))
    return why


def _paths(node: fx.Node, after: tuple[fx.Node, ...]) -> Iterator[tuple[fx.Node, ...]]:
    """Yield the ways up from a value through operators that keep channels apart; each begins where that ends."""
    path = (node, *after)
    if node.op != "call_function":
        return
    if node.target in KEEPS or node.target is aten.relu.default:
        yield from _paths(node.all_input_nodes[0], path)
    elif node.target in ATTENDS:
        yield from _paths(node.all_input_nodes[-1], path)
    elif node.target is aten.mul.Tensor and not any(map(_is_fixed, node.args[:2])):
        for operand in node.all_input_nodes:
            yield from _paths(operand, path)
    else:
        yield path


def _is_fixed(operand: object) -> bool:
    return is_constant(operand) or not isinstance(operand, fx.Node)


def _carries(graph: fx.GraphModule, node: fx.Node, reads: Counter[str]) -> bool:
    """Return whether an operator has constants per channel of the last axis, or can be given some."""
    if node.op != "call_function" or len(shape_of(node)) < 2:
        return False
    bound = bind(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    if node.target in NORMS:
        affine = [bound[name] for name in ("weight", "bias") if bound.get(name) is not None]
        return len(bound["normalized_shape"]) == 1 and all(map(is_constant, affine))
    if node.target is aten.linear.default:
        own = is_constant(bound["weight"]) and reads[str(bound["weight"].target)] == 1
        return own and is_constant(bound["bias"])
    if node.target is aten.mul.Tensor and is_constant(bound["other"]):
        factor = constant(graph, bound["other"])
        return factor.is_floating_point() and factor.numel() == factor.shape[-1:].numel() == shape_of(node)[-1]
    return False


def _shifts(path: tuple[fx.Node, ...]) -> bool:
    """Return whether the first operator of a path takes a constant, and the others pass it unchanged."""
    first, *between = path
    passes = all(node.target in KEEPS or _averages(node) for node in between)
    return passes and first.target in Operators("layer_norm.default", "linear.default")


def _averages(node: fx.Node) -> bool:
    """Return whether an operator multiplies by weights of attention whose rows add up to one."""
    if node.target not in ATTENDS:
        return False
    weights = node.all_input_nodes[0]
    while weights.target in REORDERS and facts(weights.target).onnx in ("Reshape", "Identity"):
        kept, weights = shape_of(weights)[-1:], weights.all_input_nodes[0]
        if shape_of(weights)[-1:] != kept:
            return False
    return weights.target is aten.softmax.int and bind(weights)["dim"] in (-1, len(shape_of(weights)) - 1)


def _sources(path: tuple[fx.Node, ...]) -> Tensor | None:
    """Return the channel of the first operator that each column of the last one holds; None where channels mix.

    Also None where a channel is read beside the path.
    """
    numbers = torch.arange(1, shape_of(path[0])[-1] + 1, dtype=torch.float64)
    images, inverses = (_images(path, each) for each in (numbers, 1 / numbers))
    if images is None or inverses is None:
        return None
    columns = images[path[-1]]
    found = columns[0].round()
    is_one = (columns - found).abs() < ROUNDING * len(numbers)
    unmixed = (columns * inverses[path[-1]] - 1).abs() < ROUNDING
    if not bool((is_one & unmixed).all()) or len({*found.tolist()}) < len(found):
        return None
    inside = set(path)
    for node in path[:-1]:
        for user in node.users:
            if user not in inside and bool(torch.isin(_seen(user, images[node]).round(), found).any()):
                return None
    return found.long() - 1


def _images(path: tuple[fx.Node, ...], numbers: Tensor) -> dict[fx.Node, Tensor] | None:
    """Return what a number per channel becomes at each operator; None where weights of attention are on the path."""
    images = {path[0]: numbers.expand(shape_of(path[0]))}
    for before, node in itertools.pairwise(path):
        others = {other: torch.ones(shape_of(other), dtype=torch.float64) for other in node.all_input_nodes}
        if node.target in ATTENDS:
            if node.all_input_nodes[0] is before:
                return None
            others = {other: ones / shape_of(other)[-1] for other, ones in others.items()}
        images[node] = call(node, others | {before: images[before]})
    return images


def _seen(user: fx.Node, image: Tensor) -> Tensor:
    """Return the channel numbers that an operator beside the path reads: all but where it only moves some."""
    return call(user, {user.all_input_nodes[0]: image}) if user.target in REORDERS else image
