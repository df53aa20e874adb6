"""Fold batch norms, branches and scales away: affine regions become single convolutions and linear layers.

The algebra is folding.affine_map's, in float64; what is folded is folding.select's choice. Every fold is checked when
it is made: region and replacement run in float64 on random inputs of odd and even sizes, border included, and a fold
that differs is dropped and listed. What the folded norms said of outputs is kept in their nodes (bn_statistics).

Must not know: model families, module or parameter names, quantization, ONNX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.errors import ModelError
from calibrators.graph.aten import bind, convolution, infer_shapes, module_path, shape_of, where
from calibrators.graph.batch_norm import EXPECTED, Expected
from calibrators.graph.operators import SUMS, TRANSPOSED
from calibrators.graph.rewrite import Call, constant_before, merge_equal_calls, origin, replace_call
from calibrators.record import Refused
from exporter.folding.affine_map import AffineMap
from exporter.folding.bn_statistics import expected_output
from exporter.folding.clean_graph import fill_borders, fold_constants, remove_identities, with_own_attributes
from exporter.folding.interpret import BATCH_NORM, WEIGHTED, Analysis, interpret, is_computed, own_macs
from exporter.folding.move_maps import move_maps
from exporter.folding.select import Candidate, Rejected, Selection, refusals, regroup_sums, select

__all__ = ["FoldReport", "FoldedNorm", "FoldedRegion", "fold"]

aten = torch.ops.aten

MAX_REL_ERROR = 1e-9
"""A right fold differs by float64 rounding, 1e-12 at worst with near-dead channels; a wrong one by 1e-3 or more."""
CHANNEL_FLOOR = 1e-6
"""A channel's error is relative to its own largest value, but to no less than this share of the tensor's: branches that
cancel leave a channel with rounding noise only."""
MAX_ROUNDS = 4
"""Rounds of moving maps and of reordering sums: one settles all that do not depend on another of their kind."""


@dataclass(frozen=True)
class FoldedNorm:
    """A batch norm that was folded in, and what it multiplies its branch by: |gamma| / sqrt(variance + eps).

    A branch whose gain stands far above the others' dictates the range of the folded weight; that of an identity branch
    does so where the variance it saw in training was small.

    where:          its module.
    gain:           of the median channel; largest_gain: of the largest.
    least_variance: smallest running variance of a channel.
    source: Ding et al. 2021, "RepVGG", section 3.3 (the factors of the folded kernels).
    """

    where: str
    gain: float
    largest_gain: float
    least_variance: float


@dataclass(frozen=True)
class FoldedRegion:
    """One fold: its module, the number of operators and the one they became, its error and its MACs per sample."""

    where: str
    nodes: int
    kernel: str
    rel_error: float
    macs_before: int
    macs_after: int
    norms: tuple[FoldedNorm, ...]


@dataclass(frozen=True)
class FoldReport:
    """All folds and refusals of a graph; `regions` counts the folds, MACs are those of the whole graph per sample."""

    regions: int
    max_rel_error: float
    refused: tuple[Refused, ...]
    folded: tuple[FoldedRegion, ...]
    macs_before: int | None = None
    macs_after: int | None = None


@dataclass(frozen=True)
class _Replacement:
    """The operator that stands for a region: target(padded x, weight, bias, *arguments), all tensors in float64."""

    target: Any
    weight: Tensor
    bias: Tensor
    arguments: tuple[Any, ...]
    padding: tuple[int, ...]
    kernel: str
    rel_error: float = math.inf
    expected: Expected | None = None


@torch.no_grad()
def fold(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a folded copy of `graph`, whose meta["fold"] is the FoldReport.

    graph: as in calibrators.graph.aten, in eval mode; it is not touched.
    raises: ModelError if the graph writes into its own values.
    """
    graph = with_own_attributes(graph, shared=True)
    _require_functional(graph)
    infer_shapes(graph)
    macs_before = _macs(graph)
    remove_identities(graph)
    merge_equal_calls(graph)
    constants = fold_constants(graph)
    fill_borders(graph, constants)
    analysis = interpret(graph, constants)
    for _ in range(MAX_ROUNDS):
        if not move_maps(analysis):
            break
        infer_shapes(graph)
        remove_identities(graph)
        analysis = interpret(graph, constants)
    for _ in range(MAX_ROUNDS):
        if not regroup_sums(analysis):
            break
        analysis = interpret(graph, constants)
    selection = select(analysis, lambda candidate: _checked(analysis, candidate))
    refused = tuple(Refused(where(node), why) for node, why in refusals(analysis, selection).items())
    regions = _emit(analysis, selection)
    graph.graph.eliminate_dead_code()
    folded = with_own_attributes(graph)
    infer_shapes(folded)
    worst = max((region.rel_error for region in regions), default=0.0)
    folded.meta["fold"] = FoldReport(len(regions), worst, refused, regions, macs_before, _macs(folded))
    return folded


def _require_functional(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise ModelError(f"{where(node)} writes into its input ({node.target}); capture the model with capture()")


def _macs(graph: fx.GraphModule) -> int:
    return sum(own_macs(node) for node in graph.graph.nodes if node.op == "call_function")


# One region ----------------------------------------------------------------------------------------------------------


def _checked(analysis: Analysis, candidate: Candidate) -> _Replacement:
    """Return the replacement of a region, checked against it.

    raises: Rejected if its weights do not fit the model's dtype or it computes something else.
    """
    made = _transposed(analysis, candidate) if candidate.ends_transposed else _operator(candidate.map)
    dtype = candidate.exit.meta["tensor_meta"].dtype
    if not all(bool(value.to(dtype).isfinite().all()) for value in (made.weight, made.bias)):
        raise Rejected("its weights or statistics are not finite, or their product overflows the model's dtype")
    rel_error = max(_errors(analysis, candidate, made))
    if not rel_error <= MAX_REL_ERROR:
        raise Rejected(f"the check failed: the folded operator has a relative error of {rel_error:.1e} in float64")
    expected = expected_output(analysis, candidate, _check_sizes(candidate)[0])
    return replace(made, rel_error=rel_error, expected=expected)


def _operator(f: AffineMap) -> _Replacement:
    """Return the linear layer or convolution that is the map; unequal or negative padding becomes an explicit pad."""
    weight, bias = f.kernel(), f.bias_or_zero()
    if not f.stride:
        return _Replacement(aten.linear.default, weight, bias, (), (), f"linear {f.inputs}->{f.outputs}")
    shape = f.geometry()
    is_plain = shape.low == shape.high and min(shape.low) >= 0
    widths = [width for low, high in zip(shape.low[::-1], shape.high[::-1], strict=True) for width in (low, high)]
    own = list(shape.low) if is_plain else [0] * len(f.stride)
    return _Replacement(
        target=convolution(len(f.stride)),
        weight=weight,
        bias=bias,
        arguments=(list(f.stride), own, list(shape.dilation), f.groups),
        padding=() if is_plain else tuple(widths),
        kernel=_describe(f"conv{len(f.stride)}d", shape.kernel, f.stride, shape.dilation, f.groups),
    )


def _describe(name: str, kernel: Any, stride: Any, dilation: Any, groups: int) -> str:
    """Return `conv2d 3x3 s1 g1`: kernel, stride (s1x2 if unequal), dilation if there is one, groups."""

    def short(values: Any) -> str:
        return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))

    dilated = f" d{short(dilation)}" if max(dilation) > 1 else ""
    return f"{name} {'x'.join(map(str, kernel))} s{short(stride)}{dilated} g{groups}"


def _transposed(analysis: Analysis, candidate: Candidate) -> _Replacement:
    """Return the transposed convolution at the root with its output channels scaled and shifted."""
    node, f = candidate.root.node, candidate.map
    bound = bind(node)
    weight, groups, spatial = analysis.exact(bound["weight"]), bound["groups"], candidate.root.spatial
    (diagonal,) = f.matrices({}).values()
    rows = diagonal.reshape(groups, 1, -1, *[1] * spatial)
    scaled = weight.reshape(groups, -1, *weight.shape[1:]) * rows
    bias = f.bias_or_zero()
    if bound["bias"] is not None:
        bias = bias + diagonal.flatten() * analysis.exact(bound["bias"])
    names = ("stride", "padding", "output_padding", "groups", "dilation")
    return _Replacement(
        target=node.target,
        weight=scaled.reshape(weight.shape),
        bias=bias,
        arguments=tuple(bound[name] for name in names),
        padding=(),
        kernel=_describe(f"conv_transpose{spatial}d", weight.shape[2:], bound["stride"], bound["dilation"], groups),
    )


def _errors(analysis: Analysis, candidate: Candidate, made: _Replacement) -> list[float]:
    """Return the largest relative difference per channel, for each of the random inputs."""
    source, nodes = candidate.region
    errors = []
    generator = torch.Generator().manual_seed(0)
    for sizes in _check_sizes(candidate):
        x = torch.randn(sizes, generator=generator, dtype=torch.float64)
        before = analysis.run(nodes, {source: x})[candidate.exit]
        padded = aten.constant_pad_nd(x, list(made.padding)) if made.padding else x
        after = made.target(padded, made.weight, made.bias, *made.arguments)
        if before.shape != after.shape:
            return [math.inf]
        channels = 1 if candidate.root.spatial else before.ndim - 1
        errors.append(_largest_error(before.movedim(channels, 0).flatten(1), after.movedim(channels, 0).flatten(1)))
    return errors


def _check_sizes(candidate: Candidate) -> list[list[int]]:
    """Return shapes for random inputs: an interior beside the border, odd and even, both parities if strides round."""
    shape, stride = shape_of(candidate.region[0]), candidate.map.stride
    if not stride:
        return [[1, *[3] * (len(shape) - 2), shape[-1]]]
    geometry = candidate.map.geometry()
    axes = zip(geometry.kernel, geometry.dilation, stride, strict=True)
    odd = [2 * (d * (k - 1) + s) + 3 for k, d, s in axes]
    rounds = range(2 if max(stride) > 1 else 1)
    return [[1, shape[1], *(size + (axis + turn) % 2 for axis, size in enumerate(odd))] for turn in rounds]


def _largest_error(before: Tensor, after: Tensor) -> float:
    """Return the largest |difference| per row over the row's largest value, with the floor of CHANNEL_FLOOR."""
    largest = before.abs().amax(1)
    floor = CHANNEL_FLOOR * largest.amax()
    difference = (before - after).abs().amax(1)
    return float((difference / torch.maximum(largest, floor).clamp(min=torch.finfo(torch.float64).tiny)).amax())


# Emission ------------------------------------------------------------------------------------------------------------


def _emit(analysis: Analysis, selection: Selection) -> tuple[FoldedRegion, ...]:
    """Put every replacement at the place of its region's exit."""
    regions = []
    newest: dict[fx.Node, fx.Node] = {}
    for candidate, made in selection.accepted:
        (source, nodes), exit_ = candidate.region, candidate.exit
        after = analysis.merged_macs(exit_, candidate.map)
        region = FoldedRegion(
            where=_set_origin(nodes),
            nodes=len(nodes),
            kernel=made.kernel,
            rel_error=made.rel_error,
            macs_before=sum(map(own_macs, nodes)),
            macs_after=own_macs(candidate.root.node) if candidate.ends_transposed else after,
            norms=tuple(_norm(analysis, node) for node in nodes if node.target is BATCH_NORM),
        )
        newest[exit_] = _insert(exit_, newest.get(source, source), made)
        for node in reversed(nodes[:-1]):
            analysis.graph.graph.erase_node(node)
        regions.append(region)
    return tuple(regions)


def _norm(analysis: Analysis, node: fx.Node) -> FoldedNorm:
    norm = analysis.batch_norm(node)
    assert norm is not None
    gain = norm.slope.abs()
    return FoldedNorm(module_path(node), float(gain.median()), float(gain.max()), float(norm.variance.min()))


def _insert(exit_: fx.Node, source: fx.Node, made: _Replacement) -> fx.Node:
    """Replace the exit of a region by its replacement, which reads `source`."""
    dtype = exit_.meta["tensor_meta"].dtype
    exit_.meta.pop(EXPECTED, None)
    if made.expected is not None:
        exit_.meta[EXPECTED] = made.expected.to(dtype)
    weight, bias = (
        constant_before(exit_, f"{module_path(exit_)}.{name}".lstrip("."), value.to(dtype))
        for name, value in (("weight", made.weight), ("bias", made.bias))
    )
    pad: list[Call] = [(aten.constant_pad_nd.default, (source, list(made.padding)))] if made.padding else []
    return replace_call(exit_, *pad, (made.target, (... if pad else source, weight, bias, *made.arguments)))


def _set_origin(nodes: tuple[fx.Node, ...]) -> str:
    """Set the module of the exit to that of the only weighted operator, else to the common one; return its path."""
    weighted = [node for node in nodes if node.target in WEIGHTED or node.target in TRANSPOSED]
    branches = any(node.target in SUMS and sum(map(is_computed, node.all_input_nodes)) > 1 for node in nodes)
    exit_ = nodes[-1]
    if len(weighted) == 1 and not branches:
        exit_.meta |= origin(weighted[0])
        return module_path(exit_)
    stacks = [list(node.meta["nn_module_stack"].items()) for node in nodes if node.meta.get("nn_module_stack")]
    shared = []
    for level in zip(*stacks, strict=False):
        if any(item != level[0] for item in level):
            break
        shared.append(level[0])
    exit_.meta["nn_module_stack"] = dict(shared)
    return module_path(exit_)
