"""Training's element-wise formulas with their gradients, computed chunk by chunk.

A formula reads its tensors from memory once and writes its result once: a chunk stays in a core's cache while the
kernels of the formula run over it. A backward pass computes again what a forward pass would otherwise have to keep.

Must not know: graphs, which tensors are activations, the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Ends", "FakeQuantize", "chunks", "mean_square"]

aten = torch.ops.aten

CHUNK = 1 << 16
"""Elements of a chunk: four chunks of float32 take 1 MiB. With 2^14 calls take longer than kernels, with 2^18 chunks
leave a cache of 2 MiB."""

INSIDE = 0.5001
"""A value closer than this many steps to its code was rounded; one farther away was clipped."""


def chunks(*tensors: Tensor | None) -> Iterator[list[Any]]:
    """Yield slices of flat tensors of one length, None for None; on a GPU the whole tensors at once."""
    given = [x for x in tensors if x is not None]
    size = CHUNK if given[0].device.type == "cpu" else max(1, len(given[0]))
    for start in range(0, len(given[0]), size):
        yield [None if x is None else x[start : start + size] for x in tensors]


class Scratch:
    """Memory for intermediate results of one chunk after the other."""

    def __init__(self, like: Tensor, count: int) -> None:
        length = min(len(like), CHUNK) if like.device.type == "cpu" else len(like)
        self.rows = [like.new_empty(length) for _ in range(count)]

    def of(self, length: int) -> list[Tensor]:
        """Return tensors of `length` elements, whose values are arbitrary."""
        return [row[:length] for row in self.rows]


class Ends(NamedTuple):
    """Where values end.

    codes: the lowest and highest code, counted from zero.
    clip:  bounds to which values are clipped before they are quantized, None where they are not.
    nonnegative: whether no value is below the grid.
    """

    codes: tuple[int, int]
    clip: tuple[float, float] | None
    nonnegative: bool


class FakeQuantize(torch.autograd.Function):
    """c + mask * (fake_quant(c) - c) with c = x clipped, and the gradient of LSQ for the logarithm of the scale.

    With v = c / scale the rounding error is d = round(clamp(v, lo, hi)) - v. Straight through inside the grid:
    dy/dc = 1 and dy/d(log scale) = scale * d; outside: 0 and scale * bound. Where the mask is 0: 1 and 0.
    mask: of x's shape and layout, None for 1 everywhere.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, ends: Ends, mask: Tensor | None) -> Tensor:
        scale = log_scale.exp()
        per_scale = scale.reciprocal()
        x = x if _is_dense(x) else x.contiguous()
        y = torch.empty_like(x)
        masked = None if mask is None else _flat(mask, x)
        scratch = Scratch(_flat(x, x), 2)
        for values, weight, out in chunks(_flat(x, x), masked, _flat(y, x)):
            clipped, steps = scratch.of(len(values))
            clipped = values if ends.clip is None else torch.clamp(values, *ends.clip, out=clipped)
            steps = torch.mul(clipped, per_scale, out=out if weight is None else steps)
            steps.clamp_(*ends.codes).round_().mul_(scale)
            if weight is not None:
                torch.lerp(clipped, steps, weight.to(x.dtype), out=out)
        ctx.save_for_backward(x, scale, mask)
        ctx.ends = ends
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mask = ctx.saved_tensors
        (lo, hi), clip, nonnegative = ctx.ends
        learns, per_scale = ctx.needs_input_grad[1], scale.reciprocal()
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums: list[Tensor] = []  # of every chunk: by the rounding error, by clipping to hi, by clipping to lo
        masked, out = (None if t is None else _flat(t, x) for t in (mask, to_x))
        scratch = Scratch(_flat(x, x), 3)
        for grad, values, weight, result in chunks(_flat(grads[0], x), _flat(x, x), masked, out):
            steps, error, inner = scratch.of(len(values))
            clipped = values if clip is None else torch.clamp(values, *clip, out=steps)
            torch.mul(clipped, per_scale, out=steps)
            torch.clamp(steps, lo, hi, out=error).round_().sub_(steps)
            if weight is not None:
                error.mul_(weight)
            inner = inner if result is None else result
            aten.hardtanh_backward.grad_input(grad, error, -INSIDE, INSIDE, grad_input=inner)
            if learns:
                outer = torch.sub(grad, inner, out=steps)
                sums += [torch.dot(inner, error), *_clipped_sums(outer, error, nonnegative=nonnegative)]
            if result is not None and clip is not None:
                aten.hardtanh_backward.grad_input(inner, values, *clip, grad_input=result)
        to_scale = None
        if learns:
            rounded, above, below = torch.stack(sums).view(-1, 3).sum(0)
            to_scale = (rounded + hi * above + lo * below) * scale
        return to_x, to_scale, None, None


def _clipped_sums(clipped: Tensor, error: Tensor, *, nonnegative: bool) -> tuple[Tensor, Tensor]:
    """Return the sums of the gradients of values that were clipped from above, and from below; uses up `clipped`."""
    total = clipped.sum()
    if nonnegative:
        return total, torch.zeros_like(total)
    above = aten.hardtanh_backward.grad_input(clipped, error, -math.inf, 0.0, grad_input=clipped).sum()
    return above, total - above


class _MeanSquare(torch.autograd.Function):
    """The mean of (y - t)^2, with a gradient for y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor) -> Tensor:
        y = y if _is_dense(y) else y.contiguous()
        ctx.save_for_backward(y, t)
        scratch = Scratch(_flat(y, y), 1)
        sums = []
        for values, targets in chunks(_flat(y, y), _flat(t, y)):
            (difference,) = scratch.of(len(values))
            torch.sub(values, targets, out=difference)
            sums.append(torch.dot(difference, difference))
        return torch.stack(sums).sum() / y.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, t = ctx.saved_tensors
        to_y = torch.empty_like(y)
        factor = grads[0] * (2 / y.numel())
        for values, targets, out in chunks(_flat(y, y), _flat(t, y), _flat(to_y, y)):
            torch.sub(values, targets, out=out).mul_(factor)
        return to_y, None


def mean_square(y: Tensor, t: Tensor) -> Tensor:
    """Return the mean of (y - t)^2, []; only y gets a gradient."""
    result: Tensor = _MeanSquare.apply(y, t)  # type: ignore[no-untyped-call]
    return result


def _is_dense(x: Tensor) -> bool:
    """Return whether the elements of x, in some order of its axes, fill its memory without gaps."""
    return bool(aten.is_non_overlapping_and_dense(x))


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """Return the elements of x in the order in which the dense tensor `like`, of the same shape, has them in memory."""
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,))
