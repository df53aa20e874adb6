"""Abstract interpretation of the graph: which values are tap maps of which earlier values.

Every value is a root of its own; a linear operator maps the tap maps of its inputs to those of its output, a sum keeps
the roots that all its operands share, anything else starts afresh. Each operator is a rule below; what a rule cannot
carry on it records with the reason.

Must not know: model families, module names, what is emitted, quantization.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, constant, is_constant, macs, overloads, per_axis, shape_of
from calibrators.graph.operators import CONVOLUTIONS, PADS, POOLS, PRODUCTS, QUOTIENTS, SUMS, facts
from exporter.folding.affine_map import (
    AffineMap,
    NotAffine,
    add,
    average,
    correlate,
    crop,
    identity,
    pad,
    scale,
    shift,
    stack,
)
from exporter.folding.simplify import Constants, evaluate, exact_value

__all__ = [
    "BATCH_NORM",
    "SCALES",
    "WEIGHTED",
    "Analysis",
    "Linear",
    "Root",
    "interpret",
    "own_macs",
    "terms_of",
]

aten = torch.ops.aten

LINEAR = aten.linear.default
BATCH_NORM = aten.batch_norm.default
WEIGHTED = CONVOLUTIONS | POOLS | {"linear.default"}
SCALES = PRODUCTS | QUOTIENTS

MERGERS = SUMS | SCALES | PADS | {"neg.default", "cat.default"}
"""Operators that vanish when the weighted operator before them takes them in."""

MAX_ROOTS = 12
"""Roots kept per value, nearest first: a branch has one or two weighted operators and a handful of elementwise ones."""
MAX_OFFSETS = 4096
"""Kernel cells beyond which a chain is not followed: larger than any kernel (61x61) that could be worth emitting."""


class Root(NamedTuple):
    """A value and how its axes are read: channels on axis 1 and `spatial` axes after it, or (0) channels last."""

    node: fx.Node
    spatial: int


@dataclass(frozen=True)
class Linear:
    """One value as a tap map of a root; `apart`: fewest MACs per sample that leave its last step an operator."""

    map: AffineMap
    apart: int


@dataclass
class Analysis:
    """The result of interpretation.

    values:  tap maps of every value by root, itself included.
    blocked: by node, what could not be carried through it: (root, reason).
    refused: by node, why a linear-looking operator is none, whatever its input.
    """

    graph: fx.GraphModule
    constants: Constants
    position: dict[fx.Node, int]
    values: dict[fx.Node, dict[Root, Linear]] = field(default_factory=dict)
    blocked: dict[fx.Node, list[tuple[Root, str]]] = field(default_factory=dict)
    refused: dict[fx.Node, str] = field(default_factory=dict)

    def weight(self, node: fx.Node) -> Tensor:
        """Value of a constant, float64 if it was evaluated here, else in the model's dtype."""
        return self.constants[node] if node in self.constants else constant(self.graph, node)

    def exact(self, node: fx.Node) -> Tensor:
        """Float64 value of a constant."""
        return exact_value(self.graph, node, self.constants)

    def run(self, nodes: Iterable[fx.Node], values: dict[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        """The given float64 values and those of `nodes`, in order, that follow from them."""
        known = dict(values)
        for node in nodes:
            known |= {each: self.exact(each) for each in node.all_input_nodes if is_constant(each)}
            known[node] = evaluate(node, known)
        return known

    def merged_macs(self, node: fx.Node, f: AffineMap) -> int:
        """MACs per sample of `node` computed by one operator from the root of f."""
        shape = shape_of(node)
        cells = math.prod(shape[1:]) // f.outputs
        return cells * (f.macs_per_cell() if f.stride else f.outputs * f.inputs)

    def fewest_macs(self, node: fx.Node, linear: Linear) -> int:
        """MACs per sample of `node`, merged or not, whichever is less."""
        return min(linear.apart, self.merged_macs(node, linear.map))

    def inherited(self, node: fx.Node) -> dict[Root, Linear]:
        """Tap maps of a value from earlier values."""
        return {root: linear for root, linear in self.values.get(node, {}).items() if root.node is not node}


Step = Callable[[AffineMap, int], AffineMap | None]
"""One operator on a tap map, given the number of spatial axes of the root; None where the axes do not fit."""


def interpret(graph: fx.GraphModule, constants: Constants) -> Analysis:
    """Tap maps of all values of the graph; shapes must have been inferred."""
    nodes = list(graph.graph.nodes)
    analysis = Analysis(graph, constants, {node: index for index, node in enumerate(nodes)})
    for node in nodes:
        if node.op in ("get_attr", "output"):
            continue
        rule = RULES.get(node.target) if node.op == "call_function" else None
        inherited = rule(analysis, node) if rule is not None and _one_dtype(node) else {}
        nearest = sorted(inherited, key=lambda root: analysis.position[root.node])[-MAX_ROOTS:]
        analysis.values[node] = {root: inherited[root] for root in nearest} | _as_root(node)
    return analysis


def own_macs(node: fx.Node) -> int:
    """Return the multiply-accumulates of one operator per sample (calibrators.graph.operators.macs)."""
    return macs(node) // next(iter(shape_of(node)), 1)


def terms_of(node: fx.Node) -> list[tuple[float, Any]]:
    """A sum or negation as [(coefficient, operand)]."""
    if node.target is aten.neg.default:
        return [(-1.0, node.args[0])]
    bound = bind(node)
    factor = float(bound.get("alpha") or 1)
    first, second = bound["self"], bound["other"]
    if node.target in (aten.rsub.Tensor, aten.rsub.Scalar):
        return [(-factor, first), (1.0, second)]
    is_add = node.target in (aten.add.Tensor, aten.add.Scalar)
    return [(1.0, first), (factor if is_add else -factor, second)]


def is_computed(operand: object) -> bool:
    """Whether an operand depends on the model's input."""
    return isinstance(operand, fx.Node) and not is_constant(operand)


def _one_dtype(node: fx.Node) -> bool:
    kinds = {_dtype(each) for each in (node, *node.all_input_nodes)}
    return len(kinds) == 1 and all(kind is not None and kind.is_floating_point for kind in kinds)


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("tensor_meta"), "dtype", None)


def _as_root(node: fx.Node) -> dict[Root, Linear]:
    shape, dtype = shape_of(node), _dtype(node)
    if len(shape) < 2 or dtype is None or not dtype.is_floating_point:
        return {}
    own = {Root(node, 0): Linear(identity(shape[-1], 0), 0)}
    if 3 <= len(shape) <= 5:
        own[Root(node, len(shape) - 2)] = Linear(identity(shape[1], len(shape) - 2), 0)
    return own


def _follow(analysis: Analysis, node: fx.Node, source: Any, step: Step) -> dict[Root, Linear]:
    """The tap maps of `source` after one more operator."""
    found: dict[Root, Linear] = {}
    for root, linear in analysis.values.get(source, {}).items():
        try:
            f = step(linear.map, root.spatial)
        except NotAffine as reason:
            analysis.blocked.setdefault(node, []).append((root, str(reason)))
            continue
        if f is not None and len(f.offsets) <= MAX_OFFSETS:
            found[root] = Linear(f, analysis.fewest_macs(source, linear) + own_macs(node))
    return found


def _join(
    analysis: Analysis,
    node: fx.Node,
    operands: Sequence[Any],
    combine: Callable[[list[AffineMap], int], AffineMap | None],
) -> dict[Root, Linear]:
    """The tap maps, from roots that all operands share, of one operator on several of them."""
    found: dict[Root, Linear] = {}
    each = [analysis.values.get(operand, {}) for operand in operands]
    for root in each[0]:
        if not all(root in values for values in each):
            continue
        try:
            f = combine([values[root].map for values in each], root.spatial)
        except NotAffine as reason:
            analysis.blocked.setdefault(node, []).append((root, str(reason)))
            continue
        if f is not None and len(f.offsets) <= MAX_OFFSETS:
            apart = sum(
                analysis.fewest_macs(operand, values[root]) for operand, values in zip(operands, each, strict=True)
            )
            found[root] = Linear(f, apart + own_macs(node))
    return found


def _convolution(analysis: Analysis, node: fx.Node) -> dict[Root, Linear]:
    """Zero padding, then correlation, then the bias."""
    spatial, bound = facts(node.target).spatial, bind(node)
    if not is_constant(bound["weight"]) or len(shape_of(bound["input"])) != spatial + 2:
        return {}
    weight = analysis.weight(bound["weight"])
    stride, dilation = per_axis(bound["stride"], spatial), per_axis(bound["dilation"], spatial)
    low, high = _padding(bound["padding"], weight.shape[2:], dilation)

    def step(f: AffineMap, axes: int) -> AffineMap | None:
        if axes != spatial:
            return None
        return _with_bias(analysis, correlate(pad(f, low, high), weight, stride, dilation, bound["groups"]), bound)

    return _follow(analysis, node, bound["input"], step)


def _padding(given: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and after per axis; 'same' puts the odd one after, as torch does."""
    if given == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    both = (0,) * len(kernel) if given == "valid" else per_axis(given, len(kernel))
    return both, both


def _with_bias(analysis: Analysis, f: AffineMap, bound: dict[str, Any]) -> AffineMap | None:
    if bound["bias"] is None:
        return f
    return shift(f, analysis.exact(bound["bias"])) if is_constant(bound["bias"]) else None


def _linear(analysis: Analysis, node: fx.Node) -> dict[Root, Linear]:
    """A product with a constant matrix on the last axis."""
    bound = bind(node)
    if not is_constant(bound["weight"]) or len(shape_of(bound["weight"])) != 2:
        return {}
    weight = analysis.weight(bound["weight"])

    def step(f: AffineMap, axes: int) -> AffineMap | None:
        return None if axes else _with_bias(analysis, correlate(f, weight, (), (), 1), bound)

    return _follow(analysis, node, bound["input"], step)


def _batch_norm(analysis: Analysis, node: fx.Node) -> dict[Root, Linear]:
    """The affine map t * x + (beta - mean * t) with t = gamma / sqrt(variance + eps)."""
    bound = bind(node)
    names = ("weight", "bias", "running_mean", "running_var")
    if bound["training"] or bound["running_mean"] is None or bound["running_var"] is None:
        analysis.refused[node] = "batch norm without running statistics: it normalises by the batch it sees"
        return {}
    if not all(bound[name] is None or is_constant(bound[name]) for name in names):
        return {}
    gamma, beta, mean, variance = (None if bound[name] is None else analysis.exact(bound[name]) for name in names)
    t = (variance + bound["eps"]).rsqrt() * (1.0 if gamma is None else gamma)
    offset = (0.0 if beta is None else beta) - mean * t
    rank = len(shape_of(node))
    return _follow(
        analysis, node, bound["input"], lambda f, axes: shift(scale(f, t), offset) if axes == rank - 2 else None
    )


def _sum(analysis: Analysis, node: fx.Node) -> dict[Root, Linear]:
    """Coefficients times operands; a constant operand must be one number or one per channel."""
    terms = terms_of(node)
    computed = [(factor, operand) for factor, operand in terms if is_computed(operand)]
    if not computed or any(shape_of(operand) != shape_of(node) for _, operand in computed):
        return {}
    fixed = [(factor, operand) for factor, operand in terms if not is_computed(operand)]

    def combine(maps: list[AffineMap], axes: int) -> AffineMap | None:
        scaled = [
            f if factor == 1 else scale(f, torch.tensor(factor, dtype=torch.float64))
            for f, (factor, _) in zip(maps, computed, strict=True)
        ]
        total = scaled[0] if len(scaled) == 1 else add(*scaled)
        for factor, operand in fixed:
            vector = _per_channel(analysis, operand, node, axes)
            if vector is None:
                return None
            total = shift(total, factor * vector)
        return total

    return _join(analysis, node, [operand for _, operand in computed], combine)


def _product(analysis: Analysis, node: fx.Node) -> dict[Root, Linear]:
    """A product with, or a quotient by, one number or one per channel."""
    first, second = node.args[:2]
    is_quotient = node.target in QUOTIENTS
    if is_computed(second) and not is_quotient:
        first, second = second, first
    if not is_computed(first) or is_computed(second) or shape_of(first) != shape_of(node):  # type: ignore[arg-type]
        return {}

    def step(f: AffineMap, axes: int) -> AffineMap | None:
        vector = _per_channel(analysis, second, node, axes)
        if vector is None:
            return None
        return scale(f, 1.0 / vector if is_quotient else vector)

    return _follow(analysis, node, first, step)


def _per_channel(analysis: Analysis, operand: Any, node: fx.Node, spatial: int) -> Tensor | None:
    """Float64 [] or [channels] of a constant that varies along the channel axis of `node` only; None otherwise."""
    if not isinstance(operand, fx.Node):
        return torch.tensor(float(operand), dtype=torch.float64)
    value, rank = analysis.exact(operand), len(shape_of(node))
    if value.numel() == 1:
        return value.reshape(())
    axis = 1 if spatial else rank - 1
    shape = [1] * (rank - value.ndim) + list(value.shape)
    only_there = len(shape) == rank and all(size == 1 for at, size in enumerate(shape) if at != axis)
    return value.flatten() if only_there else None


def _average_pool(analysis: Analysis, node: fx.Node) -> dict[Root, Linear]:
    """A depthwise convolution with equal weights, where every window has the same divisor."""
    spatial, bound = facts(node.target).spatial, bind(node)
    kernel, padding = per_axis(bound["kernel_size"], spatial), per_axis(bound["padding"], spatial)
    stride = per_axis(bound["stride"], spatial) if bound["stride"] else kernel
    if bound["ceil_mode"]:
        analysis.refused[node] = "average pooling with ceil_mode: the last windows have another divisor"
    elif any(padding) and not bound["count_include_pad"] and not bound.get("divisor_override"):
        analysis.refused[node] = (
            "average pooling with count_include_pad=False: windows on the border have another divisor"
        )
    if node in analysis.refused or len(shape_of(bound["self"])) != spatial + 2:
        return {}
    divisor = bound.get("divisor_override") or math.prod(kernel)

    def step(f: AffineMap, axes: int) -> AffineMap | None:
        return average(pad(f, padding, padding), kernel, stride, divisor) if axes == spatial else None

    return _follow(analysis, node, bound["self"], step)


def _constant_pad(analysis: Analysis, node: fx.Node) -> dict[Root, Linear]:
    """Padding of spatial axes with one number."""
    bound = bind(node)
    if bound.get("mode", "constant") != "constant":
        return {}
    widths = list(bound["pad"])

    def step(f: AffineMap, axes: int) -> AffineMap | None:
        if not axes or len(widths) > 2 * axes or not all(isinstance(width, int) for width in widths):
            return None
        every = widths + [0] * (2 * axes - len(widths))
        return pad(f, tuple(every[-2::-2]), tuple(every[::-2]), float(bound["value"] or 0.0))

    return _follow(analysis, node, bound["self"], step)


def _slice(analysis: Analysis, node: fx.Node) -> dict[Root, Linear]:
    """Every step-th cell of one spatial axis, from a fixed start to the end or a fixed distance before it."""
    bound = bind(node)
    rank = len(shape_of(node))
    axis, start, step_size = bound["dim"] % rank - 2, bound["start"] or 0, bound["step"]
    end = sys.maxsize if bound["end"] is None else bound["end"]
    fixed = all(isinstance(value, int) for value in (start, end, step_size))
    if not fixed or axis < 0 or start < 0 or 0 <= end < sys.maxsize:
        return {}

    def along(value: int, others: int, axes: int) -> tuple[int, ...]:
        return tuple(value if at == axis else others for at in range(axes))

    def step(f: AffineMap, axes: int) -> AffineMap | None:
        if axes != rank - 2:
            return None
        return crop(f, along(start, 0, axes), along(max(-end, 0), 0, axes), along(step_size, 1, axes))

    return _follow(analysis, node, bound["self"], step)


def _concatenation(analysis: Analysis, node: fx.Node) -> dict[Root, Linear]:
    """Values side by side on the channel axis."""
    bound, rank = bind(node), len(shape_of(node))
    axis = bound["dim"] % rank
    if not all(is_computed(operand) for operand in bound["tensors"]):
        return {}

    def combine(maps: list[AffineMap], axes: int) -> AffineMap | None:
        return stack(maps) if axis == (1 if axes else rank - 1) else None

    return _join(analysis, node, bound["tensors"], combine)


RULES: dict[Any, Callable[[Analysis, fx.Node], dict[Root, Linear]]] = {
    **dict.fromkeys(overloads(CONVOLUTIONS), _convolution),
    **dict.fromkeys(overloads(POOLS), _average_pool),
    **dict.fromkeys(overloads(SUMS), _sum),
    **dict.fromkeys(overloads(SCALES), _product),
    **dict.fromkeys(overloads(PADS), _constant_pad),
    aten.neg.default: _sum,
    LINEAR: _linear,
    BATCH_NORM: _batch_norm,
    aten.slice.Tensor: _slice,
    aten.cat.default: _concatenation,
}
