"""Canonical forms: rewrite every operator into the equal form for which integer runtimes have kernels.

Pooling and resizing
- mean over space -> adaptive average pooling to 1x1 (and a flatten where the dimensions are dropped)
- mean and adaptive average pooling of a sequence -> the same of an image of height 1
- mean over a volume -> the same of an image that has all but its last axis in its height
- adaptive average pooling to a divisor of the size -> average pooling
- average pooling of a sequence -> the same of an image of height 1
- average pooling with ceil_mode or divisor_override -> padding, plain average pooling, a factor per position
- adaptive max pooling to 1 -> amax, to a divisor of the size -> max pooling
- max pooling with unused indices -> max pooling; maxima and minima along an axis -> amax, amin
- resizing to a multiple of the size -> resizing by that factor

Layers
- convolution or linear without bias -> with a bias of zeros, which every runtime fuses and corrections need
- matmul with a constant matrix -> linear
- linear on [..., features] -> linear on a matrix, between two reshapes
- batch norm that could not be folded -> depthwise 1x1 convolution
- transposed convolution -> convolution with stride**2 times the channels, and moves (calibrators.graph.transposed)
- scaled dot product attention -> matmul, mask, softmax, matmul

Elementwise: calibrators.graph.elementwise

Moves
- split, chunk, unbind, select -> slices (and a squeeze where the dimension is dropped)
- roll -> concatenation of two slices
- operand expanded to a shape to which the operator broadcasts it anyway -> the operand

Must not know: targets, scales, ONNX.
"""

from __future__ import annotations

import itertools
import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import (
    bind,
    copy_graph,
    infer_shapes,
    is_constant,
    is_free,
    layer_name,
    overloads,
    replace_args,
    shape_of,
)
from calibrators.graph.batch_norm import EXPECTED, read_batch_norm
from calibrators.graph.elementwise import ELEMENTWISE
from calibrators.graph.operators import TRANSPOSED
from calibrators.graph.rewrite import (
    Call,
    Rule,
    apply_rules,
    call_before,
    constant_before,
    constant_of,
    merge_equal_calls,
    meta_of_part,
    replace_by,
    replace_call,
)
from calibrators.graph.sizes import reshape_sizes
from calibrators.graph.transposed import transposed_convolution

__all__ = ["clip_bounds", "to_integer_forms"]

aten = torch.ops.aten


def to_integer_forms(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of the graph, which shares its tensors, with every operator of the list above in canonical form."""
    graph = copy_graph(graph)
    infer_shapes(graph)
    apply_rules(graph, RULES)
    merge_equal_calls(graph)
    graph.recompile()
    infer_shapes(graph)
    return graph


def clip_bounds(node: fx.Node) -> tuple[float, float] | None:
    """Return the bounds of a ReLU or of a clamp by numbers; None for anything else."""
    if node.target is aten.relu.default:
        return 0.0, math.inf
    if node.target is aten.clamp.default:
        bound = bind(node)
        lo, hi = bound["min"], bound["max"]
        if isinstance(lo, fx.Node) or isinstance(hi, fx.Node):
            return None
        return -math.inf if lo is None else float(lo), math.inf if hi is None else float(hi)
    return None


# Pooling and resizing ------------------------------------------------------------------------------------------------


def _spatial_mean(node: fx.Node) -> None:
    x, axes, keepdim, dtype = bind(node).values()
    rank = len(shape_of(x))
    over = sorted(axis % rank for axis in axes) if axes and dtype is None else []
    if rank < 3 or over != [*range(2, rank)] or (rank > 4 and _has_free(x, rank - 2)):
        return
    pool = (aten.adaptive_avg_pool2d.default, (x if rank == 4 else ..., [1, 1]))
    if rank == 3:
        as_image: list[Call] = [(aten.unsqueeze.default, (x, 2))]
        pixels: list[Call] = [(aten.squeeze.dim, (..., 2))]
    else:
        as_image = [(aten.flatten.using_ints, (x, 2, rank - 2))] * (rank > 4)
        pixels = [(aten.unsqueeze.default, (..., 2))] * (rank - 4)
    replace_call(node, *as_image, pool, *(pixels if keepdim else [(aten.flatten.using_ints, (..., 1))]))


def _adaptive_pool(node: fx.Node) -> None:
    x, sizes = bind(node).values()
    if list(sizes) == list(shape_of(x)[-2:]) and not _has_free(x, 2):
        replace_by(node, x)
    elif len(shape_of(x)) == 3:  # an image without channels: the first dimension counts samples
        pool = (aten.adaptive_avg_pool2d.default, (..., sizes))
        replace_call(node, (aten.unsqueeze.default, (x, 1)), pool, (aten.squeeze.dim, (..., 1)))
    elif len(shape_of(x)) == 4 and (kernel := _whole_windows(x, sizes)):
        replace_call(node, (aten.avg_pool2d.default, (x, kernel, kernel)))


def _whole_windows(x: fx.Node, sizes: Sequence[int]) -> list[int] | None:
    """Return the kernel that makes an adaptive pool a plain one; None for unequal windows, free sizes, one pixel."""
    before = shape_of(x)[-len(sizes) :]
    if _has_free(x, len(sizes)) or {*sizes} == {1} or any(old % new for old, new in zip(before, sizes, strict=True)):
        return None
    return [old // new for old, new in zip(before, sizes, strict=True)]


def _pool_of_volume(node: fx.Node) -> None:
    x, sizes = bind(node).values()
    if {*sizes} == {1}:
        replace_call(node, (aten.mean.dim, (x, [-3, -2, -1], True)))
    elif kernel := _whole_windows(x, sizes):
        replace_call(node, (aten.avg_pool3d.default, (x, kernel, kernel)))


def _has_free(x: fx.Node, space: int) -> bool:
    """Return whether one of the last axes of a value has a free size."""
    return any(is_free(x, axis) for axis in range(-space, 0))


def _pool_of_sequence(node: fx.Node) -> None:
    x, sizes = bind(node).values()
    if list(sizes) == list(shape_of(x)[-1:]) and not _has_free(x, 1):
        replace_by(node, x)
    elif len(shape_of(x)) == 3:
        kernel = _whole_windows(x, sizes)
        pool = (aten.adaptive_avg_pool2d.default, (..., [1, *sizes]))
        plain = (aten.avg_pool2d.default, (..., [1, *(kernel or ())], [1, *(kernel or ())]))
        replace_call(node, (aten.unsqueeze.default, (x, 2)), plain if kernel else pool, (aten.squeeze.dim, (..., 2)))


def _average_pool(node: fx.Node) -> None:
    """Rewrite an average pool as a plain one over two dimensions; ceiling and divisor become padding and a factor."""
    bound = bind(node)
    x, shape, after = bound["self"], shape_of(bound["self"]), shape_of(node)
    dims = 1 if node.target is aten.avg_pool1d.default else 2
    include, divisor = bound["count_include_pad"], bound.get("divisor_override")
    if len(shape) != dims + 2 or (dims == 2 and not bound["ceil_mode"] and divisor is None):
        return

    def pair(values: Any, missing: int) -> list[int]:
        return [missing] * (2 - dims) + list(values) * (dims // len(values))

    kernel, padding = pair(bound["kernel_size"], 1), pair(bound["padding"], 0)
    stride = pair(bound["stride"] or bound["kernel_size"], 1)
    sizes, made = pair(shape[2:], 1), pair(after[2:], 1)
    along = list(zip(sizes, made, kernel, stride, padding, strict=True))
    if any(is_free(x, axis) for axis in range(2, dims + 2)) and (bound["ceil_mode"] or divisor is not None):
        return
    calls: list[Call] = [(aten.unsqueeze.default, (x, 2))] if dims == 1 else []
    source = ... if calls else x
    if divisor is None and all((size + 2 * p - k) // s + 1 == out for size, out, k, s, p in along):
        calls.append((aten.avg_pool2d.default, (source, kernel, stride, padding, False, include)))
    else:
        sides = ((p, max(0, (out - 1) * s + k - size - p)) for size, out, k, s, p in reversed(along))
        widths = list(itertools.chain.from_iterable(sides))
        ones = torch.ones(1, 1, *sizes, dtype=torch.float64)
        plain = aten.avg_pool2d.default(aten.constant_pad_nd.default(ones, widths, 0), kernel, stride)
        factor = aten.avg_pool2d.default(ones, kernel, stride, padding, bound["ceil_mode"], include, divisor) / plain
        calls += [
            (aten.constant_pad_nd.default, (source, widths, 0)),
            (aten.avg_pool2d.default, (..., kernel, stride)),
            (aten.mul.Tensor, (..., constant_before(node, f"{node.name}_factor", factor.float()))),
        ]
    replace_call(node, *calls, *([(aten.squeeze.dim, (..., 2))] if dims == 1 else []))


def _max_pool(node: fx.Node) -> None:
    """Drop the indices of the maxima where nothing reads them; adaptive pools become plain ones or maxima."""
    x, sizes = node.all_input_nodes[0], list(node.args[1])  # type: ignore[arg-type]
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return
    call: Call = (aten.max_pool2d.default, node.args)
    if node.target in ADAPTIVE_MAXIMA:
        call = (aten.amax.default, (x, list(range(-len(sizes), 0)), True))
        if {*sizes} != {1}:
            kernel = _whole_windows(x, sizes)
            if kernel is None or len(shape_of(x)) != len(sizes) + 2:
                return
            call = (ADAPTIVE_MAXIMA[node.target], (x, kernel, kernel))
    for user in list(node.users):
        replace_call(user, call)


def _extreme(node: fx.Node) -> None:
    """Drop the indices of maxima and minima along one axis where nothing reads them."""
    x, dim, keepdim = bind(node).values()
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return
    target = aten.amax.default if node.target is aten.max.dim else aten.amin.default
    for user in list(node.users):
        replace_call(user, (target, (x, [dim], keepdim)))


def _resize(node: fx.Node) -> None:
    x = node.all_input_nodes[0]
    before, after = shape_of(x)[2:], shape_of(node)[2:]
    if any(is_free(each, axis) for each in (x, node) for axis in range(2, len(shape_of(x)))):
        return
    if bind(node)["output_size"] is None or any(new % old for old, new in zip(before, after, strict=True)):
        return
    factors = [float(new // old) for old, new in zip(before, after, strict=True)]
    replace_args(node, output_size=None, scale_factors=factors)


# Layers --------------------------------------------------------------------------------------------------------------


def _bias(node: fx.Node) -> None:
    bound = bind(node)
    if bound["bias"] is None and is_constant(bound["weight"]):
        weight = constant_of(bound["weight"])
        zeros = torch.zeros(len(weight), dtype=weight.dtype)
        replace_args(node, bias=constant_before(node, f"{bound['weight'].target}_bias", zeros))


def _matmul(node: fx.Node) -> None:
    x, matrix = node.args[:2]
    if is_constant(matrix) and not is_constant(x) and len(shape_of(matrix)) == 2:
        node.args = (x, constant_before(node, f"{matrix.target}_transposed", constant_of(matrix).T))
        node.target = aten.linear.default
        _bias(node)
        _linear(node)


def _linear(node: fx.Node) -> None:
    """Reshape the input to a matrix, as runtimes fuse a bias only then; layers with one input share its reshape."""
    x, shape = bind(node)["input"], shape_of(bind(node)["input"])
    sizes = _sizes(node)
    if len(shape) < 3 or sizes is None:
        return
    flat_shape = [-1, shape[-1]]
    reshapes = (user for user in x.users if user.target is aten.reshape.default and user < node)
    flat = next((user for user in reshapes if list(user.args[1]) == flat_shape), None)
    if flat is None:
        flat = call_before(x.next, aten.reshape.default, x, flat_shape)
        flat.meta = meta_of_part(x)
    replace_call(node, (aten.linear.default, (flat, *node.args[1:])), (aten.reshape.default, (..., sizes)))


def _sizes(node: fx.Node) -> list[Any] | None:
    """Return the shape of a value as arguments of a reshape before it; None if several free sizes are not known."""
    free = _free(node)
    if len(free) < 2:
        missing = free[0] if free else 0
        return [-1 if axis == missing else size for axis, size in enumerate(shape_of(node))]
    value = node.meta.get("val")
    return reshape_sizes(node, tuple(value.shape)) if isinstance(value, Tensor) else None


def _batch_norm(node: fx.Node) -> None:
    x = bind(node)["input"]
    target = {3: aten.conv1d.default, 4: aten.conv2d.default}.get(len(shape_of(x)))
    norm = read_batch_norm(node, lambda parameter: constant_of(parameter).double())
    if target is None or is_constant(x) or norm is None:
        return
    space, dtype, path = len(shape_of(x)) - 2, x.meta["tensor_meta"].dtype, layer_name(node)
    weight = constant_before(node, f"{path}.weight", norm.slope.to(dtype).reshape(-1, *[1] * (space + 1)))
    bias = constant_before(node, f"{path}.bias", norm.offset.to(dtype))
    node.meta[EXPECTED] = norm.expected.to(dtype)
    replace_call(node, (target, (x, weight, bias, [1] * space, [0] * space, [1] * space, len(norm.slope))))


def _attention(node: fx.Node) -> None:
    bound = bind(node)
    query, key, value = bound["query"], bound["key"], bound["value"]
    masked = bound["attn_mask"] is not None or bound["is_causal"]
    mask = _additive_mask(bound) if masked else None
    if (masked and mask is None) or bound["dropout_p"] or bound.get("enable_gqa"):
        return
    scale = bound["scale"] if bound["scale"] is not None else shape_of(query)[-1] ** -0.5
    added: list[Call] = []
    if mask is not None:
        added = [(aten.add.Tensor, (..., constant_before(node, "attention_mask", mask)))]
    transposed = call_before(node, aten.transpose.int, key, -2, -1)
    scaled = call_before(node, aten.mul.Tensor, query, scale)
    scores = (aten.matmul.default, (scaled, transposed))
    replace_call(node, scores, *added, (aten.softmax.int, (..., -1)), (aten.matmul.default, (..., value)))


def _additive_mask(bound: dict[str, Any]) -> Tensor | None:
    """Return the mask as zeros and minus infinities; None for a computed mask, or one that hides a whole row."""
    given = bound["attn_mask"]
    if not (given is None or is_constant(given)) or is_free(bound["query"], -2) or is_free(bound["key"], -2):
        return None
    if given is None:
        allowed = torch.ones(shape_of(bound["query"])[-2], shape_of(bound["key"])[-2], dtype=torch.bool).tril()
    else:
        allowed = constant_of(given)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf) if allowed.dtype == torch.bool else allowed
    return mask if bool(mask.isfinite().any(-1).all()) else None


# Moves ---------------------------------------------------------------------------------------------------------------


def _slice(x: fx.Node, dim: int, span: tuple[int, int], *, squeezed: bool) -> Sequence[Call]:
    part = (aten.slice.Tensor, (x, dim, *span))
    return (part, (aten.squeeze.dim, (..., dim))) if squeezed else (part,)


def _split(node: fx.Node) -> None:
    bound, parts = bind(node), node.meta.get("tensor_meta")
    x = bound["self"]
    dim = bound["dim"] % len(shape_of(x))
    if is_free(x, dim) or not isinstance(parts, (list, tuple)):
        return
    squeezed = node.target is aten.unbind.int
    ends = list(itertools.accumulate(1 if squeezed else part.shape[dim] for part in parts))
    spans = list(itertools.pairwise([0, *ends]))
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], int):
            replace_call(user, *_slice(x, dim, spans[user.args[1]], squeezed=squeezed))


def _select(node: fx.Node) -> None:
    bound = bind(node)
    x, index = bound["self"], bound["index"]
    if isinstance(index, int) and x.meta["tensor_meta"].dtype == torch.float32:
        span = (index, index + 1 if index != -1 else sys.maxsize)
        replace_call(node, *_slice(x, bound["dim"] % len(shape_of(x)), span, squeezed=True))


def _roll(node: fx.Node) -> None:
    """Rewrite a roll: swap the two parts of each rolled dimension."""
    x, shifts, dims = bind(node).values()
    if not dims or any(is_free(x, dim) for dim in dims) or not all(isinstance(shift, int) for shift in shifts):
        return
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % shape_of(x)[dim]
        tail = call_before(node, aten.slice.Tensor, x, dim, cut, sys.maxsize)
        head = call_before(node, aten.slice.Tensor, x, dim, 0, cut)
        x = call_before(node, aten.cat.default, [tail, head] if cut else [tail], dim)
    x.meta = dict(node.meta)
    replace_by(node, x)


def _expand(node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    for user in list(node.users):
        others = [x for x in user.args[:2] if isinstance(x, fx.Node) and x is not node]
        same = len(others) == 1 and shape_of(others[0]) == shape_of(user) and _free(others[0]) == _free(user)
        if user.target in BROADCASTING and same:
            user.replace_input_with(node, source)


def _free(node: fx.Node) -> list[int]:
    return [axis for axis in range(len(shape_of(node))) if is_free(node, axis)]


BROADCASTING = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)

ADAPTIVE_MAXIMA: dict[Any, Any] = {
    aten.adaptive_max_pool1d.default: aten.max_pool1d.default,
    aten.adaptive_max_pool2d.default: aten.max_pool2d.default,
    aten.adaptive_max_pool3d.default: aten.max_pool3d.default,
}
"""By adaptive max pool, the plain one."""

RULES: dict[Any, tuple[Rule, ...]] = {
    aten.mean.dim: (_spatial_mean,),
    aten.adaptive_avg_pool2d.default: (_adaptive_pool,),
    aten.adaptive_avg_pool1d.default: (_pool_of_sequence,),
    aten.adaptive_avg_pool3d.default: (_pool_of_volume,),
    **dict.fromkeys((aten.avg_pool1d.default, aten.avg_pool2d.default), (_average_pool,)),
    **dict.fromkeys((*ADAPTIVE_MAXIMA, aten.max_pool2d_with_indices.default), (_max_pool,)),
    **dict.fromkeys((aten.max.dim, aten.min.dim), (_extreme,)),
    **dict.fromkeys((aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec), (_resize,)),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), (_bias,)),
    aten.linear.default: (_bias, _linear),
    aten.matmul.default: (_matmul,),
    aten.batch_norm.default: (_batch_norm,),
    **dict.fromkeys(overloads(TRANSPOSED), (transposed_convolution,)),
    aten.scaled_dot_product_attention.default: (_attention,),
    **ELEMENTWISE,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), (_split,)),
    **dict.fromkeys((aten.tensor_split.sections, aten.tensor_split.indices, aten.unbind.int), (_split,)),
    aten.select.int: (_select,),
    aten.roll.default: (_roll,),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default), (_expand,)),
}
