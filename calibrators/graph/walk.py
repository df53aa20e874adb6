"""Run a graph node by node, and free every value after its last reader.

Must not know: quantization, what is done with the values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import constant, example_batch, shape_of

__all__ = ["Values", "call", "sample_values", "walk"]

Values = dict[fx.Node, Any]
"""The values that are alive, by node."""


def call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return the result of a call_function node for the values that it reads."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def walk(
    graph: fx.GraphModule,
    inputs: Iterable[Tensor],
    evaluate: Callable[[fx.Node, Mapping[fx.Node, Any]], Any] = call,
    *,
    skipped: Collection[fx.Node] = (),
    reads: Callable[[fx.Node], Iterable[fx.Node]] = lambda node: node.all_input_nodes,
) -> Iterator[tuple[fx.Node, Values]]:
    """Run the graph on one tensor per input; yield every node with the values alive after it, its own among them.

    The caller may replace the value of a node for later readers. The value of the output node is the tuple of outputs.

    evaluate: makes the value of a call_function node; reads: the nodes whose values it needs.
    skipped:  nodes that are not run.
    """
    nodes = [node for node in graph.graph.nodes if node not in skipped]
    last = {source: node for node in nodes for source in (node, *reads(node))}
    freed: dict[fx.Node, list[fx.Node]] = {}
    for source, reader in last.items():
        freed.setdefault(reader, []).append(source)
    pending, values = iter(inputs), Values()
    for node in nodes:
        if node.op == "placeholder":
            values[node] = next(pending)
        elif node.op == "get_attr":
            values[node] = constant(graph, node)
        elif node.op == "output":
            values[node] = fx.map_arg(node.args[0], values.__getitem__)
        else:
            values[node] = evaluate(node, values)
        yield node, values
        for source in freed.get(node, ()):
            values.pop(source, None)


def sample_values(graph: fx.GraphModule) -> frozenset[str]:
    """Return the names of the values whose first dimension counts the samples.

    If the batch is free, one more sample than the example has is run as well, because sizes may agree by chance.
    """
    batch = example_batch(graph)
    names = {node.name for node in graph.graph.nodes if shape_of(node)[:1] == (batch,)}
    if not graph.meta["dynamic_batch"]:
        return frozenset(names)
    longer = [torch.cat([x, x[:1]]) if x.ndim else x for x in graph.meta["example"]]
    with torch.no_grad():
        steps = ((node.name, values[node]) for node, values in walk(graph, longer))
        return frozenset(name for name, x in steps if name in names and isinstance(x, Tensor) and len(x) == batch + 1)
