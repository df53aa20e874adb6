"""Trainable quantizers: an activation scale, with random drop, and the rounding of a unit's weights.

Exported values always come from grid.numerics; this is the differentiable form that training sees.

Must not know: graphs, blocks, methods, the training loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from calibrators.execution.fused import Ends, FakeQuantize, chunks
from calibrators.grid.numerics import along_axis, code_limits, fake_quant
from calibrators.grid.spec import QParams, QuantizedTensor

__all__ = ["ActivationQuantizer", "Masks", "Rounding"]

aten = torch.ops.aten

STRETCH = 1.2
"""Width of the stretched sigmoid: from -0.1 to 1.1, so that 0 and 1 are reached (AdaRound, eq. 23)."""

RISING = (STRETCH - 1) / 2 / STRETCH, (STRETCH + 1) / 2 / STRETCH
"""The sigmoid between which the stretched one is neither 0 nor 1."""

SETTLED = 20.0
"""Rounding variable of an element outside the grid: the stretched sigmoid is flat there, so nothing moves it."""


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

    def forward(self, x: Tensor, clip: tuple[float, float] | None = None) -> Tensor:
        """Return the quantized values of x, clipped to the bounds `clip` before."""
        if self.training and not self.bypass:
            mask = self.masks.like(x) if self.masks is not None else None
            y: Tensor = FakeQuantize.apply(x, self.log_scale, Ends(self.bounds, clip, self.nonnegative), mask)  # type: ignore[no-untyped-call]
            return y
        if clip is not None:
            x = nn.functional.hardtanh(x, *clip)
        return x if self.training else fake_quant(x, self.qparams)


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
        start = -torch.log(STRETCH / (fraction + (STRETCH - 1) / 2) - 1)
        self.variable = nn.Parameter(start.masked_fill_(~free, SETTLED))
        self.variable.grad = torch.zeros_like(self.variable)
        self.sigmoid = torch.empty_like(self.offset)
        self.soft = torch.empty_like(self.offset)
        ends = torch.tensor([s.numel() for s in self.shapes]).cumsum(0).tolist()
        self.spans = list(zip([0, *ends], ends, strict=False))
        self.weights = [self._view(self.soft, i).detach().requires_grad_() for i in range(len(self.shapes))]

    def _view(self, flat: Tensor, index: int) -> Tensor:
        start, end = self.spans[index]
        return _unflat(flat[start:end], self.shapes[index])

    @torch.no_grad()
    def soften(self) -> None:
        """Compute the soft weights in place and forget their gradients."""
        for leaf in self.weights:
            leaf.grad = None
        for v, sigmoid, offset, step, soft in chunks(self.variable, self.sigmoid, self.offset, self.step, self.soft):
            torch.sigmoid(v, out=sigmoid)
            up = torch.mul(sigmoid, STRETCH, out=soft).sub_((STRETCH - 1) / 2).clamp_(0, 1)
            torch.addcmul(offset, up, step, out=soft)

    @torch.no_grad()
    def backward(self, strength: float, beta: Tensor) -> None:
        """Set the gradient of v: that of the weights by v, plus `strength` * d/dv sum(1 - |2h - 1|**beta), beta []."""
        assert self.variable.grad is not None
        push = (beta * (2 * strength)).to(self.step.dtype)
        for leaf, (start, end) in zip(self.weights, self.spans, strict=True):
            found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            of_leaf = (x[start:end] for x in (self.step, self.sigmoid, self.variable.grad))
            for given, step, sigmoid, grad in chunks(_flat(found), *of_leaf):
                torch.mul(given, step, out=grad)
                if strength:
                    side = sigmoid.mul(2 * STRETCH).sub_(STRETCH)  # 2h - 1
                    grad.addcmul_(side.abs().pow_(beta - 1).copysign_(side), push, value=-1)
                aten.sigmoid_backward.grad_input(grad, sigmoid, grad_input=grad)
                aten.hardtanh_backward.grad_input(grad, sigmoid, *RISING, grad_input=grad).mul_(STRETCH)

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
