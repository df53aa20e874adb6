"""Count the float operators, one after the other, through which the roundings of a value have come.

Must not know: runtimes, tolerances.
"""

from __future__ import annotations

import torch
from torch import fx

from calibrators.graph.aten import bind, shape_of
from calibrators.graph.operators import MOVES
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE

__all__ = ["float_depths"]

aten = torch.ops.aten

RECURRENCES = (aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input)

OPERATORS_PER_STEP = 10
"""Of a recurrence: two products, sums, three activations and products of these, all of which the next step reads."""


def float_depths(program: fx.GraphModule) -> dict[fx.Node, int]:
    """Return by node the longest row of float operators since codes, inputs or constants; moves round nothing."""
    depths: dict[fx.Node, int] = {}
    same: set[fx.Node] = set()  # on both sides: constants and sizes
    for node in program.graph.nodes:
        before = max((depths[source] for source in node.all_input_nodes), default=0)
        is_size = node.target is aten.sym_size.int
        if node.op == "get_attr" or (node.op == "call_function" and (is_size or same.issuperset(node.all_input_nodes))):
            same.add(node)
        starts = node in same or node.op == "placeholder" or node.target is DEQUANTIZE
        depths[node] = 0 if starts else before + _operators(node)
    return depths


def _operators(node: fx.Node) -> int:
    if node.op != "call_function" or node.target in MOVES or node.target is QUANTIZE:
        return 0
    if node.target not in RECURRENCES:
        return 1
    bound = bind(node)
    steps = shape_of(bound["input"])[1 if bound["batch_first"] else 0]
    return OPERATORS_PER_STEP * steps * int(bound["num_layers"])
