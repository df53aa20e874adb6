"""Trainable quantizers: an activation scale, with random drop, and the rounding of a unit's weights.

Exported values always come from grid.numerics; this is the differentiable form that training sees.

Must not know: graphs, blocks, methods, the training loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calibrators.grid.numerics import along_axis, code_limits, fake_quant
from calibrators.grid.spec import QParams, QuantizedTensor

__all__ = ["ActivationQuantizer", "Masks", "Rounding"]

STRETCH = 1.2
"""Width of the stretched sigmoid: from -0.1 to 1.1, so that 0 and 1 are reached (AdaRound, eq. 23)."""

INSIDE = 0.5001
"""A value closer than this many steps to its code was rounded; one farther away was clipped."""


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """Return a generator for a device: the given one on the CPU, else a new one seeded from it."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(1 << 62, (), generator=generator)))


class Masks:
    """Random 0/1 masks that keep an element with probability `keep`, drawn with a generator of the device.

    On the CPU they are cut out of one random pool: drawing it once and starting at a random place in it costs next to
    nothing per mask. A GPU draws every mask.
    """

    def __init__(self, keep: float, generator: torch.Generator, device: torch.device) -> None:
        self.keep, self.generator, self.device = keep, generator, device
        self.pool = torch.empty(0)

    def like(self, x: Tensor) -> Tensor:
        """Return a mask of x's shape, dense, in the memory layout that results of x have."""
        if self.device.type != "cpu":
            return torch.empty_like(x).bernoulli_(self.keep, generator=self.generator)
        if len(self.pool) < 2 * x.numel():
            uniform = torch.rand(2 * x.numel() + (1 << 16), generator=self.generator)
            self.pool = (uniform < self.keep).to(torch.float32)
        room = len(self.pool) - x.numel()
        start = int(torch.randint(room, (), generator=self.generator))
        stride = torch.empty_like(x, device="meta").stride()
        return self.pool.as_strided(x.size(), stride, start)


class _FakeQuantize(torch.autograd.Function):
    """x -> x + mask * (fake_quant(x) - x), with the gradient of LSQ for the logarithm of the scale.

    With v = x / scale the rounding error is d = round(clamp(v, lo, hi)) - v. Straight through inside the grid:
    dy/dx = 1 and dy/d(log scale) = scale * d; outside: 0 and scale * bound. Where the mask is 0: 1 and 0.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_scale: Tensor, bounds: tuple[int, int], mask: Tensor | None, nonnegative: bool
    ) -> Tensor:
        lo, hi = bounds
        scale = log_scale.exp()
        steps = x / scale
        error = torch.clamp(steps, lo, hi).round_().sub_(steps)
        if mask is not None:
            error.mul_(mask)
        ctx.save_for_backward(error, scale)
        ctx.lo, ctx.hi, ctx.nonnegative = lo, hi, nonnegative
        return steps.copy_(error).mul_(scale).add_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        error, scale = ctx.saved_tensors
        inner = torch.ops.aten.hardtanh_backward(grad, error, -INSIDE, INSIDE)
        total = _dot(inner, error)
        if ctx.nonnegative:  # only the upper end clips
            total = total + ctx.hi * (grad.sum() - inner.sum())
        else:
            clipped = grad - inner
            above = clipped.mul(error < 0).sum()
            total = total + ctx.hi * above + ctx.lo * (clipped.sum() - above)
        return inner, total * scale, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a * b; without a temporary where both are dense in the same layout."""
    if a.stride() != b.stride():
        return (a * b).sum()
    return torch.dot(a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,)))


class ActivationQuantizer(nn.Module):
    """Fake quantization of one activation site: exact until `learn` is called, exact again after `harden`.

    log_scale: logarithm of the scale, the trained parameter, so that the scale stays positive and its learning rate
               is relative. Source: Esser et al. 2020 (LSQ) for the gradient. Departs: the logarithm; the zero point
               stays.
    """

    def __init__(self, qparams: QParams, *, nonnegative: bool) -> None:
        super().__init__()
        self.qparams, self.nonnegative = qparams, nonnegative and int(qparams.zero_point) == qparams.spec.qmin
        self.log_scale = nn.Parameter(qparams.scale.log(), requires_grad=False)
        self.masks: Masks | None = None
        self.bypass = False
        self.bounds = _bounds(qparams)

    def learn(self, masks: Masks | None, *, scale: bool, bypass: bool = False) -> None:
        """Quantize differentiably from now on, with random drop by `masks` (None: never); `bypass`: do not quantize."""
        self.train()
        self.masks, self.bypass = masks, bypass
        self.bounds = _bounds(self.qparams)
        self.log_scale.requires_grad_(scale)

    def harden(self) -> None:
        """Make the learned scale the exact one, and compute exactly from now on."""
        if self.log_scale.requires_grad:
            scale = self.log_scale.detach().exp().to(self.qparams.scale.device)
            self.qparams = replace(self.qparams, scale=scale)
        self.log_scale.requires_grad_(False)
        self.masks = None
        self.eval()

    def reset(self, qparams: QParams) -> None:
        """Set other parameters, and compute exactly from now on."""
        self.qparams = qparams
        self.log_scale.data.copy_(qparams.scale.log())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return fake_quant(x, self.qparams)
        if self.bypass:
            return x
        mask = self.masks.like(x) if self.masks is not None else None
        y: Tensor = _FakeQuantize.apply(x, self.log_scale, self.bounds, mask, self.nonnegative)  # type: ignore[no-untyped-call]
        return y


def _bounds(qparams: QParams) -> tuple[int, int]:
    """Return the lowest and highest code of one scale, counted from zero."""
    zero_point = int(qparams.zero_point)
    return qparams.spec.qmin - zero_point, qparams.spec.qmax - zero_point


class Rounding:
    """The learned rounding of all weights of a unit, held in flat buffers so that a step costs a dozen kernels.

    A weight is scale * (floor(w / scale) + h(v)) within its grid, h the stretched sigmoid of the trained variable v;
    it starts as the float weight itself. Outside the grid there is nothing to learn.
    source: Nagel et al. 2020 (AdaRound), section 3, eq. 22-24.
    Departs: gradients of h and of the regularizer are written out; floor and bounds are computed once.

    weights: float32 weights; qparams: one per weight, on its device.
    variable: v, float32 [all elements]; `weights` are leaves whose memory `soften` fills.
    """

    def __init__(self, weights: Sequence[Tensor], qparams: Sequence[QParams]) -> None:
        self.qparams = tuple(qparams)
        self.shapes = [w.shape for w in weights]
        steps = [_flat(w / _of(w, p.scale, p)) for w, p in zip(weights, qparams, strict=True)]
        scale = torch.cat([_flat(_of(w, p.scale, p).expand_as(w)) for w, p in zip(weights, qparams, strict=True)])
        zero = torch.cat(
            [_flat(_of(w, p.zero_point, p).float().expand_as(w)) for w, p in zip(weights, qparams, strict=True)]
        )
        limits = zip(*(_flat_limits(w, p) for w, p in zip(weights, qparams, strict=True)), strict=True)
        lo, hi = (torch.cat(ends) - zero for ends in limits)
        position = torch.cat(steps)
        floor = position.floor()
        free = (floor >= lo) & (floor < hi)
        self.base = torch.maximum(torch.minimum(floor, hi), lo)
        self.step = scale * free
        self.offset = scale * self.base
        self.free = free
        fraction = (position - floor).clamp(1e-4, 1 - 1e-4)
        self.variable = nn.Parameter(-torch.log(STRETCH / (fraction + (STRETCH - 1) / 2) - 1))
        self.variable.grad = torch.zeros_like(self.variable)
        self.sigmoid = torch.empty_like(self.offset)
        self.soft = torch.empty_like(self.offset)
        self.grad = torch.zeros_like(self.offset)
        ends = torch.tensor([s.numel() for s in self.shapes]).cumsum(0).tolist()
        self.spans = list(zip([0, *ends], ends, strict=False))
        self.weights = [self._leaf(i) for i in range(len(self.shapes))]

    def _leaf(self, index: int) -> Tensor:
        leaf = self._view(self.soft, index).detach().requires_grad_()
        leaf.grad = self._view(self.grad, index)
        return leaf

    def _view(self, flat: Tensor, index: int) -> Tensor:
        start, end = self.spans[index]
        return _unflat(flat[start:end], self.shapes[index])

    def soften(self) -> None:
        """Compute the soft weights in place and clear their gradients."""
        with torch.no_grad():
            torch.sigmoid(self.variable, out=self.sigmoid)
            up = self.sigmoid.mul(STRETCH).sub_((STRETCH - 1) / 2).clamp_(0, 1)
            self.up = up
            torch.addcmul(self.offset, up, self.step, out=self.soft)
            self.grad.zero_()

    def backward(self, strength: float, beta: Tensor) -> None:
        """Set the gradient of v: that of the weights by v, plus `strength` * d/dv sum(1 - |2h - 1|**beta), beta []."""
        assert self.variable.grad is not None
        with torch.no_grad():
            grad = self.variable.grad
            torch.mul(self.grad, self.step, out=grad)
            if strength:
                side = self.up.mul(2).sub_(1)
                push = side.abs().pow_(beta - 1).copysign_(side)
                grad.addcmul_(push.mul_(self.free), (beta * (2 * strength)).to(push.dtype), value=-1)
            inside = (self.up > 0) & (self.up < 1)
            slope = self.sigmoid.mul(STRETCH)
            slope.addcmul_(self.sigmoid, self.sigmoid, value=-STRETCH).mul_(inside)
            grad.mul_(slope)

    def codes(self) -> list[QuantizedTensor]:
        """Return the integer codes of every weight: floor or floor + 1 as v says."""
        with torch.no_grad():
            up = self.free & (self.variable >= 0)
            values = self.base + up
        coded = []
        for index, qparams in enumerate(self.qparams):
            grid = self._view(values, index)
            codes = grid + _of(grid, qparams.zero_point, qparams)
            coded.append(QuantizedTensor(codes.to(qparams.spec.dtype).contiguous().cpu(), qparams.to("cpu")))
        return coded

    def undecided(self) -> float:
        """Return the share of the free elements whose h is farther than 0.001 from both 0 and 1."""
        up = self.sigmoid.mul(STRETCH).sub_((STRETCH - 1) / 2).clamp_(0, 1)
        open_ = self.free & (up > 1e-3) & (up < 1 - 1e-3)
        return float(open_.sum() / self.free.sum().clamp(min=1))


def _of(w: Tensor, values: Tensor, qparams: QParams) -> Tensor:
    return along_axis(values, w, qparams.spec.axis, qparams.spec.block_size)


def _flat_limits(w: Tensor, qparams: QParams) -> list[Tensor]:
    """Return the lowest and highest code of every element, in the order of `_flat`."""
    return [_flat(torch.as_tensor(end, dtype=w.dtype, device=w.device).expand_as(w)) for end in code_limits(w, qparams)]


def _flat(w: Tensor) -> Tensor:
    """Return all elements in the order convolutions like best: channels last where there are four dimensions."""
    return (w.permute(0, 2, 3, 1) if w.ndim == 4 else w).reshape(-1)


def _unflat(flat: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) != 4:
        return flat.view(shape)
    out, channels, height, width = shape
    return flat.view(out, height, width, channels).permute(0, 3, 1, 2)
