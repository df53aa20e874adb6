"""Which integer kernel onnxruntime has for one operator between codes, prepared with its constants.

A rule takes the operator and the grid of its result (None: floats) and gives the kernel, or says why there is none.

Must not know: the operators around it beyond the quantizers at its edges, sessions, ONNX.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from calibrators.graph.aten import bind, constant, is_constant, operator_name
from calibrators.graph.canonical import clip_bounds
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE
from runtime_tests.reference import kernels
from runtime_tests.reference.kernels import Grid

__all__ = [
    "LISTS",
    "MOVES",
    "PROPAGATED",
    "RULES",
    "WEIGHTED",
    "Kernel",
    "StaysFloat",
    "check_container",
    "is_coded",
    "is_weight_only",
    "output_grid",
    "reason_without_rule",
    "source",
]

aten = torch.ops.aten

WIDE = "16-bit activations have no integer kernels"
WEIGHT_ONLY = "only its weight is quantized"
UNSIGNED_ONLY = "int8 activations have no fast integer kernels on x86, and the runtime keeps them in float"

CHANNELS_LAST_RANK = 4
"""The runtime holds tensors of this rank with channels last between its integer convolutions and pools. Where a graph
input is broadcast against one of them it may choose otherwise; that shows at ties of the sum alone."""

PROPAGATED: dict[Any, str] = {
    aten.view.default: "Reshape",
    aten.reshape.default: "Reshape",
    aten.permute.default: "Transpose",
    aten.transpose.int: "Transpose",
    aten.squeeze.dim: "Squeeze",
    aten.squeeze.dims: "Squeeze",
    aten.unsqueeze.default: "Unsqueeze",
    aten.slice.Tensor: "Slice",
    aten.max_pool1d.default: "MaxPool",
    aten.max_pool2d.default: "MaxPool",
}
"""Operators that select and move values and through which the runtime moves quantizers and dequantizers."""

LISTS: dict[Any, str] = {
    aten.split.Tensor: "Split",
    aten.split_with_sizes.default: "Split",
    aten.chunk.default: "Split",
    aten.unbind.int: "Split",
}
"""Operators that cut a value into a list, each part of which is read by its index."""

MOVES: dict[Any, str] = {
    **PROPAGATED,
    **LISTS,
    operator.getitem: "Split",
    aten.amax.default: "ReduceMax",
    aten.flatten.using_ints: "Flatten",
    aten.upsample_nearest2d.vec: "Resize",
    aten.pixel_shuffle.default: "DepthToSpace",
    aten.clone.default: "Identity",
    aten.contiguous.default: "Identity",
}
"""Operators that run on codes when they stand between a dequantizer and a quantizer with the same parameters."""


class StaysFloat(Exception):
    """Why the runtime keeps an operator in float."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """An integer kernel with its constants prepared: codes of `inputs` -> codes or floats; then codes move."""

    name: str
    inputs: tuple[fx.Node, ...]
    compute: Callable[..., Tensor]
    moves: tuple[fx.Node, ...] = ()

    @property
    def reads(self) -> list[fx.Node]:
        """Every node whose value the kernel needs: codes, and sizes that moves take from the graph."""
        inside = set(self.moves)
        sizes = [n for move in self.moves for n in move.all_input_nodes if n is not move.args[0] and n not in inside]
        return [*self.inputs, *sizes]


# --- the edges of an operator ----------------------------------------------------------------------------------------


def source(node: fx.Node) -> fx.Node:
    """The first operand."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def output_grid(program: fx.GraphModule, quantizer: fx.Node) -> Grid:
    """Grid of the codes that a quantizer writes."""
    bound = bind(quantizer)
    return _grid(program, bound["scale"], bound["zero_point"], (bound["qmin"], bound["qmax"]))


def _grid(program: fx.GraphModule, scale: Any, zero_point: Any, limits: tuple[Any, Any]) -> Grid:
    zero = constant(program, zero_point)
    return Grid(constant(program, scale), int(zero), limits[0], limits[1], zero.dtype)


def is_coded(node: object) -> bool:
    """Whether a value is the dequantized form of codes with one scale, moved or not."""
    while isinstance(node, fx.Node) and node.target in PROPAGATED:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE and bind(node)["axis"] is None


def _input_grid(program: fx.GraphModule, node: fx.Node) -> Grid:
    """Grid of a coded value; the range is that of its quantizer or of the clip of its codes, else of the container."""
    while node.target in PROPAGATED:
        node = source(node)
    bound = bind(node)
    codes, container = bound["codes"], torch.iinfo(constant(program, bound["zero_point"]).dtype)
    limits = container.min, container.max
    if codes.target is QUANTIZE:
        limits = bind(codes)["qmin"], bind(codes)["qmax"]
    elif codes.target is aten.clamp.default:
        limits = bind(codes)["min"], bind(codes)["max"]
    return _grid(program, bound["scale"], bound["zero_point"], limits)


def _grids(program: fx.GraphModule, *nodes: Any) -> list[Grid]:
    """Grids of the activations that an operator reads."""
    grids = []
    for node in nodes:
        if not isinstance(node, fx.Node):
            raise StaysFloat("an operand is a number")
        if not is_coded(node):
            raise StaysFloat(f"its input {node.name} is not quantized")
        grids.append(_input_grid(program, node))
    for grid in grids:
        check_container(grid)
    return grids


def check_container(grid: Grid) -> None:
    """Raises StaysFloat for codes that no integer kernel reads or writes."""
    if grid.dtype != torch.uint8:
        raise StaysFloat(WIDE if grid.dtype == torch.int16 else UNSIGNED_ONLY)


def _is_quantized_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE and is_constant(node.args[0])


def is_weight_only(node: fx.Node) -> bool:
    """Whether a linear layer reads codes of its weight alone: a float kernel, MatMulNBits, computes it."""
    if node.target is not aten.linear.default or not _is_quantized_constant(bind(node)["weight"]):
        return False
    return not _is_dequantized(source(node))


def _is_dequantized(node: fx.Node) -> bool:
    while node.target in PROPAGATED:
        node = source(node)
    return node.target is DEQUANTIZE


def _check_weight(node: fx.Node) -> None:
    """Float weights keep an operator in float, whatever stands around it: the program shields its input then."""
    if not _is_quantized_constant(bind(node)["weight"]):
        raise StaysFloat("its weight is not quantized")


def _weights(program: fx.GraphModule, node: fx.Node, x: Grid, y: Grid | None) -> kernels.Weights:
    """Prepared weights [out, in, ...] and bias of a convolution or linear layer."""
    weight, bias = bind(node)["weight"], bind(node)["bias"]
    codes, scale, zero_point = (constant(program, argument) for argument in weight.args[:3])
    if codes.dtype not in (torch.int8, torch.uint8):
        raise StaysFloat(f"weights of {codes.dtype} have no integer kernel")
    bias_codes = None if bias is None else _bias_codes(program, bias, x.scale * scale, y)
    return kernels.prepare_weights(codes, zero_point, scale, bias_codes, x)


def _bias_codes(program: fx.GraphModule, bias: fx.Node, scale: Tensor, y: Grid | None) -> Tensor:
    if is_constant(bias):
        if y is None:
            raise StaysFloat("its bias is float and so is its result")
        return kernels.quantize_bias(constant(program, bias), scale)
    if not _is_quantized_constant(bias):
        raise StaysFloat("its bias is computed")
    codes, bias_scale = (constant(program, argument) for argument in bias.args[:2])  # type: ignore[arg-type]
    if codes.dtype != torch.int32 or not torch.equal(bias_scale, scale.expand(bias_scale.shape)):
        raise StaysFloat("the scale of its bias is not the product of input and weight scale")
    return codes


# --- rules ----------------------------------------------------------------------------------------------------------


def _conv(program: fx.GraphModule, node: fx.Node, y: Grid | None) -> Kernel:
    bound = bind(node)
    _check_weight(node)
    (x,) = _grids(program, bound["input"])
    if y is None:
        raise StaysFloat("its result is not quantized")
    weights = _weights(program, node, x, y)
    space = weights.parts[0][1].ndim - 2
    geometry = kernels.ConvGeometry(
        stride=_per_axis(bound["stride"], space),
        padding=_per_axis(bound["padding"], space),
        dilation=_per_axis(bound["dilation"], space),
        groups=bound["groups"],
    )
    compute = partial(kernels.conv, x=x, weights=weights, y=y, geometry=geometry)
    return Kernel("QLinearConv", (bound["input"],), compute)


def _per_axis(sizes: Sequence[int], space: int) -> tuple[int, ...]:
    return tuple(sizes) * space if len(sizes) == 1 else tuple(sizes)


def _linear(program: fx.GraphModule, node: fx.Node, y: Grid | None) -> Kernel:
    _check_weight(node)
    if is_weight_only(node):
        raise StaysFloat(WEIGHT_ONLY)
    (x,) = _grids(program, source(node))
    return _gemm("QGemm", source(node), _weights(program, node, x, y), x, y)


def _gemm(name: str, left: fx.Node, weights: kernels.Weights, x: Grid, y: Grid | None) -> Kernel:
    if y is None:
        return Kernel(name, (left,), partial(kernels.linear_float, x=x, weights=weights))
    return Kernel(name, (left,), partial(kernels.linear, x=x, weights=weights, y=y))


def _matmul(program: fx.GraphModule, node: fx.Node, y: Grid | None) -> Kernel:
    left, right = bind(node).values()
    name = "MatMulIntegerToFloat" if y is None else "QLinearMatMul"
    if _is_quantized_constant(right):
        (x,) = _grids(program, left)
        codes, scale, zero_point = (constant(program, argument) for argument in right.args[:3])
        if codes.ndim != 2:
            raise StaysFloat("a constant factor that is no matrix has no rule")
        return _gemm(name, left, kernels.prepare_weights(codes.T, zero_point, scale, None, x), x, y)
    a, b = _grids(program, left, right)
    if y is None:
        return Kernel(name, (left, right), partial(kernels.matmul_float, a=a, b=b))
    return Kernel(name, (left, right), partial(kernels.matmul, a=a, b=b, y=y))


def _add(program: fx.GraphModule, node: fx.Node, y: Grid) -> Kernel:
    left, right, factor = bind(node).values()
    a, b = _grids(program, left, right)
    if factor != 1:
        raise StaysFloat("a factor on the second summand has no integer kernel")
    tables = kernels.add_table(a, b, y), kernels.add_table(b, a, y).T.contiguous()

    def compute(a_codes: Tensor, b_codes: Tensor) -> Tensor:
        channels_last = a_codes.ndim == b_codes.ndim == CHANNELS_LAST_RANK
        swapped = kernels.adds_swapped(a_codes.shape, b_codes.shape, channels_last=channels_last)
        return kernels.lookup_pair(tables[swapped], a_codes, b_codes)

    return Kernel("QLinearAdd", (left, right), compute)


def _mul(program: fx.GraphModule, node: fx.Node, y: Grid) -> Kernel:
    left, right = bind(node).values()
    a, b = _grids(program, left, right)
    return Kernel("QLinearMul", (left, right), partial(kernels.lookup_pair, kernels.mul_table(a, b, y)))


def _sigmoid(program: fx.GraphModule, node: fx.Node, y: Grid) -> Kernel:
    (x,) = _grids(program, source(node))
    return Kernel("QLinearSigmoid", (source(node),), partial(kernels.lookup, kernels.unary_table(torch.sigmoid, x, y)))


def _leaky_relu(program: fx.GraphModule, node: fx.Node, y: Grid) -> Kernel:
    (x,) = _grids(program, source(node))
    leaky_relu = partial(functional.leaky_relu, negative_slope=bind(node)["negative_slope"])
    table = kernels.unary_table(leaky_relu, x, y)
    return Kernel("QLinearLeakyRelu", (source(node),), partial(kernels.lookup, table))


def _softmax(program: fx.GraphModule, node: fx.Node, y: Grid) -> Kernel:
    (x,) = _grids(program, source(node))
    return Kernel("QLinearSoftmax", (source(node),), partial(kernels.softmax, x=x, y=y, dim=bind(node)["dim"]))


def _global_pool(program: fx.GraphModule, node: fx.Node, y: Grid) -> Kernel:
    (x,) = _grids(program, source(node))
    if list(bind(node)["output_size"]) != [1, 1]:
        raise StaysFloat("only pooling to 1x1 has an integer kernel")
    return Kernel("QLinearGlobalAveragePool", (source(node),), partial(kernels.global_average_pool, x=x, y=y))


def _average_pool(program: fx.GraphModule, node: fx.Node, y: Grid) -> Kernel:
    bound = bind(node)
    (x,) = _grids(program, bound["self"])
    if bound["ceil_mode"] or bound["divisor_override"] is not None:
        raise StaysFloat("average pooling with a ceiling or a divisor of its own has no integer kernel")
    size = bound["kernel_size"]
    kernel, stride, padding = ((v * 2)[:2] for v in map(tuple, (size, bound["stride"] or size, bound["padding"])))
    geometry = kernels.PoolGeometry(kernel, stride, padding, bound["count_include_pad"])
    compute = partial(kernels.average_pool, x=x, y=y, geometry=geometry)
    return Kernel("QLinearAveragePool", (bound["self"],), compute)


def _cat(program: fx.GraphModule, node: fx.Node, y: Grid) -> Kernel:
    sources, dim = bind(node).values()
    tables = [kernels.unary_table(lambda values: values, x, y) for x in _grids(program, *sources)]

    def compute(*codes: Tensor) -> Tensor:
        return torch.cat([kernels.lookup(table, part) for table, part in zip(tables, codes, strict=True)], dim)

    return Kernel("QLinearConcat", tuple(sources), compute)


def _move(program: fx.GraphModule, node: fx.Node, y: Grid) -> Kernel:
    """The move itself is evaluated on codes like any move; what is left for the quantizer is its clip."""
    cut = node.target is operator.getitem
    if cut and source(node).target not in LISTS:
        raise StaysFloat(reason_without_rule(source(node)))
    (x,) = _grids(program, source(source(node)) if cut else source(node))
    if not torch.equal(x.scale, y.scale) or x.zero_point != y.zero_point:
        raise StaysFloat(f"{MOVES[node.target]} between different scales is executed on floats")
    return Kernel(MOVES[node.target], (node,), partial(kernels.integer_clip, y=y))


def reason_without_rule(node: fx.Node) -> str:
    """Why an operator that has no rule is computed in float."""
    if node.target is DEQUANTIZE:
        return "a quantizer directly behind another"
    if clip_bounds(node) is not None:
        return "a clip that is not the saturation of an integer kernel in front of it"
    return f"{operator_name(node.target)} has no integer kernel"


WEIGHTED: dict[Any, Callable[[fx.GraphModule, fx.Node, Grid | None], Kernel]] = {
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
}
"""Operators that multiply and accumulate: reported whether or not their result is quantized."""

RULES: dict[Any, Callable[[fx.GraphModule, fx.Node, Grid], Kernel]] = {
    **WEIGHTED,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.cat.default: _cat,
    aten.adaptive_avg_pool2d.default: _global_pool,
    aten.avg_pool2d.default: _average_pool,
    aten.sigmoid.default: _sigmoid,
    aten.leaky_relu.default: _leaky_relu,
    aten.softmax.int: _softmax,
    **dict.fromkeys(MOVES, _move),
}
