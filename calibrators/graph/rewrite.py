"""Replace calls of a graph by others, and apply tables of such rewrites.

Must not know: which rewrites there are, quantization, folding, ONNX.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import add_constant, constant
from calibrators.graph.batch_norm import EXPECTED

__all__ = [
    "Call",
    "Rule",
    "apply_rules",
    "call_before",
    "constant_before",
    "constant_of",
    "merge_equal_calls",
    "meta_of_part",
    "origin",
    "replace_by",
    "replace_call",
]

Call = tuple[Any, tuple[Any, ...]]
"""An operator and its arguments, of which Ellipsis stands for the result of the call before it."""

Rule = Callable[[fx.Node], None]
"""A function that rewrites one call if it can, and leaves it alone otherwise."""


def apply_rules(graph: fx.GraphModule, rules: Mapping[Any, Sequence[Rule]]) -> None:
    """Apply the rules for its operator to every call in the graph, then remove unused nodes.

    Calls that a rule inserts are not visited. Recompile the graph after the last rewrite.
    """
    for node in list(graph.graph.nodes):
        for rule in rules.get(node.target, ()) if node.op == "call_function" else ():
            rule(node)
    graph.graph.eliminate_dead_code()


def merge_equal_calls(graph: fx.GraphModule) -> None:
    """Keep one of several calls of an operator with the same operands, as runtimes do.

    How many readers a value has decides which kernels runtimes make, so it must be the same here and there.
    """
    first: dict[str, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            key = f"constant {id(attrgetter(str(node.target))(graph))}"
        elif node.op == "call_function" and _is_repeatable(node.target):
            key = repr((node.target, node.args, sorted(node.kwargs.items())))
        else:
            continue
        if (kept := first.setdefault(key, node)) is not node:
            replace_by(node, kept)


def _is_repeatable(target: Any) -> bool:
    """Return whether calls of an operator with the same operands have the same result."""
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def replace_call(node: fx.Node, *calls: Call) -> fx.Node:
    """Replace `node` by a chain of calls; return the last one, which computes its value and has its metadata."""
    result = node
    for target, arguments in calls:
        result = call_before(node, target, *(result if argument is ... else argument for argument in arguments))
    result.meta = dict(node.meta)
    replace_by(node, result)
    return result


def replace_by(node: fx.Node, value: fx.Node) -> None:
    """Make every reader of `node` read `value` instead, and erase `node`."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def call_before(node: fx.Node, target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
    """Insert a call before `node` and return it: same module, but a value of its own."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, arguments, keywords)
    made.meta = meta_of_part(node)
    return made


def constant_before(node: fx.Node, name: str, value: Tensor) -> fx.Node:
    """Register a constant under a free name near `name`, and insert a get_attr node for it before `node`."""
    owner = node.graph.owning_module
    assert isinstance(owner, fx.GraphModule)
    with node.graph.inserting_before(node):
        return node.graph.get_attr(add_constant(owner, name, value))


def constant_of(node: fx.Node) -> Tensor:
    """Return the tensor of a get_attr node from the module that owns its graph."""
    owner = node.graph.owning_module
    assert owner is not None
    return constant(owner, node)


def meta_of_part(node: fx.Node) -> dict[str, Any]:
    """Return the metadata of `node` for a node of the same module with another value."""
    return {key: value for key, value in node.meta.items() if key != EXPECTED}


def origin(node: fx.Node) -> dict[str, Any]:
    """Return the metadata that says which module and line a node comes from."""
    return {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
