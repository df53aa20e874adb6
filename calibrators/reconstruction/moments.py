"""Second moments of what a layer reads: in the network quantized so far, and of what quantization did to it.

Must not know: methods, how activations are computed and cached, rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from calibrators.graph.aten import bind, per_axis, shape_of

__all__ = ["Im2col", "Moments", "half_of"]

PIECE, LARGEST_PIECE = 4096, 1 << 26
"""Positions whose columns are copied, and multiplied, at a time; fewer where they would be more numbers than this."""

HALVES = 2
"""Parts of the samples whose moments are kept apart, so that one can judge what was fitted to the other."""

RUN = 16
"""Neighbouring samples that stand in the same half: they may be alike, as frames of a film are."""


def half_of(rows: int, first: int, count: int, samples: int) -> Tensor:
    """Return the half in which each of some rows stands, int64 [rows].

    first, count: samples that the rows belong to, of all `samples`; each has equally many rows, in order.
    """
    run = max(1, min(RUN, samples // HALVES))
    sample = torch.arange(rows) // max(1, rows // count)
    return (first + sample) // run % HALVES


@dataclass(frozen=True)
class Im2col:
    """The way a convolution or linear layer cuts its input into columns; a linear layer has no spatial dimensions.

    Layers that read the same value with equal `Im2col` share their moments.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, node: fx.Node) -> Im2col:
        """Return the `Im2col` of an ATen call."""
        bound = bind(node)
        kernel = shape_of(bound["weight"])[2:]
        if not kernel:
            return cls()
        stride, padding, dilation = (per_axis(bound[key], len(kernel)) for key in ("stride", "padding", "dilation"))
        return cls(kernel, stride, padding, dilation, bound["groups"])

    def cut(self, x: Tensor) -> Tensor:
        """Return the inputs of every position, [*positions, channels, *kernel], as a view of the padded input."""
        if not self.kernel:
            return x
        windows = F.pad(x, [width for width in reversed(self.padding) for _ in range(2)]) if any(self.padding) else x
        for axis, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), start=2):
            windows = windows.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
        return windows.movedim(1, 1 + len(self.kernel))  # [n, *out, channels, *kernel]

    def batched(self, x: Tensor) -> Tensor:
        """Return the input with a first dimension for samples, which single values lack."""
        return x if x.ndim >= len(self.kernel) + 2 else x[None]

    def take(self, values: Sequence[Tensor], share: float, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """Yield columns [groups, columns, positions] of each of the values, at most PIECE positions at a time.

        values: inputs of one shape; share: part of the positions, drawn at random and the same for all of them.
        """
        windows = [self.cut(x) for x in values]
        positions = windows[0].shape[: windows[0].ndim - 1 - len(self.kernel)]
        total = math.prod(positions)
        index = torch.arange(total)
        if share < 1:
            index = torch.randperm(total, generator=generator)[: math.ceil(share * total)].sort().values
        size = math.prod(windows[0].shape[len(positions) :])
        for piece in torch.split(index.to(values[0].device), max(1, min(PIECE, LARGEST_PIECE // size))):
            where = torch.unravel_index(piece, positions)
            yield [x[where].reshape(len(piece), self.groups, -1).permute(1, 2, 0) for x in windows]


class Moments:
    """Means over the positions of a layer's inputs: x^ in the network quantized so far, x in the float network.

    Products are float32 and are added up in float64, batch by batch and so in an order that batches do not change. The
    means are computed once, when they are first read; nothing is added after that.

    counts: positions seen in each half of the samples.
    """

    def __init__(self, groups: int, columns: int, device: torch.device, *, with_error: bool) -> None:
        shape = (HALVES, groups, columns, columns)
        self._hessian = torch.zeros(shape, dtype=torch.float64, device=device)
        self._error = torch.zeros_like(self._hessian) if with_error else None
        self._waiting: list[list[tuple[Tensor, ...]]] = [[] for _ in range(HALVES)]
        self.counts = [0] * HALVES

    def add(self, half: int, *columns: Tensor) -> None:
        """Include columns [groups, columns, positions] of one half of the samples: x^, and x where it is needed."""
        self._waiting[half].append(columns)
        self.counts[half] += columns[0].shape[-1]
        waiting = sum(x.shape[-1] for x, *_ in self._waiting[half])
        if waiting >= PIECE or waiting * math.prod(columns[0].shape[:2]) >= LARGEST_PIECE:
            self._multiply(half)

    def _multiply(self, half: int) -> None:
        """Add the products of the columns that wait; many positions at a time, because sums in float64 are slow."""
        if not self._waiting[half]:
            return
        quantized, *exact = (torch.cat(x, 2) for x in zip(*self._waiting[half], strict=True))
        self._waiting[half].clear()
        self._hessian[half] += quantized @ quantized.mT
        if self._error is not None:
            self._error[half] += (exact[0] - quantized) @ quantized.mT

    def _sums(self) -> tuple[Tensor, Tensor | None]:
        for half in range(HALVES):
            self._multiply(half)
        return self._hessian, self._error

    @cached_property
    def hessian(self) -> Tensor:
        """Mean over all samples of 2 x^ x^T, float64 [groups, columns, columns]."""
        return 2 / sum(self.counts) * self._sums()[0].sum(0)

    @cached_property
    def error(self) -> Tensor | None:
        """Mean over all samples of 2 (x - x^) x^T, float64 [groups, columns, columns]."""
        error = self._sums()[1]
        return None if error is None else 2 / sum(self.counts) * error.sum(0)

    def half(self, index: int) -> tuple[Tensor, Tensor]:
        """Return both means over one half of the samples."""
        hessian, error = self._sums()
        assert error is not None
        scale = 2 / self.counts[index]
        return scale * hessian[index], scale * error[index]
