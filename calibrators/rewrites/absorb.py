"""Absorb high biases into the next layer: the floor of a channel's values becomes part of that layer's bias.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019, "absorbing high
biases": c = max(0, mean - 3 deviations) of what enters the activation; b1 - c, b2 + W2 c.

Without an activation between the layers this is exact; with one, it is exact wherever a value is not below c. Of
normally distributed values 0.135 percent are below c, by 0.28 deviations on average; they are treated as c.

Departs: a next layer that pads with zeros is left alone. The paper absorbs there as well, although a padded cell holds
nothing to move: the result is off by the weights over the padding times c along the whole border. Where several batch
norms were added up, the deviation is the sum of theirs, which it cannot exceed.

Must not know: data, targets, methods, ONNX.
"""

from __future__ import annotations

import math

from torch import Tensor, fx

from calibrators.graph.aten import bind, constant, copy_graph, infer_shapes, layer_name
from calibrators.graph.batch_norm import HIGH_BIAS, mean_and_deviation, update_expected
from calibrators.record import AbsorbedPair, Absorption, Refused
from calibrators.rewrites.layer_pairs import Link, by_group, find_links, set_constants

__all__ = ["absorb"]

MEAN_LOSS = math.exp(-(HIGH_BIAS**2) / 2) / math.sqrt(2 * math.pi) - HIGH_BIAS * math.erfc(HIGH_BIAS / 2**0.5) / 2
"""Mean of max(0, c - x) for a normal x, in deviations, where c is three of them below the mean: 0.00038."""


def absorb(graph: fx.GraphModule) -> tuple[fx.GraphModule, Absorption]:
    """Return a copy of the graph with high biases absorbed, and a record of it; `graph` is in integer forms."""
    graph = copy_graph(graph)
    links, skipped = find_links(graph)
    pairs = []
    for link in links:
        found = _constants(link)
        if isinstance(found, str):
            skipped.append(Refused(layer_name(link.first), found))
        else:
            pairs.append(_move(graph, link, *found))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    infer_shapes(graph)
    return graph, Absorption(tuple(pairs), tuple(skipped))


def _constants(link: Link) -> tuple[Tensor, Tensor] | str:
    """Return the constants to move and the deviations of the first layer's channels, [channels] each; or why not."""
    known = mean_and_deviation(link.first)
    if known is None:
        return "no batch norm tells the range of its values"
    if not link.keeps_constants or any(bind(link.second).get("padding", ())):
        return f"the input of {layer_name(link.second)} is padded with zeros"
    mean, deviation = known
    moved = (mean - HIGH_BIAS * deviation).clamp(min=0.0)
    return (moved, deviation) if bool(moved.any()) else "no channel stays above zero"


def _move(graph: fx.GraphModule, link: Link, moved: Tensor, deviation: Tensor) -> AbsorbedPair:
    """Move the constants from the bias of the first layer to that of the second."""
    first, second = link.first, link.second
    biases = [constant(graph, bind(node)["bias"]).double() for node in (first, second)]
    weight = constant(graph, bind(second)["weight"]).double()
    parted = by_group(weight, int(bind(second).get("groups", 1)))

    def read(x: Tensor, taps: Tensor) -> Tensor:
        """Return what a constant of each channel adds to the second layer's outputs, [outputs]."""
        return (taps @ x[link.sources].reshape(len(taps), -1, 1)).flatten()

    set_constants(graph, first, bias=biases[0] - moved)
    set_constants(graph, second, bias=biases[1] + read(moved, parted.sum(3)))
    update_expected(first, lambda expected: expected.shifted(-moved), later=link.between)
    worst, mean = (read(x, parted.abs().sum(3)).max() for x in (moved, MEAN_LOSS * deviation * (moved > 0)))
    return AbsorbedPair(
        first=layer_name(first),
        second=layer_name(second),
        channels=len(moved),
        absorbed=int((moved > 0).sum()),
        largest=float(moved.max()),
        exact=not link.has_activation,
        worst=float(worst) if link.has_activation else 0.0,
        mean=float(mean) if link.has_activation else 0.0,
    )
