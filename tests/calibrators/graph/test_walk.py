"""A walk computes what the graph computes, holds live values only, and goes on from a value that was replaced."""

from __future__ import annotations

import torch

from calibrators.graph.walk import walk
from exporter.frontend.capture import capture
from tests.support.architectures import construct
from tests.support.networks import build


def test_outputs_are_those_of_the_graph_and_dead_values_are_freed() -> None:
    model, inputs = construct("densenet")
    graph = capture(model, inputs)
    with torch.no_grad():
        for node, values in walk(graph, inputs):
            if node.op == "output":
                assert all(map(torch.equal, values[node], graph(*inputs)))
                assert values.keys() == {node, *node.all_input_nodes}


def test_a_replaced_value_is_read_by_later_nodes() -> None:
    model, x = build("mlp")
    graph = capture(model, x)
    outputs: tuple[torch.Tensor, ...] = ()
    with torch.no_grad():
        for node, values in walk(graph, [x]):
            if node.op == "placeholder":
                values[node] = torch.zeros_like(x)
            elif node.op == "output":
                outputs = values[node]
        assert torch.equal(outputs[0], graph(torch.zeros_like(x))[0])


def test_skipped_nodes_are_not_run() -> None:
    model, x = build("mlp")
    graph = capture(model, x)
    last = graph.graph.output_node()
    assert last not in [node for node, _ in walk(graph, [x], skipped=[last])]
