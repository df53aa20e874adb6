"""Decide which values of a graph are integers on a target: those that integer kernels write, and those that they read.

Must not know: rules, bits, names of sites, methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from calibrators.graph.aten import bind, coded_outputs, is_constant, shape_of
from calibrators.graph.canonical import clip_bounds
from calibrators.graph.elementwise import constant_operand
from calibrators.graph.operators import name_of
from calibrators.graph.rewrite import constant_of
from calibrators.grid.target import Target
from calibrators.placement.kernel_forms import is_float, missing_form

__all__ = ["EXTREMES", "Placer"]

aten = torch.ops.aten

EXTREMES = (aten.maximum.default, aten.minimum.default)
"""Operators that select codes of two operands, which need one scale."""


class Placer:
    """Decides for every node whether its value can be an integer, and whether it is needed as one."""

    def __init__(
        self, graph: fx.GraphModule, target: Target, selected: frozenset[str], weighted: frozenset[fx.Node]
    ) -> None:
        self.graph, self.target, self.selected, self.weighted = graph, target, selected, weighted
        self.nodes = [node for node in graph.graph.nodes if node.op in ("placeholder", "call_function")]
        self.coded = frozenset(coded_outputs(graph).values())
        self.absorbed: dict[fx.Node, fx.Node] = {}  # ReLU or clip -> the operator whose kernel performs it
        for node in self.nodes:
            self._absorb_clip(node)
        self.available: dict[fx.Node, bool] = {}
        for node in self.nodes:
            self.available[node] = self._is_available(node)
        self.is_quantized: dict[fx.Node, bool] = {}
        for node in reversed(self.nodes):
            self.is_quantized[node] = self._find_is_quantized(node)

    def without(self, names: frozenset[str]) -> Placer:
        """Return the placer with further operators in float."""
        weighted = frozenset(node for node in self.weighted if node.name not in names)
        return Placer(self.graph, self.target, self.selected - names, weighted)

    def _absorb_clip(self, node: fx.Node) -> None:
        user = next(iter(node.users), None)
        if not (self.is_weighted(node) or self._is_integer_op(node)) or len(node.users) != 1:
            return
        bounds = clip_bounds(user) if isinstance(user, fx.Node) and user.name in self.selected else None
        if isinstance(user, fx.Node) and bounds is not None and (self.target.fuses_clips or bounds[0] == 0):
            self.absorbed[user] = node

    def is_weighted(self, node: fx.Node) -> bool:
        """Return whether an operator has a constant weight and the target runs it on integers."""
        return node in self.weighted

    def _is_integer_op(self, node: fx.Node) -> bool:
        if node.target not in self.target.integer_ops or node.name not in self.selected or not is_float(node):
            return False
        constants = [x for x in _inputs(node) if is_constant(x)]
        if constants and (node.target not in self.target.constant_operands or constants != [constant_operand(node)]):
            return False
        return missing_form(node, self.target) is None

    def factor(self, node: fx.Node) -> float | None:
        """Return the number by which a product multiplies all its codes: its readers may read them at another scale.

        None for other operators, for numbers that are not positive, and where a reader needs the scale of the codes.
        """
        operand = constant_operand(node) if self.target.free_factors and self._is_integer_op(node) else None
        if operand is None or node.target is not aten.mul.Tensor:
            return None
        value = constant_of(operand)
        needed = any(self.is_weighted(x) or self._moves_codes(x) or clip_bounds(x) is not None for x in node.users)
        is_number = value.numel() == 1 and value > 0 and shape_of(node) == shape_of(bind(node)["self"])
        return float(value) if is_number and not needed else None

    def _moves_codes(self, node: fx.Node) -> bool:
        """Return whether output codes are input codes, moved or saturated: reshapes, max pools, stand-alone clips."""
        if node.name not in self.selected or not is_float(node) or node in self.absorbed:
            return False
        is_move = node.target in self.target.same_scale_ops | self.target.on_codes_ops
        check = _FORM_OF_MOVE.get(node.target)
        if node.target in EXTREMES:
            return is_move and all(self._may_join(x) for x in _inputs(node))
        return (is_move and (check is None or check(node))) or clip_bounds(node) is not None

    def _may_join(self, value: object) -> bool:
        """Return whether a value that a maximum or minimum compares may have the scale of another one."""
        while isinstance(value, fx.Node) and value.op == "call_function" and self._moves_codes(value):
            value = value.args[0]
        return (
            isinstance(value, fx.Node)
            and not is_constant(value)
            and name_of(value.target) not in self.target.fixed_outputs
        )

    def _is_available(self, node: fx.Node) -> bool:
        """Return whether integers can produce the value, without quantizing the result of a float operator."""
        if node.op == "placeholder":
            return is_float(node)
        if node in self.absorbed:
            return self.available[self.absorbed[node]]
        if self.is_weighted(node):
            gives_codes = any(self.absorbed.get(each, each) is node for each in self.coded)
            writes = self.target.weighted_to_codes | self.target.weighted_to_either
            return gives_codes or node.target in writes or self.available[bind(node)["input"]]
        if self._is_integer_op(node) or self._moves_codes(node):
            inputs = [x for x in _inputs(node) if isinstance(x, fx.Node) and not is_constant(x)]
            return bool(inputs) and all(self.available.get(x, False) for x in inputs)
        return False

    def reads_codes(self, user: fx.Node, value: fx.Node) -> bool:
        """Return whether `user` runs an integer kernel on `value`, or is an output that is given as codes."""
        if user.op == "output":
            return value in self.coded and self.available[value]
        if user.op != "call_function":
            return False
        if self.is_weighted(user):
            return bind(user)["input"] is value
        return self.runs_on_integers(user)

    def runs_on_integers(self, node: fx.Node) -> bool:
        """Return whether a weightless operator runs on codes: its inputs can be integers, its result is quantized."""
        if not (self._is_integer_op(node) or self._moves_codes(node)) or not self.available[node]:
            return False
        carrier = next(iter(node.users)) if self._carried(node) else node
        return self.is_quantized[carrier]

    def _carried(self, node: fx.Node) -> bool:
        return len(node.users) == 1 and self.absorbed.get(next(iter(node.users))) is node

    def _find_is_quantized(self, node: fx.Node) -> bool:
        if not is_float(node) or self._carried(node):
            return False
        origin = self.absorbed.get(node, node)
        if origin.target in self.target.weighted_to_codes and self.is_weighted(origin):
            return True
        return any(self.reads_codes(user, node) for user in node.users)

    def writes_codes(self, node: fx.Node) -> bool:
        """Return whether an integer kernel writes the value, so that only its dequantized form exists."""
        origin = self.absorbed.get(node, node)
        if origin.op != "call_function":
            return False
        return self.is_quantized[node] and self.available[node]


def _inputs(node: fx.Node) -> list[object]:
    """Return the tensor operands of a weightless operator, constants and numbers included."""
    first = node.args[0]
    if isinstance(first, (list, tuple)):
        return list(first)
    return list(node.args[:2]) if node.target in (aten.add.Tensor, aten.mul.Tensor, *EXTREMES) else [first]


def _pads_with_zeros(node: fx.Node) -> bool:
    bound = bind(node)
    return bound.get("mode", "constant") != "constant" or not bound["value"]


_FORM_OF_MOVE: dict[object, Callable[[fx.Node], bool]] = {
    aten.constant_pad_nd.default: _pads_with_zeros,
    aten.pad.default: _pads_with_zeros,
}
