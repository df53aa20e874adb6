"""The quantize/dequantize formula: the only copy in the project.

ONNX order: divide by scale in float32, round half to even, add zero_point, saturate. `torch.fake_quantize_*` multiplies
by 1/scale and differs from ONNX in rare codes; adding the zero point before rounding breaks ties the other way.

Must not know: graphs, methods, targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from calibrators.grid.spec import QParams, QuantSpec

__all__ = [
    "SMALLEST_SCALE",
    "along_axis",
    "as_codes",
    "by_rows",
    "code_limits",
    "dequantize",
    "fake_quant",
    "grid_of",
    "has_middle_diagonal",
    "middle_diagonal",
    "qparams_from_range",
    "quantize",
    "round_codes",
    "values_of",
]

SMALLEST_SCALE = 2.0**-100
"""Floor of every scale: far below any real activation or weight, and products of two such scales with a third in the
denominator stay normal float32 numbers."""


BLOCK = 1 << 20
"""Values that are rounded at once: the temporaries of a large tensor would take several times its memory, and more of
them stay in the caches."""


def along_axis(values: Tensor, x: Tensor, axis: int | None, block_size: int | None = None) -> Tensor:
    """Return `values` ([], [channels], or [channels, blocks]) shaped to broadcast against `x` along `axis`."""
    if block_size is not None:
        return values.repeat_interleave(block_size, 1)[:, : x.shape[1]]  # [channels, inputs]
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def grid_of(x: Tensor, qparams: QParams) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of every element of `x`, shaped to broadcast against it."""
    axis, block_size = qparams.spec.axis, qparams.spec.block_size
    return along_axis(qparams.scale, x, axis, block_size), along_axis(qparams.zero_point, x, axis, block_size)


def by_rows(x: Tensor, qparams: QParams) -> Iterator[tuple[slice, QParams]]:
    """Yield ranges of the first axis with the parameters of each, so that few elements of `x` are read at once.

    One range holds all where the parameters of rows cannot be told apart.
    """
    spec = qparams.spec
    if x.numel() <= BLOCK or x.ndim < 2 or spec.axis not in (None, 0) or spec.tap_bits is not None:
        yield slice(None), qparams
        return
    scale, zero_point, height = qparams.scale, qparams.zero_point, max(1, BLOCK * len(x) // x.numel())
    for first in range(0, len(x), height):
        rows = slice(first, first + height)
        yield rows, qparams if scale.ndim == 0 else QParams(scale[rows], zero_point[rows], spec)


def has_middle_diagonal(shape: Sequence[int]) -> bool:
    """Return whether a weight [out, in / groups, ...] is a kernel with one tap per channel that adds it to itself."""
    channels, inputs, *kernel = shape
    return bool(kernel) and inputs > 1 and channels % inputs == 0 and all(size % 2 for size in kernel)


def middle_diagonal(shape: Sequence[int]) -> tuple[Tensor | int, ...]:
    """Return the index of the taps that add a channel to itself: [out, in / groups, ...], odd kernels, out = in."""
    channel = torch.arange(shape[0])
    return channel, channel % shape[1], *(size // 2 for size in shape[2:])


def code_limits(x: Tensor, qparams: QParams) -> tuple[int | Tensor, int | Tensor]:
    """Return the lowest and the highest code, for every element of `x` where they differ."""
    spec = qparams.spec
    if spec.tap_bits is None:
        return spec.qmin, spec.qmax
    container, reach = torch.iinfo(spec.dtype), (1 << (spec.tap_bits - 1)) - 1
    middle = middle_diagonal(x.shape)
    low, high = (torch.full(x.shape, float(code), device=x.device) for code in (spec.qmin, spec.qmax))
    low[middle] = (qparams.zero_point - reach).clamp(min=container.min).to(low)
    high[middle] = (qparams.zero_point + reach).clamp(max=container.max).to(high)
    return low, high


def round_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int | float | Tensor, qmax: int | float | Tensor
) -> Tensor:
    """Return the codes of `x` as integer-valued floats of x's dtype; parameters are numbers or broadcast against x."""
    return (x / scale).round_().add_(zero_point).clamp_(qmin, qmax)  # type: ignore[arg-type]


def as_codes(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integer-valued floats in a dtype of codes; in one of 8 bits, those of 16 bits wrap around.

    torch converts floats to uint8 one by one, 0.37 ns each; by way of int16 it takes 0.16 ns.
    """
    return (values.to(torch.int16) if dtype.itemsize == 1 else values).to(dtype)


def values_of(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return f32(f32(code - zero_point) * scale); the parameters broadcast against the codes."""
    if codes.dtype.itemsize > 2:
        return (codes.to(torch.int32) - zero_point.to(torch.int32)).to(torch.float32) * scale
    return codes.to(torch.float32).sub_(zero_point).mul_(scale)  # the same: differences of short codes are exact


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Return the codes of `x` in the container dtype of the spec."""
    if x.numel() <= BLOCK:
        return as_codes(round_codes(x, *grid_of(x, qparams), *code_limits(x, qparams)), qparams.spec.dtype)
    codes = torch.empty_like(x, dtype=qparams.spec.dtype)
    for rows, own in by_rows(x, qparams):
        some = x[rows]
        codes[rows] = as_codes(round_codes(some, *grid_of(some, own), *code_limits(some, own)), codes.dtype)
    return codes


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Return the float32 values of `codes`."""
    return values_of(codes, *grid_of(codes, qparams))


def fake_quant(x: Tensor, qparams: QParams) -> Tensor:
    """Return dequantize(quantize(x)), computed without leaving floats."""
    scale, zero_point = grid_of(x, qparams)
    return round_codes(x, scale, zero_point, *code_limits(x, qparams)).sub_(zero_point).mul_(scale)


def qparams_from_range(lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
    """Return the scale and zero point of the range [lo, hi], widened to contain 0 so that zero is a code exactly.

    lo, hi:  [], [channels] or [channels, blocks], any float dtype; lo <= hi, finite. Ranges of width zero get scale 1.
    returns: symmetric: scale = max(|lo|, |hi|) / qmax, zero_point 0.
             asymmetric: scale = (hi - lo) / (qmax - qmin), zero_point = clamp(round(qmin - lo / scale)).
    source:  the convention of onnxruntime (a / 127 for signed symmetric 8 bit).
    """
    lo = lo.to(torch.float64).clamp(max=0.0)
    hi = hi.to(torch.float64).clamp(min=0.0)
    width = torch.maximum(-lo, hi) if spec.symmetric else hi - lo
    steps = spec.qmax if spec.symmetric else spec.qmax - spec.qmin
    scale = torch.where(width > 0, (width / steps).clamp(min=SMALLEST_SCALE), torch.ones_like(width)).to(torch.float32)
    if spec.symmetric:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero_point = (spec.qmin - lo / scale.double()).round().clamp(spec.qmin, spec.qmax).to(torch.int32)
    return QParams(scale, zero_point, spec)
