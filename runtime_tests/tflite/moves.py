"""Operators that move values, as operators of LiteRT: on int8 codes or on floats, in the same form.

Must not know: which operators run on codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from calibrators.graph.aten import operator_name
from runtime_tests.tflite.builder import FIRST, Value, order_of
from runtime_tests.tflite.call import Call, padded, pool, reduced, resized

__all__ = ["cut", "moved", "moves"]

aten = torch.ops.aten

LOWEST = float(np.finfo(np.float32).min)


def moves(node: fx.Node) -> bool:
    """Return whether `moved` knows an operator."""
    return node.target in MOVED


def moved(call: Call, x: Value) -> Value:
    """Add what moves a value, codes or floats.

    raises: ModelError for an operator or form that LiteRT lacks.
    """
    found = MOVED.get(call.node.target)
    if found is None:
        raise call.refused(operator_name(call.node.target))
    return found(call, x)


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
    return pool(call, "MAX_POOL_2D", x, LOWEST if x.grid is None else FIRST)


def _pad(call: Call, x: Value) -> Value:
    """Add zeros, or their code; where the value itself is codes, the program fills it with that code."""
    bound, rank = call.bound, len(x.shape)
    pairs = [*zip(bound["pad"][::2], bound["pad"][1::2], strict=True)][::-1]
    widths = [(0, 0)] * (rank - len(pairs)) + [(int(a), int(b)) for a, b in pairs]
    is_zero = not bound["value"] or not call.node.meta["tensor_meta"].dtype.is_floating_point
    if bound.get("mode", "constant") != "constant" or not is_zero or any(min(each) < 0 for each in widths):
        raise call.refused("padding with something else than zeros, or by less than nothing")
    return padded(call.builder, x, widths, None)


def _nearest(call: Call, x: Value) -> Value:
    return resized(call, x, "RESIZE_NEAREST_NEIGHBOR", ("ResizeNearestNeighborOptions", {}))


def _maximum(call: Call, x: Value) -> Value:
    bound = call.bound
    made = reduced(call.builder, "REDUCE_MAX", x, bound["dim"] or range(len(x.shape)), x.grid)
    return made if bound["keepdim"] else call.builder.reshaped(made, call.shape)


def _pixel_shuffle(call: Call, x: Value) -> Value:
    (batch, channels, height, width), factor = x.shape, int(call.bound["upscale_factor"])
    split = call.builder.reshaped(x, (batch, channels // factor**2, factor, factor, height, width))
    return call.builder.reshaped(call.builder.permuted(split, (0, 1, 4, 2, 5, 3)), call.shape)


def _same(call: Call, x: Value) -> Value:
    return x


MOVED: dict[Any, Callable[[Call, Value], Value]] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.flatten.using_ints), _reshape),
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default), _reshape),
    aten.permute.default: _permute,
    aten.transpose.int: _swap,
    aten.slice.Tensor: _slice,
    **dict.fromkeys((aten.clone.default, aten.contiguous.default), _same),
    aten.max_pool2d.default: _max_pool,
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    aten.upsample_nearest2d.vec: _nearest,
    aten.amax.default: _maximum,
    aten.pixel_shuffle.default: _pixel_shuffle,
}
"""Operators that move values."""
