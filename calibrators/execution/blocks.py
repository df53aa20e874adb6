"""Reconstruction units: the graph cut into consecutive blocks, if possible where only one tensor crosses.

    values   results that depend on the inputs. What follows from constants or the batch size alone is computed where
             it is needed and crosses no cut; a value that is read and also returned is live as long as it is read.
    cut      after the call that makes the only live value; every path from an input to an output leads through it,
             so that cuts do not depend on the order in which branches are listed.
    atom     what lies between two cuts. One without weights belongs to the atom before it.
    block    an atom with several weighted operators (residual, inception or attention block), or up to `chain` atoms
             with one each. An atom with more than `largest` weighted operators is divided where several tensors cross.

source: Li et al. 2021 (BRECQ) for blocks as units; the published partitions of its ResNets, RegNets and MobileNetV2
come out without naming any module. Departs: plain chains are units of three layers, as in MQBench.

Must not know: quantization, methods, ONNX.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import fx

from calibrators.graph.aten import constant, example_batch, free_name, module_path, shape_of
from calibrators.graph.canonical import clip_bounds
from calibrators.graph.walk import sample_values

__all__ = ["Block", "extract", "merge", "partition"]

Price = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """An interval of the graph's calls; all fields but `name` are fx names.

    name:     module path of its weighted nodes, or the paths of the first and the last; unique in a partition.
    nodes:    its call_function nodes, in topological order; consecutive blocks are consecutive intervals.
    inputs:   values read inside and made outside, model inputs included, in order of first use.
    outputs:  values made inside and read outside or returned by the graph, in topological order.
    weighted: its weighted nodes, in topological order.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weighted: tuple[str, ...]


def partition(
    graph: fx.GraphModule, weighted: Collection[str], *, chain: int = 3, largest: int = 16
) -> tuple[Block, ...]:
    """Cut a graph into blocks, each with at least one weighted node; every call that reaches an output is in one block.

    graph:    as in calibrators.graph.aten, with the shapes of its example.
    weighted: fx names of the nodes whose weights are quantized; all others count as weightless.
    chain:    weighted operators per block where the graph is a plain chain; of the divisions into the fewest blocks,
              the one whose blocks share the fewest enclosing modules with their neighbours.
    largest:  weighted operators per block where only several tensors cross: as few as possible beyond it, then breaks
              at local minima of live bytes, then few of them, then few bytes. Branches that are listed in another order
              may be divided differently.
    returns:  blocks with at least one input each; inputs have the samples of the batch as their first dimension, except
              for model inputs.
    raises:   ValueError if nothing is weighted, a name is no call that reaches an output, or a limit is not positive.
    """
    if min(chain, largest) < 1:
        raise ValueError(f"a block holds at least one weighted operator: chain is {chain}, largest is {largest}")
    flow = _Flow(graph, frozenset(weighted))
    missing = set(weighted) - {node.name for node in flow.calls}
    if missing or not weighted:
        raise ValueError(f"no calls that reach an output: {sorted(missing)}" if missing else "no node is weighted")
    starts = _reading(flow, _starts(flow, chain, largest))
    intervals = [flow.calls[a:b] for a, b in pairwise([*starts, len(flow.calls)])]
    names = _names([[node for node in nodes if node.name in flow.weighted] for nodes in intervals])
    return tuple(flow.block(name, nodes) for name, nodes in zip(names, intervals, strict=True))


def merge(graph: fx.GraphModule, blocks: Sequence[Block]) -> Block:
    """Merge consecutive blocks of a partition; values that only they read are no longer outputs.

    raises: ValueError if there are none or they are not consecutive.
    """
    order = [node.name for node in _live_calls(graph)]
    nodes = tuple(name for block in blocks for name in block.nodes)
    start = order.index(nodes[0]) if nodes and nodes[0] in order else 0
    if not nodes or tuple(order[start : start + len(nodes)]) != nodes:
        raise ValueError(f"not consecutive blocks of the graph: {', '.join(b.name for b in blocks) or 'none'}")
    inside, outside = set(nodes), set(order) - set(nodes)

    def leaves(name: str) -> bool:
        users = [user for user in source[name].users if not _is_size(user)]
        return any(user.op == "output" or user.name in outside for user in users)

    source = {node.name: node for node in graph.graph.nodes}
    first, last = blocks[0].name.split("..")[0], blocks[-1].name.split("..")[-1]
    return Block(
        name=blocks[0].name if len(blocks) == 1 else f"{first}..{last}",
        nodes=nodes,
        inputs=tuple(dict.fromkeys(name for block in blocks for name in block.inputs if name not in inside)),
        outputs=tuple(name for block in blocks for name in block.outputs if leaves(name)),
        weighted=tuple(name for block in blocks for name in block.weighted),
    )


def extract(graph: fx.GraphModule, block: Block) -> fx.GraphModule:
    """Return the block as a graph of its own: it takes block.inputs and returns the tuple of block.outputs.

    Calls that lead to no output are left out. Nodes keep their names and meta. Constants come along as buffers on the
    same memory, and calls on constants alone are copied from where they are made; the batch size is taken from the
    block's own inputs. There is no example.
    """
    source = {node.name: node for node in graph.graph.nodes}
    batch = example_batch(graph)
    new = fx.Graph()
    made: dict[fx.Node, Any] = {}

    def copied(node: fx.Node) -> Any:
        if node not in made:
            if _is_size(node) and not _is_batch_size(node, batch):
                made[node] = shape_of(node.args[0])[node.args[1]]  # type: ignore[arg-type, index]
            else:
                far = _is_batch_size(node, batch) and node.args[0] not in made
                made[node] = batch_size(node) if far else new.node_copy(node, copied)
        return made[node]

    def batch_size(node: fx.Node) -> fx.Node:
        inputs = [made[source[name]] for name in block.inputs]
        samples = next((x for x in inputs if shape_of(x)[:1] == (batch,)), None)
        if samples is None:
            raise ValueError(f"block {block.name!r} needs the batch size, but none of its inputs has it")
        return new.create_node("call_function", torch.ops.aten.sym_size.int, (samples, 0), name=node.name)

    for name in block.inputs:
        made[source[name]] = new.create_node("placeholder", name, name=name)
        made[source[name]].meta = dict(source[name].meta)
    for name in block.nodes:
        copied(source[name])
    new.output(tuple(made[source[name]] for name in block.outputs))
    new.eliminate_dead_code()
    constants = {str(node.target): constant(graph, node) for node in new.nodes if node.op == "get_attr"}
    return fx.GraphModule(constants, new)


# What is live where --------------------------------------------------------------------------------------------------


def _live_calls(graph: fx.GraphModule) -> list[fx.Node]:
    """Return the call_function nodes that reach an output, in order."""
    reached = {graph.graph.output_node()}
    for node in reversed(graph.graph.nodes):
        if node in reached:
            reached.update(node.all_input_nodes)
    return [node for node in graph.graph.nodes if node in reached and node.op == "call_function"]


def _is_size(node: fx.Node) -> bool:
    """Return whether a call reads a size from a tensor. All sizes but the batch are those of the example here."""
    return node.target is torch.ops.aten.sym_size.int


def _is_batch_size(node: fx.Node, batch: int) -> bool:
    """Return whether a call reads the number of samples from a tensor; any other tensor with samples has it too."""
    if not _is_size(node):
        return False
    x, dim = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(dim, int)
    shape = shape_of(x)
    return bool(shape) and shape[dim] == batch and (x.op != "placeholder" or dim == 0)


class _Flow:
    """The calls of a graph and what crosses the boundary after each of them."""

    def __init__(self, graph: fx.GraphModule, weighted: frozenset[str]) -> None:
        self.weighted = weighted
        self.calls = _live_calls(graph)
        self.samples = sample_values(graph)
        self.returned = frozenset(graph.graph.output_node().all_input_nodes)
        self.position = {node: index for index, node in enumerate(self.calls)}
        self.constants = {node for node in graph.graph.nodes if node.op == "get_attr"}
        for node in self.calls:
            fixed = all(x in self.constants for x in node.all_input_nodes) or _is_size(node)
            if fixed and node.name not in weighted:
                self.constants.add(node)
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        for node in self.calls:
            for x in self.reads(node):
                self.readers.setdefault(x, []).append(node)

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that a call reads."""
        return [] if node in self.constants else [x for x in node.all_input_nodes if x not in self.constants]

    def block(self, name: str, nodes: Sequence[fx.Node]) -> Block:
        """Return the block of an interval of the calls."""
        inside = set(nodes)
        inputs = [x.name for node in nodes for x in self.reads(node) if x not in inside]
        outputs = [
            node.name
            for node in nodes
            if node in self.returned or any(user not in inside for user in self.readers.get(node, ()))
        ]
        return Block(
            name=name,
            nodes=tuple(node.name for node in nodes),
            inputs=tuple(dict.fromkeys(inputs)),
            outputs=tuple(outputs),
            weighted=tuple(node.name for node in nodes if node.name in self.weighted),
        )

    def counts_samples(self, node: fx.Node) -> bool:
        """Return whether the first dimension of the value counts samples."""
        return node.name in self.samples

    @cached_property
    def spans(self) -> dict[fx.Node, tuple[int, int]]:
        """By value that is read: the first boundary that it crosses, and the first that it no longer crosses."""
        return {
            node: (self.position.get(node, 0), max(self.position[user] for user in users))
            for node, users in self.readers.items()
        }

    def crossing(self, amounts: Iterable[tuple[tuple[int, int], int]]) -> list[int]:
        """Return the sum of the amounts of the spans that cross, at every boundary."""
        change = [0] * (len(self.calls) + 1)
        for (first, last), amount in amounts:
            change[first] += amount
            change[last] -= amount
        return list(accumulate(change))[:-1]

    @cached_property
    def cuts(self) -> list[int]:
        """Boundaries that only the result of the call before crosses, a tensor of samples; the last ends the graph."""
        end = len(self.calls)
        leaves = self.returned & self.position.keys() - self.spans.keys() - self.constants
        spans = self.spans | {node: (self.position[node], end) for node in leaves}
        live = self.crossing((span, 1) for span in spans.values())
        cuts = [
            index
            for index, node in enumerate(self.calls[:-1])
            if live[index] == 1 and spans.get(node, (0, 0))[1] > index and self.counts_samples(node)
        ]
        return [*cuts, end - 1]

    @cached_property
    def live_bytes(self) -> list[int]:
        """Bytes that later calls still read, at every boundary; -1 where blocks cannot meet.

        Blocks cannot meet where a value without samples crosses, or between a value and the clip that belongs to it.
        belongs to it.
        """
        blocked = self.crossing((span, 1) for node, span in self.spans.items() if not self._may_cross(node))
        size = self.crossing((span, _bytes(node)) for node, span in self.spans.items())
        return [-1 if closed else amount for closed, amount in zip(blocked, size, strict=True)]

    def _may_cross(self, node: fx.Node) -> bool:
        users = list(node.users)
        is_clipped = node.op == "call_function" and len(users) == 1 and clip_bounds(users[0]) is not None
        return self.counts_samples(node) and not is_clipped


def _bytes(node: fx.Node) -> int:
    shape = torch.Size(shape_of(node))
    return int(shape.numel()) * node.meta["tensor_meta"].dtype.itemsize if shape else 0


# Where blocks begin --------------------------------------------------------------------------------------------------


def _starts(flow: _Flow, chain: int, largest: int) -> list[int]:
    """Return the position of the first call of every block."""
    starts: list[int] = []
    for is_plain, atoms in groupby(_atoms(flow), key=lambda atom: len(atom.weighted) == 1):
        if not is_plain:
            for atom in atoms:
                starts += [atom.start, *_divisions(flow, atom.weighted, largest)]
            continue
        run = list(atoms)
        paths = [module_path(flow.calls[atom.weighted[0]]) for atom in run]
        breaks = _divide([(1, _shared(a, b)) for a, b in pairwise(paths)], chain)
        starts += [run[index].start for index in (0, *breaks)]
    return [0, *starts[1:]]


def _reading(flow: _Flow, starts: list[int]) -> list[int]:
    """Return the starts of blocks that read a value; layers on constants alone (learned queries) join a neighbour."""

    def reads(start: int, end: int) -> bool:
        return any(flow.position.get(x, -1) < start for node in flow.calls[start:end] for x in flow.reads(node))

    kept = [0]
    for start, end in pairwise([*starts[1:], len(flow.calls)]):
        if reads(kept[-1], start) and reads(start, end):
            kept.append(start)
    return kept


@dataclass(frozen=True)
class _Atom:
    """Positions of its first call and of its weighted operators."""

    start: int
    weighted: list[int]


def _atoms(flow: _Flow) -> list[_Atom]:
    """Return the parts between neighbouring cuts that hold a weighted operator."""
    atoms: dict[int, _Atom] = {}
    for position, node in enumerate(flow.calls):
        if node.name in flow.weighted:
            index = bisect_left(flow.cuts, position)
            start = flow.cuts[index - 1] + 1 if index else 0
            atoms.setdefault(index, _Atom(start, [])).weighted.append(position)
    return list(atoms.values())


def _shared(left: str, right: str) -> int:
    """Return how many modules enclose both."""
    pairs = zip(left.split("."), right.split("."), strict=False)
    return next((depth for depth, (a, b) in enumerate(pairs) if a != b), min(left.count("."), right.count(".")) + 1)


def _divisions(flow: _Flow, atom: list[int], largest: int) -> list[int]:
    """Divide an atom with too many weighted operators; return the first calls of all its blocks but the first."""
    gaps = [_least(flow.live_bytes, a, b) for a, b in pairwise(atom)]
    free = [gap for gap in gaps if gap is not None]
    lowest = {gap: min(flow.live_bytes[g] for g in free[max(i - 1, 0) : i + 2]) for i, gap in enumerate(free)}

    def price(gap: int) -> Price:
        size = flow.live_bytes[gap]
        return int(size > lowest[gap]), 1, size

    prices = [price(gap) if gap is not None else None for gap in gaps]
    return [gap + 1 for index in _divide(prices, largest) if (gap := gaps[index - 1]) is not None]


def _least(live_bytes: list[int], first: int, last: int) -> int | None:
    """Return the latest boundary between two calls that the fewest bytes cross; None where there is none."""
    free = [index for index in range(first, last) if live_bytes[index] >= 0]
    return min(free, key=lambda index: (live_bytes[index], -index), default=None)


def _divide(prices: Sequence[Price | None], limit: int) -> list[int]:
    """Divide a row of operators; return the index of the first operator of every part but the first.

    prices: of breaks between neighbours, None where a break is not allowed.
    returns: division with the fewest operators beyond `limit` per part, then the least sum of prices (entry by entry),
             then long parts first.
    """
    count = len(prices) + 1
    free = (0,) * max((len(price) for price in prices if price), default=0)
    best: dict[int, tuple[int, Price, tuple[int, ...]]] = {0: (0, free, ())}  # by first operator of the next part
    for end in range(1, count + 1):
        price = prices[end - 1] if end < count else free
        if price is None:
            continue
        best[end] = min(
            (
                excess + max(0, end - start - limit),
                tuple(a + b for a, b in zip(paid, price, strict=True)),
                (*breaks, -end),
            )
            for start, (excess, paid, breaks) in best.items()
        )
    return [-index for index in best[count][2][:-1]]


# Names ---------------------------------------------------------------------------------------------------------------


def _names(blocks: Sequence[Sequence[fx.Node]]) -> list[str]:
    """Return a readable name for each group of weighted nodes: the outermost module that holds no other group's."""
    everywhere = Counter(path for nodes in blocks for node in nodes for path in _paths(node))
    names: list[str] = []
    for nodes in blocks:
        here = Counter(path for node in nodes for path in _paths(node))
        ends = [next((p for p in _paths(n) if here[p] == everywhere[p]), _paths(n)[-1]) for n in (nodes[0], nodes[-1])]
        name = "..".join(dict.fromkeys(ends))
        names.append(free_name(name, names.__contains__))
    return names


def _paths(node: fx.Node) -> list[str]:
    """Return the modules around a node from the outermost in, or its own name where none is known."""
    return list(accumulate(module_path(node).split("."), "{}.{}".format)) if module_path(node) else [node.name]
