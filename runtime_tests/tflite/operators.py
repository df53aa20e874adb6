"""Which operators of LiteRT compute an operator of a program: on int8 codes or on floats, in the same form.

An operator that is not in the tables has no form in a LiteRT file here, and is refused.

Must not know: which operators run on codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from calibrators.errors import ModelError, argument
from calibrators.graph.aten import bind, constant, is_constant, operator_name, shape_of
from calibrators.graph.canonical import clip_bounds
from calibrators.program.qdq_program import DEQUANTIZE, dequantized
from runtime_tests.tflite.builder import FIRST, Builder, Grid, Value, order_of

__all__ = ["Call", "computed", "cut", "moved", "shifted"]

aten = torch.ops.aten
Array = NDArray[Any]

SAME, VALID = 0, 1
"""Paddings of LiteRT, in which SAME adds one more at the end than at the beginning where it adds an odd number."""
LOWEST = float(np.finfo(np.float32).min)
RELU6 = 6.0


@dataclass(frozen=True)
class Call:
    """A call of an operator of the program.

    read: returns the value of an operand: codes where the call runs on codes, else floats.
    grid: of the result; None where the call runs on floats.
    """

    builder: Builder
    program: fx.GraphModule
    node: fx.Node
    read: Callable[[fx.Node], Value]
    grid: Grid | None

    @property
    def bound(self) -> dict[str, Any]:
        return bind(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(int, shape_of(self.node)))

    def operand(self, name: str) -> Value:
        """Return an operand, with as many axes as the result has."""
        given = self.bound[name]
        if not isinstance(given, fx.Node):
            return self.builder.constant(name, np.asarray(given, np.float32), len(self.shape))
        return self.builder.widened(self.read(given), len(self.shape))

    def made(self, op: str, inputs: Sequence[Value | int], kind: str, **options: Any) -> Value:
        """Add the operator that gives the result."""
        full = None if self.grid is None else self.grid.full
        return self.builder.call(op, inputs, self.shape, full, (kind, options))

    def refused(self, why: str) -> ModelError:
        return ModelError(
            f"{self.node.name}: {why} has no form in a LiteRT file here; export for another target "
            f"({argument('target', 'ort-cpu')})."
        )


def computed(call: Call) -> Value:
    """Add what computes a call; its result holds all codes of the container.

    raises: ModelError for an operator or form that LiteRT lacks.
    """
    bounds = clip_bounds(call.node)
    if bounds is not None:
        return _clip(call, *bounds)
    found = OPERATORS.get(call.node.target)
    if found is None:
        raise call.refused(operator_name(call.node.target))
    return found(call)


# --- layers -----------------------------------------------------------------------------------------------------------


def _array(call: Call, node: fx.Node) -> Array:
    """Return the values of a constant of floats, which may be stored as codes."""
    if node.target is DEQUANTIZE and is_constant(bind(node)["codes"]):
        bound: dict[str, Any] = bind(node)
        held: dict[str, Any] = {n: constant(call.program, x) if isinstance(x, fx.Node) else x for n, x in bound.items()}
        return dequantized(**held).numpy()
    if not is_constant(node):
        raise call.refused("a computed weight")
    return constant(call.program, node).numpy()


def _weights(call: Call) -> tuple[Array, Array | None, list[int]]:
    """Return the weight [out, ...] as codes or floats, its scales [out] if it has codes, and the tensor of its bias."""
    weight, bias = call.bound["weight"], call.bound["bias"]
    if call.grid is None:
        values = [] if bias is None else [call.builder.plain("bias", _array(call, bias), np.float32)]
        return _array(call, weight), None, values
    codes, scale, zero = (constant(call.program, x) for x in weight.args[:3])
    points = zero.to(torch.int16).reshape(-1, *[1] * (codes.ndim - 1))
    scales = scale.expand(len(codes)).numpy()
    added = [] if bias is None else [_bias(call, bias)]
    return (codes.to(torch.int16) - points).to(torch.int8).numpy(), scales, added


def _bias(call: Call, bias: fx.Node) -> int:
    codes, scale = (constant(call.program, x).numpy() for x in bias.args[:2])  # type: ignore[arg-type]
    return call.builder.plain("bias", codes, np.int32, _per_axis(np.broadcast_to(scale, codes.shape), 0))


def _per_axis(scales: Array, axis: int) -> dict[str, Any]:
    return {"scale": scales.tolist(), "zeroPoint": [0] * len(scales), "quantizedDimension": axis}


def _conv(call: Call) -> Value:
    weight, scales, bias = _weights(call)
    x, groups, bound = call.read(call.bound["input"]), call.bound["groups"], call.bound
    window = _Window(weight.shape[2:], bound["stride"], bound["padding"], bound["dilation"])
    x, padding = window.applied(call, x)
    options = {
        "padding": padding,
        **dict(zip(("strideH", "strideW"), window.stride, strict=True)),
        **dict(zip(("dilationHFactor", "dilationWFactor"), window.dilation, strict=True)),
    }
    if 1 < groups == x.shape[1]:
        op, kind, order, axis = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions", (1, 2, 3, 0), 3
        options["depthMultiplier"] = len(weight) // groups
    else:
        op, kind, order, axis = "CONV_2D", "Conv2DOptions", (0, 2, 3, 1), 0
    held = call.builder.plain("weight", weight.transpose(order), weight.dtype, _grid_of(scales, axis))
    return call.made(op, [x, held, *bias], kind, **options)


def _grid_of(scales: Array | None, axis: int) -> dict[str, Any] | None:
    return None if scales is None else _per_axis(scales, axis)


def _linear(call: Call) -> Value:
    weight, scales, bias = _weights(call)
    x = call.read(call.bound["input"])
    held = call.builder.plain("weight", weight, weight.dtype, _grid_of(scales, 0))
    full = None if call.grid is None else call.grid.full
    inputs = [call.builder.in_order(x), held, *bias]
    options = ("FullyConnectedOptions", {"keepNumDims": True})
    return call.builder.held(call.builder.raw("FULLY_CONNECTED", inputs, call.shape, full, options), call.shape, full)


@dataclass(frozen=True)
class _Window:
    """The moves of a window over images, two numbers each; padding may be "valid"."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int] | str
    dilation: Sequence[int] = (1, 1)

    def __post_init__(self) -> None:
        padding = [0, 0] if self.padding == "valid" else self.padding
        for name, sizes in (("padding", padding), ("stride", self.stride), ("dilation", self.dilation)):
            object.__setattr__(self, name, [*sizes] * (1 if len(sizes) == 2 else 2))

    def is_same(self, call: Call, x: Value) -> bool:
        """Return whether LiteRT's SAME pads alike."""
        for axis in range(2):
            size, step = x.shape[2 + axis], self.stride[axis]
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            total = max((call.shape[2 + axis] - 1) * step + reach - size, 0)
            if call.shape[2 + axis] != -(-size // step) or total != 2 * int(self.padding[axis]):
                return False
        return True

    def applied(self, call: Call, x: Value, fill: float | None = None) -> tuple[Value, int]:
        """Return the input, padded if no padding of LiteRT does it, and the padding that remains.

        fill: code or float with which it is padded; None: 0.
        """
        if not any(self.padding):
            return x, VALID
        if fill is None and self.is_same(call, x):
            return x, SAME
        widths = [(0, 0), (0, 0), *((int(n), int(n)) for n in self.padding)]
        return _padded(call.builder, x, widths, fill), VALID


def _padded(builder: Builder, x: Value, widths: Sequence[tuple[int, int]], fill: float | None) -> Value:
    """Pad a value; fill: code or float, None for 0."""
    shape = tuple(size + sum(width) for size, width in zip(x.shape, widths, strict=True))
    amounts = builder.plain("paddings", [widths[axis] for axis in order_of(len(shape))])
    if fill is None:
        return builder.call("PAD", [x, amounts], shape, x.grid, ("PadOptions", {}))
    dtype, parameters = (np.float32, None) if x.grid is None else (np.int8, x.grid.parameters)
    return builder.call(
        "PADV2", [x, amounts, builder.plain("fill", [fill], dtype, parameters)], shape, x.grid, ("PadV2Options", {})
    )


# --- pools, means -----------------------------------------------------------------------------------------------------


def _pool(call: Call, op: str, x: Value, fill: float | None, *, inside: bool = False) -> Value:
    """Add a pool; inside: whether the mean leaves out what is padded."""
    bound = call.bound
    kernel = [*bound["kernel_size"]] * (1 if len(bound["kernel_size"]) == 2 else 2)
    window = _Window(kernel, bound["stride"] or kernel, bound["padding"], bound.get("dilation") or (1, 1))
    if bound["ceil_mode"] or bound.get("divisor_override") is not None or any(d != 1 for d in window.dilation):
        raise call.refused("a pool with ceil_mode, dilation or a divisor")
    if inside and any(window.padding):
        if not window.is_same(call, x):
            raise call.refused("an average pool that leaves out its padding")
        padding = SAME
    else:
        x, padding = window.applied(call, x, fill)
    options = {
        "padding": padding,
        **dict(zip(("strideH", "strideW", "filterHeight", "filterWidth"), [*window.stride, *kernel], strict=True)),
    }
    return call.builder.call(op, [x], call.shape, x.grid, ("Pool2DOptions", options))


def _average_pool(call: Call) -> Value:
    x = call.read(call.bound["self"])
    fill = 0.0 if x.grid is None else float(x.grid.zero_point)
    return _pool(call, "AVERAGE_POOL_2D", x, fill, inside=not call.bound["count_include_pad"])


def _mean(call: Call, axes: Sequence[int], *, keep: bool) -> Value:
    x = call.read(call.bound["self"])
    rank = len(x.shape)
    if len(call.shape) != rank and rank == 4:  # what remains has no order of its own
        tensor, held = call.builder.in_order(x), [axis % rank for axis in axes]
        full = None if call.grid is None else call.grid.full
        options = ("ReducerOptions", {"keepDims": keep})
        made = call.builder.raw("MEAN", [tensor, call.builder.plain("axes", held)], call.shape, full, options)
        return call.builder.held(made, call.shape, full)
    held = sorted(call.builder.axis(axis, rank) for axis in axes)
    return call.made("MEAN", [x, call.builder.plain("axes", held)], "ReducerOptions", keepDims=keep)


def _global_pool(call: Call) -> Value:
    if [*call.bound["output_size"]] != [1, 1]:
        raise call.refused("pooling to more than one pixel")
    return _mean(call, (2, 3), keep=True)


# --- elementwise ------------------------------------------------------------------------------------------------------


def _clip(call: Call, low: float, high: float) -> Value:
    x = call.read(call.bound["self"])
    if low == 0 and high in (RELU6, float("inf")):
        return call.builder.call("RELU6" if high == RELU6 else "RELU", [x], call.shape, None)
    for op, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        if np.isfinite(bound):
            limit = call.builder.plain(op.lower(), [bound], np.float32)
            x = call.builder.call(op, [x, limit], call.shape, None, ("MaximumMinimumOptions", {}))
    return x


def _binary(op: str, kind: str) -> Callable[[Call], Value]:
    """Return what adds an operator of two operands that broadcast."""

    def added(call: Call) -> Value:
        if call.bound.get("alpha", 1) != 1:
            raise call.refused("a sum with a factor")
        return call.made(op, [call.operand("self"), call.operand("other")], kind)

    return added


def _unary(op: str, kind: str = "") -> Callable[[Call], Value]:
    """Return what adds a float operator of one operand."""

    def added(call: Call) -> Value:
        (x,) = call.node.all_input_nodes
        return call.builder.call(op, [call.read(x)], call.shape, None, (kind, {}) if kind else None)

    return added


def _softmax(call: Call) -> Value:
    x, axis = call.read(call.bound["self"]), call.bound["dim"] % len(call.shape)
    last = [each for each in range(len(call.shape)) if each != axis] + [axis]
    tensor = call.builder.in_order(call.builder.permuted(x, last))
    shape = tuple(call.shape[each] for each in last)
    made = call.builder.raw("SOFTMAX", [tensor], shape, None, ("SoftmaxOptions", {"beta": 1.0}))
    return call.builder.permuted(call.builder.held(made, shape, None), [last.index(each) for each in range(len(last))])


def _cat(call: Call) -> Value:
    values = [call.read(x) for x in call.bound["tensors"]]
    axis = call.builder.axis(call.bound["dim"], len(call.shape))
    return call.made("CONCATENATION", values, "ConcatenationOptions", axis=axis)


# --- moves ------------------------------------------------------------------------------------------------------------


def moved(call: Call, x: Value) -> Value | None:
    """Add what moves a value, codes or floats; None for an operator that moves nothing."""
    found = MOVED.get(call.node.target)
    return None if found is None else found(call, x)


def _reshape(call: Call, x: Value) -> Value:
    return call.builder.reshaped(x, call.shape)


def _permute(call: Call, x: Value) -> Value:
    return call.builder.permuted(x, [axis % len(x.shape) for axis in call.bound["dims"]])


def _swap(call: Call, x: Value) -> Value:
    rank = len(x.shape)
    order, first, second = [*range(rank)], call.bound["dim0"] % rank, call.bound["dim1"] % rank
    order[first], order[second] = second, first
    return call.builder.permuted(x, order)


def _slice(call: Call, x: Value) -> Value:
    bound = call.bound
    return cut(call, x, bound["dim"], bound["start"], bound["end"], bound["step"])


def cut(call: Call, x: Value, axis: int, start: int | None, stop: int | None, step: int = 1) -> Value:
    """Add a slice along one axis."""
    rank = len(x.shape)
    first, last, steps = slice(start, stop, step).indices(x.shape[axis])
    ranges = np.asarray([[0] * rank, x.shape, [1] * rank])
    ranges[:, axis] = first, last, steps
    held = [call.builder.plain("range", each) for each in ranges[:, order_of(rank)]]
    return call.builder.call("STRIDED_SLICE", [x, *held], call.shape, x.grid, ("StridedSliceOptions", {}))


def _max_pool(call: Call, x: Value) -> Value:
    return _pool(call, "MAX_POOL_2D", x, LOWEST if x.grid is None else FIRST)


def _pad(call: Call, x: Value) -> Value:
    bound, rank = call.bound, len(x.shape)
    pairs = [*zip(bound["pad"][::2], bound["pad"][1::2], strict=True)][::-1]
    widths = [(0, 0)] * (rank - len(pairs)) + [(int(a), int(b)) for a, b in pairs]
    if bound.get("mode", "constant") != "constant" or any(min(each) < 0 for each in widths):
        raise call.refused("padding by reflection, or by less than nothing")
    return _padded(call.builder, x, widths, None)


def _same(call: Call, x: Value) -> Value:
    return x


OPERATORS: dict[Any, Callable[[Call], Value]] = {
    aten.conv2d.default: _conv,
    aten.linear.default: _linear,
    aten.add.Tensor: _binary("ADD", "AddOptions"),
    aten.sub.Tensor: _binary("SUB", "SubOptions"),
    aten.mul.Tensor: _binary("MUL", "MulOptions"),
    aten.div.Tensor: _binary("DIV", "DivOptions"),
    aten.maximum.default: _binary("MAXIMUM", "MaximumMinimumOptions"),
    aten.minimum.default: _binary("MINIMUM", "MaximumMinimumOptions"),
    aten.cat.default: _cat,
    aten.adaptive_avg_pool2d.default: _global_pool,
    aten.mean.dim: lambda call: _mean(call, call.bound["dim"], keep=call.bound["keepdim"]),
    aten.avg_pool2d.default: _average_pool,
    aten.softmax.int: _softmax,
    aten.sigmoid.default: _unary("LOGISTIC"),
    aten.tanh.default: _unary("TANH"),
    aten.exp.default: _unary("EXP", "ExpOptions"),
    aten.sqrt.default: _unary("SQRT"),
    aten.rsqrt.default: _unary("RSQRT"),
}
"""Operators that compute."""

MOVED: dict[Any, Callable[[Call, Value], Value]] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.flatten.using_ints), _reshape),
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default), _reshape),
    aten.permute.default: _permute,
    aten.transpose.int: _swap,
    aten.slice.Tensor: _slice,
    **dict.fromkeys((aten.clone.default, aten.contiguous.default), _same),
    aten.max_pool2d.default: _max_pool,
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
}
"""Operators that move values."""


def shifted(codes: Tensor) -> Array:
    """Return 8-bit codes as int8 codes of the same values."""
    return codes.numpy() if codes.dtype == torch.int8 else (codes.to(torch.int16) + FIRST).to(torch.int8).numpy()
