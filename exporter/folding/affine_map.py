"""Affine maps: the normal form of every linear, shift-invariant piece of a network, and its algebra in float64.

An affine map says how a value y follows from one root x (x is zero outside its borders, i counts positions per axis):

    y[n, o, i] = sum_d sum_c T_d[o, c] * x[n, c, stride * i + d]  +  bias[o]

with an output size of floor((size + extra) / stride) + 1 per axis. Matrices are block diagonal with `groups` blocks and
are stored as [groups, outputs / groups, inputs / groups]. Everything that decides whether an operation is legal (sizes,
offsets, groups, bias) is known at once; the matrices are computed when asked for, so that a map which is not folded
costs nothing. A linear layer is a map without spatial axes.

Groups are decided by structure, never by looking for zeros in a weight.

Must not know: graphs, nodes, models, what is worth folding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AffineMap",
    "Geometry",
    "NotAffine",
    "add",
    "average",
    "correlate",
    "crop",
    "identity",
    "pad",
    "scale",
    "shift",
    "stack",
]

Vector = tuple[int, ...]
Matrices = dict[Vector, Tensor]
Memo = dict[int, Matrices]

CANCELLED = 1e-12
"""A sum of float64 numbers smaller than this share of its terms is zero: 4 decimal digits above their rounding."""


class NotAffine(Exception):
    """The result of an operation is not an affine map; the message says why, for the list of refused folds."""


@dataclass(frozen=True)
class Geometry:
    """The convolution that an affine map is: kernel, dilation, zeros to pad (if negative: cells to crop) per axis."""

    kernel: Vector
    dilation: Vector
    low: Vector
    high: Vector


@dataclass(frozen=True, eq=False)
class AffineMap:
    """One affine map, see the module docstring.

    bias:  float64 [outputs]; None if it is zero by construction.
    build: computes the matrices; the memo keeps shared operands from being computed twice.
    """

    inputs: int
    outputs: int
    groups: int
    stride: Vector
    extra: Vector
    offsets: frozenset[Vector]
    bias: Tensor | None
    build: Callable[[Memo], Matrices]

    @property
    def is_pointwise(self) -> bool:
        """Whether every output cell reads the input cell at its own position and no other."""
        same = identity(self.inputs, len(self.stride))
        return (self.offsets, self.stride, self.extra) == (same.offsets, same.stride, same.extra)

    @property
    def is_diagonal(self) -> bool:
        """Whether every matrix is diagonal, so that channels do not mix."""
        return self.inputs == self.outputs == self.groups

    def geometry(self) -> Geometry:
        """Return the smallest convolution that has all offsets."""
        columns = [sorted(set(column)) for column in zip(*self.offsets, strict=True)] if self.stride else []
        steps = [math.gcd(*(value - column[0] for value in column)) or 1 for column in columns]
        spans = [column[-1] - column[0] for column in columns]
        low = tuple(-column[0] for column in columns)
        return Geometry(
            kernel=tuple(span // step + 1 for span, step in zip(spans, steps, strict=True)),
            dilation=tuple(steps),
            low=low,
            high=tuple(e + span + 1 - p for e, span, p in zip(self.extra, spans, low, strict=True)),
        )

    @property
    def kernel_groups(self) -> int:
        """Groups of the operator that is this map: a linear layer has none."""
        return self.groups if self.stride else 1

    def macs_per_cell(self) -> int:
        """Return the multiply-accumulates per output position of the operator with kernel()."""
        return self.outputs * (self.inputs // self.kernel_groups) * math.prod(self.geometry().kernel)

    def matrices(self, memo: Memo) -> Matrices:
        """Return the float64 matrices by offset."""
        if id(self) not in memo:
            memo[id(self)] = self.build(memo)
        return memo[id(self)]

    def kernel(self) -> Tensor:
        """Return the float64 weight of a convolution [outputs, inputs / groups, *kernel] or linear layer."""
        shape, groups = self.geometry(), self.kernel_groups
        weight = torch.zeros(*shape.kernel, self.outputs, self.inputs // groups, dtype=torch.float64)
        for offset, matrix in self.matrices({}).items():
            steps = zip(offset, shape.low, shape.dilation, strict=True)
            weight[tuple((at + low) // step for at, low, step in steps)] = _regroup(matrix, groups).flatten(0, 1)
        return weight.movedim((-2, -1), (0, 1)).contiguous()

    def bias_or_zero(self) -> Tensor:
        """Return the float64 bias [outputs]."""
        return torch.zeros(self.outputs, dtype=torch.float64) if self.bias is None else self.bias


def identity(channels: int, spatial: int) -> AffineMap:
    """Return the map of a root from itself."""
    here = (0,) * spatial
    ones, size_kept = (1,) * spatial, (-1,) * spatial
    eye = {here: torch.ones(channels, 1, 1, dtype=torch.float64)}
    return AffineMap(channels, channels, channels, ones, size_kept, frozenset([here]), None, lambda _: eye)


def scale(f: AffineMap, factor: Tensor) -> AffineMap:
    """Return the map factor * f; factor is float64 [] or [outputs]."""

    def build(memo: Memo) -> Matrices:
        rows = factor.expand(f.outputs).reshape(f.groups, -1, 1)
        return {offset: rows * matrix for offset, matrix in f.matrices(memo).items()}

    return replace(f, bias=None if f.bias is None else f.bias * factor, build=build)


def shift(f: AffineMap, value: Tensor) -> AffineMap:
    """Return the map f + value; value is float64 [] or [outputs]. A sum that cancels leaves a map without a bias."""
    old = f.bias_or_zero()
    total = old + value
    vanished = bool((total.abs() <= CANCELLED * (old.abs() + value.abs())).all())
    return replace(f, bias=None if vanished else total)


def add(f: AffineMap, g: AffineMap) -> AffineMap:
    """Return the map f + g on the same root.

    raises: NotAffine unless channels, strides and output sizes agree for every input size.
    """
    if (f.inputs, f.outputs) != (g.inputs, g.outputs):
        raise NotAffine("the operands of the sum have different channels")
    if f.stride != g.stride or f.extra != g.extra:
        raise NotAffine("the operands of the sum agree in size only for some input sizes")
    groups = math.gcd(f.groups, g.groups)

    def build(memo: Memo) -> Matrices:
        total = {offset: _regroup(matrix, groups) for offset, matrix in f.matrices(memo).items()}
        for offset, matrix in g.matrices(memo).items():
            matrix = _regroup(matrix, groups)
            total[offset] = total[offset] + matrix if offset in total else matrix
        return total

    bias = f.bias if g.bias is None else g.bias if f.bias is None else f.bias + g.bias
    return replace(f, groups=groups, offsets=f.offsets | g.offsets, bias=bias, build=build)


def stack(maps: Sequence[AffineMap]) -> AffineMap:
    """Return the concatenation of the outputs of maps on the same root.

    raises: NotAffine unless strides and output sizes agree for every input size.
    """
    first = maps[0]
    if any(f.stride != first.stride or f.extra != first.extra for f in maps):
        raise NotAffine("the concatenated values agree in size only for some input sizes")
    offsets = frozenset().union(*(f.offsets for f in maps))

    def build(memo: Memo) -> Matrices:
        parts = [f.matrices(memo) for f in maps]
        zeros = [torch.zeros(1, f.outputs, f.inputs, dtype=torch.float64) for f in maps]
        pairs = list(zip(parts, zeros, strict=True))
        return {at: torch.cat([_regroup(part.get(at, zero), 1) for part, zero in pairs], 1) for at in offsets}

    outputs = sum(f.outputs for f in maps)
    bias = None if all(f.bias is None for f in maps) else torch.cat([f.bias_or_zero() for f in maps])
    return replace(first, outputs=outputs, groups=1, offsets=offsets, bias=bias, build=build)


def pad(f: AffineMap, low: Vector, high: Vector, value: float = 0.0) -> AffineMap:
    """Return f with `value` written around its output: per axis `low` cells before, `high` after (negative: cut off).

    A map may be padded only if, evaluated one cell beyond its border, it reads nothing but zeros: there it yields its
    bias, as the merged convolution does. Before the first cell that needs every offset <= stride - 1, after the last
    one every offset >= -(extra + 1); and the padding value must be the bias.

    raises: NotAffine (the border rule) otherwise.
    """
    for axis, (before, after) in enumerate(zip(low, high, strict=True)):
        along = [offset[axis] for offset in f.offsets]
        reads_before = before > 0 and max(along) > f.stride[axis] - 1
        reads_after = after > 0 and min(along) < -(f.extra[axis] + 1)
        if reads_before or reads_after:
            raise NotAffine("border rule: a kernel wider than one cell lies before zero padding")
    if any(side > 0 for side in low + high) and bool((f.bias_or_zero() != value).any()):
        raise NotAffine(f"border rule: the padding writes {value:g} where the layer before it would write its bias")
    moved = tuple(-s * p for s, p in zip(f.stride, low, strict=True))
    grown = zip(f.extra, f.stride, low, high, strict=True)
    return replace(
        f,
        extra=tuple(e + s * (before + after) for e, s, before, after in grown),
        offsets=frozenset(_plus(offset, moved) for offset in f.offsets),
        build=lambda memo: {_plus(offset, moved): matrix for offset, matrix in f.matrices(memo).items()},
    )


def crop(f: AffineMap, low: Vector, high: Vector, step: Vector) -> AffineMap:
    """Return the map f[low : -high : step] per axis."""
    cut = pad(f, tuple(-p for p in low), tuple(-p for p in high))
    return replace(cut, stride=tuple(s * t for s, t in zip(f.stride, step, strict=True)))


def correlate(f: AffineMap, weight: Tensor, stride: Vector, dilation: Vector, groups: int) -> AffineMap:
    """Return f followed by the unpadded convolution with `weight` [outputs, channels / groups, *kernel]."""
    kernel = tuple(weight.shape[2:])
    cells = list(itertools.product(*(range(k) for k in kernel)))
    jumps = [tuple(s * d * u for s, d, u in zip(f.stride, dilation, cell, strict=True)) for cell in cells]
    merged = math.gcd(f.groups, groups)

    def build(memo: Memo) -> Matrices:
        own = weight.double().reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        total: Matrices = {}
        for offset, inner in f.matrices(memo).items():
            for cell, jump in zip(cells, jumps, strict=True):
                at = _plus(offset, jump)
                index: Any = (..., *cell)
                product = _regroup(_product(own[index], inner), merged)
                total[at] = total[at] + product if at in total else product
        return total

    bias = None
    if f.bias is not None:
        sums = weight.double().flatten(2).sum(2) if kernel else weight.double()
        bias = torch.einsum(
            "goc,gc->go", sums.reshape(groups, -1, weight.shape[1]), f.bias.reshape(groups, -1)
        ).flatten()
    grown = zip(f.extra, f.stride, dilation, kernel, strict=True)
    return AffineMap(
        inputs=f.inputs,
        outputs=weight.shape[0],
        groups=merged,
        stride=tuple(s * t for s, t in zip(f.stride, stride, strict=True)),
        extra=tuple(e - s * d * (k - 1) for e, s, d, k in grown),
        offsets=frozenset(_plus(offset, jump) for offset in f.offsets for jump in jumps),
        bias=bias,
        build=build,
    )


def average(f: AffineMap, kernel: Vector, stride: Vector, divisor: int) -> AffineMap:
    """Return f followed by the sum over a window, divided by `divisor`, per channel and without padding."""
    weight = torch.full((f.outputs, 1, *kernel), 1.0 / divisor, dtype=torch.float64)
    return correlate(f, weight, stride, (1,) * len(kernel), f.outputs)


def _plus(a: Vector, b: Vector) -> Vector:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _regroup(matrix: Tensor, groups: int) -> Tensor:
    """Rewrite a block diagonal [g, o, c] with fewer, larger blocks [groups, g/groups * o, g/groups * c]."""
    blocks, rows, columns = matrix.shape
    ratio = blocks // groups
    if ratio == 1:
        return matrix
    wide = matrix.new_zeros(groups, ratio, rows, ratio, columns)
    diagonal = torch.arange(ratio)
    wide[:, diagonal, :, diagonal, :] = matrix.reshape(groups, ratio, rows, columns).transpose(0, 1)
    return wide.reshape(groups, ratio * rows, ratio * columns)


def _product(outer: Tensor, inner: Tensor) -> Tensor:
    """Return outer @ inner for block-diagonal matrices of possibly different groups; diagonal ones only scale."""
    if inner.shape[1:] == (1, 1):
        return outer * inner.reshape(outer.shape[0], 1, outer.shape[2])
    if outer.shape[1:] == (1, 1):
        return outer.reshape(inner.shape[0], inner.shape[1], 1) * inner
    groups = math.gcd(outer.shape[0], inner.shape[0])
    return _regroup(outer, groups) @ _regroup(inner, groups)
