"""Codes that integer kernels compute from codes, by the arithmetic of a family of processors, for all codes at once.

A kernel rounds a float32 number or a 32-bit fixed-point number. Families compute it in different orders, so that they
round differently where it lies on a tie or next to one, and alike everywhere else. Kernels that are not here compute
the same codes in every family. In float32, each operation rounded unless it is fused (`fma`), and clipped at last:

    add    fused    fma(a, ra, fma(b, rb, fix))                  fix = zy - fma(ra, za, rb * zb), ra = sa / sy
           plain    (fix + a * ra) + b * rb, and (fix + b * rb) + a * ra where b is one element for a run of a
           values   (sa * (a - za) + sb * (b - zb)) / sy + zy
           fixed    ((a - za) * ma + (b - zb) * mb) / 2**shift, rounded half away from 0; ma = rint(ra * 2**shift)
           fixed, half up    the same with one bit less, and halves rounded up
           Q31      a and b in units of 2 * max(sa, sb) / 2**20, their sum, each scaled by fixed point of 31 bits
    mul    fused    fma((a - za) * (b - zb), r, zy)              r = sa * sb / sy
           plain    ((a - za) * (b - zb)) * r + zy
           values   (sa * (a - za)) * (sb * (b - zb)) / sy + zy
           rounded  rint(((a - za) * (b - zb)) * r) + zy
           Q31      the product scaled by r in fixed point of 31 bits
    mean   rounded  rint((sum - n * za) * (sa / (sy * n))) + zy
           with zero    sum * m + (zy - (n * za) * m), m = (1 / n) * (sa / sy), of int8 codes
           Q31      sum - n * za scaled by sa / sy in fixed point of 31 bits, of which n divides the significand
    layer  float32  rint(f32(sum) * m) + zy             m = f32(f32(sx * sw) / sy), of a sum of products
           float64  sum * m, rounded half away from 0, m in float64
           Q31      the sum scaled by m in fixed point of 31 bits
    sigmoid         a quotient of polynomials in Horner's form, with `fma` (fused) or without (plain)

Each formula gives 0 differing codes on tie-stress grids in onnxruntime 1.32 (natively, and on emulated Haswell,
Nehalem, Cortex-A76 and A53) and onnxruntime-web 1.30, in XNNPACK of ExecuTorch 1.5.1 on x86-64, or (Q31 and
float64, calibrators.grid.fixed_point) in the reference kernels of LiteRT 2.3.0. Only numpy is imported, so that a check
of a file needs no torch.

Must not know: graphs, targets, runtimes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.grid.fixed_point import FixedPoint, half_away
from calibrators.grid.processors import Processor

__all__ = [
    *("KERNELS", "CodeGrid", "add", "arithmetics", "average", "differing", "layer", "mean", "mul", "sigmoid", "table"),
]

Array = NDArray[Any]

FIXED_BITS, HALF_UP_BITS = 21, 20
"""Exponents of the larger multiplier of a sum in fixed point, which has one bit more."""
Q31_SUM_BITS = 20
"""Bits by which the codes of a sum are shifted to the left before they are scaled."""

NUMERATOR = (
    4.37031012579801e-11,
    1.15627324459942e-07,
    6.08574864600143e-05,
    8.51377133304701e-03,
    2.48287947061529e-01,
)
DENOMINATOR = (
    *(6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03, 1.16817656904453e-01),
    9.93151921023180e-01,
)
"""Polynomials in x**2, highest power first: x * NUMERATOR / DENOMINATOR + 0.5 is the sigmoid of |x| <= 18."""
SATURATED = 18.0


@dataclass(frozen=True)
class CodeGrid:
    """The grid of 8-bit codes of one value in plain numbers.

    scale:      a float32 number.
    qmin, qmax: first and last code that occurs.
    lowest:     first code of the container, -128 or 0.
    count:      how many codes a kernel adds up; `codes` are their sums.
    """

    scale: float
    zero_point: int
    qmin: int = 0
    qmax: int = 255
    lowest: int = 0
    count: int = 1

    @property
    def step(self) -> np.float32:
        return np.float32(self.scale)

    @property
    def zero(self) -> np.float32:
        return np.float32(self.zero_point)

    def codes(self, *, unused: bool = False) -> Array:
        """Return the codes that occur, or with `unused` all of the container, ascending, float32."""
        first, last = (self.lowest, self.lowest + 255) if unused else (self.qmin, self.qmax)
        return np.arange(first * self.count, last * self.count + 1, dtype=np.float32)

    def saturated(self, values: Array) -> Array:
        """Return the codes of numbers that include the zero point, int16."""
        codes: Array = np.rint(values).clip(self.lowest, self.lowest + 255).clip(self.qmin, self.qmax).astype(np.int16)
        return codes


def _fma(a: Any, b: Any, c: Any) -> Array:
    """Return f32(a * b + c), computed in float64, where the product of two float32 numbers is exact."""
    total = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
    return np.asarray(total, np.float32)


def add(a_codes: Array, b_codes: Array, a: CodeGrid, b: CodeGrid, y: CodeGrid, arithmetic: str) -> Array:
    """Return the codes of sums, int16, for float32 codes that broadcast against each other.

    arithmetic: of Processor.add, or "plain, one b" where b is one element for a run of a.
    """
    ra, rb = a.step / y.step, b.step / y.step
    if arithmetic == "fused":
        fix = y.zero - _fma(ra, a.zero, rb * b.zero)
        return y.saturated(_fma(a_codes, ra, _fma(b_codes, rb, fix)))
    if arithmetic == "Q31":
        return _q31_add(a_codes - a.zero, b_codes - b.zero, a, b, y)
    if arithmetic.startswith("fixed"):
        return _fixed_add(a_codes, b_codes, a, b, y, half_up=arithmetic != "fixed")
    if arithmetic == "values":
        return _of_values(a.step * (a_codes - a.zero) + b.step * (b_codes - b.zero), y)
    offset = y.zero - (ra * a.zero + rb * b.zero)
    left, right = a_codes * ra, b_codes * rb
    return y.saturated((offset + left) + right if arithmetic == "plain" else (offset + right) + left)


def _of_values(values: Array, y: CodeGrid) -> Array:
    """Return the codes of results that are not scaled yet."""
    low, high = y.lowest - y.zero_point, y.lowest + 255 - y.zero_point
    return y.saturated(np.clip(values / y.step, low, high) + y.zero)


def _fixed_add(a_codes: Array, b_codes: Array, a: CodeGrid, b: CodeGrid, y: CodeGrid, *, half_up: bool) -> Array:
    """Return sums in fixed point; of scales whose ratios are too far apart or round up to 1, of fused values.

    half_up: halves are rounded up instead of away from 0, multipliers have one bit less, and all ratios are taken.
    """
    ratios = [float(a.step / y.step), float(b.step / y.step)]
    shift = (HALF_UP_BITS if half_up else FIXED_BITS) - (math.frexp(max(ratios))[1] - 1)
    first, second = (int(np.rint(ratio * 2.0**shift)) for ratio in ratios)
    fits = max(first, second) >> (FIXED_BITS + 1) == 0 and 2.0**-14 <= min(ratios) <= max(ratios) < 2.0**8
    if not (half_up or fits):
        return _of_values(_fma(a_codes - a.zero, a.step, b.step * (b_codes - b.zero)), y)
    total = (a_codes - a.zero).astype(np.int64) * first + (b_codes - b.zero).astype(np.int64) * second
    rounded = (total - (0 if half_up else total < 0) + (1 << (shift - 1))) >> shift
    return y.saturated(np.clip(rounded, -(2**15), 2**15 - 1) + y.zero_point)


def _q31_add(left: Array, right: Array, a: CodeGrid, b: CodeGrid, y: CodeGrid) -> Array:
    """Return sums of centred codes in fixed point of 31 bits, each operand and the sum rounded twice."""
    unit = 2.0 * float(max(a.step, b.step))
    first, second = (FixedPoint.of(float(x.step) / unit) for x in (a, b))
    total = first.scaled(left.astype(np.int64) << Q31_SUM_BITS) + second.scaled(right.astype(np.int64) << Q31_SUM_BITS)
    return y.saturated(FixedPoint.of(unit / (2.0**Q31_SUM_BITS * float(y.step))).scaled(total) + y.zero_point)


def mul(a_codes: Array, b_codes: Array, a: CodeGrid, b: CodeGrid, y: CodeGrid, arithmetic: str) -> Array:
    """Return the codes of products, int16, for float32 codes that broadcast; arithmetic: of Processor.mul."""
    left, right = a_codes - a.zero, b_codes - b.zero
    if arithmetic == "values":
        return _of_values((a.step * left) * (b.step * right), y)
    ratio = (a.step * b.step) / y.step
    product = left * right
    if arithmetic == "Q31":
        return y.saturated(FixedPoint.of(ratio).scaled(product) + y.zero_point)
    if arithmetic == "rounded":
        return y.saturated(np.rint(product * ratio) + y.zero)
    return y.saturated(_fma(product, ratio, y.zero) if arithmetic == "fused" else product * ratio + y.zero)


def mean(sums: Array, x: CodeGrid, y: CodeGrid, arithmetic: str) -> Array:
    """Return the codes of means, int16, for sums of x.count codes, int32 or float32; arithmetic: of Processor.mean."""
    count, centred = np.float32(x.count), (sums - x.count * x.zero_point).astype(np.float32)
    if arithmetic == "Q31":
        ratio = FixedPoint.of(float(x.step) / float(y.step)).divided(x.count)
        return y.saturated(ratio.scaled(centred) + y.zero_point)
    if arithmetic == "rounded":
        return y.saturated(np.rint(centred * (x.step / (y.step * count))) + y.zero)
    to_int8 = -128 - x.lowest
    multiplier = (np.float32(1) / count) * (x.step / y.step)
    offset = y.zero + np.float32(to_int8) - (count * (x.zero + np.float32(to_int8))) * multiplier
    sums_of_int8 = (sums + x.count * to_int8).astype(np.float32)
    return y.saturated(np.rint(sums_of_int8 * multiplier + offset) - to_int8)


def layer(sums: Array, x_scale: Array, w_scale: Array, y: CodeGrid, arithmetic: str) -> Array:
    """Return the codes of sums of products, int16; arithmetic: "Q31" or "float64" (Processor.conv, Processor.linear).

    sums: integers; w_scale broadcasts against them.
    """
    ratio = x_scale.astype(np.float64) * w_scale.astype(np.float64) / float(y.step)
    steps = FixedPoint.of(ratio).scaled(sums) if arithmetic == "Q31" else half_away(sums.astype(np.float64) * ratio)
    return y.saturated(steps + y.zero_point)


def average(sums: Array, counts: Array, y: CodeGrid) -> Array:
    """Return the codes of means of windows on the grid of what they read, halves of int8 codes away from 0, int16.

    sums: of `counts` codes, integers.
    """
    to_int8 = -128 - y.lowest
    return y.saturated(half_away((sums + counts * to_int8).astype(np.float64) / counts) - to_int8)


def sigmoid(values: Array, arithmetic: str) -> Array:
    """Return the sigmoid as the kernels approximate it, float32; arithmetic: of Processor.sigmoid."""
    x = np.clip(values, np.float32(-SATURATED), np.float32(SATURATED))
    square: Array = x * x

    def polynomial(coefficients: Sequence[float]) -> Array:
        total: Array = np.full_like(square, coefficients[0])
        for c in map(np.float32, coefficients[1:]):
            total = _fma(total, square, c) if arithmetic == "fused" else total * square + c
        return total

    result: Array = np.clip(polynomial(NUMERATOR) * x / polynomial(DENOMINATOR) + np.float32(0.5), 0, 1)
    return result


def table(function: Callable[[Array], Array], codes: Array, x: CodeGrid, y: CodeGrid) -> Array:
    """Return the codes that a table of one operand holds for float32 codes, int16: quantize(function(dequantize))."""
    return y.saturated(np.rint(function(x.step * (codes - x.zero)) / y.step) + y.zero)


KERNELS = {"add": 2, "mul": 2, "sigmoid": 1, "mean": 1}
"""Kernels that compute other codes on other processors, and their number of operands."""


def differing(
    kernel: str, inputs: Sequence[CodeGrid], y: CodeGrid, processors: Iterable[Processor], *, broadcast: bool = False
) -> Array:
    """Return for every tuple of codes of the inputs whether processors compute different codes, bool [codes, ...].

    kernel:    of KERNELS; operands in the order in which the kernel gets them.
    broadcast: whether the operands differ in shape, so that the runtime may swap them or take runs of one element.
    """
    keys = arithmetics(kernel, processors, broadcast=broadcast)
    different = np.zeros([len(x.codes()) for x in inputs], dtype=bool)
    tables = (_codes(kernel, inputs, y, *key) for key in keys) if len(keys) > 1 else ()
    for one, other in pairwise(tables):
        different |= one != other
    return different


def arithmetics(kernel: str, processors: Iterable[Processor], *, broadcast: bool = False) -> list[tuple[str, bool]]:
    """Return the arithmetics that processors may use for a kernel, each once, and whether its operands are swapped."""
    return [*dict.fromkeys(key for processor in processors for key in _variants(kernel, processor, broadcast))]


def _variants(kernel: str, processor: Processor, broadcast: bool) -> Iterator[tuple[str, bool]]:
    """Yield the arithmetic that a processor may use, and whether operands are swapped."""
    arithmetic = getattr(processor, kernel)
    if arithmetic is None:
        return
    yield arithmetic, False
    if kernel == "add" and broadcast:
        yield arithmetic, True
        if arithmetic == "plain":
            yield from ((f"{arithmetic}, one b", swapped) for swapped in (False, True))


def _codes(kernel: str, inputs: Sequence[CodeGrid], y: CodeGrid, arithmetic: str, swapped: bool) -> Array:
    """Return the codes that a kernel computes of all codes that occur, int16 [codes, ...]."""
    if kernel == "mean":
        (x,) = inputs
        return mean(x.codes(), x, y, arithmetic)
    if kernel == "sigmoid":
        (x,) = inputs
        return table(lambda values: sigmoid(values, arithmetic), x.codes(), x, y)
    a, b = inputs
    left, right = a.codes()[:, None], b.codes()[None]
    if kernel == "mul":
        return mul(left, right, a, b, y, arithmetic)
    return add(right, left, b, a, y, arithmetic) if swapped else add(left, right, a, b, y, arithmetic)
