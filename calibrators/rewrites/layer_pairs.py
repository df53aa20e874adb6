"""Pairs of weighted operators between which a factor per channel can move, and a constant where borders allow it.

Two operators are linked when only the second reads the first, through operators f with f(a x) = a f(x) for a > 0: ReLU,
leaky ReLU, pools, padding with zeros, and whatever moves values. Which channel of the first each input channel of the
second holds is not derived from shapes but observed: images that are constant in every channel pass f, channel k
with the value k and with 1 / k. Where channels mix, in averages as in maxima, the product of both results
is above 1 (Jensen's inequality).

A clip such as ReLU6 ends a link: its bound would have to move too, one per channel, and no integer kernel has that.

Must not know: what moves between the operators, targets, ONNX.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from calibrators.graph.aten import (
    add_constant,
    bind,
    constant,
    is_constant,
    layer_name,
    operator_name,
    replace_args,
    shape_of,
)
from calibrators.graph.canonical import clip_bounds
from calibrators.graph.operators import HOMOGENEOUS, PADS, Operators
from calibrators.graph.walk import call
from calibrators.record import Refused

__all__ = ["Link", "by_group", "find_links", "set_constants"]

aten = torch.ops.aten

LAYERS = Operators("conv1d.default", "conv2d.default", "linear.default")

ROUNDING = 1e-9
"""Tolerance for float64 rounding of averages of channel numbers, which differ by 1."""


@dataclass(frozen=True, eq=False)
class Link:
    """Two operators with weights, and the operators between them.

    sources:         [input channels of the second] the output channel of the first that each holds.
    keeps_constants: whether a constant channel passes unchanged, so that f(x + c) = f(x) + c, activations aside.
    """

    first: fx.Node
    second: fx.Node
    between: tuple[fx.Node, ...]
    sources: Tensor
    keeps_constants: bool

    @property
    def has_activation(self) -> bool:
        """Whether an activation stands between."""
        return any(node.target is aten.leaky_relu.default or clip_bounds(node) is not None for node in self.between)


def find_links(graph: fx.GraphModule) -> tuple[list[Link], list[Refused]]:
    """Return all links in topological order, and the operators with weights that begin none, with reasons.

    graph: in integer forms (calibrators.graph.canonical), with shapes.
    """
    weighted = [node for node in graph.graph.nodes if _is_weighted(graph, node)]
    reads = Counter(str(x.target) for node in graph.graph.nodes for x in node.all_input_nodes if is_constant(x))
    free = {node for node in weighted if reads[str(bind(node)["weight"].target)] == 1}
    links, unlinked = [], []
    for node in weighted:
        found = _follow(node, free) if node in free else "another operator reads its weight too"
        if isinstance(found, Link):
            links.append(found)
        else:
            unlinked.append(Refused(layer_name(node), found))
    return links, unlinked


def by_group(weight: Tensor, groups: int) -> Tensor:
    """Return a weight [outputs, inputs of a group, ...] as [groups, outputs of a group, inputs of a group, taps]."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def set_constants(graph: fx.GraphModule, node: fx.Node, **values: Tensor) -> None:
    """Replace constants of an operator, in the dtype of its result; other readers of the old constants keep those."""
    dtype = node.meta["tensor_meta"].dtype
    for name, value in values.items():
        made = add_constant(graph, f"{layer_name(node)}.{name}", value.to(dtype))
        with graph.graph.inserting_before(node):
            replace_args(node, **{name: graph.graph.get_attr(made)})


def _is_weighted(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node is a convolution or linear layer with constant weight and bias, channels on axis 1."""
    if node.op != "call_function" or node.target not in LAYERS:
        return False
    bound = bind(node)
    if not is_constant(bound["weight"]) or not is_constant(bound["bias"]) or is_constant(bound["input"]):
        return False
    weight = constant(graph, bound["weight"])
    return weight.is_floating_point() and weight.ndim == len(shape_of(node))


def _follow(first: fx.Node, free: set[fx.Node]) -> Link | str:
    """Return the link that begins at an operator, or why there is none."""
    node, between = first, list[fx.Node]()
    while True:
        if len(node.users) != 1:
            return f"its result has {len(node.users)} readers"
        node_before, node = node, next(iter(node.users))
        if node in free and bind(node)["input"] is node_before:
            break
        if not _is_homogeneous(node):
            return _barrier(node)
        between.append(node)
    found = _sources(first, between)
    return "channels mix before the next layer" if found is None else Link(first, node, tuple(between), *found)


def _is_homogeneous(node: fx.Node) -> bool:
    """Return whether f(a x) = a f(x) for a > 0 in each channel."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return False
    if node.target in PADS:
        return not bind(node)["value"]
    bounds = clip_bounds(node)
    return node.target in HOMOGENEOUS if bounds is None else all(b == 0 or math.isinf(b) for b in bounds)


def _barrier(node: fx.Node) -> str:
    if node.op == "output":
        return "its result is an output of the model"
    if node.target in LAYERS:
        return f"the next layer, {layer_name(node)}, shares its weight with another operator"
    if (bounds := clip_bounds(node)) is not None:
        return f"the clip to {bounds[0]:g} ... {bounds[1]:g} after it has the same bounds for all channels"
    return f"{operator_name(node.target)} comes after it"


def _sources(first: fx.Node, between: list[fx.Node]) -> tuple[Tensor, bool] | None:
    """Return which channel each channel after `between` holds, and whether constants pass; None where channels mix."""
    shape = shape_of(first)
    ones = torch.ones(shape, dtype=torch.float64)
    number = torch.arange(1, shape[1] + 1, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 2)).expand(shape)
    images = ones, number, 1 / number
    passed, numbers, inverses = (_by_channel(_run(between, x)) for x in images)  # [channels, rest]
    seen = passed > 0
    if not bool(seen.any(1).all()):
        return None
    found, inverse = (torch.where(seen, values / passed, 0.0) for values in (numbers, inverses))
    sources = found.amax(1).round()
    one = (found - sources[:, None]).abs() < ROUNDING * shape[1]
    unmixed = (found * inverse - 1).abs() < ROUNDING
    keeps = bool(((passed - 1).abs() < ROUNDING).all())
    return (sources.long() - 1, keeps) if bool((~seen | (one & unmixed)).all()) else None


def _run(nodes: list[fx.Node], x: Tensor) -> Tensor:
    for node in nodes:
        x = call(node, {node.all_input_nodes[0]: x})
    return x


def _by_channel(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)
