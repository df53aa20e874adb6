"""Cross-layer equalization: move factors per channel between neighbouring layers until their ranges agree.

Source: Nagel, van Baalen, Blankevoort, Welling, Data-Free Quantization Through Weight Equalization and Bias
Correction, 2019, "cross-layer range equalization": W1[i] / s, b1[i] / s and W2[:, i] * s with s = sqrt(r1 * r2) / r2,
r the largest magnitude of a channel, pair after pair until nothing changes. A depthwise layer is the second of one pair
and the first of the next; the iteration ends where the three ranges of a channel agree, at their geometric mean.

Departs: where a channel is known to be almost constant (its mean is more than three deviations above zero), its range
counts as if its deviation were a third of its mean; otherwise small weights would let a factor grow that blows up the
constant, and with it the range of the activation. If no batch norm tells, the bias is taken for the mean and the
range of the weights for the deviation. A channel without weights on either side keeps its factor. ReLU6 is
not replaced by ReLU, which changes the function, but ends a chain (calibrators.rewrites.layer_pairs).

The function is the same up to rounding: all factors are found and applied in float64, and rounded once.

Must not know: data, targets, methods, ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, constant, copy_graph, infer_shapes, layer_name
from calibrators.graph.batch_norm import HIGH_BIAS, mean_and_deviation, update_expected
from calibrators.record import Equalization, EqualizedPair
from calibrators.rewrites.layer_pairs import Link, by_group, find_links, set_constants

__all__ = ["equalize"]

CONVERGED = 1e-3
"""Largest factor of a sweep, as |ln s|, at which ranges agree: an eighth of a step at the end of an 8-bit grid."""

MAX_SWEEPS = 1000
"""Largest number of sweeps. In a very long chain the rest is mostly a factor for whole layers, which changes no grid.
Measured: 15 dense layers take 102 sweeps, 26 layers of which half are depthwise 275."""


def equalize(graph: fx.GraphModule) -> tuple[fx.GraphModule, Equalization]:
    """Return a copy of the graph with equalized layers, and a record of it; `graph` is in integer forms.

    Equalizing a pair on its own maximizes the precision in its record.
    """
    graph = copy_graph(graph)
    links, skipped = find_links(graph)
    layers = dict.fromkeys(node for link in links for node in (link.first, link.second))
    weights = {node: constant(graph, bind(node)["weight"]).double() for node in layers}
    ranges = {node: by_group(weight.abs(), _groups(node)).amax(3) for node, weight in weights.items()}
    before = [_precision(link, ranges) for link in links]
    factors, sweeps = _converge(graph, links, ranges)
    for link, factor in zip(links, factors, strict=True):
        _divide(graph, link, factor, weights)
    for node, weight in weights.items():
        set_constants(graph, node, weight=weight)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    infer_shapes(graph)
    pairs = [
        EqualizedPair(
            first=layer_name(link.first),
            second=layer_name(link.second),
            channels=len(factor),
            factor_lo=float(factor.min()),
            factor_hi=float(factor.max()),
            precision_before=old,
            precision_after=_precision(link, ranges),
        )
        for link, factor, old in zip(links, factors, before, strict=True)
    ]
    return graph, Equalization(tuple(pairs), sweeps, tuple(skipped))


def _groups(node: fx.Node) -> int:
    return int(bind(node).get("groups", 1))


def _converge(graph: fx.GraphModule, links: list[Link], ranges: dict[fx.Node, Tensor]) -> tuple[list[Tensor], int]:
    """Return the factor of every channel of every link, [channels] each, and the number of sweeps; updates `ranges`.

    ranges: [groups, outputs, inputs] largest magnitude of every kernel, by layer.
    """
    factors = [torch.ones(_channels(link.first, ranges), dtype=torch.float64) for link in links]
    constancies = [_constancy(link.first) for link in links]
    least = [_least(graph, link.first) for link in links]
    for sweep in range(MAX_SWEEPS):
        largest = 0.0
        for link, factor, constancy, floor in zip(links, factors, constancies, least, strict=True):
            written, read = _of_channels(link, ranges)
            written = torch.maximum(written * constancy, floor.where(written > 0, 0.0))
            used = (written > 0) & (read > 0)
            step = torch.where(used, written / read.where(used, 1.0), 1.0).sqrt()
            ranges[link.first] /= step.reshape(len(ranges[link.first]), -1, 1)
            ranges[link.second] *= step[link.sources].reshape(len(ranges[link.second]), 1, -1)
            factor *= step
            floor /= step
            largest = max(largest, float(step.log().abs().max()))
        if largest < CONVERGED:
            return factors, sweep + 1
    return factors, MAX_SWEEPS


def _constancy(node: fx.Node) -> Tensor:
    """Return the factors of an operator's output ranges, at least 1, [channels]; [] where nothing is known."""
    known = mean_and_deviation(node)
    if known is None:
        return torch.ones((), dtype=torch.float64)
    mean, deviation = known
    return (mean / (HIGH_BIAS * deviation.clamp(min=torch.finfo(torch.float32).tiny))).clamp(min=1.0)


def _least(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """Return the smallest output ranges of an operator, from its bias, [channels]; 0 where norms tell more."""
    bias = constant(graph, bind(node)["bias"]).double().abs() / HIGH_BIAS
    return torch.zeros_like(bias) if mean_and_deviation(node) is not None else bias


def _channels(node: fx.Node, ranges: dict[fx.Node, Tensor]) -> int:
    groups, outputs, _ = ranges[node].shape
    return groups * outputs


def _of_channels(link: Link, ranges: dict[fx.Node, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the range of every channel as the first layer writes and as the second reads it, [channels] each."""
    written = ranges[link.first].amax(2).flatten()
    inputs = ranges[link.second].amax(1).flatten()
    return written, torch.zeros_like(written).scatter_reduce(0, link.sources, inputs, "amax")


def _precision(link: Link, ranges: dict[fx.Node, Tensor]) -> float:
    written, read = _of_channels(link, ranges)
    shares = (r / r.max().clamp(min=torch.finfo(r.dtype).tiny) for r in (written, read))
    return float((next(shares) * next(shares)).mean())


def _divide(graph: fx.GraphModule, link: Link, factor: Tensor, weights: dict[fx.Node, Tensor]) -> None:
    """Divide the first layer and its bias by `factor` [channels], multiply what the second reads by it."""
    first, second = link.first, link.second
    weights[first] = weights[first] / factor.reshape(-1, *[1] * (weights[first].ndim - 1))
    parted = by_group(weights[second], _groups(second))
    weights[second] = (parted * factor[link.sources].reshape(len(parted), 1, -1, 1)).reshape(weights[second].shape)
    set_constants(graph, first, bias=constant(graph, bind(first)["bias"]).double() / factor)
    update_expected(first, lambda expected: expected.scaled(1 / factor), later=link.between)
