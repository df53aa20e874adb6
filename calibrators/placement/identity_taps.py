"""Identity branches that folding put into a kernel: how far they stand out, and where few bits cannot hold both.

A reparameterized block adds its input to the result of its convolution; folded, that is a spike in the middle of every
kernel, tens of times larger than the weights around it. A grid of few bits that reaches the spike rounds everything
else to zero. The containers of integer kernels have 8 bits, whatever the grid. Where it matters, the one code per
channel that holds the branch keeps all of them (QuantSpec.tap_bits), on the scale that suits the other weights.

Must not know: methods, ONNX, runtimes.
"""

from __future__ import annotations

import torch
from torch import fx

from calibrators.graph.aten import bind, constant
from calibrators.graph.operators import CONVOLUTIONS
from calibrators.grid.numerics import has_middle_diagonal, middle_diagonal

__all__ = ["needs_wide_taps", "spike_of"]

aten = torch.ops.aten

LEAST_SPIKE = 10.0
"""Least spike, in root mean squares of the other weights, which themselves reach three of these."""


def spike_of(graph: fx.GraphModule, weight: fx.Node) -> float | None:
    """Return the diagonal of a weight divided by the root mean square of its other values, in the median channel.

    returns: None for a weight whose convolutions cannot add their input to their output.
    """
    if not all(_may_add_its_input(graph, weight, user) for user in weight.users):
        return None
    values = constant(graph, weight)
    middle = middle_diagonal(values.shape)
    rest = values.clone()
    rest[middle] = 0.0
    others = rest.square().flatten(1).sum(1) / (rest[0].numel() - 1)
    return float((values[middle].abs() / others.sqrt().clamp(min=1e-30)).median())


def needs_wide_taps(graph: fx.GraphModule, weight: fx.Node) -> bool:
    """Return whether the diagonal of a weight would force a step that is too coarse for its other values."""
    spike = spike_of(graph, weight)
    return spike is not None and spike > LEAST_SPIKE


def _may_add_its_input(graph: fx.GraphModule, weight: fx.Node, user: fx.Node) -> bool:
    """Return whether `user` is a convolution whose middle tap reads the position of the output, channel by channel.

    Depthwise convolutions do not count: in them every channel has a range of its own.
    """
    if user.target not in CONVOLUTIONS or bind(user)["weight"] is not weight:
        return False
    bound, shape = bind(user), constant(graph, weight).shape
    channels, inputs, *kernel = shape
    centred = [dilation * (size // 2) for dilation, size in zip(bound["dilation"], kernel, strict=True)]
    return (
        has_middle_diagonal(shape)
        and channels == inputs * bound["groups"]
        and set(bound["stride"]) == {1}
        and list(bound["padding"]) == centred
    )
