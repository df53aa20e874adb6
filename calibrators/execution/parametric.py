"""An operator with a weight, and the arithmetic it trains in.

Must not know: quantizers, blocks, methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ParametricOp"]

aten = torch.ops.aten


class ParametricOp(nn.Module):
    """An operator with a weight; in training it may compute in another precision, its result is always float32.

    A grouped operator stays in float32: another precision would only lose time.
    """

    def __init__(self, operator: Callable[..., Tensor], *, dense: bool) -> None:
        super().__init__()
        self.operator, self.dense = operator, dense
        self.precision = self.gradients = torch.float32

    def train_in(self, precision: torch.dtype, gradients: torch.dtype) -> None:
        """Compute values in `precision` from now on, and gradients in `gradients`, if all channels are mixed."""
        if self.dense:
            self.precision, self.gradients = precision, gradients

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        if not self.training or self.gradients is torch.float32:
            return self.operator(x, weight, bias, *arguments)
        if self.precision is torch.float32 and self.operator in GRADIENTS:
            y: Tensor = _RoundedGradient.apply(self.operator, self.gradients, x, weight, bias, *arguments)  # type: ignore[no-untyped-call]
            return y
        operands = (None if y is None else y.to(self.precision) for y in (x, weight, bias))
        return self.operator(*operands, *arguments).to(torch.float32)


class _RoundedGradient(torch.autograd.Function):
    """An operator in float32, whose gradients are computed from operands in a precision that has fewer bits."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Callable[..., Tensor],
        precision: torch.dtype,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *arguments: Any,
    ) -> Tensor:
        ctx.save_for_backward(x.to(precision), weight.to(precision))
        ctx.compute, ctx.arguments = GRADIENTS[operator], arguments
        return operator(x, weight, bias, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:5]
        found = ctx.compute(grads[0].to(x.dtype), x, weight, wanted, *ctx.arguments)
        floats = (None if needed is False else g.to(torch.float32) for g, needed in zip(found, wanted, strict=True))
        return None, None, *floats, *(None for _ in ctx.arguments)


def _of_linear(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    rows = grad.flatten(0, -2)
    return (
        grad @ weight if wanted[0] else None,
        rows.T @ x.flatten(0, -2) if wanted[1] else None,
        rows.new_ones(len(rows)) @ rows if wanted[2] else None,
    )


def _of_convolution(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], *arguments: Any
) -> Sequence[Tensor | None]:
    *window, groups = arguments  # stride, padding, dilation
    rest = (False, [0] * (x.ndim - 2), groups, list(wanted))  # not transposed, no padding of the output
    found: Sequence[Tensor | None] = aten.convolution_backward(grad, x, weight, [len(weight)], *window, *rest)
    return found


GRADIENTS: dict[Callable[..., Tensor], Callable[..., Sequence[Tensor | None]]] = {
    aten.linear.default: _of_linear,
    aten.conv1d.default: _of_convolution,
    aten.conv2d.default: _of_convolution,
    aten.conv3d.default: _of_convolution,
}
"""Gradients of input, weight and bias, by operator; others compute theirs in the precision of their values."""
