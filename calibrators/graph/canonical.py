"""Operator forms: rewrites into the equal form for which integer runtimes have kernels.

- SiLU            -> x * sigmoid(x)
- mean over space -> adaptive average pooling to 1x1 (and a flatten where the dimensions are dropped)
- adaptive average pooling to a divisor of the size -> average pooling
- average pooling of a sequence -> the same of an image of height 1
- average pooling with a ceiling or a divisor of its own -> padding, plain average pooling, a factor per position
- max pooling with indices that nobody reads -> max pooling
- ReLU6, hardtanh -> clamp
- convolution or linear without bias -> with a bias of zeros: the form that every runtime fuses, and corrections need
- matmul with a constant matrix -> linear
- linear on [..., features] -> linear on a matrix, between two reshapes
- scaled dot product attention -> matmul, mask, softmax, matmul
- roll -> concatenation of two slices
- split, chunk, unbind, select -> slices (and a squeeze where the dimension is dropped)
- batch norm that could not be folded -> depthwise 1x1 convolution
- transposed convolution whose kernel is its stride -> 1x1 convolution and pixel shuffle
- resizing to a size that is a multiple -> resizing by that factor
- operand expanded to the shape that the operator broadcasts it to anyway -> the operand
- scale * (x * gate) with a gate of one value per channel -> x * conv1x1(gate): layer scale after a squeeze-excite

Must not know: targets, scales, ONNX.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from calibrators.graph.aten import (
    add_constant,
    bind,
    constant,
    infer_shapes,
    is_constant,
    layer_name,
    replace_args,
    shape_of,
)
from calibrators.graph.batch_norm import EXPECTED, meta_of_part, of_batch_norm

__all__ = ["clip_bounds", "to_integer_forms"]

aten = torch.ops.aten


def to_integer_forms(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with every operator of the list above in its integer form."""
    graph = copy.deepcopy(graph)
    infer_shapes(graph)
    for node in list(graph.graph.nodes):
        for rewrite in _REWRITES.get(node.target, ()) if node.op == "call_function" else ():
            rewrite(graph.graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    infer_shapes(graph)
    return graph


def clip_bounds(node: fx.Node) -> tuple[float, float] | None:
    """Bounds of a ReLU or a clamp by numbers; None for anything else."""
    if node.target is aten.relu.default:
        return 0.0, math.inf
    if node.target is aten.clamp.default:
        bound = bind(node)
        lo, hi = bound["min"], bound["max"]
        if isinstance(lo, fx.Node) or isinstance(hi, fx.Node):
            return None
        return -math.inf if lo is None else float(lo), math.inf if hi is None else float(hi)
    return None


def _substitute(graph: fx.Graph, node: fx.Node, *calls: tuple[Any, tuple[Any, ...]]) -> None:
    """Replace `node` by a chain of calls; Ellipsis in the arguments stands for the previous call's result."""
    result: fx.Node | None = None
    with graph.inserting_before(node):
        for target, arguments in calls:
            result = graph.call_function(target, tuple(result if a is ... else a for a in arguments))
            result.meta = meta_of_part(node)
    assert result is not None
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _silu(graph: fx.Graph, node: fx.Node) -> None:
    x = node.args[0]
    _substitute(graph, node, (aten.sigmoid.default, (x,)), (aten.mul.Tensor, (x, ...)))


def _spatial_mean(graph: fx.Graph, node: fx.Node) -> None:
    bound = bind(node)
    x, rank = bound["self"], len(shape_of(bound["self"]))
    axes = bound["dim"]
    if rank != 4 or not axes or sorted(axis % rank for axis in axes) != [2, 3] or bound["dtype"] is not None:
        return
    pool = (aten.adaptive_avg_pool2d.default, (x, [1, 1]))
    _substitute(graph, node, pool, *([] if bound["keepdim"] else [(aten.flatten.using_ints, (..., 1))]))


def _adaptive_pool(graph: fx.Graph, node: fx.Node) -> None:
    x, sizes = bind(node).values()
    before = shape_of(x)[-2:]
    if len(shape_of(x)) == 3:  # without channels: samples are none
        pool = (aten.adaptive_avg_pool2d.default, (..., sizes))
        _substitute(graph, node, (aten.unsqueeze.default, (x, 1)), pool, (aten.squeeze.dim, (..., 1)))
        return
    if list(sizes) == [1, 1] or len(shape_of(x)) != 4 or any(old % new for old, new in zip(before, sizes, strict=True)):
        return
    kernel = [old // new for old, new in zip(before, sizes, strict=True)]
    if kernel == [1, 1]:
        node.replace_all_uses_with(x)
        graph.erase_node(node)
    else:
        _substitute(graph, node, (aten.avg_pool2d.default, (x, kernel, kernel)))


def _average_pool(graph: fx.Graph, node: fx.Node) -> None:
    """Plain averages over two dimensions: what ceilings and divisors make of them is padded and multiplied."""
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
    calls: list[tuple[Any, tuple[Any, ...]]] = [(aten.unsqueeze.default, (x, 2))] if dims == 1 else []
    source = ... if calls else x
    if divisor is None and all((size + 2 * p - k) // s + 1 == out for size, out, k, s, p in along):
        calls.append((aten.avg_pool2d.default, (source, kernel, stride, padding, False, include)))
    else:
        sides = ((p, max(0, (out - 1) * s + k - size - p)) for size, out, k, s, p in reversed(along))
        widths = list(itertools.chain.from_iterable(sides))
        ones = torch.ones(1, 1, *sizes, dtype=torch.float64)
        plain = aten.avg_pool2d.default(aten.constant_pad_nd.default(ones, widths, 0), kernel, stride)
        factor = aten.avg_pool2d.default(ones, kernel, stride, padding, bound["ceil_mode"], include, divisor) / plain
        assert graph.owning_module is not None
        name = add_constant(graph.owning_module, f"{node.name}_factor", factor.float())
        with graph.inserting_before(node):
            multiplier = graph.get_attr(name)
        calls += [
            (aten.constant_pad_nd.default, (source, widths, 0)),
            (aten.avg_pool2d.default, (..., kernel, stride)),
            (aten.mul.Tensor, (..., multiplier)),
        ]
    _substitute(graph, node, *calls, *([(aten.squeeze.dim, (..., 2))] if dims == 1 else []))


def _pool_of_sequence(graph: fx.Graph, node: fx.Node) -> None:
    x, sizes = bind(node).values()
    if list(sizes) == [1] and len(shape_of(x)) == 3:
        pool = (aten.adaptive_avg_pool2d.default, (..., [1, 1]))
        _substitute(graph, node, (aten.unsqueeze.default, (x, 2)), pool, (aten.squeeze.dim, (..., 2)))


def _plain_max(graph: fx.Graph, node: fx.Node) -> None:
    """Pooling that also returns where the maxima stood, when nobody asks where."""
    bound, rank = bind(node), len(shape_of(bind(node)["self"]))
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return
    call: tuple[Any, tuple[Any, ...]] = (aten.max_pool2d.default, node.args)
    if node.target is aten.adaptive_max_pool2d.default:
        if list(bound["output_size"]) != [1, 1]:
            return
        call = (aten.amax.default, (bound["self"], [rank - 2, rank - 1], True))
    for user in list(node.users):
        _substitute(graph, user, call)


def _hardtanh(graph: fx.Graph, node: fx.Node) -> None:
    bound = bind(node)
    lo, hi = bound.get("min_val", 0), bound.get("max_val", 6)
    _substitute(graph, node, (aten.clamp.default, (bound["self"], float(lo), float(hi))))


def _bias(graph: fx.Graph, node: fx.Node) -> None:
    bound = bind(node)
    owner = graph.owning_module
    if bound["bias"] is not None or not is_constant(bound["weight"]) or owner is None:
        return
    zeros = torch.zeros(len(constant(owner, bound["weight"])), dtype=constant(owner, bound["weight"]).dtype)
    name = add_constant(owner, f"{bound['weight'].target}_bias", zeros)
    with graph.inserting_before(node):
        replace_args(node, bias=graph.get_attr(name))


def _matmul(graph: fx.Graph, node: fx.Node) -> None:
    x, matrix = node.args[:2]
    owner = graph.owning_module
    if not is_constant(matrix) or is_constant(x) or len(shape_of(matrix)) != 2 or owner is None:
        return
    name = add_constant(owner, f"{matrix.target}_transposed", constant(owner, matrix).T)
    with graph.inserting_before(node):
        node.args = (x, graph.get_attr(name))
    node.target = aten.linear.default
    _bias(graph, node)
    _linear(graph, node)


def _linear(graph: fx.Graph, node: fx.Node) -> None:
    """Runtimes fuse a matrix product with its bias only for matrices; layers that share an input share the reshape."""
    x, shape = bind(node)["input"], shape_of(bind(node)["input"])
    if len(shape) < 3:
        return
    flat_shape = [-1, shape[-1]]
    reshapes = (user for user in x.users if user.target is aten.reshape.default and user < node)
    flat = next((user for user in reshapes if list(user.args[1]) == flat_shape), None)
    if flat is None:
        with graph.inserting_after(x):
            flat = graph.call_function(aten.reshape.default, (x, flat_shape))
        flat.meta = meta_of_part(x)
    product = (aten.linear.default, (flat, *node.args[1:]))
    _substitute(graph, node, product, (aten.reshape.default, (..., _sizes(node))))


def _sizes(node: fx.Node) -> list[int]:
    """Shape of a value, -1 at the dimension that the batch decides."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and any(not isinstance(size, int) for size in value.shape):
        return [size if isinstance(size, int) else -1 for size in value.shape]
    return [-1, *shape_of(node)[1:]]


def _attention(graph: fx.Graph, node: fx.Node) -> None:
    bound = bind(node)
    query, key, value = bound["query"], bound["key"], bound["value"]
    masked = bound["attn_mask"] is not None or bound["is_causal"]
    mask = _additive_mask(graph, bound) if masked else None
    if (masked and mask is None) or bound["dropout_p"] or bound.get("enable_gqa"):
        return
    scale = bound["scale"] if bound["scale"] is not None else shape_of(query)[-1] ** -0.5
    with graph.inserting_before(node):
        transposed = graph.call_function(aten.transpose.int, (key, -2, -1))
        scaled = graph.call_function(aten.mul.Tensor, (query, scale))
    transposed.meta, scaled.meta = dict(node.meta), dict(node.meta)
    scores: list[tuple[Any, tuple[Any, ...]]] = [(aten.matmul.default, (scaled, transposed))]
    if mask is not None:
        with graph.inserting_before(node):
            scores.append((aten.add.Tensor, (..., graph.get_attr(mask))))
    _substitute(graph, node, *scores, (aten.softmax.int, (..., -1)), (aten.matmul.default, (..., value)))


def _additive_mask(graph: fx.Graph, bound: dict[str, Any]) -> str | None:
    """Name of a constant of zeros and minus infinities; None for a computed mask, or a row that may see nothing."""
    given, owner = bound["attn_mask"], graph.owning_module
    if owner is None or (given is not None and not is_constant(given)) or _is_free(bound["query"], -2):
        return None
    if given is None:
        allowed = torch.ones(shape_of(bound["query"])[-2], shape_of(bound["key"])[-2], dtype=torch.bool).tril()
    else:
        allowed = constant(owner, given)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf) if allowed.dtype == torch.bool else allowed
    return add_constant(owner, "attention_mask", mask) if bool(mask.isfinite().any(-1).all()) else None


def _roll(graph: fx.Graph, node: fx.Node) -> None:
    """The two parts of each dimension change places."""
    x, shifts, dims = bind(node).values()
    if not dims or any(_is_free(x, dim) for dim in dims) or not all(isinstance(shift, int) for shift in shifts):
        return
    result = x
    with graph.inserting_before(node):
        for shift, dim in zip(shifts, dims, strict=True):
            cut = -shift % shape_of(x)[dim]
            tail = graph.call_function(aten.slice.Tensor, (result, dim, cut, sys.maxsize))
            head = graph.call_function(aten.slice.Tensor, (result, dim, 0, cut))
            result = graph.call_function(aten.cat.default, ([tail, head] if cut else [tail], dim))
            for made in (tail, head, result):
                made.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _is_free(x: fx.Node, dim: int) -> bool:
    """Whether the size of a dimension depends on the batch."""
    value = x.meta.get("val")
    return isinstance(value, torch.Tensor) and not isinstance(value.shape[dim], int)


def _slice(x: fx.Node, dim: int, span: tuple[int, int], squeezed: bool) -> tuple[tuple[Any, tuple[Any, ...]], ...]:
    part = (aten.slice.Tensor, (x, dim, *span))
    return (part, (aten.squeeze.dim, (..., dim))) if squeezed else (part,)


def _split(graph: fx.Graph, node: fx.Node) -> None:
    bound, parts = bind(node), node.meta.get("tensor_meta")
    x = bound["self"]
    dim = bound["dim"] % len(shape_of(x))
    if _is_free(x, dim) or not isinstance(parts, (list, tuple)):
        return
    squeezed = node.target is aten.unbind.int
    start, spans = 0, []
    for part in parts:
        end = start + (1 if squeezed else part.shape[dim])
        spans.append((start, end))
        start = end
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], int):
            _substitute(graph, user, *_slice(x, dim, spans[user.args[1]], squeezed))


def _select(graph: fx.Graph, node: fx.Node) -> None:
    bound = bind(node)
    x, index = bound["self"], bound["index"]
    if isinstance(index, int) and x.meta["tensor_meta"].dtype == torch.float32:
        span = (index, index + 1 if index != -1 else sys.maxsize)
        _substitute(graph, node, *_slice(x, bound["dim"] % len(shape_of(x)), span, True))


def _batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    bound, owner = bind(node), graph.owning_module
    x = bound["input"]
    target = {3: aten.conv1d.default, 4: aten.conv2d.default}.get(len(shape_of(x)))
    parameters = [bound[key] for key in ("weight", "bias", "running_mean", "running_var")]
    if target is None or owner is None or bound["training"] or not all(p is None or is_constant(p) for p in parameters):
        return
    if is_constant(x) or parameters[2] is None or parameters[3] is None:
        return
    gain, shift, mean, variance = (None if p is None else constant(owner, p).double() for p in parameters)
    assert mean is not None and variance is not None
    slope = (variance + bound["eps"]).rsqrt() * (1.0 if gain is None else gain)
    offset = (0.0 if shift is None else shift) - mean * slope
    space = len(shape_of(x)) - 2
    path = layer_name(node)
    dtype = x.meta["tensor_meta"].dtype
    weight = add_constant(owner, f"{path}.weight", slope.to(dtype).reshape(-1, *[1] * (space + 1)))
    bias = add_constant(owner, f"{path}.bias", offset.to(dtype))
    node.meta[EXPECTED] = of_batch_norm(gain, shift, variance, bound["eps"]).to(dtype)
    with graph.inserting_before(node):
        made = graph.get_attr(weight), graph.get_attr(bias)
    ones, zeros = [1] * space, [0] * space
    _substitute(graph, node, (target, (x, *made, ones, zeros, ones, len(mean))))


def _transposed_convolution(graph: fx.Graph, node: fx.Node) -> None:
    bound, owner = bind(node), graph.owning_module
    if (
        owner is None
        or not is_constant(bound["weight"])
        or (bound["bias"] is not None and not is_constant(bound["bias"]))
    ):
        return
    weight = constant(owner, bound["weight"])  # [in, out, r, r]
    factor = weight.shape[2]
    unit = set(bound["stride"]) == {factor} == set(weight.shape[2:]) and set(bound["dilation"]) == {1}
    if not unit or any((*bound["padding"], *bound["output_padding"])) or bound["groups"] != 1:
        return
    outputs = weight.shape[1] * factor**2
    spread = weight.permute(1, 2, 3, 0).reshape(outputs, -1, 1, 1)
    bias = weight.new_zeros(weight.shape[1]) if bound["bias"] is None else constant(owner, bound["bias"])
    names = add_constant(owner, f"{bound['weight'].target}_spread", spread)
    biases = add_constant(owner, f"{bound['weight'].target}_spread_bias", bias.repeat_interleave(factor**2))
    with graph.inserting_before(node):
        made = graph.get_attr(names), graph.get_attr(biases)
    convolution = (aten.conv2d.default, (bound["input"], *made, [1, 1], [0, 0], [1, 1], 1))
    _substitute(graph, node, convolution, (aten.pixel_shuffle.default, (..., factor)))


def _resize(graph: fx.Graph, node: fx.Node) -> None:
    before, after = shape_of(node.all_input_nodes[0])[2:], shape_of(node)[2:]
    if bind(node)["output_size"] is None or any(new % old for old, new in zip(before, after, strict=True)):
        return
    factors = [float(new // old) for old, new in zip(before, after, strict=True)]
    replace_args(node, output_size=None, scale_factors=factors)


def _expand(graph: fx.Graph, node: fx.Node) -> None:
    source = node.args[0]
    for user in list(node.users):
        others = [x for x in user.args[:2] if isinstance(x, fx.Node) and x is not node]
        if user.target in _BROADCASTING and len(others) == 1 and shape_of(others[0]) == shape_of(user):
            user.replace_input_with(node, source)  # type: ignore[arg-type]


_BROADCASTING = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def _scaled_gate(graph: fx.Graph, node: fx.Node) -> None:
    """The constant moves onto the gate, which is small, as a depthwise 1x1 convolution, which is an integer kernel."""
    nodes = node.all_input_nodes
    scale = next(filter(is_constant, nodes), None)
    product = next((x for x in nodes if x is not scale), None)
    if scale is None or product is None or product.target is not aten.mul.Tensor or len(product.users) != 1:
        return
    gate = next(filter(_is_gate, product.all_input_nodes), None)
    x = next((x for x in product.all_input_nodes if x is not gate), None)
    if gate is None or x is None or is_constant(x):
        return
    channels = shape_of(gate)[1]
    if shape_of(scale) not in ((channels, 1, 1), (1, channels, 1, 1)):
        return
    owner = graph.owning_module
    assert owner is not None
    name = add_constant(owner, f"{scale.target}_gate", constant(owner, scale).reshape(channels, 1, 1, 1))
    with graph.inserting_before(node):
        weight = graph.get_attr(name)
    convolution = (aten.conv2d.default, (gate, weight, None, [1, 1], [0, 0], [1, 1], channels))
    _substitute(graph, node, convolution, (aten.mul.Tensor, (x, ...)))
    _bias(graph, next(user for user in weight.users))


def _is_gate(value: fx.Node) -> bool:
    """One value per sample and channel, [n, c, 1, 1]."""
    return len(shape_of(value)) == 4 and shape_of(value)[2:] == (1, 1)


_REWRITES: dict[Any, tuple[Callable[[fx.Graph, fx.Node], None], ...]] = {
    aten.silu.default: (_silu,),
    aten.mean.dim: (_spatial_mean,),
    aten.adaptive_avg_pool2d.default: (_adaptive_pool,),
    aten.avg_pool1d.default: (_average_pool,),
    aten.avg_pool2d.default: (_average_pool,),
    aten.adaptive_avg_pool1d.default: (_pool_of_sequence,),
    aten.adaptive_max_pool2d.default: (_plain_max,),
    aten.max_pool2d_with_indices.default: (_plain_max,),
    aten.hardtanh.default: (_hardtanh,),
    aten.relu6.default: (_hardtanh,),
    aten.conv1d.default: (_bias,),
    aten.conv2d.default: (_bias,),
    aten.linear.default: (_bias, _linear),
    aten.matmul.default: (_matmul,),
    aten.split.Tensor: (_split,),
    aten.split_with_sizes.default: (_split,),
    aten.split.sizes: (_split,),
    aten.chunk.default: (_split,),
    aten.unbind.int: (_split,),
    aten.select.int: (_select,),
    aten.batch_norm.default: (_batch_norm,),
    aten.conv_transpose2d.input: (_transposed_convolution,),
    aten.upsample_nearest2d.vec: (_resize,),
    aten.upsample_bilinear2d.vec: (_resize,),
    aten.roll.default: (_roll,),
    aten.expand.default: (_expand,),
    aten.expand_as.default: (_expand,),
    aten.mul.Tensor: (_scaled_gate,),
    aten.scaled_dot_product_attention.default: (_attention,),
}
