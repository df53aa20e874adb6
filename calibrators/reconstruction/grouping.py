"""Choose neighbouring units that are reconstructed jointly.

Where a unit of small capacity follows one of large capacity, or the reverse, the reconstruction error jumps and falls
back. Joining both sides of the largest jumps smooths the error that reaches the output.

source: Ma et al. 2023 (MRECG, "Solving Oscillation Problem in Post-Training Quantization Through a Theoretical
Perspective"): capacity of a module, top-k differentials.
Departs: the published schemes were written by hand; here they are selected. Losses are relative; capacities are
compared by their ratio, since they grow with depth; by losses, only drops are joined, as in the published schemes.

Must not know: how units are trained, methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import fx

from calibrators.errors import InputError
from calibrators.execution.blocks import Block
from calibrators.graph.aten import bind, is_constant, shape_of

__all__ = ["by_boundary", "by_capacity", "by_loss", "capacities", "join", "parse_groups", "stage_ends"]

STRIDE_FACTOR = 1.6
"""Weight of a layer with a stride (MRECG, alpha)."""

NOTABLE_DROP = 0.15
"""Relative fall of the error from one unit to the next above which the two are joined."""

NOTABLE_RATIO = 2.0
"""Ratio of the capacities of neighbours above which the two are joined."""

Pairs = list[int]
"""Indices i of units to be joined with unit i + 1, most important first."""


def capacities(graph: fx.GraphModule, blocks: Sequence[Block], bits: Mapping[str, int]) -> list[float]:
    """Return the data-free capacity of every unit: the sum over its layers of weights * bits (* STRIDE_FACTOR).

    bits: of the weight of each weighted node, by its fx name.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    return [sum(_layer_capacity(nodes[name], bits[name]) for name in block.weighted) for block in blocks]


def _layer_capacity(node: fx.Node, bits: int) -> float:
    bound = bind(node)
    assert is_constant(bound["weight"])
    strided = max(bound.get("stride") or [1], default=1) > 1
    return math.prod(shape_of(bound["weight"])) * bits * (STRIDE_FACTOR if strided else 1.0)


def by_loss(losses: Sequence[float], k: int = 0) -> Pairs:
    """Return the pairs in which the error falls, largest fall first.

    losses: of every unit, after each was reconstructed alone.
    k:      number of pairs; 0: every fall by more than NOTABLE_DROP.
    """
    falls = [(a - b, i) for i, (a, b) in enumerate(pairwise(losses)) if b < a]
    notable = [i for fall, i in sorted(falls, key=lambda f: (-f[0], f[1])) if k or fall > NOTABLE_DROP * losses[i]]
    return notable[:k] if k else notable


def by_capacity(capacity: Sequence[float], k: int = 0) -> Pairs:
    """Return the pairs whose capacities have the largest ratios; the first and the last unit stay alone.

    k: number of pairs; 0: every ratio above NOTABLE_RATIO.
    """
    ratios = [(abs(math.log(b / a)), i) for i, (a, b) in enumerate(pairwise(capacity)) if 0 < i < len(capacity) - 2]
    ranked = [i for ratio, i in sorted(ratios, key=lambda r: (-r[0], r[1])) if k or ratio > math.log(NOTABLE_RATIO)]
    return ranked[:k] if k else ranked


def by_boundary(graph: fx.GraphModule, blocks: Sequence[Block]) -> Pairs:
    """Return the pairs whose second unit changes the shape of activations; the first and last unit stay alone."""
    shapes = _shapes(graph, blocks)
    return [i for i, (a, b) in enumerate(pairwise(shapes)) if a != b and 0 < i < len(blocks) - 2]


def _shapes(graph: fx.GraphModule, blocks: Sequence[Block]) -> list[tuple[int, ...]]:
    """Return the shape of a sample at the last weighted operator of every unit; later pools do not count."""
    nodes = {node.name: node for node in graph.graph.nodes}
    return [tuple(shape_of(nodes[block.weighted[-1]])[1:]) for block in blocks]


def stage_ends(graph: fx.GraphModule, blocks: Sequence[Block]) -> list[int]:
    """Return for every unit the index after the last unit of its stage, a run of units with outputs of one shape."""
    shapes = _shapes(graph, blocks)
    ends = [len(blocks)] * len(blocks)
    for i in range(len(blocks) - 2, -1, -1):
        ends[i] = ends[i + 1] if shapes[i] == shapes[i + 1] else i + 1
    return ends


def join(units: int, pairs: Pairs, largest: int) -> list[list[int]]:
    """Join pairs, in order of importance, into groups of at most `largest` of all `units`; return their indices."""
    group = list(range(units))  # index of the first unit of each unit's group
    size = [1] * units
    for i in pairs:
        first, second = group[i], group[i + 1]
        if first != second and size[first] + size[second] <= largest:
            size[first] += size[second]
            group = [first if g == second else g for g in group]
    return [[i for i, g in enumerate(group) if g == first] for first in dict.fromkeys(group)]


def parse_groups(text: str, units: int) -> Pairs:
    """Return the pairs of groups written as "2-3, 5-7": ranges of unit numbers, both ends included, counted from 0.

    raises: InputError for text of another form, unknown units and groups that overlap.
    """
    pairs: Pairs = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        ends = part.split("-")
        if len(ends) not in (1, 2) or not all(end.strip().isdecimal() for end in ends):
            raise InputError(f"groups {text!r}: {part!r} is not a range of units; write for example groups=2-3,5-7")
        first, last = int(ends[0]), int(ends[-1])
        if not first <= last < units:
            raise InputError(f"groups {text!r}: {part!r} is not within the {units} units, which are numbered from 0")
        pairs += range(first, last)
    if len(set(pairs)) != len(pairs):
        raise InputError(f"groups {text!r}: two groups overlap; name each unit once")
    return pairs
