"""The integer kernels of onnxruntime's CPU provider as functions on codes, which agree with them in every code.

Every formula is the order of float32 roundings that the x86 kernels (AVX2 and newer) execute; a different but
algebraically equal order gives other codes at ties. Accumulators are integers held in float32, which is exact while
they stay below 2**24: a longer reduction is cut into the fewest parts that do, and the parts are added in int32.
Kernels are memory-bound: each pass over a tensor that a grid does not need is left out, and the others are in place.

    QLinearConv, QGemm, QLinearMatMul   y = sat(rint(clamp(f32(f32(acc) * m))) + zp), m = f32(f32(xs * ws) / ys)
    QGemm and MatMulIntegerToFloat      y = f32(f32(acc) * f32(xs * ws))
    QLinearAdd, QLinearMul              a table over all pairs of codes (calibrators.grid.kernel_tables)
    QLinearGlobalAveragePool            y = sat(rint(f32(sum * f32(xs / f32(ys * n)))) + zp)
    QLinearAveragePool                  y = sat(rint(f32(f32(mean / ys) + zp))), mean of float32 values in window order
    QLinearSigmoid, LeakyRelu, Concat   a table: quantize(f(dequantize(code))) of every code
    QLinearSoftmax                      y = sat(rint(f32(f32(e * floor(1 / ys)) / sum e)) + zp), e from a table

Measured with onnxruntime 1.32 on random grids, powers of two and their neighbours: 0 differing codes of 1.0 M
(sigmoid), 0.2 M each (LeakyRelu, Concat), 20.5 M (softmax) and 2.5 M (global means).

Must not know: graphs, programs, sessions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product, zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from calibrators.grid import kernel_tables
from calibrators.grid.kernel_tables import CodeGrid
from calibrators.grid.numerics import as_codes
from calibrators.grid.processors import PROCESSORS, REFERENCE

__all__ = [
    "ConvGeometry",
    "Grid",
    "PoolGeometry",
    "Weights",
    "adds_swapped",
    "average_pool",
    "conv",
    "global_average_pool",
    "integer_clip",
    "leaky_relu",
    "linear",
    "lookup",
    "lookup_pair",
    "matmul",
    "pair_table",
    "prepare_weights",
    "quantize_bias",
    "sigmoid",
    "softmax",
    "unary_table",
    "unpadded",
]

EXACT_FLOAT32 = 2**24
"""Integers of at most this magnitude, and all sums of them that stay below it, are exact in float32."""

BLOCK = 1 << 20
"""Weights that are widened to int64 at once."""

INT32 = torch.iinfo(torch.int32)
CODES = 256
"""Codes of an 8-bit container."""
SOFTMAX_RESERVE = 5
"""Natural logarithm of the room that QLinearSoftmax leaves between the sum of its table and the largest float32."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of the codes of one activation.

    scale:      float32, [].
    qmin, qmax: range of the codes, which may be narrower than the container.
    dtype:      container: torch.uint8 or torch.int8.
    """

    scale: Tensor
    zero_point: int
    qmin: int
    qmax: int
    dtype: torch.dtype

    @property
    def container(self) -> tuple[int, int]:
        limits = torch.iinfo(self.dtype)
        return limits.min, limits.max

    @property
    def reach(self) -> int:
        """Largest |code - zero_point|."""
        return max(abs(self.qmin - self.zero_point), abs(self.qmax - self.zero_point))

    @property
    def numbers(self) -> CodeGrid:
        """The grid in plain numbers."""
        return CodeGrid(float(self.scale), self.zero_point, self.qmin, self.qmax, self.container[0])

    def every_code(self) -> NDArray[Any]:
        """Return all codes of the container in ascending order, float32 [256]."""
        return self.numbers.codes(unused=True)

    def centred(self, codes: Tensor) -> Tensor:
        """Return codes - zero_point as integer-valued float32."""
        return _shifted(codes.to(torch.float32), -self.zero_point)

    def values(self, codes: Tensor) -> Tensor:
        """Return the float32 values of `codes`."""
        return self.centred(codes).mul_(self.scale)


@dataclass(frozen=True)
class ConvGeometry:
    """The moves of a convolution's window; padding is a tuple or torch's 'same' / 'valid'."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class PoolGeometry:
    """The moves of an averaging window, one number per spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    count_include_pad: bool


@dataclass(frozen=True, eq=False)
class Weights:
    """Constant operand of a convolution or linear layer, made ready for exact accumulation.

    parts: (range of the reduction axis, integer-valued weight [out, part, ...]); float32 where sums are exact in it.
    bias:  [out] or None; int32 if wide, else integer-valued float32.
    scale: float32, [] or [out].
    wide:  whether the sum of all parts and the bias may exceed float32's exact integers.
    """

    parts: tuple[tuple[slice, Tensor], ...]
    bias: Tensor | None
    scale: Tensor
    wide: bool


def quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Return the int32 codes of a float bias in onnxruntime: rint(f32(b / scale)), saturated; scale is f32(xs * ws)."""
    return torch.round(bias / scale).double().clamp(INT32.min, INT32.max).to(torch.int32)


def prepare_weights(codes: Tensor, zero_point: Tensor, scale: Tensor, bias: Tensor | None, x: Grid) -> Weights:
    """Split weights along the reduction axis into the fewest parts whose sums are exact in float32.

    codes:      int8 or uint8 [out, in, ...].
    zero_point: [] or [out].
    """
    added = 0 if bias is None else bias.to(torch.int64).abs()
    sums = torch.cat([size.sum(1) for size in _sizes(codes, zero_point, x)])  # [out]
    ranges, wide = _split(codes, zero_point, x, int(sums.argmax())), int((sums + added).max()) >= EXACT_FLOAT32
    points = zero_point.reshape(-1, *[1] * (codes.ndim - 1))
    if ranges:
        parts = tuple((cut, codes[:, cut].to(torch.float32).sub_(points)) for cut in ranges)
    else:
        parts = ((slice(0, codes.shape[1]), codes.to(torch.float64).sub_(points)),)
    return Weights(parts, bias if wide or bias is None else bias.to(torch.float32), scale, wide)


def unpadded(codes: Tensor, zero_point: Tensor, scale: Tensor, bias: Tensor | None, x: Grid) -> tuple[Grid, Weights]:
    """Return weights of a product that reads no padding, and the grid with which to read its input.

    The bias takes over what the zero point of the input adds to every sum, where the sums then stay exact in float32.
    """
    if x.zero_point:
        taps, rows = codes[0].numel(), max(1, BLOCK // max(codes[0].numel(), 1))
        sums = torch.cat([some.flatten(1).sum(1, dtype=torch.int64) for some in torch.split(codes, rows)])
        shift = x.zero_point * (sums - taps * zero_point.to(torch.int64))  # [out]
        raw, moved = replace(x, zero_point=0), -shift if bias is None else bias.to(torch.int64) - shift
        weights = prepare_weights(codes, zero_point, scale, moved, raw)
        if not weights.wide:
            return raw, weights
    return x, prepare_weights(codes, zero_point, scale, bias, x)


def _sizes(codes: Tensor, zero_point: Tensor, x: Grid) -> Iterator[Tensor]:
    """Yield the most that each index can add to the accumulators, int64 [some outputs, in], few outputs at a time.

    Each is overwritten by the next: a new tensor each time would leave gaps in the heap, as large as all of them.
    """
    channels, taps = codes.shape[1], math.prod(codes.shape[2:])
    rows = max(1, BLOCK // max(channels * taps, 1))
    points = zero_point.to(torch.int64).expand(len(codes))[:, None]
    memory = torch.empty(min(rows, len(codes)), channels * taps, dtype=torch.int64)
    for first in range(0, len(codes), rows):
        some = codes[first : first + rows].flatten(1)
        sizes = memory[: len(some)].copy_(some).sub_(points[first : first + rows]).abs_()
        if taps > 1:
            sizes = sizes.reshape(len(some), channels, taps).sum(2)
        yield sizes.mul_(x.reach)


def _split(codes: Tensor, zero_point: Tensor, x: Grid, heaviest: int) -> list[slice]:
    """Return the fewest ranges of the reduction axis with exact sums; none if one index alone exceeds them.

    heaviest: the output with the largest sum, which says how far a range reaches at most.
    """
    (own,) = _sizes(codes[heaviest, None], zero_point.expand(len(codes))[heaviest], x)
    ranges: list[slice] = []
    start, channels = 0, codes.shape[1]
    while start < channels:
        reach = int((own[0, start:].cumsum(0) < EXACT_FLOAT32).sum())
        blocks = _sizes(codes[:, start : start + reach], zero_point, x)
        sums = torch.stack([size.cumsum_(1).amax(0) for size in blocks]).amax(0)  # [reach]
        fitting = int((sums < EXACT_FLOAT32).sum())
        if fitting == 0:
            return []
        ranges.append(slice(start, start + fitting))
        start += fitting
    return ranges


def _accumulate(
    pick: Callable[[slice], Tensor],
    weights: Weights,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    shape: list[int],
) -> Tensor:
    """Return the accumulators: integer-valued float32, or int32 if the sums are wide; those beyond it wrap around.

    pick:    returns the part of the centred input that belongs to a range of the reduction axis.
    product: of such a part, weights and a bias, if there is one; it may add in any order, as every sum is exact.
    shape:   in which the bias broadcasts against the accumulators.
    """
    if not weights.wide:
        ((cut, part),) = weights.parts
        return product(pick(cut), part, weights.bias)
    sums = _wrapped(product(pick(cut).to(part.dtype), part, None) for cut, part in weights.parts)
    if weights.bias is not None:
        sums += weights.bias.reshape(shape)
    return sums


def _wrapped(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of integer-valued parts in int32. Those of float64 may hold more than fits in it."""
    narrowed = (part.to(torch.int64) if part.dtype == torch.float64 else part for part in parts)
    return reduce(Tensor.add_, (part.to(torch.int32) for part in narrowed))


def _shifted(values: Tensor, by: int) -> Tensor:
    """Add a number in place, which takes a pass over memory unless it is 0."""
    return values.add_(by) if by else values


def _requantize(accumulators: Tensor, x_scale: Tensor, w_scale: Tensor, y: Grid, arithmetic: str) -> Tensor:
    """Return the codes of accumulators, whose memory is overwritten; arithmetic: of kernel_tables.layer.

    The float32 kernels clamp to the ends of the container before they round. As these are integers, a clamp after it,
    to the range of the codes within them, gives the same. The zero point is added to bytes, whose sums wrap into the
    range.
    """
    if arithmetic != "float32":
        scales = x_scale.numpy(), w_scale.numpy()
        return _table(kernel_tables.layer(accumulators.numpy(), *scales, y.numbers, arithmetic), y)
    steps = accumulators.to(torch.float32).mul_((x_scale * w_scale) / y.scale).round_()
    return _shifted(as_codes(steps.clamp_(y.qmin - y.zero_point, y.qmax - y.zero_point), y.dtype), y.zero_point)


def conv(
    codes: Tensor, x: Grid, weights: Weights, y: Grid, geometry: ConvGeometry, arithmetic: str = "float32"
) -> Tensor:
    """Compute QLinearConv.

    codes:   [batch, channels, *space], one to three dimensions of space; arithmetic: of Processor.conv.
    returns: codes [batch, out, *space].
    """
    centred = x.centred(codes)
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[codes.ndim - 2]

    def pick(cut: slice) -> Tensor:
        batch, channels, *space = centred.shape
        grouped = centred.reshape(batch, geometry.groups, channels // geometry.groups, *space)
        return grouped[:, :, cut].flatten(1, 2)

    def product(part: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(part, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)

    shape = [-1] + [1] * (codes.ndim - 2)
    accumulators = _accumulate(pick, weights, product, shape)
    return _requantize(accumulators, x.scale, weights.scale.reshape(shape), y, arithmetic)


def linear(codes: Tensor, x: Grid, weights: Weights, y: Grid | None, arithmetic: str = "float32") -> Tensor:
    """Compute QGemm, or without a bias QLinearMatMul and, if y is None, MatMulIntegerToFloat.

    codes:   [..., in]; arithmetic: of Processor.linear.
    returns: codes [..., out], or float32 if y is None.
    """
    centred = x.centred(codes)
    accumulators = _accumulate(lambda cut: centred[..., cut], weights, functional.linear, [-1])
    if y is None:
        return accumulators.to(torch.float32).mul_(x.scale * weights.scale)
    return _requantize(accumulators, x.scale, weights.scale, y, arithmetic)


def matmul(a_codes: Tensor, b_codes: Tensor, a: Grid, b: Grid, y: Grid | None) -> Tensor:
    """Compute QLinearMatMul of two activations, MatMulIntegerToFloat if y is None.

    a_codes, b_codes: [..., m, k], [..., k, n].
    returns:          codes [..., m, n], or float32 if y is None.
    """
    left, right = a.centred(a_codes), b.centred(b_codes)
    length = left.shape[-1]
    step = max((EXACT_FLOAT32 - 1) // max(a.reach * b.reach, 1), 1)
    if length <= step:
        accumulators = left @ right
    else:
        starts = range(0, length, step)
        sums = _wrapped(left[..., i : i + step] @ right[..., i : i + step, :] for i in starts)
        accumulators = sums.to(torch.float32)
    if y is None:
        return accumulators.mul_(a.scale * b.scale)
    return _requantize(accumulators, a.scale, b.scale, y, "float32")


def _saturate(values: Tensor, y: Grid) -> Tensor:
    """Return the codes of float values that already include the zero point; their memory is overwritten."""
    return as_codes(values.round_().clamp_(y.qmin, y.qmax), y.dtype)


def _table(codes: NDArray[Any], y: Grid) -> Tensor:
    """Return codes computed by numpy in the container of `y`."""
    return torch.from_numpy(codes).to(y.dtype)


def pair_table(function: Callable[..., NDArray[Any]], a: Grid, b: Grid, y: Grid, arithmetic: str) -> Tensor:
    """Return the result for every pair of codes, [256, 256]; function: `add` or `mul` of kernel_tables."""
    left, right = a.every_code()[:, None], b.every_code()
    return _table(function(left, right, a.numbers, b.numbers, y.numbers, arithmetic), y)


def adds_swapped(a_shape: Sequence[int], b_shape: Sequence[int], *, channels_last: bool) -> bool:
    """Return whether QLinearAdd computes b + a: if the innermost run of `a` is one element and that of `b` is not.

    channels_last: whether the runtime holds both tensors with axis 1 innermost.
    """

    def innermost_first(shape: Sequence[int]) -> list[int]:
        return [shape[1], *reversed(shape[2:]), shape[0]] if channels_last else list(reversed(shape))

    for a, b in zip_longest(innermost_first(a_shape), innermost_first(b_shape), fillvalue=1):
        if (a, b) != (1, 1):
            return a == 1
    return False


def lookup_pair(table: Tensor, a_codes: Tensor, b_codes: Tensor) -> Tensor:
    """Return table[a, b], where the codes broadcast as in an addition."""
    first = torch.iinfo(a_codes.dtype).min * CODES + torch.iinfo(b_codes.dtype).min
    index = _shifted(a_codes.to(torch.int32).mul_(CODES) + b_codes, -first)
    return table.flatten().index_select(0, index.flatten()).view(index.shape)


def unary_table(function: Callable[[NDArray[Any]], NDArray[Any]], x: Grid, y: Grid) -> Tensor:
    """Return quantize(function(dequantize(code))) for every code, [256]; with the identity, QLinearConcat's table."""
    return _table(kernel_tables.table(function, x.every_code(), x.numbers, y.numbers), y)


def sigmoid(values: NDArray[Any]) -> NDArray[Any]:
    """Return the sigmoid as QLinearSigmoid approximates it."""
    arithmetic = PROCESSORS[REFERENCE].sigmoid
    assert arithmetic is not None
    return kernel_tables.sigmoid(values, arithmetic)


def leaky_relu(values: NDArray[Any], negative_slope: float) -> NDArray[Any]:
    """Return the values with negative ones multiplied by a float32 number."""
    return np.where(values >= 0, values, np.float32(negative_slope) * values)


def lookup(table: Tensor, codes: Tensor) -> Tensor:
    """Return the entry of a table of 8-bit codes, [256], for every 8-bit code, of which the lowest has the first."""
    by_byte = table.roll(torch.iinfo(codes.dtype).min)  # the bytes of negative codes come after the others
    found = bytearray(codes.numpy()).translate(by_byte.numpy().tobytes())
    return torch.frombuffer(found, dtype=table.dtype).view(codes.shape)


def softmax(codes: Tensor, x: Grid, y: Grid, dim: int) -> Tensor:
    """Compute QLinearSoftmax: quotients of table entries, which are added one by one in float32."""
    one, indices = np.float32(1), codes.movedim(dim, -1).numpy().astype(np.int64)
    length = indices.shape[-1]
    room = float(np.log(np.finfo(np.float32).max / np.float32(length))) - SOFTMAX_RESERVE
    exponents = np.arange(CODES) - (CODES - 1.0) + max(0.0, room) / float(x.scale)
    table = np.exp(exponents * float(x.scale)).astype(np.float32)
    terms = table[indices + (CODES - 1) - indices.max(-1, keepdims=True)]
    total = np.add.accumulate(terms, axis=-1, dtype=np.float32)[..., -1:]
    quotients = np.rint(terms * np.floor(one / y.numbers.step) / total) + y.zero_point
    return _table(y.numbers.saturated(quotients), y).movedim(-1, dim)


def global_average_pool(codes: Tensor, x: Grid, y: Grid, arithmetic: str = "rounded") -> Tensor:
    """Compute QLinearGlobalAveragePool: codes [batch, channels, *space] -> [batch, channels, 1...]; Processor.mean."""
    sums = codes.sum(tuple(range(2, codes.ndim)), keepdim=True, dtype=torch.int32)
    counted = replace(x.numbers, count=codes[0, 0].numel())
    return _table(kernel_tables.mean(sums.numpy(), counted, y.numbers, arithmetic), y)


def average_pool(codes: Tensor, x: Grid, y: Grid, geometry: PoolGeometry, arithmetic: str = "values") -> Tensor:
    """Compute QLinearAveragePool without ceil_mode: codes [batch, channels, *space] -> codes.

    arithmetic: of Processor.average; "codes" writes them on the grid of the input.
    """
    kernel, stride, space = geometry.kernel, geometry.stride, len(geometry.kernel)
    widths = [width for each in reversed(geometry.padding) for width in (each, each)]
    of_codes = arithmetic == "codes"
    values, fill = (codes.to(torch.float32), x.zero_point) if of_codes else (x.values(codes), 0)
    values = functional.pad(values, widths, value=fill if geometry.count_include_pad else 0)
    sizes = [(n - k) // s + 1 for n, k, s in zip(values.shape[-space:], kernel, stride, strict=True)]

    def window_sum(image: Tensor) -> Tensor:
        total = torch.zeros(*image.shape[:-space], *sizes)
        for offsets in product(*map(range, kernel)):
            cells = (slice(at, at + s * (n - 1) + 1, s) for at, s, n in zip(offsets, stride, sizes, strict=True))
            total += image[(..., *cells)]  # type: ignore[index]
        return total

    count = torch.tensor(float(math.prod(kernel)))
    if not geometry.count_include_pad:
        count = window_sum(functional.pad(torch.ones(codes.shape[-space:]), widths))
    sums = window_sum(values)
    if of_codes:
        return _table(kernel_tables.average(sums.numpy(), count.numpy(), y.numbers), y)
    return _saturate((sums / count) / y.scale + y.zero_point, y)


def integer_clip(codes: Tensor, y: Grid) -> Tensor:
    """Clip the codes, which is all that remains of a kernel that only moves or selects codes."""
    low, high = y.container
    return codes if (y.qmin, y.qmax) == (low, high) else codes.clamp(y.qmin, y.qmax)
