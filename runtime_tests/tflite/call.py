"""A call of an operator of a program that is to become operators of LiteRT, and what several of them need.

Must not know: which operators run on codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from calibrators.errors import ModelError, argument
from calibrators.graph.aten import bind, shape_of
from runtime_tests.tflite.builder import Builder, Grid, Value, order_of

__all__ = ["Call", "Window", "padded", "pool", "reduced", "resized"]

SAME, VALID = 0, 1
"""Paddings of LiteRT, in which SAME adds one more at the end than at the beginning where it adds an odd number."""


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

    @property
    def full(self) -> Grid | None:
        """The grid of the result with all codes of the container."""
        return None if self.grid is None else self.grid.full

    def made(self, op: str, inputs: Sequence[Value | int], kind: str, **options: Any) -> Value:
        """Add the operator that gives the result."""
        return self.builder.call(op, inputs, self.shape, self.full, (kind, options))

    def in_order(self, op: str, inputs: Sequence[int], options: tuple[str, dict[str, Any]]) -> Value:
        """Add the operator that gives the result with the axes of the program, from such tensors."""
        made = self.builder.raw(op, inputs, self.shape, self.full, options)
        return self.builder.held(made, self.shape, self.full)

    def refused(self, why: str) -> ModelError:
        return ModelError(
            f"{self.node.name}: {why} has no form in a LiteRT file here; export for another target "
            f"({argument('target', 'ort-cpu')})."
        )


@dataclass(frozen=True)
class Window:
    """The moves of a window over images; one number stands for two."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "padding", "dilation"):
            sizes = getattr(self, name)
            object.__setattr__(self, name, [*sizes] * (1 if len(sizes) == 2 else 2))

    def is_same(self, x: Value, shape: Sequence[int]) -> bool:
        """Return whether LiteRT's SAME pads alike; shape: of the result."""
        for axis in range(2):
            size, step = x.shape[2 + axis], self.stride[axis]
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            total = max((shape[2 + axis] - 1) * step + reach - size, 0)
            if shape[2 + axis] != -(-size // step) or total != 2 * int(self.padding[axis]):
                return False
        return True

    def applied(self, builder: Builder, x: Value, shape: Sequence[int], fill: float | None = None) -> tuple[Value, int]:
        """Return the input, padded if no padding of LiteRT does it, and the padding that remains.

        fill: code or float with which it is padded; None: 0.
        """
        if not any(self.padding):
            return x, VALID
        if fill is None and self.is_same(x, shape):
            return x, SAME
        widths = [(0, 0), (0, 0), *((int(n), int(n)) for n in self.padding)]
        return padded(builder, x, widths, fill), VALID


def padded(builder: Builder, x: Value, widths: Sequence[tuple[int, int]], fill: float | None) -> Value:
    """Pad a value; fill: code or float, None for 0."""
    shape = tuple(size + sum(width) for size, width in zip(x.shape, widths, strict=True))
    amounts = builder.plain("paddings", [widths[axis] for axis in order_of(len(shape))])
    if fill is None:
        return builder.call("PAD", [x, amounts], shape, x.grid, ("PadOptions", {}))
    dtype, parameters = (np.float32, None) if x.grid is None else (np.int8, x.grid.parameters)
    return builder.call(
        "PADV2", [x, amounts, builder.plain("fill", [fill], dtype, parameters)], shape, x.grid, ("PadV2Options", {})
    )


def pool(call: Call, op: str, x: Value, fill: float | None, *, inside: bool = False) -> Value:
    """Add a pool; inside: whether the mean leaves out what is padded."""
    bound = call.bound
    kernel = bound["kernel_size"]
    window = Window(kernel, bound["stride"] or kernel, bound["padding"], bound.get("dilation") or (1, 1))
    if bound["ceil_mode"] or bound.get("divisor_override") is not None or any(d != 1 for d in window.dilation):
        raise call.refused("a pool with ceil_mode, dilation or a divisor")
    if inside and any(window.padding):
        if not window.is_same(x, call.shape):
            raise call.refused("an average pool that leaves out its padding")
        padding = SAME
    else:
        x, padding = window.applied(call.builder, x, call.shape, fill)
    options = {
        "padding": padding,
        **dict(
            zip(("strideH", "strideW", "filterHeight", "filterWidth"), [*window.stride, *window.kernel], strict=True)
        ),
    }
    return call.builder.call(op, [x], call.shape, x.grid, ("Pool2DOptions", options))


def reduced(builder: Builder, op: str, x: Value, axes: Sequence[int], grid: Grid | None) -> Value:
    """Reduce a value along axes, which stay with size 1."""
    rank = len(x.shape)
    over = {axis % rank for axis in axes}
    along = builder.plain("axes", sorted(builder.axis(axis, rank) for axis in over))
    shape = tuple(1 if axis in over else size for axis, size in enumerate(x.shape))
    return builder.call(op, [x, along], shape, grid, ("ReducerOptions", {"keepDims": True}))


def resized(call: Call, x: Value, op: str, options: tuple[str, dict[str, Any]]) -> Value:
    """Resize images by the ratio of their sizes, the only one that LiteRT knows."""
    for factor, before, after in zip(call.bound["scale_factors"] or (), x.shape[2:], call.shape[2:], strict=False):
        if factor * before != after:
            raise call.refused("resizing by a factor that is not the ratio of the sizes")
    return call.builder.call(op, [x, call.builder.plain("size", call.shape[2:])], call.shape, x.grid, options)
