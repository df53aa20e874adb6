"""Identity branches that folding hid in a kernel, taken out again where low bits cannot hold both.

A reparameterized block adds its input to the result of its convolution; folded, that is a spike in the middle of every
kernel, tens of times larger than the weights around it. A grid of few bits that reaches the spike rounds everything
else to zero. As a depthwise convolution of its own the branch costs one value per channel, which any grid holds:

    conv(x, w) = conv(x, w with its middle diagonal set to 0) + conv1x1(x, that diagonal, one group per channel)

A ReLU behind the convolution then belongs to the sum. All of the diagonal is taken out: a part of it that could stay
among the other weights would be rounded like them, while the zeros it leaves are exact.

Measured on a trained RepVGG: the error of such a layer falls from 0.67 of its output's energy to 0.075 at 2 bits and
from 0.15 to 0.007 at 4; the network takes 6 percent longer.

Must not know: methods, ONNX, runtimes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx

from calibrators.graph import (
    add_constant,
    bind,
    constant,
    infer_shapes,
    is_constant,
    layer_name,
    replace_args,
    shape_of,
)
from calibrators.norms import meta_of_part

__all__ = ["Skip", "spike_of", "split_skips"]

aten = torch.ops.aten

Skip = tuple[str, float]
"""Module path (or node name) of a convolution and how many times its spike exceeds the weights around it."""

LEAST_SPIKE = 10.0
"""Times the root mean square of the other weights, which reach three times that themselves. Measured on a trained
MobileOne, whose spikes are 3 to 7 in 1x1 kernels: taken out, they cost a quarter of the time and gain 2 decibels at 3
bits with rounding to nearest, nothing with learned rounding."""

TOLERABLE_STEP = 1.0
"""A grid step of this many times the root mean square of the other weights leaves little of them. Measured on a trained
RepVGG: taken out where it is exceeded, its spikes of 24 to 48 gain 6 to 20 decibels at the output for 3 to 6 bits; with
7 or 8 the output has more than 25 anyway."""

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)


def split_skips(graph: fx.GraphModule, bits_of: Callable[[fx.Node], int | None]) -> tuple[fx.GraphModule, list[Skip]]:
    """The graph with the identity branch of every convolution that needs it taken out, and which those are.

    The branch of `conv` is called `conv.skip`. Convolutions that share a weight go on sharing both of its parts.

    graph:   in integer forms. Returned as it is when nothing is split, else as a changed copy.
    bits_of: weight bits of a convolution, None where it stays in float.
    """
    spikes = {
        weight.name: spike
        for weight in graph.graph.nodes
        if is_constant(weight) and (spike := _intolerable_spike(graph, weight, bits_of)) is not None
    }
    if not spikes:
        return graph, []
    graph = copy.deepcopy(graph)
    skips = [(_split(graph, w), spikes[w.name]) for w in list(graph.graph.nodes) if w.name in spikes]
    graph.graph.eliminate_dead_code()
    graph.recompile()
    infer_shapes(graph)
    return graph, skips


def spike_of(graph: fx.GraphModule, weight: fx.Node) -> float | None:
    """How many times the diagonal of a weight exceeds the root mean square of its other values, in the median channel.

    None for a weight whose convolutions cannot add their input to their output.
    """
    if not all(_may_add_its_input(graph, weight, user) for user in weight.users):
        return None
    diagonal, rest = _parted(constant(graph, weight))
    others = rest.square().flatten(1).sum(1) / (rest[0].numel() - 1)
    return float((diagonal.abs() / others.sqrt().clamp(min=1e-30)).median())


def _intolerable_spike(
    graph: fx.GraphModule, weight: fx.Node, bits_of: Callable[[fx.Node], int | None]
) -> float | None:
    """How far the diagonal of a weight stands out, where the step it dictates is too coarse for the other weights."""
    spike = spike_of(graph, weight)
    widths = {bits_of(user) for user in weight.users}
    bits = widths.pop() if len(widths) == 1 else None
    if bits is None or spike is None:
        return None
    return spike if spike > max(LEAST_SPIKE, TOLERABLE_STEP * 2 ** (bits - 1)) else None


def _may_add_its_input(graph: fx.GraphModule, weight: fx.Node, user: fx.Node) -> bool:
    """Whether the user is a convolution whose middle tap lies on the output's place, one input channel per output.

    Depthwise ones are left alone, for the branch would cost as much as they do.
    """
    if user.target not in CONVOLUTIONS or bind(user)["weight"] is not weight:
        return False
    bound, (channels, inputs, *kernel) = bind(user), constant(graph, weight).shape
    centred = [dilation * (size // 2) for dilation, size in zip(bound["dilation"], kernel, strict=True)]
    return (
        channels == inputs * bound["groups"]
        and inputs > 1
        and all(size % 2 for size in kernel)
        and set(bound["stride"]) == {1}
        and list(bound["padding"]) == centred
    )


def _parted(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The middle diagonal of each group [channels], and the weight [channels, inputs, ...] without it."""
    channel = torch.arange(len(weight))
    centre = [size // 2 for size in weight.shape[2:]]
    middle: tuple[Tensor | int, ...] = (channel, channel % weight.shape[1], *centre)
    rest = weight.clone()
    rest[middle] = 0.0
    return weight[middle], rest


def _split(graph: fx.GraphModule, weight: fx.Node) -> str:
    """Take the diagonal of a weight out of all convolutions that use it; returns the path of the first of them."""
    diagonal, rest = _parted(constant(graph, weight))
    users = list(weight.users)
    path = layer_name(users[0])
    values = {
        "rest": rest,
        "skip": diagonal.reshape(-1, *[1] * (rest.ndim - 1)),
        "skip_bias": torch.zeros_like(diagonal),
    }
    names = [add_constant(graph, f"{path}.{what}", value) for what, value in values.items()]
    with graph.graph.inserting_before(weight):
        rest_node, skip, bias = map(graph.graph.get_attr, names)
    for user in users:
        replace_args(user, weight=rest_node)
        _add_branch(graph.graph, user, skip, bias)
    return path


def _add_branch(graph: fx.Graph, node: fx.Node, skip: fx.Node, bias: fx.Node) -> None:
    """Put the sum of a convolution and its identity branch in its place."""
    bound = bind(node)
    ones, channels = [1] * len(bound["stride"]), shape_of(node)[1]
    arguments = (bound["input"], skip, bias, ones, [0] * len(ones), ones, channels)
    with graph.inserting_after(node):
        branch = graph.create_node("call_function", node.target, arguments, name=f"{node.name}_skip")
    with graph.inserting_after(branch):
        total = graph.create_node("call_function", aten.add.Tensor, (node, branch), name=f"{node.name}_sum")
    path = f"{layer_name(node)}.skip"
    total.meta, node.meta = node.meta, meta_of_part(node)
    stack = {**(node.meta.get("nn_module_stack") or {}), path: (path, "")}
    branch.meta = node.meta | {"nn_module_stack": stack, "branch_of": node.name}
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
