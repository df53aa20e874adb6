"""Rewrites of calls: chains, metadata, constants, rules by operator."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from calibrators.graph.batch_norm import EXPECTED, Expected
from calibrators.graph.rewrite import (
    apply_rules,
    call_before,
    constant_before,
    merge_equal_calls,
    replace_by,
    replace_call,
)

aten = torch.ops.aten


def graph_of(*targets: object) -> fx.GraphModule:
    """A chain of calls without other arguments, each with metadata of its own."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for index, target in enumerate(targets):
        value = graph.call_function(target, (value,))
        value.meta = {"index": index, EXPECTED: Expected(torch.zeros(1), ())}
    graph.output((value,))
    return fx.GraphModule(nn.Module(), graph)


def calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def run(graph: fx.GraphModule, x: Tensor) -> Tensor:
    graph.recompile()
    result: Tensor = graph(x)[0]
    return result


def test_a_chain_takes_the_place_of_a_call_and_its_metadata() -> None:
    """The expected statistics of a value stay with the call that computes it."""
    graph, x = graph_of(aten.relu.default, aten.neg.default), torch.tensor([-1.0, 2.0])
    before, node = calls(graph)
    made = replace_call(node, (aten.mul.Tensor, (before, 3.0)), (aten.add.Tensor, (..., before)))
    assert torch.equal(run(graph, x), torch.tensor([0.0, 8.0]))
    assert [each.target for each in calls(graph)] == [aten.relu.default, aten.mul.Tensor, aten.add.Tensor]
    assert made.meta["index"] == 1 and EXPECTED in made.meta
    assert calls(graph)[1].meta == {"index": 1}


def test_constants_are_registered_under_free_names() -> None:
    graph, x = graph_of(aten.relu.default), torch.ones(2)
    [node] = calls(graph)
    first, second = (constant_before(node, "layer.weight", torch.full((2,), value)) for value in (2.0, 5.0))
    replace_call(node, (aten.mul.Tensor, (node.args[0], first)), (aten.add.Tensor, (..., second)))
    assert [first.target, second.target] == ["layer_weight", "layer_weight_1"]
    assert torch.equal(run(graph, x), torch.full((2,), 7.0))


def test_rules_see_the_calls_of_the_beginning_and_leave_nothing_unread() -> None:
    graph = graph_of(aten.relu.default, aten.neg.default)
    seen = []

    def negative(node: fx.Node) -> None:
        seen.append(node.target)
        replace_by(node, call_before(node, aten.relu.default, node.args[0]))
        call_before(graph.graph.output_node(), aten.sigmoid.default, graph.graph.find_nodes(op="placeholder")[0])

    apply_rules(graph, {aten.neg.default: (negative,), aten.sigmoid.default: (negative,)})
    assert seen == [aten.neg.default]
    assert [node.target for node in calls(graph)] == [aten.relu.default, aten.relu.default]


def test_equal_calls_are_made_once() -> None:
    """Random ones are drawn at each call, and 2 is not 2.0."""
    graph = graph_of(aten.relu.default)
    [relu] = calls(graph)
    arguments: list[tuple[object, ...]] = [(aten.add.Tensor, relu, 2), (aten.add.Tensor, relu, 2.0)]
    arguments += [(aten.exp.default, relu), (aten.rand_like.default, relu)]
    output = graph.graph.output_node()
    made = [call_before(output, *call) for call in arguments * 2]
    made.append(constant_before(output, "c", torch.ones(2)))
    with graph.graph.inserting_before(output):
        made.append(graph.graph.get_attr("c"))
    output.args = ((relu, *made),)
    merge_equal_calls(graph)
    kept = [made.index(node) for node in output.args[0][1:]]  # type: ignore[union-attr, index]
    assert kept == [0, 1, 2, 3, 0, 1, 2, 7, 8, 8]
