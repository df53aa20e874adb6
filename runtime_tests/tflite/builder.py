"""Add tensors and operators of LiteRT to a draft, with the axes of images as LiteRT orders them.

Every value of four axes is held with axis 1 last (NHWC for images), whatever it is; shapes and axes in this package are
those of the program, before that.

Must not know: programs, which operator of a program becomes which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_tests.tflite.draft import Draft

__all__ = ["CHANNELS_LAST", "FIRST", "Builder", "Grid", "Value", "order_of"]

Array = NDArray[Any]
Shape = tuple[int, ...]

CHANNELS_LAST = (0, 2, 3, 1)
FIRST, LAST = -128, 127

VERSIONS = {
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D"), 3),
    "FULLY_CONNECTED": 12,
    **dict.fromkeys(("RESHAPE", "RELU", "RELU6", "TANH", "LOGISTIC", "LEAKY_RELU", "GELU", "CAST", "GATHER"), 1),
    **dict.fromkeys(
        ("SQUARED_DIFFERENCE", "EXP", "RSQRT", "SQRT", "DIV", "SUB", "NEG", "ABS", "BATCH_MATMUL", "RESIZE_BILINEAR"), 1
    ),
}
"""Oldest versions of operators that hold what is written here; of the others it is 2, with int8."""


@dataclass(frozen=True)
class Grid:
    """The grid of int8 codes; low, high: the codes that occur."""

    scale: float
    zero_point: int
    low: int = FIRST
    high: int = LAST

    @property
    def full(self) -> Grid:
        return Grid(self.scale, self.zero_point)

    @property
    def parameters(self) -> dict[str, Any]:
        return {"scale": [self.scale], "zeroPoint": [self.zero_point]}

    def is_like(self, other: Grid) -> bool:
        """Return whether a code has the same value on both grids."""
        return (self.scale, self.zero_point) == (other.scale, other.zero_point)


@dataclass(frozen=True)
class Value:
    """A value of the program: its tensor, its shape, and the grid of its codes; floats have none."""

    tensor: int
    shape: Shape
    grid: Grid | None = None
    dtype: str = "float32"


def order_of(rank: int) -> Shape:
    """Return the axes of a value in the order in which they are held."""
    return CHANNELS_LAST if rank == len(CHANNELS_LAST) else tuple(range(rank))


class Builder:
    """Writes operators into a draft."""

    def __init__(self) -> None:
        self.draft = Draft()
        self._floats: dict[int, Value] = {}

    # --- values ---------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: Shape, dtype: str, parameters: Any = None) -> Value:
        """Add an input."""
        held = self.draft.value(name, [shape[axis] for axis in order_of(len(shape))], dtype, parameters)
        self.draft.inputs.append(held)
        return Value(held, shape, None, dtype)

    def constant(self, name: str, data: Array, rank: int | None = None) -> Value:
        """Add a constant of floats; rank: of the values with which it is combined, to which axes of 1 are added."""
        return self._constant(name, data, None, rank)

    def codes(self, name: str, data: Array, grid: Grid, rank: int | None = None) -> Value:
        """Add a constant of int8 codes."""
        return self._constant(name, data, grid, rank)

    def _constant(self, name: str, data: Array, grid: Grid | None, rank: int | None) -> Value:
        whole = data.reshape((1,) * max(0, (rank or data.ndim) - data.ndim) + data.shape)
        held = self.draft.constant(name, whole.transpose(order_of(whole.ndim)), grid.parameters if grid else None)
        return Value(held, whole.shape, grid, data.dtype.name)

    def plain(self, name: str, data: Any, dtype: Any = np.int32, parameters: Any = None) -> int:
        """Add a constant that no value of the program is: axes, sizes, weights; return its tensor."""
        return self.draft.constant(name, np.asarray(data, dtype), parameters)

    def widened(self, x: Value, rank: int) -> Value:
        """Return a value with leading axes of 1."""
        return x if len(x.shape) >= rank else self.reshaped(x, (1,) * (rank - len(x.shape)) + x.shape)

    def axis(self, axis: int, rank: int) -> int:
        """Return where an axis is held."""
        return order_of(rank).index(axis % rank)

    # --- operators ------------------------------------------------------------------------------------------------

    def call(
        self,
        op: str,
        inputs: Sequence[Value | int],
        shape: Shape,
        grid: Grid | None,
        options: tuple[str, dict[str, Any]] | None = None,
    ) -> Value:
        """Add an operator whose result has this shape; grid: of the result, None for floats."""
        order = order_of(len(shape))
        return Value(self.raw(op, inputs, [shape[axis] for axis in order], grid, options), shape, grid)

    def raw(
        self, op: str, inputs: Sequence[Value | int], held: Sequence[int], grid: Grid | None, options: Any = None
    ) -> int:
        """Add an operator whose result is held with this shape; return its tensor."""
        dtype, parameters = ("int8", grid.parameters) if grid else ("float32", None)
        result = self.draft.value(op.lower(), held, dtype, parameters)
        tensors = [x.tensor if isinstance(x, Value) else x for x in inputs]
        return self.draft.add(op, VERSIONS.get(op, 2), tensors, result, options)

    def floats(self, x: Value) -> Value:
        """Return the floats of a value."""
        if x.grid is None:
            return x
        if x.tensor not in self._floats:
            self._floats[x.tensor] = self.call("DEQUANTIZE", [x], x.shape, None, ("DequantizeOptions", {}))
        return replace(self._floats[x.tensor], shape=x.shape)

    def quantized(self, x: Value, grid: Grid) -> Value:
        """Return the codes of floats."""
        made = self.call("QUANTIZE", [x], x.shape, grid.full, ("QuantizeOptions", {}))
        return self.clipped(made, grid)

    def clipped(self, x: Value, grid: Grid) -> Value:
        """Limit the codes of a value to those of a grid."""
        assert x.grid is not None
        for op, limit, applies in (
            ("MAXIMUM", grid.low, grid.low > x.grid.low),
            ("MINIMUM", grid.high, grid.high < x.grid.high),
        ):
            if applies:
                bound = self.plain(op.lower(), [limit], np.int8, grid.parameters)
                x = self.call(op, [x, bound], x.shape, x.grid, ("MaximumMinimumOptions", {}))
        return replace(x, grid=grid)

    # --- shapes ---------------------------------------------------------------------------------------------------

    def permuted(self, x: Value, axes: Sequence[int]) -> Value:
        """Return the value with axes in another order."""
        rank = len(axes)
        shape = tuple(x.shape[axis] for axis in axes)
        before, after = order_of(rank), order_of(rank)
        order = tuple(before.index(axes[axis]) for axis in after)
        return replace(x, tensor=self._transposed(x, order), shape=shape)

    def reshaped(self, x: Value, shape: Shape) -> Value:
        """Return the value with another shape."""
        plain = self.in_order(x)
        held = self._reshaped(replace(x, tensor=plain), shape)
        back = replace(x, tensor=held, shape=shape)
        return replace(back, tensor=self._transposed(back, order_of(len(shape))))

    def in_order(self, x: Value) -> int:
        """Return the tensor of a value with the axes of the program."""
        order = order_of(len(x.shape))
        return self._transposed(x, tuple(order.index(axis) for axis in range(len(order))))

    def held(self, tensor: int, shape: Shape, grid: Grid | None) -> Value:
        """Return the value of a tensor that has the axes of the program."""
        x = Value(tensor, shape, grid)
        return replace(x, tensor=self._transposed(x, order_of(len(shape))))

    def _transposed(self, x: Value, order: Sequence[int]) -> int:
        """Return the tensor with its axes, as it holds them, in another order; axes of 1 move at no cost."""
        now = self.draft.shape(x.tensor)
        shape = [now[axis] for axis in order]
        if [axis for axis in order if now[axis] > 1] == [axis for axis in range(len(now)) if now[axis] > 1]:
            return self._reshaped(x, shape)
        return self.raw("TRANSPOSE", [x, self.plain("axes", order)], shape, x.grid, ("TransposeOptions", {}))

    def _reshaped(self, x: Value, shape: Sequence[int]) -> int:
        if self.draft.shape(x.tensor) == [*shape]:
            return x.tensor
        options = ("ReshapeOptions", {"newShape": [*shape]})
        return self.raw("RESHAPE", [x, self.plain("shape", shape)], shape, x.grid, options)
