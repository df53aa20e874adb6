"""Abstract interpretation of the graph: find which values are affine maps of which earlier values.

Every value is a root of its own. An operator that is affine extends the maps of its operands, from the roots that they
share, to its result; after any other operator only the result itself is a root. Each affine operator is a rule below;
where its algebra refuses (NotAffine), the reason is recorded.

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

from calibrators.graph.aten import bind, constant, convolution, is_constant, macs, overloads, per_axis, shape_of
from calibrators.graph.batch_norm import BatchNorm, read_batch_norm, uses_batch_statistics
from calibrators.graph.operators import (
    CONVOLUTIONS,
    PADS,
    POOLS,
    PRODUCTS,
    QUOTIENTS,
    REVERSED,
    SUMS,
    TRANSPOSED,
    facts,
)
from calibrators.graph.walk import call
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
from exporter.folding.clean_graph import Constants, exact_value, varying_axes

__all__ = [
    "BATCH_NORM",
    "MERGERS",
    "RULES",
    "SCALES",
    "WEIGHTED",
    "Analysis",
    "Linear",
    "Root",
    "absorbers",
    "has_constant_parameters",
    "interpret",
    "is_computed",
    "own_macs",
    "terms_of",
    "times",
]

aten = torch.ops.aten

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
    """One value as an affine map of a root; `apart`: fewest MACs per sample that leave its last step an operator."""

    map: AffineMap
    apart: int


@dataclass
class Analysis:
    """The result of interpretation.

    values:  affine maps of every value by root, itself included.
    blocked: by node, what could not be carried through it: (root, reason).
    refused: by node, why an operator that looks affine is not, whatever its input.
    """

    graph: fx.GraphModule
    constants: Constants
    position: dict[fx.Node, int]
    values: dict[fx.Node, dict[Root, Linear]] = field(default_factory=dict)
    blocked: dict[fx.Node, list[tuple[Root, str]]] = field(default_factory=dict)
    refused: dict[fx.Node, str] = field(default_factory=dict)

    def weight(self, node: fx.Node) -> Tensor:
        """Return the value of a constant: float64 if it was evaluated here, else in the model's dtype."""
        return self.constants[node] if node in self.constants else constant(self.graph, node)

    def exact(self, node: fx.Node) -> Tensor:
        """Return the float64 value of a constant."""
        return exact_value(self.graph, node, self.constants)

    def batch_norm(self, node: fx.Node) -> BatchNorm | None:
        """Return what a batch norm computes; None if that depends on its input."""
        return read_batch_norm(node, self.exact)

    def run(self, nodes: Iterable[fx.Node], values: dict[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        """Return the given float64 values and those of `nodes`, in order, that follow from them."""
        known = dict(values)
        for node in nodes:
            known |= {each: self.exact(each) for each in node.all_input_nodes if is_constant(each)}
            known[node] = call(node, known)
        return known

    def merged_macs(self, node: fx.Node, f: AffineMap) -> int:
        """Return the MACs per sample of `node` computed by one operator from the root of f."""
        return math.prod(shape_of(node)[1:]) // f.outputs * f.macs_per_cell()

    def fewest_macs(self, node: fx.Node, linear: Linear) -> int:
        """Return the MACs per sample of `node`, merged or not, whichever is less."""
        return min(linear.apart, self.merged_macs(node, linear.map))

    def inherited(self, node: fx.Node) -> dict[Root, Linear]:
        """Return the affine maps of a value from earlier values."""
        return {root: linear for root, linear in self.values.get(node, {}).items() if root.node is not node}


@dataclass(frozen=True)
class Step:
    """One affine operator.

    extend:  takes the number of spatial axes of a root and the maps of the operands from it, and returns the map of the
             result; None where the axes do not fit.
    spatial: spatial axes that a root must have; None where any number will do.
    """

    operands: Sequence[fx.Node]
    extend: Callable[..., AffineMap | None]
    spatial: int | None = None


Rule = Callable[[Analysis, fx.Node], Step | None]
"""A function that returns the step of an operator, None where the operator is not affine."""


def interpret(graph: fx.GraphModule, constants: Constants) -> Analysis:
    """Return the affine maps of all values of the graph; shapes must have been inferred."""
    nodes = list(graph.graph.nodes)
    analysis = Analysis(graph, constants, {node: index for index, node in enumerate(nodes)})
    for node in nodes:
        if node.op in ("get_attr", "output"):
            continue
        rule = RULES.get(node.target) if node.op == "call_function" else None
        step = rule(analysis, node) if rule is not None and _has_one_dtype(node) else None
        found = _extend(analysis, node, step) if step is not None else {}
        nearest = sorted(found, key=lambda root: analysis.position[root.node])[-MAX_ROOTS:]
        analysis.values[node] = {root: found[root] for root in nearest} | _as_root(node)
    return analysis


def absorbers(analysis: Analysis) -> set[fx.Node]:
    """Return the weighted operators, and those that fold into one of them: per-channel operators and sums after it."""
    found: set[fx.Node] = set()
    for node in analysis.graph.graph.nodes:
        merges = node.target is BATCH_NORM or node.target in MERGERS
        takes_in = merges and any(each in found for each in node.all_input_nodes) and analysis.inherited(node)
        if node.target in WEIGHTED or node.target in TRANSPOSED or takes_in:
            found.add(node)
    return found


def own_macs(node: fx.Node) -> int:
    """Return the multiply-accumulates of one operator per sample."""
    return macs(node) // next(iter(shape_of(node)), 1)


def terms_of(node: fx.Node) -> list[tuple[float, Any]]:
    """Return a sum or negation as [(coefficient, operand)]."""
    if node.target is aten.neg.default:
        return [(-1.0, node.args[0])]
    bound = bind(node)
    factor = float(bound.get("alpha") or 1)
    first, second = bound["self"], bound["other"]
    if node.target in REVERSED:
        return [(-factor, first), (1.0, second)]
    is_add = node.target in (aten.add.Tensor, aten.add.Scalar)
    return [(1.0, first), (factor if is_add else -factor, second)]


def is_computed(operand: object) -> bool:
    """Return whether an operand depends on the model's input."""
    return isinstance(operand, fx.Node) and not is_constant(operand)


def times(f: AffineMap, factor: float) -> AffineMap:
    """Return the map factor * f."""
    return f if factor == 1 else scale(f, torch.tensor(factor, dtype=torch.float64))


def _has_one_dtype(node: fx.Node) -> bool:
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


def _extend(analysis: Analysis, node: fx.Node, step: Step) -> dict[Root, Linear]:
    """Return the affine maps of `node` from the roots that all its operands share."""
    found: dict[Root, Linear] = {}
    each = [analysis.values.get(operand, {}) for operand in step.operands]
    for root in each[0]:
        if step.spatial not in (None, root.spatial) or not all(root in values for values in each):
            continue
        linears = [values[root] for values in each]
        try:
            f = step.extend(root.spatial, *(linear.map for linear in linears))
        except NotAffine as reason:
            analysis.blocked.setdefault(node, []).append((root, str(reason)))
            continue
        if f is not None and len(f.offsets) <= MAX_OFFSETS:
            apart = sum(map(analysis.fewest_macs, step.operands, linears))
            found[root] = Linear(f, apart + own_macs(node))
    return found


# Rules ---------------------------------------------------------------------------------------------------------------


def _convolution(analysis: Analysis, node: fx.Node) -> Step | None:
    """Return the step of a convolution: zero padding, then correlation, then the bias."""
    spatial, bound = facts(node.target).spatial, bind(node)
    if not has_constant_parameters(bound) or len(shape_of(bound["input"])) != spatial + 2:
        return None
    weight, groups = analysis.weight(bound["weight"]), bound["groups"]
    stride, padding, dilation = (per_axis(bound[name], spatial) for name in ("stride", "padding", "dilation"))

    def extend(_: int, f: AffineMap) -> AffineMap:
        product = correlate(pad(f, padding, padding), weight, stride, dilation, groups)
        return _plus_bias(analysis, product, bound)

    return Step([bound["input"]], extend, spatial)


def _linear(analysis: Analysis, node: fx.Node) -> Step | None:
    """Return the step of a linear layer: the product with a constant matrix on the last axis, then the bias."""
    bound = bind(node)
    if not has_constant_parameters(bound) or len(shape_of(bound["weight"])) != 2:
        return None
    weight = analysis.weight(bound["weight"])
    return Step([bound["input"]], lambda _, f: _plus_bias(analysis, correlate(f, weight, (), (), 1), bound), 0)


def has_constant_parameters(bound: dict[str, Any]) -> bool:
    """Return whether weight and bias of a weighted operator are constants."""
    return is_constant(bound["weight"]) and (bound["bias"] is None or is_constant(bound["bias"]))


def _plus_bias(analysis: Analysis, f: AffineMap, bound: dict[str, Any]) -> AffineMap:
    return f if bound["bias"] is None else shift(f, analysis.exact(bound["bias"]))


def _batch_norm(analysis: Analysis, node: fx.Node) -> Step | None:
    if uses_batch_statistics(node):
        analysis.refused[node] = "batch norm without running statistics: it normalizes with those of the batch"
    norm = analysis.batch_norm(node)
    if norm is None:
        return None
    slope, offset = norm.slope, norm.offset
    return Step([bind(node)["input"]], lambda _, f: shift(scale(f, slope), offset), len(shape_of(node)) - 2)


def _average_pool(analysis: Analysis, node: fx.Node) -> Step | None:
    """Return the step of an average pool whose windows have one divisor: a depthwise convolution of equal weights."""
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
        return None
    divisor = bound.get("divisor_override") or math.prod(kernel)
    return Step([bound["self"]], lambda _, f: average(pad(f, padding, padding), kernel, stride, divisor), spatial)


def _sum(analysis: Analysis, node: fx.Node) -> Step | None:
    """Return the step of a sum: coefficients times operands; a constant must be one number or one per channel."""
    terms = terms_of(node)
    computed = [(factor, operand) for factor, operand in terms if is_computed(operand)]
    fixed = [(factor, operand) for factor, operand in terms if not is_computed(operand)]
    if not computed or any(shape_of(operand) != shape_of(node) for _, operand in computed):
        return None

    def extend(axes: int, *maps: AffineMap) -> AffineMap | None:
        scaled = [times(f, factor) for f, (factor, _) in zip(maps, computed, strict=True)]
        total = scaled[0] if len(scaled) == 1 else add(*scaled)
        for factor, operand in fixed:
            vector = _per_channel(analysis, operand, node, axes)
            if vector is None:
                return None
            total = shift(total, factor * vector)
        return total

    return Step([operand for _, operand in computed], extend)


def _product(analysis: Analysis, node: fx.Node) -> Step | None:
    """Return the step of a product with, or a quotient by, one number or one per channel."""
    first, second = node.args[:2]
    is_quotient = node.target in QUOTIENTS
    if is_computed(second) and not is_quotient:
        first, second = second, first
    if not isinstance(first, fx.Node) or is_constant(first) or is_computed(second):
        return None

    def extend(axes: int, f: AffineMap) -> AffineMap | None:
        vector = _per_channel(analysis, second, node, axes)
        return None if vector is None else scale(f, 1.0 / vector if is_quotient else vector)

    return Step([first], extend) if shape_of(first) == shape_of(node) else None


def _per_channel(analysis: Analysis, operand: Any, node: fx.Node, spatial: int) -> Tensor | None:
    """Return float64 [] or [channels] of a constant that varies along the channel axis of `node` only, else None."""
    if not isinstance(operand, fx.Node):
        return torch.tensor(float(operand), dtype=torch.float64)
    value, rank = analysis.exact(operand), len(shape_of(node))
    if value.numel() == 1:
        return value.reshape(())
    axis = 1 if spatial else rank - 1
    return value.flatten() if varying_axes(value.shape, rank) == [axis] and value.ndim <= rank else None


def _constant_pad(analysis: Analysis, node: fx.Node) -> Step | None:
    """Return the step that pads spatial axes with one number."""
    bound, axes = bind(node), len(shape_of(node)) - 2
    widths = list(bound["pad"])
    is_spatial = axes > 0 and len(widths) <= 2 * axes and all(isinstance(width, int) for width in widths)
    if bound.get("mode", "constant") != "constant" or not is_spatial:
        return None
    widths += [0] * (2 * axes - len(widths))
    low, high = tuple(widths[-2::-2]), tuple(widths[::-2])
    return Step([bound["self"]], lambda _, f: pad(f, low, high, float(bound["value"] or 0.0)), axes)


def _slice(analysis: Analysis, node: fx.Node) -> Step | None:
    """Return the step that slices one spatial axis, from a fixed start to the end or a fixed distance before it."""
    bound, axes = bind(node), len(shape_of(node)) - 2
    axis, start, step = bound["dim"] % (axes + 2) - 2, bound["start"] or 0, bound["step"]
    end = sys.maxsize if bound["end"] is None else bound["end"]
    fixed = all(isinstance(value, int) for value in (start, end, step))
    if not fixed or axis < 0 or start < 0 or 0 <= end < sys.maxsize:
        return None

    def along(value: int, others: int) -> tuple[int, ...]:
        return tuple(value if at == axis else others for at in range(axes))

    return Step([bound["self"]], lambda _, f: crop(f, along(start, 0), along(max(-end, 0), 0), along(step, 1)), axes)


def _concatenation(analysis: Analysis, node: fx.Node) -> Step | None:
    """Return the step that concatenates values on the channel axis."""
    bound, rank = bind(node), len(shape_of(node))
    spatial = {1: rank - 2, rank - 1: 0}.get(bound["dim"] % rank)
    if spatial is None or not all(is_computed(operand) for operand in bound["tensors"]):
        return None
    return Step(bound["tensors"], lambda _, *maps: stack(maps), spatial)


RULES: dict[Any, Rule] = {
    **{convolution(spatial): _convolution for spatial in (1, 2, 3)},
    **dict.fromkeys(overloads(POOLS), _average_pool),
    **dict.fromkeys(overloads(SUMS), _sum),
    **dict.fromkeys(overloads(SCALES), _product),
    **dict.fromkeys(overloads(PADS), _constant_pad),
    aten.neg.default: _sum,
    aten.linear.default: _linear,
    BATCH_NORM: _batch_norm,
    aten.slice.Tensor: _slice,
    aten.cat.default: _concatenation,
}
"""Convolutions padded by name do not occur: capture gives them numbers."""
