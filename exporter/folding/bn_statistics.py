"""Statistics of the output of a folded region, from its batch norms, which the folded operator no longer has.

After its last norms a region is affine: it is executed, in float64, on images in which every norm has its mean
everywhere, and once per norm with that one moved up by its deviation.

Must not know: how regions are found or emitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from calibrators.graph.aten import is_constant
from calibrators.graph.batch_norm import Expected
from exporter.folding.interpret import BATCH_NORM, WEIGHTED, Analysis
from exporter.folding.select import Candidate

__all__ = ["expected_output"]


def expected_output(analysis: Analysis, candidate: Candidate, sizes: Sequence[int]) -> Expected | None:
    """Return the known statistics of the output of a region, in float64.

    sizes:   of an input of the region that is larger than its kernel.
    returns: None where a part of the output passes no batch norm, or where the norms stand before all of the region's
             convolutions: then they describe the input.
    """
    source, nodes = candidate.region
    after_norms = _after_norms(source, candidate.exit)
    if after_norms is None:
        return None
    norms = {node: analysis.batch_norm(node) for node in nodes if node in after_norms and node.target is BATCH_NORM}
    expected = {node: norm.expected for node, norm in norms.items() if norm is not None}
    rest = [node for node in nodes if node in after_norms and node not in expected]
    mixes = any(node.target in WEIGHTED for node in rest)
    if mixes and all(norm.args[0] is source for norm in expected):
        return None
    values = analysis.run(nodes, {source: torch.zeros(*sizes, dtype=torch.float64)})
    cell: tuple[int | slice, ...] = (0, slice(None), *_interior(candidate, sizes))

    def response(moved: fx.Node | None = None) -> Tensor:
        """Return the output for images on which every norm has its mean, and `moved` its mean plus one deviation."""
        images = {
            norm: (each.mean + (each.gains[0] if norm is moved else 0.0))
            .reshape(-1, *[1] * (values[norm].ndim - 2))
            .expand_as(values[norm])
            for norm, each in expected.items()
        }
        return analysis.run(rest, values | images)[candidate.exit][cell]

    mean = response()
    return Expected(mean, () if mixes else tuple((response(norm) - mean).abs() for norm in expected))


def _after_norms(source: fx.Node, exit_: fx.Node) -> set[fx.Node] | None:
    """Return the last norms before the exit and all nodes after them; None where the region's input bypasses them."""
    found: set[fx.Node] = set()
    waiting = [exit_]
    while waiting:
        node = waiting.pop()
        if node is source:
            return None
        if node not in found and not is_constant(node):
            found.add(node)
            waiting += [] if node.target is BATCH_NORM else node.all_input_nodes
    return found


def _interior(candidate: Candidate, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return an output cell that reads the middle of the input; any cell after a transposed convolution."""
    if candidate.ends_transposed:
        return (0,) * candidate.root.spatial
    low, stride = candidate.map.geometry().low, candidate.map.stride
    return tuple((size // 2 + before) // step for size, before, step in zip(sizes[2:], low, stride, strict=True))
