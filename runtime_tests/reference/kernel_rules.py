"""Choose the integer kernel for one operator between codes, and prepare its constants.

A rule takes the operator, the grid of its result (None: floats) and the family whose arithmetic the kernel has, and
returns the kernel, or says why there is none.

Must not know: the operators around it beyond the quantizers at its edges, sessions, ONNX.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, constant, is_constant, operator_name, overloads, shape_of
from calibrators.graph.canonical import clip_bounds
from calibrators.graph.operators import LISTS, MOVES, Operators, facts
from calibrators.grid import kernel_tables
from calibrators.grid.kernel_tables import CodeGrid
from calibrators.grid.processors import Processor
from calibrators.grid.target import Target
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE
from runtime_tests.reference import kernels
from runtime_tests.reference.kernels import Grid

__all__ = [
    "PRODUCTS",
    "PROPAGATED",
    "RULES",
    "WEIGHTED",
    "Kernel",
    "StaysFloat",
    "before_moves",
    "check_containers",
    "is_basic_arithmetic",
    "is_coded",
    "is_codes",
    "is_weight_only",
    "output_grid",
    "reason_without_kernel",
    "source",
]

aten = torch.ops.aten

CHANNELS_LAST_RANK = 4
"""The runtime holds tensors of this rank with channels last between its integer convolutions and pools. Where a graph
input is broadcast against one of them, it may choose another layout; that changes only ties of the sum."""

_THROUGH = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool")
PROPAGATED = Operators(*(name for name in MOVES if facts(name).onnx in _THROUGH))
"""Moves that the runtime swaps with quantizers and dequantizers. All moves run on codes if they are between a
dequantizer and a quantizer with the same parameters."""

BASIC = Operators(*(f"{name}.Tensor" for name in ("add", "sub", "mul", "div")))
CONVERSIONS = Operators("to.dtype", "_to_copy.default")


class StaysFloat(Exception):
    """The runtime keeps an operator in float; the message says why."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """An integer kernel: from codes of `inputs` to codes or floats; then codes move.

    compute: prepares the weights when it is first called: most plans are only read, and weights that are ready take
          four times the memory of their codes.
    tied: of a kernel that rounds differently on some processors: its name in kernel_tables, and the grids of what it
          reads and of what it writes.
    """

    name: str
    inputs: tuple[fx.Node, ...]
    compute: Callable[..., Tensor]
    moves: tuple[fx.Node, ...] = ()
    tied: tuple[str, tuple[CodeGrid, ...], CodeGrid] | None = None

    @property
    def reads(self) -> list[fx.Node]:
        """The nodes whose values the kernel needs: codes, and sizes that moves take from the graph."""
        inside = set(self.moves)
        sizes = [n for move in self.moves for n in move.all_input_nodes if n is not move.args[0] and n not in inside]
        return [*self.inputs, *sizes]


# --- the edges of an operator ----------------------------------------------------------------------------------------


def source(node: fx.Node) -> fx.Node:
    """Return the first operand."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def before_moves(node: fx.Node, moves: Container[Any] = PROPAGATED) -> fx.Node:
    """Return the node that computes a value before it is moved."""
    while node.target in moves:
        node = source(node)
    return node


def output_grid(program: fx.GraphModule, quantizer: fx.Node) -> Grid:
    """Return the grid of the codes that a quantizer writes."""
    bound = bind(quantizer)
    return _grid(program, bound, (bound["qmin"], bound["qmax"]))


def _grid(program: fx.GraphModule, bound: dict[str, Any], limits: tuple[Any, Any]) -> Grid:
    zero = constant(program, bound["zero_point"])
    return Grid(constant(program, bound["scale"]), int(zero), limits[0], limits[1], zero.dtype)


def is_coded(node: object) -> bool:
    """Return whether a value is the dequantized form of codes with one scale, moved or not."""
    if not isinstance(node, fx.Node):
        return False
    origin = before_moves(node)
    return origin.target is DEQUANTIZE and bind(origin)["axis"] is None


def is_codes(node: fx.Node) -> bool:
    """Return whether a value is codes that a quantizer wrote, moved, clipped, padded or selected since."""
    if node.target is QUANTIZE:
        return True
    meta, operands = node.meta.get("tensor_meta"), node.all_input_nodes
    is_integer = getattr(meta, "dtype", None) in (torch.uint8, torch.int8, torch.uint16, torch.int16)
    return node.op == "call_function" and is_integer and all(is_codes(x) or is_constant(x) for x in operands)


def is_basic_arithmetic(node: fx.Node) -> bool:
    """Return whether a value is an input, converted to float32, moved, and combined with constants, one at a time.

    IEEE 754 decides every bit of it, and runtimes keep these operators as they are.
    """
    while node.op == "call_function":
        operands = [x for x in node.all_input_nodes if not is_constant(x)]
        to_float = node.target in CONVERSIONS and node.meta["tensor_meta"].dtype == torch.float32
        combined = node.target in BASIC and node.kwargs.get("alpha", 1) == 1 and "rounding_mode" not in node.kwargs
        if len(operands) != 1 or not (to_float or combined or node.target in PROPAGATED):
            return False
        node = operands[0]
    return node.op == "placeholder"


def _grids(program: fx.GraphModule, *nodes: Any) -> list[Grid]:
    """Return the grids of the activations that an operator reads.

    A range is that of the quantizer, of a clip of the codes or of constant codes, else that of the container.
    """
    grids = []
    for node in nodes:
        if not isinstance(node, fx.Node):
            raise StaysFloat("one of its operands is a number")
        if not is_coded(node):
            raise StaysFloat(f"its input {node.name} is not quantized")
        bound = bind(before_moves(node))
        container = torch.iinfo(constant(program, bound["zero_point"]).dtype)
        limits = _limits(program, bound["codes"], (container.min, container.max))
        grids.append(_grid(program, bound, limits))
    return grids


def _limits(program: fx.GraphModule, codes: fx.Node, container: tuple[int, int]) -> tuple[int, int]:
    """Return the lowest and the highest code that may occur."""
    if codes.target is QUANTIZE:
        return bind(codes)["qmin"], bind(codes)["qmax"]
    if codes.target is aten.clamp.default:
        return bind(codes)["min"], bind(codes)["max"]
    if is_constant(codes):
        low, high = constant(program, codes).aminmax()
        return int(low), int(high)
    if codes.target in (aten.maximum.default, aten.minimum.default, aten.amin.default):
        lows, highs = zip(*(_limits(program, x, container) for x in codes.all_input_nodes), strict=True)
        return min(lows), max(highs)
    return container


def check_containers(program: fx.GraphModule, node: fx.Node, y: Grid | None, target: Target) -> None:
    """Raise StaysFloat for an operator that reads or writes codes of a type for which the target has no kernels."""
    coded = (x for x in node.all_input_nodes if is_coded(x) and not _is_quantized_constant(x))
    read = [constant(program, bind(before_moves(x))["zero_point"]).dtype for x in coded]
    for dtype in [*read, *([] if y is None else [y.dtype])]:
        if dtype != target.activation.dtype:
            kind = "16-bit" if torch.iinfo(dtype).bits > target.activation.bits else str(dtype).removeprefix("torch.")
            raise StaysFloat(f"{kind} activations have no integer kernels")


def _is_quantized_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE and is_constant(node.args[0])


def is_weight_only(node: fx.Node) -> bool:
    """Return whether a linear layer is weight-only, so that the float kernel MatMulNBits computes it."""
    if node.target is not aten.linear.default or not _is_quantized_constant(bind(node)["weight"]):
        return False
    return before_moves(source(node)).target is not DEQUANTIZE


def _check_weight(node: fx.Node) -> None:
    """Raise StaysFloat for float weights in any case, because the program shields the input of such an operator."""
    if not _is_quantized_constant(bind(node)["weight"]):
        raise StaysFloat("its weight is not quantized")


def _with_weights(
    program: fx.GraphModule, node: fx.Node, y: Grid | None, kernel: Callable[..., Tensor], *, padded: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return the computation of a layer by a kernel that takes the grid of the input, the weights and that of y.

    raises: StaysFloat.
    """
    (x,) = _grids(program, source(node))
    weight, bias = bind(node)["weight"], bind(node)["bias"]
    codes, scale, zero_point = (constant(program, argument) for argument in weight.args[:3])
    if codes.dtype not in (torch.int8, torch.uint8):
        raise StaysFloat(f"weights of {codes.dtype} have no integer kernel")
    bias_codes = None if bias is None else _bias_codes(program, bias, x.scale * scale, y)
    return _prepared(kernel, (codes, zero_point, scale, bias_codes, x), y, padded=padded)


def _prepared(
    kernel: Callable[..., Tensor], constants: tuple[Any, ...], y: Grid | None, *, padded: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return the computation of a kernel whose weights are prepared of constants when it is first called."""

    @functools.cache
    def ready() -> Callable[[Tensor], Tensor]:
        x, weights = (constants[-1], kernels.prepare_weights(*constants)) if padded else kernels.unpadded(*constants)
        return partial(kernel, x=x, weights=weights, y=y)

    return lambda codes: ready()(codes)


def _bias_codes(program: fx.GraphModule, bias: fx.Node, scale: Tensor, y: Grid | None) -> Tensor:
    if is_constant(bias):
        if y is None:
            raise StaysFloat("its bias is float, as is its result")
        return kernels.quantize_bias(constant(program, bias), scale)
    if not _is_quantized_constant(bias):
        raise StaysFloat("its bias is computed")
    codes, bias_scale = (constant(program, argument) for argument in bias.args[:2])  # type: ignore[arg-type]
    if codes.dtype != torch.int32 or not torch.equal(bias_scale, scale.expand(bias_scale.shape)):
        raise StaysFloat("the scale of its bias is not the product of input and weight scale")
    return codes


# --- rules ----------------------------------------------------------------------------------------------------------


def _conv(program: fx.GraphModule, node: fx.Node, y: Grid | None, family: Processor) -> Kernel:
    bound = bind(node)
    _check_weight(node)
    _grids(program, bound["input"])
    if y is None:
        raise StaysFloat("its result is not quantized")
    padded, space = bound["padding"] != "valid" and any(bound["padding"]), len(shape_of(bound["weight"])) - 2
    stride, padding, dilation = (_per_axis(bound[name], space) for name in ("stride", "padding", "dilation"))
    geometry = kernels.ConvGeometry(stride, padding, dilation, bound["groups"])
    kernel = partial(kernels.conv, geometry=geometry, arithmetic=family.conv)
    compute = _with_weights(program, node, y, kernel, padded=padded)
    return Kernel("QLinearConv", (bound["input"],), compute)


def _per_axis(sizes: Sequence[int], space: int) -> tuple[int, ...]:
    return tuple(sizes) * space if len(sizes) == 1 else tuple(sizes)


def _linear(program: fx.GraphModule, node: fx.Node, y: Grid | None, family: Processor) -> Kernel:
    _check_weight(node)
    if is_weight_only(node):
        raise StaysFloat("only its weight is quantized")
    compute = _with_weights(program, node, y, partial(kernels.linear, arithmetic=family.linear))
    return Kernel("QGemm", (source(node),), compute)


def _matmul(program: fx.GraphModule, node: fx.Node, y: Grid | None, family: Processor) -> Kernel:
    left, right = bind(node).values()
    name = "MatMulIntegerToFloat" if y is None else "QLinearMatMul"
    if not _is_quantized_constant(right):
        a, b = _grids(program, left, right)
        return Kernel(name, (left, right), partial(kernels.matmul, a=a, b=b, y=y))
    (x,) = _grids(program, left)
    codes, scale, zero_point = (constant(program, argument) for argument in right.args[:3])
    if codes.ndim != 2:
        raise StaysFloat("a constant factor that is not a matrix has no integer kernel here")
    kernel = partial(kernels.linear, arithmetic=family.linear)
    return Kernel(name, (left,), _prepared(kernel, (codes.T, zero_point, scale, None, x), y))


def _add(program: fx.GraphModule, node: fx.Node, y: Grid, family: Processor) -> Kernel:
    left, right = bind(node)["self"], bind(node)["other"]
    a, b = _grids(program, left, right)
    table = partial(kernels.pair_table, kernel_tables.add, y=y, arithmetic=family.add)
    tables = table(a, b), table(b, a).T.contiguous()

    def compute(a_codes: Tensor, b_codes: Tensor) -> Tensor:
        channels_last = a_codes.ndim == b_codes.ndim == CHANNELS_LAST_RANK
        swapped = kernels.adds_swapped(a_codes.shape, b_codes.shape, channels_last=channels_last)
        return kernels.lookup_pair(tables[swapped], a_codes, b_codes)

    return Kernel("QLinearAdd", (left, right), compute, tied=("add", (a.numbers, b.numbers), y.numbers))


def _mul(program: fx.GraphModule, node: fx.Node, y: Grid, family: Processor) -> Kernel:
    left, right = bind(node).values()
    a, b = _grids(program, left, right)
    compute = partial(kernels.lookup_pair, kernels.pair_table(kernel_tables.mul, a, b, y, family.mul))
    return Kernel("QLinearMul", (left, right), compute, tied=("mul", (a.numbers, b.numbers), y.numbers))


def _unary(name: str, prepare: Callable[[dict[str, Any], Grid, Grid], Callable[[Tensor], Tensor]]) -> Rule:
    """Return the rule of an operator with one operand; `prepare` returns its function on codes."""

    def rule(program: fx.GraphModule, node: fx.Node, y: Grid, family: Processor) -> Kernel:
        (x,) = _grids(program, source(node))
        return Kernel(name, (source(node),), prepare(bind(node), x, y))

    return rule


def _sigmoid(program: fx.GraphModule, node: fx.Node, y: Grid, family: Processor) -> Kernel:
    (x,) = _grids(program, source(node))
    compute = partial(kernels.lookup, kernels.unary_table(kernels.sigmoid, x, y))
    return Kernel("QLinearSigmoid", (source(node),), compute, tied=("sigmoid", (x.numbers,), y.numbers))


def _leaky_relu(bound: dict[str, Any], x: Grid, y: Grid) -> Callable[[Tensor], Tensor]:
    leaky_relu = partial(kernels.leaky_relu, negative_slope=bound["negative_slope"])
    return partial(kernels.lookup, kernels.unary_table(leaky_relu, x, y))


def _softmax(bound: dict[str, Any], x: Grid, y: Grid) -> Callable[[Tensor], Tensor]:
    return partial(kernels.softmax, x=x, y=y, dim=bound["dim"])


def _global_pool(program: fx.GraphModule, node: fx.Node, y: Grid, family: Processor) -> Kernel:
    (x,) = _grids(program, source(node))
    sums = replace(x.numbers, count=math.prod(shape_of(source(node))[2:]))
    compute = partial(kernels.global_average_pool, x=x, y=y, arithmetic=family.mean)
    return Kernel("QLinearGlobalAveragePool", (source(node),), compute, tied=("mean", (sums,), y.numbers))


def _average_pool(program: fx.GraphModule, node: fx.Node, y: Grid, family: Processor) -> Kernel:
    (x,), bound = _grids(program, source(node)), bind(node)
    if family.average == "codes":
        _check_same_scale(node, x, y)
    space, stride = len(shape_of(node)) - 2, bound["stride"] or bound["kernel_size"]
    kernel, stride, padding = (_per_axis(v, space) for v in (bound["kernel_size"], stride, bound["padding"]))
    geometry = kernels.PoolGeometry(kernel, stride, padding, bound["count_include_pad"])
    compute = partial(kernels.average_pool, x=x, y=y, geometry=geometry, arithmetic=family.average)
    return Kernel("QLinearAveragePool", (source(node),), compute)


def _cat(program: fx.GraphModule, node: fx.Node, y: Grid, family: Processor) -> Kernel:
    sources, dim = bind(node).values()
    tables = [kernels.unary_table(lambda values: values, x, y) for x in _grids(program, *sources)]

    def compute(*codes: Tensor) -> Tensor:
        return torch.cat([kernels.lookup(table, part) for table, part in zip(tables, codes, strict=True)], dim)

    return Kernel("QLinearConcat", tuple(sources), compute)


def _move(program: fx.GraphModule, node: fx.Node, y: Grid, family: Processor) -> Kernel:
    """Return the kernel of a move: it moves codes as usual, and leaves a clip to the quantizer."""
    cut = node.target is operator.getitem
    if cut and source(node).target not in LISTS:
        raise StaysFloat(reason_without_kernel(source(node)))
    (x,) = _grids(program, source(source(node)) if cut else source(node))
    _check_same_scale(node, x, y)
    return Kernel(facts(node.target).onnx, (node,), partial(kernels.integer_clip, y=y))


def _check_same_scale(node: fx.Node, x: Grid, y: Grid) -> None:
    if not torch.equal(x.scale, y.scale) or x.zero_point != y.zero_point:
        name = facts(node.target).onnx or operator_name(node.target)
        raise StaysFloat(f"{name} between different scales runs on floats")


def reason_without_kernel(node: fx.Node) -> str:
    """Return why an operator for which the target has no kernel is computed in float."""
    if node.target is DEQUANTIZE:
        return "it is a quantizer directly after another one"
    if clip_bounds(node) is not None:
        return "it is a clip that no integer kernel before it performs by saturation"
    return f"{operator_name(node.target)} has no integer kernel"


Rule = Callable[[fx.GraphModule, fx.Node, Grid, Processor], Kernel]

PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
"""Products of two activations, or of one and a constant."""

WEIGHTED: dict[Any, Callable[[fx.GraphModule, fx.Node, Grid | None, Processor], Kernel]] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _conv),
    aten.linear.default: _linear,
    **dict.fromkeys(PRODUCTS, _matmul),
}
"""Operators that multiply and accumulate; they are reported even if their result is not quantized."""

RULES: dict[Any, Rule] = {
    **WEIGHTED,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.cat.default: _cat,
    aten.adaptive_avg_pool2d.default: _global_pool,
    **dict.fromkeys((aten.avg_pool2d.default, aten.avg_pool3d.default), _average_pool),
    aten.sigmoid.default: _sigmoid,
    aten.leaky_relu.default: _unary("QLinearLeakyRelu", _leaky_relu),
    aten.softmax.int: _unary("QLinearSoftmax", _softmax),
    **dict.fromkeys(overloads(MOVES), _move),
}
