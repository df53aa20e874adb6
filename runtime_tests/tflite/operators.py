"""Operators that compute, as operators of LiteRT: on int8 codes or on floats, in the same form.

An operator that is neither here nor in `moves` has no form in a LiteRT file, and is refused.

Must not know: which operators run on codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from calibrators.graph.aten import bind, constant, is_constant, operator_name
from calibrators.graph.canonical import clip_bounds
from calibrators.program.qdq_program import DEQUANTIZE, dequantized
from runtime_tests.tflite.builder import Value
from runtime_tests.tflite.call import Call, Window, pool, reduced, resized

__all__ = ["computed"]

aten = torch.ops.aten
Array = NDArray[Any]

RELU6 = 6.0


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
    """Add a convolution; one over sequences is one over images of one row."""
    weight, scales, bias = _weights(call)
    x, groups, bound = call.read(call.bound["input"]), call.bound["groups"], call.bound
    shape, moves = call.shape, [bound[name] for name in ("stride", "padding", "dilation")]
    if weight.ndim == 3:
        x, shape, weight = (call.builder.reshaped(x, _row(x.shape)), _row(shape), weight[:, :, None])
        moves = [
            each if isinstance(each, str) else [first, *each] for each, first in zip(moves, (1, 0, 1), strict=True)
        ]
    window = Window(weight.shape[2:], *moves)
    x, padding = window.applied(call.builder, x, shape)
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
    made = call.builder.call(op, [x, held, *bias], shape, call.full, (kind, options))
    return made if shape == call.shape else call.builder.reshaped(made, call.shape)


def _row(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an image of one row that holds sequences."""
    return (*shape[:2], 1, *shape[2:])


def _grid_of(scales: Array | None, axis: int) -> dict[str, Any] | None:
    return None if scales is None else _per_axis(scales, axis)


def _linear(call: Call) -> Value:
    weight, scales, bias = _weights(call)
    x = call.read(call.bound["input"])
    held = call.builder.plain("weight", weight, weight.dtype, _grid_of(scales, 0))
    inputs = [call.builder.in_order(x), held, *bias]
    return call.in_order("FULLY_CONNECTED", inputs, ("FullyConnectedOptions", {"keepNumDims": True}))


def _matmul(call: Call) -> Value:
    operands = [call.read(x) for x in call.node.all_input_nodes]
    if len(operands) != 2 or min(len(x.shape) for x in operands) < 2:
        raise call.refused("a product with a vector or with itself")
    return call.in_order("BATCH_MATMUL", [*map(call.builder.in_order, operands)], ("BatchMatMulOptions", {}))


# --- pools, means -----------------------------------------------------------------------------------------------------


def _average_pool(call: Call) -> Value:
    x = call.read(call.bound["self"])
    fill = 0.0 if x.grid is None else float(x.grid.zero_point)
    return pool(call, "AVERAGE_POOL_2D", x, fill, inside=not call.bound["count_include_pad"])


def _mean(call: Call, axes: Sequence[int], *, keep: bool) -> Value:
    x = call.read(call.bound["self"])
    rank = len(x.shape)
    along = call.builder.plain("axes", sorted(axis % rank for axis in axes))
    if len(call.shape) != rank:
        return call.in_order("MEAN", [call.builder.in_order(x), along], ("ReducerOptions", {"keepDims": keep}))
    return reduced(call.builder, "MEAN", x, axes, call.full)


def _layer_norm(call: Call) -> Value:
    builder, bound = call.builder, call.bound
    x, rank = call.read(bound["input"]), len(call.shape)
    axes = [*range(rank - len(bound["normalized_shape"]), rank)]

    def combined(op: str, kind: str, a: Value, b: Value) -> Value:
        return builder.call(op, [a, b], a.shape, None, (kind, {}) if kind else None)

    mean = reduced(builder, "MEAN", x, axes, None)
    squares = combined("SQUARED_DIFFERENCE", "SquaredDifferenceOptions", x, mean)
    variance = reduced(builder, "MEAN", squares, axes, None)
    eps = builder.constant("eps", np.asarray(bound["eps"], np.float32), rank)
    factor = builder.call("RSQRT", [combined("ADD", "AddOptions", variance, eps)], variance.shape, None)
    result = combined("MUL", "MulOptions", combined("SUB", "SubOptions", x, mean), factor)
    for name, op, kind in (("weight", "MUL", "MulOptions"), ("bias", "ADD", "AddOptions")):
        if bound[name] is not None:
            operand = builder.constant(name, _array(call, bound[name]), rank)
            result = combined(op, kind, result, operand)
    return result


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


def _binary(op: str, kind: str, *, swapped: bool = False) -> Callable[[Call], Value]:
    """Return what adds an operator of two operands that broadcast; swapped: the second comes first."""

    def added(call: Call) -> Value:
        first, second = call.operand("self"), call.operand("other")
        if (alpha := call.bound.get("alpha", 1)) != 1:
            scaled = second if not swapped else first
            factor = call.builder.constant("alpha", np.asarray(alpha, np.float32), len(call.shape))
            scaled = call.builder.call("MUL", [scaled, factor], scaled.shape, None, ("MulOptions", {}))
            first, second = (first, scaled) if not swapped else (scaled, second)
        return call.made(op, [second, first] if swapped else [first, second], kind)

    return added


def _unary(op: str, kind: str = "") -> Callable[[Call], Value]:
    """Return what adds a float operator of one operand."""

    def added(call: Call) -> Value:
        (x,) = call.node.all_input_nodes
        return call.builder.call(op, [call.read(x)], call.shape, None, (kind, {}) if kind else None)

    return added


def _gelu(call: Call) -> Value:
    return call.made(
        "GELU", [call.read(call.bound["self"])], "GeluOptions", approximate=call.bound["approximate"] == "tanh"
    )


def _leaky_relu(call: Call) -> Value:
    slope = call.bound["negative_slope"]
    return call.made("LEAKY_RELU", [call.read(call.bound["self"])], "LeakyReluOptions", alpha=float(slope))


def _bilinear(call: Call) -> Value:
    corners = bool(call.bound["align_corners"])
    options = {"alignCorners": corners, "halfPixelCenters": not corners}
    return resized(call, call.read(call.bound["input"]), "RESIZE_BILINEAR", ("ResizeBilinearOptions", options))


def _softmax(call: Call) -> Value:
    x, axis = call.read(call.bound["self"]), call.bound["dim"] % len(call.shape)
    last = [each for each in range(len(call.shape)) if each != axis] + [axis]
    tensor = call.builder.in_order(call.builder.permuted(x, last))
    shape = tuple(call.shape[each] for each in last)
    made = call.builder.raw("SOFTMAX", [tensor], shape, None, ("SoftmaxOptions", {"beta": 1.0}))
    return call.builder.permuted(call.builder.held(made, shape, None), [last.index(each) for each in range(len(last))])


def _cast(call: Call) -> Value:
    if call.node.meta["tensor_meta"].dtype != torch.float32:
        raise call.refused("a conversion to another type than float32")
    (x,) = call.node.all_input_nodes
    return call.made("CAST", [call.read(x)], "CastOptions")


def _embedding(call: Call) -> Value:
    table = call.builder.plain("table", _array(call, call.bound["weight"]), np.float32)
    indices = call.builder.in_order(call.read(call.bound["indices"]))
    return call.in_order("GATHER", [table, indices], ("GatherOptions", {"axis": 0}))


def _cat(call: Call) -> Value:
    values = [call.read(x) for x in call.bound["tensors"]]
    axis = call.builder.axis(call.bound["dim"], len(call.shape))
    return call.made("CONCATENATION", values, "ConcatenationOptions", axis=axis)


OPERATORS: dict[Any, Callable[[Call], Value]] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default), _conv),
    aten.linear.default: _linear,
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), _matmul),
    aten.layer_norm.default: _layer_norm,
    aten.add.Tensor: _binary("ADD", "AddOptions"),
    aten.sub.Tensor: _binary("SUB", "SubOptions"),
    aten.rsub.Scalar: _binary("SUB", "SubOptions", swapped=True),
    aten.rsub.Tensor: _binary("SUB", "SubOptions", swapped=True),
    aten.mul.Tensor: _binary("MUL", "MulOptions"),
    aten.div.Tensor: _binary("DIV", "DivOptions"),
    aten.maximum.default: _binary("MAXIMUM", "MaximumMinimumOptions"),
    aten.minimum.default: _binary("MINIMUM", "MaximumMinimumOptions"),
    aten.embedding.default: _embedding,
    **dict.fromkeys((aten.to.dtype, aten._to_copy.default), _cast),
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
    aten.neg.default: _unary("NEG", "NegOptions"),
    aten.abs.default: _unary("ABS", "AbsOptions"),
    aten.gelu.default: _gelu,
    aten.leaky_relu.default: _leaky_relu,
    aten.upsample_bilinear2d.vec: _bilinear,
}
"""Operators that compute."""
