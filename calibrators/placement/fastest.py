"""Find the layers that a runtime computes faster in float than in integers: `placement = fastest`.

The predicted time of a placement is the sum of its kernels, its quantizers and its changes of layout, each from a table
of measured costs. The best choice of layers is a minimum cut: kernels are nodes of a network whose sides are integer
and float, and every value that passes from one side to the other costs a quantizer. The table is committed, so the same
model gives the same choice on every machine.

Must not know: rules, bits, methods, ONNX, this machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from calibrators.graph.aten import batch_of, bind, example_batch, is_constant, shape_of
from calibrators.graph.operators import CONVOLUTIONS, WEIGHTED, Operators, name_of
from calibrators.grid.costs import LANES, Cost, Costs, Work, kind_of_convolution
from calibrators.placement.integer_values import Placer

__all__ = ["LeftInFloat", "faster_in_float", "predicted"]

aten = torch.ops.aten

GAIN = 0.15
"""Least share of the predicted time that layers in float must save: the table's costs are off by about as much."""
LEAST_SAVING = 100_000.0
"""Nanoseconds of a sample that they must save at least."""

DEMANDING = CONVOLUTIONS | Operators("max_pool2d.default", "avg_pool2d.default")
"""Operators that compute in a layout of their own, blocked in float, channels last in integers."""
NEUTRAL = Operators("add.Tensor", "cat.default", "relu.default", "hardtanh.default", "clamp.default")
NEUTRAL_FOR_CODES = NEUTRAL | Operators("mul.Tensor", "sigmoid.default", "leaky_relu.default")
"""Operators that take over the layout of what they read."""
IMAGES = 4
"""Dimensions of the values that have layouts."""

SINK, SOURCE = 0, 1
PRECISION = 10**8
"""Unit of the network's integers, as a part of the sum of all costs; INFINITE is beyond every sum."""
INFINITE = 10**9


@dataclass(frozen=True)
class LeftInFloat:
    """Operators that stay in float, by name, and the predicted milliseconds of a sample with and without them."""

    nodes: frozenset[str]
    integer_ms: float
    ms: float


@dataclass(frozen=True, eq=False)
class _Prices:
    """The costs of operators and values in nanoseconds, for one sample or for the batch that the graph fixes."""

    placer: Placer
    costs: Mapping[str, Costs]
    samples: int
    steps: Mapping[fx.Node, str]

    @classmethod
    def of(cls, placer: Placer, costs: Mapping[str, Costs]) -> _Prices:
        samples = example_batch(placer.graph) // batch_of(placer.graph, 1)
        return cls(placer, costs, samples, dict(_steps(placer.nodes)))

    def kernel(self, node: fx.Node, *, integer: bool) -> float:
        """Return the cost of an operator; what is fused into another costs nothing."""
        if not integer and node in self.steps:
            return self._cost(self.steps[node], node, integer=False)
        if integer and self.placer.factor(node) is not None:
            return 0.0
        if origin := self.placer.absorbed.get(node):
            return 0.0 if integer or origin.target in WEIGHTED else self._cost("relu.default", node, integer=False)
        return self._cost(self._kind(node), node, integer=integer)

    def quantizer(self, kind: str, value: fx.Node) -> float:
        return self.costs[kind].integer.of(Work(self._elements(value)))

    def quantize(self, value: fx.Node) -> float:
        """Return the cost of quantizing a float.

        onnxruntime moves a quantizer that follows a max pool to before it: the pool then reads codes in the layout of
        floats, for which its kernel is slow.
        """
        total = self.quantizer("quantize", value)
        if value.target is aten.max_pool2d.default:
            total += self._cost("max pool of planes", value, integer=True)
        return total

    def layout(self, value: fx.Node, *, integer: bool) -> float:
        """Return the cost of bringing an image into another layout."""
        if len(shape_of(value)) != IMAGES:
            return 0.0
        return self._form("layout", integer=integer).of(Work(self._elements(value)))

    def _cost(self, kind: str, node: fx.Node, *, integer: bool) -> float:
        if kind not in self.costs:
            return 0.0
        return self._form(kind, integer=integer).of(self._work(node))

    def _form(self, kind: str, *, integer: bool) -> Cost:
        return self.costs[kind].integer if integer else self.costs[kind].float

    def _kind(self, node: fx.Node) -> str:
        if node.target in CONVOLUTIONS:
            bound = bind(node)
            return kind_of_convolution(shape_of(bound["weight"]), bound["groups"])
        return "linear" if node.target is aten.linear.default else name_of(node.target)

    def _work(self, node: fx.Node) -> Work:
        if node.target not in CONVOLUTIONS and node.target is not aten.linear.default:
            return Work(max(map(self._elements, (node, *node.all_input_nodes))))
        bound = bind(node)
        weight = shape_of(bound["weight"])
        places = self._elements(node) / weight[0]
        return Work.of_product((1, weight[0], places), weight, bound.get("groups", 1))

    def _elements(self, value: fx.Node) -> float:
        return math.prod(shape_of(value)) / self.samples


def _steps(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    """Yield the steps of operators that are one in float: the last with the row of its cost, the others with no row."""
    for node in nodes:
        for kind, match in _COMPOSED.items():
            if steps := [step for step in match(node) if step is not None]:
                yield node, kind
                yield from ((step, FREE) for step in steps)


def _silu(node: fx.Node) -> tuple[fx.Node | None, ...]:
    """Return the sigmoid of x * sigmoid(x)."""
    gate = _step(node, aten.mul.Tensor, aten.sigmoid.default)
    return (gate,) if gate is not None and gate.args[0] in node.args else ()


def _hard_sigmoid(node: fx.Node) -> tuple[fx.Node | None, ...]:
    """Return sum and product of clamp(slope * x + offset)."""
    total = _step(node, aten.clamp.default, aten.add.Tensor)
    scaled = None if total is None else _step(total, aten.add.Tensor, aten.mul.Tensor)
    numbers = all(step is not None and is_constant(step.args[1]) for step in (total, scaled))
    return (total, scaled) if numbers else ()


def _step(node: fx.Node, target: object, before: object) -> fx.Node | None:
    """Return the operator `before` that makes an operand of `target` and has no other reader."""
    found = (x for x in node.all_input_nodes if x.target is before and len(x.users) == 1)
    return next(found, None) if node.target is target else None


_COMPOSED = {"silu": _silu, "hard sigmoid": _hard_sigmoid}
"""By row: what finds the earlier steps of an operator from its last one."""
FREE = "part of another operator"
"""Stands for a row of the table that costs nothing: there is none of that name."""


def faster_in_float(
    placer: Placer, costs: Mapping[str, Costs], asked: frozenset[str] = frozenset()
) -> LeftInFloat | None:
    """Return the operators to leave in float, None where integers are as fast, or nearly so.

    At least one layer stays quantized.

    placer: the placement that quantizes all that can be.
    costs:  by ATen name or kind of convolution (calibrators.grid.x86_costs).
    asked:  names of operators that stay quantized in any case.
    """
    prices = _Prices.of(placer, costs)
    floats = _Cut(prices, asked).floats() if costs else frozenset()
    if not floats:
        return None
    if not any(node.name not in floats for node in placer.weighted):
        floats -= _cheapest_layer(prices)
    before, after = predicted(placer, costs), predicted(placer.without(floats), costs)
    if after > before * (1 - GAIN) or before - after < LEAST_SAVING:
        return None
    return LeftInFloat(floats, before / 1e6, after / 1e6)


def predicted(placer: Placer, costs: Mapping[str, Costs]) -> float:
    """Return the predicted nanoseconds of one sample on one thread, of everything that placement can change."""
    prices = _Prices.of(placer, costs)
    total, laid_out = 0.0, dict[fx.Node, bool]()
    for node in placer.nodes:
        integer = _is_integer(placer, node)
        if node.op == "call_function":
            total += prices.kernel(node, integer=integer)
        laid_out[node] = len(shape_of(node)) == IMAGES and (
            node.target in DEMANDING
            or (
                node.target in (NEUTRAL_FOR_CODES if integer else NEUTRAL)
                and any(map(laid_out.get, node.all_input_nodes))
            )
        )
        if node in placer.absorbed or not _is_carried(placer, node):
            total += _of_value(prices, node, laid_out=laid_out[node])
    return total


def _of_value(prices: _Prices, value: fx.Node, *, laid_out: bool) -> float:
    """Return the cost of the quantizers and changes of layout between a value and its readers."""
    placer = prices.placer
    has_codes, written = placer.is_quantized[value], placer.writes_codes(value)
    reads = {user: has_codes and placer.reads_codes(user, value) for user in value.users}
    total = prices.quantize(value) if has_codes and not written else 0.0
    total += prices.quantizer("dequantize", value) if has_codes and not all(reads.values()) else 0.0
    for integer in (False, True):
        neutral = NEUTRAL_FOR_CODES if integer else NEUTRAL
        readers = [user for user, codes in reads.items() if codes == integer]
        demanding = any(_demands(user, value, integer=integer) for user in readers)
        plain = any(user.target not in DEMANDING | neutral for user in value.users)
        same_side = laid_out and written == integer
        if (same_side and (plain or len(readers) < len(reads))) or (demanding and not same_side):
            total += prices.layout(value, integer=integer)
    return total


def _demands(user: fx.Node, value: fx.Node, *, integer: bool) -> bool:
    """Return whether a reader needs the value in its layout; float convolutions read few channels as they are."""
    return user.target in DEMANDING and (integer or len(shape_of(value)) != IMAGES or shape_of(value)[1] >= LANES)


def _is_integer(placer: Placer, node: fx.Node) -> bool:
    if node in placer.absorbed:
        return _is_integer(placer, placer.absorbed[node])
    return placer.is_weighted(node) or (node.op == "call_function" and placer.runs_on_integers(node))


def _is_carried(placer: Placer, node: fx.Node) -> bool:
    """Return whether a clip that is part of the same kernel is the only reader."""
    return len(node.users) == 1 and placer.absorbed.get(next(iter(node.users))) is node


def _cheapest_layer(prices: _Prices) -> frozenset[str]:
    """Return the layer for which integers cost the least compared with float, with the clip in its kernel."""

    def extra(node: fx.Node) -> float:
        around = prices.quantizer("quantize", bind(node)["input"]) + prices.quantizer("dequantize", node)
        return around + prices.kernel(node, integer=True) - prices.kernel(node, integer=False)

    placer = prices.placer
    best = min((node for node in placer.nodes if node in placer.weighted), key=extra)
    return frozenset({best.name, *(clip.name for clip, origin in placer.absorbed.items() if origin is best)})


@dataclass(eq=False)
class _Cut:
    """The network whose minimum cut divides kernels into integer ones (with the source) and float ones."""

    prices: _Prices
    asked: frozenset[str]
    edges: list[tuple[int, int, float]] = field(default_factory=list)
    place: dict[fx.Node, int] = field(default_factory=dict)
    count: int = 2

    def __post_init__(self) -> None:
        placer = self.prices.placer
        self.place[placer.graph.graph.output_node()] = SOURCE  # which reads those values as codes that are given so
        for node in placer.nodes:
            if not _is_integer(placer, node):
                self.place[node] = SINK
            elif node in placer.absorbed:
                self.place[node] = self.place[placer.absorbed[node]]
            else:
                self.place[node] = SOURCE if node.name in self.asked else self._new()
            if self.place[node] > SOURCE:
                self._edge(SOURCE, self.place[node], self.prices.kernel(node, integer=False))
                self._edge(self.place[node], SINK, self.prices.kernel(node, integer=True))
        for node in placer.nodes:
            if node in placer.absorbed or not _is_carried(placer, node):
                self._value(node)

    def _new(self) -> int:
        self.count += 1
        return self.count - 1

    def _edge(self, start: int, end: int, cost: float) -> None:
        self.edges.append((start, end, cost))

    def _value(self, value: fx.Node) -> None:
        """Add what it costs if the kernel that writes a value and one that reads it are on different sides."""
        placer = self.prices.placer
        if not placer.is_quantized[value]:
            return
        quantize = self.prices.quantize(value) + self.prices.layout(value, integer=True)
        dequantize = self.prices.quantizer("dequantize", value) + self.prices.layout(value, integer=True)
        writer = self.place[value] if placer.writes_codes(value) else SINK
        codes, floats = self._new(), self._new()
        self._edge(writer, floats, dequantize)
        self._edge(codes, writer, quantize)
        for user in value.users:
            if not placer.reads_codes(user, value):
                self._edge(floats, SINK, math.inf)
                continue
            self._edge(floats, self.place[user], math.inf)
            needs_codes = not placer.is_weighted(user) and value.op == "call_function"
            self._edge(self.place[user], writer if needs_codes else codes, math.inf)

    def floats(self) -> frozenset[str]:
        """Return the names of the operators on the float side; of equal cuts the one with the fewest."""
        from scipy.sparse import csr_array  # imported only where there is a choice
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        total = sum(cost for *_, cost in self.edges if cost < math.inf) or 1.0
        capacity: dict[tuple[int, int], int] = {}
        for start, end, cost in self._between_sides():
            units = INFINITE if cost == math.inf else round(cost / total * PRECISION)
            capacity[start, end] = min(capacity.get((start, end), 0) + units, INFINITE)
        rows, columns = np.array([*capacity], np.int32).reshape(-1, 2).T  # none where no operator has a choice
        network = csr_array((np.array([*capacity.values()], np.int32), (rows, columns)), (self.count, self.count))
        flow = maximum_flow(network, SOURCE, SINK).flow
        left = csr_array((network - flow).T)  # what can still flow, reversed
        left.data = np.maximum(left.data, 0)
        left.eliminate_zeros()
        reached = set(breadth_first_order(left, SINK, return_predecessors=False).tolist())
        return frozenset(node.name for node, place in self.place.items() if place > SOURCE and place in reached)

    def _between_sides(self) -> Iterator[tuple[int, int, float]]:
        return (
            (start, end, cost) for start, end, cost in self.edges if start != end and end != SOURCE and start != SINK
        )
