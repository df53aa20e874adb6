"""Move per-channel maps to the weighted operators that can take them in, past operators that only move values.

A batch norm, a factor or a summand per channel folds into the operator beside it. Where reshapes, permutations, slices,
splits or concatenations stand between the two, the map is moved to the other side of them: up to the operators that
compute the values (a concatenation distributes it over its branches), else down to all operators that read them.

Which channel of one side a channel of the other side is, is observed: the moves are executed on channel numbers. Every
move is checked on random float64 values before the graph is changed, and the fold that follows checks the rest.

Must not know: model families, module names, quantization, ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, is_constant, module_path, per_axis, shape_of
from calibrators.graph.operators import CONVOLUTIONS, LISTS, MOVES, SUMS, TRANSPOSED, Operators, facts
from calibrators.graph.rewrite import call_before, constant_before, meta_of_part, origin, replace_by
from exporter.folding.affine_map import NotAffine, identity
from exporter.folding.interpret import (
    BATCH_NORM,
    RULES,
    SCALES,
    Analysis,
    absorbers,
    has_constant_parameters,
    is_computed,
)

__all__ = ["move_maps"]

aten = torch.ops.aten

MOVED = Operators(*(name for name in MOVES if facts(name).onnx not in ("MaxPool", "ReduceMax")))
"""Operators each of whose values is a value of the first operand, chosen by its place alone."""
MAPS = SUMS | SCALES | {"batch_norm.default", "neg.default"}
READERS = CONVOLUTIONS | {"linear.default"}

MAX_REL_ERROR = 1e-12
"""Moved maps compute the same numbers; only sums with an offset may round differently."""


@dataclass(frozen=True, eq=False)
class _Map:
    """An operator that computes slope * source + offset in each channel of `axis`; both float64 [channels].

    If all channels have one slope and one offset, both are [1], and the whole value is one channel.
    """

    node: fx.Node
    source: fx.Node
    axis: int
    slope: Tensor
    offset: Tensor

    @property
    def numbers(self) -> Tensor:
        """The number of each value's channel, as _numbers returns it."""
        shape = shape_of(self.node)
        return _numbers(shape, self.axis) if len(self.slope) > 1 else torch.ones(shape, dtype=torch.float64)

    def __call__(self, x: Tensor, axis: int, index: Tensor) -> Tensor:
        """Return the map of x, where channel c of x's `axis` is channel index[c] of the source."""
        shape = _along(axis, x.ndim)
        return x * self.slope[index].reshape(shape) + self.offset[index].reshape(shape)


def move_maps(analysis: Analysis) -> bool:
    """Move per-channel maps in the graph of `analysis`, which must be made again if any was; return whether any was."""
    absorbing = absorbers(analysis)
    changed = False
    for node in list(analysis.graph.graph.nodes):
        found = _as_map(analysis, node)
        if found is not None and (_pull_up(analysis, found, absorbing) or _push_down(analysis, found, absorbing)):
            replace_by(found.node, found.source)
            changed = True
    analysis.graph.graph.eliminate_dead_code()
    return changed


def _as_map(analysis: Analysis, node: fx.Node) -> _Map | None:
    """Return what an operator computes of its operand, if that is one slope and one offset per channel."""
    step = RULES[node.target](analysis, node) if node.op == "call_function" and node.target in MAPS else None
    if step is None or len(step.operands) != 1 or node not in analysis.values:
        return None
    (source,) = step.operands
    shape = shape_of(node)
    for spatial, axis in ((len(shape) - 2, 1), (0, len(shape) - 1)):
        if spatial > 3 or axis >= len(shape) or step.spatial not in (None, spatial):
            continue
        try:
            f = step.extend(spatial, identity(shape[axis], spatial))
        except NotAffine:
            continue
        if f is not None:
            (diagonal,) = f.matrices({}).values()
            slope, offset = diagonal.flatten(), f.bias_or_zero()
            is_uniform = bool((slope == slope[0]).all() and (offset == offset[0]).all())
            count = 1 if is_uniform and node.target is not BATCH_NORM else None
            return _Map(node, source, axis, slope[:count], offset[:count])
    return None


# Up ------------------------------------------------------------------------------------------------------------------


def _pull_up(analysis: Analysis, found: _Map, absorbing: set[fx.Node]) -> bool:
    """Move a map to the operators whose values it reads, if nothing else reads them and all but one take it in."""
    moves, leaves = _moves_before(found.source)
    inside = {*moves, found.node}
    taking = [leaf for leaf in leaves if leaf in absorbing and inside.issuperset(leaf.users)]
    rest = len(leaves) - len(taking)
    if not moves or not taking or rest > 1 or any(is_constant(leaf) or not shape_of(leaf) for leaf in leaves):
        return False
    if any(user not in inside for move in moves for user in move.users):
        return False
    places = {leaf: _place_before(analysis, found, moves, leaf, leaves) for leaf in leaves}
    if not _same_after(analysis, found, moves, places):
        return False
    for leaf, place in places.items():
        assert place is not None
        made = _insert(analysis, found, leaf.next, leaf, *place)
        for user in list(leaf.users):
            if user in inside:
                user.replace_input_with(leaf, made)
        if leaf in taking:
            absorbing.add(made)
    return True


def _moves_before(value: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the operators that only move values into `value`, in order, and the nodes whose values they move."""
    moves: list[fx.Node] = []
    leaves: list[fx.Node] = []

    def visit(node: fx.Node) -> None:
        if node in moves or node in leaves:
            return
        is_move = node.target in MOVED or node.target in LISTS or node.target is aten.cat.default
        if node.op != "call_function" or not is_move:
            leaves.append(node)
            return
        for source in node.all_input_nodes:
            visit(source)
        moves.append(node)

    visit(value)
    return moves, leaves


Place = tuple[int, Tensor]
"""The channel axis of a value, and the channel of the map that each of its channels is."""


def _place_before(
    analysis: Analysis, found: _Map, moves: list[fx.Node], leaf: fx.Node, leaves: list[fx.Node]
) -> Place | None:
    """Return how the channels of a leaf are those of the map; None where one of them becomes several."""
    shape = shape_of(leaf)
    zeros = {other: torch.zeros(shape_of(other), dtype=torch.float64) for other in leaves}
    for axis in _axes(leaf):
        image = analysis.run(moves, zeros | {leaf: _numbers(shape, axis)})[found.source]
        if (index := _function(image, found.numbers, shape[axis])) is not None:
            return axis, index
    return None


def _same_after(analysis: Analysis, found: _Map, moves: list[fx.Node], places: dict[fx.Node, Place | None]) -> bool:
    """Return whether the map before the moves gives what it gives after them, on random values."""
    generator = torch.Generator().manual_seed(0)
    before, after = {}, {}
    for leaf, place in places.items():
        if place is None:
            return False
        before[leaf] = torch.randn(shape_of(leaf), generator=generator, dtype=torch.float64)
        after[leaf] = found(before[leaf], *place)
    expected = analysis.run([*moves, found.node], before)[found.node]
    return _is_same(expected, analysis.run(moves, after)[found.source])


# Down ----------------------------------------------------------------------------------------------------------------


def _push_down(analysis: Analysis, found: _Map, absorbing: Collection[fx.Node]) -> bool:
    """Move a map to the operators that read its values, if all of them take it in."""
    moves, reads = _reads_after(found.node)
    takers = [_taker(found, *read) for read in reads]
    is_beside = not moves and len(reads) < 2
    is_beside |= found.source in absorbing and len(found.source.users) == 1
    if is_beside or not reads or None in takers:
        return False
    numbers = analysis.run(moves, {found.node: found.numbers})
    places = [
        (_axes(taker)[0], numbers[value]) for taker, (_, value) in zip(takers, reads, strict=True) if taker is not None
    ]
    indices = [_function(_numbers(image.shape, axis), image, image.shape[axis]) for axis, image in places]
    x = torch.randn(shape_of(found.node), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = analysis.run([found.node, *moves], {found.source: x})
    moved = analysis.run(moves, {found.node: x})
    for (_, value), (axis, _), index in zip(reads, places, indices, strict=True):
        if index is None or not _is_same(expected[value], found(moved[value], axis, index)):
            return False
    for (reader, value), (axis, _), index in zip(reads, places, indices, strict=True):
        assert index is not None
        reader.replace_input_with(value, _insert(analysis, found, reader, value, axis, index))
    return True


def _reads_after(node: fx.Node) -> tuple[list[fx.Node], list[tuple[fx.Node, fx.Node]]]:
    """Return the operators that only move a value, in order, and all other readers with what they read."""
    moves: list[fx.Node] = []
    reads: list[tuple[fx.Node, fx.Node]] = []
    waiting = [node]
    while waiting:
        value = waiting.pop(0)
        for user in value.users:
            if user.target in MOVED or user.target in LISTS:
                moves.append(user)
                waiting.append(user)
            else:
                reads.append((user, value))
    return moves, reads


def _taker(found: _Map, reader: fx.Node, value: fx.Node) -> fx.Node | None:
    """Return the operator that takes in a map of `value`, after other maps if any; an offset passes no padding."""
    while reader.target in MAPS and len(reader.users) == 1 and sum(map(is_computed, reader.all_input_nodes)) == 1:
        reader, value = next(iter(reader.users)), reader
    if reader.op != "call_function" or reader.target not in READERS:
        return None
    bound = bind(reader)
    if bound["input"] is not value or not has_constant_parameters(bound):
        return None
    return None if bool(found.offset.any()) and any(per_axis(bound.get("padding", 0), 1)) else reader


# Channels ------------------------------------------------------------------------------------------------------------


def _axes(node: fx.Node) -> tuple[int, ...]:
    """Return the axes that may count the channels of a value (of a reader: of its input)."""
    last = len(shape_of(node)) - 1
    if node.target is aten.linear.default:
        return (last,)
    return (1,) if node.target in CONVOLUTIONS or node.target in TRANSPOSED or last < 2 else (1, last)


def _along(axis: int, rank: int) -> list[int]:
    return [-1 if at == axis else 1 for at in range(rank)]


def _numbers(shape: Iterable[int], axis: int) -> Tensor:
    """Return a tensor of the number of each value's channel, from 1, in float64."""
    sizes = tuple(shape)
    counted = torch.arange(1, sizes[axis] + 1, dtype=torch.float64)
    return counted.reshape(_along(axis, len(sizes))).expand(sizes)


def _function(keys: Tensor, values: Tensor, count: int) -> Tensor | None:
    """Return the value, less 1, of each key of 1 ... count; 0 where it does not occur, None unless there is one."""
    at, found = keys.flatten().long(), values.flatten().long()
    first, last = (
        torch.zeros(count + 1, dtype=torch.long).scatter_reduce(0, at, found, how, include_self=False)[1:]
        for how in ("amin", "amax")
    )
    return (first - 1).clamp(min=0) if torch.equal(first, last) else None


def _is_same(expected: Tensor, found: Tensor) -> bool:
    largest = max(float(expected.abs().max()), math.ulp(1.0))
    return float((expected - found).abs().max()) <= MAX_REL_ERROR * largest


def _insert(analysis: Analysis, found: _Map, place: fx.Node, value: fx.Node, axis: int, index: Tensor) -> fx.Node:
    """Insert the map of `value` before `place`: as the batch norm that it is, else as a product and a sum."""

    def call(target: Any, x: fx.Node, *arguments: Tensor | float | None) -> fx.Node:
        made = call_before(place, target, x, *(stored(a) if isinstance(a, Tensor) else a for a in arguments))
        made.meta = meta_of_part(value) | origin(found.node)
        return made

    def stored(exact: Tensor) -> fx.Node:
        made = constant_before(place, f"{module_path(found.node)}.moved".lstrip("."), exact.to(dtype))
        analysis.constants[made] = exact
        return made

    dtype = found.node.meta["tensor_meta"].dtype
    if found.node.target is BATCH_NORM and axis == 1:
        _, *given = bind(found.node).values()
        return call(BATCH_NORM, value, *(analysis.exact(a)[index] if is_constant(a) else a for a in given))
    shape = _along(axis, len(shape_of(value)))
    scaled = (
        value if bool((found.slope == 1).all()) else call(aten.mul.Tensor, value, found.slope[index].reshape(shape))
    )
    is_moved = bool(found.offset.any())
    return call(aten.add.Tensor, scaled, found.offset[index].reshape(shape)) if is_moved else scaled
