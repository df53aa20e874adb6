"""Second moments of what a layer reads: in the network quantized so far, and of what quantization did to it.

Must not know: methods, how activations are computed and cached, rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from calibrators.graph.aten import bind, per_axis, shape_of

__all__ = ["Im2col", "Moments", "half_of"]

PIECE, LARGEST_PIECE = 4096, 1 << 26
"""Positions whose columns are copied, and multiplied, at a time; fewer where they would be more numbers than this."""

BLOCKS, SMALLEST_BLOCK = 4, 128
"""Blocks of rows of a symmetric product, and the fewest rows that make one."""

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

    with_error: whether x is given and the error of x^ is correlated with x^.
    weights:    [groups, rows, columns] of all layers that will ask for the error of their outputs; None: any may.
    counts:     positions seen in each half of the samples.
    """

    def __init__(
        self, groups: int, columns: int, device: torch.device, *, with_error: bool, weights: Tensor | None = None
    ) -> None:
        few = (
            weights is not None and 2 * weights.shape[1] < columns
        )  # two products with them take less than one without
        self._weights = weights.to(device) if weights is not None and few else None
        rows = columns if self._weights is None else self._weights.shape[1]
        nothing = partial(torch.zeros, dtype=torch.float64, device=device)
        self._hessian = nothing(HALVES, groups, columns, columns)
        self._error = nothing(HALVES, groups, rows, columns) if with_error else None
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
        for block in _blocks(quantized.shape[1]):
            self._hessian[half, :, block, block.start :] += quantized[:, block] @ quantized[:, block.start :].mT
        if self._error is not None:
            error = exact[0] - quantized
            self._error[half] += (error if self._weights is None else self._weights @ error) @ quantized.mT

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor | None]:
        for half in range(HALVES):
            self._multiply(half)
        for block in _blocks(self._hessian.shape[2]):
            self._hessian[:, :, block.stop :, block] = self._hessian[:, :, block, block.stop :].mT
        return self._hessian, self._error

    @cached_property
    def hessian(self) -> Tensor:
        """Mean over all samples of 2 x^ x^T, float64 [groups, columns, columns]."""
        return 2 / sum(self.counts) * self._sums[0].sum(0)

    @cached_property
    def _mean_error(self) -> Tensor:
        assert self._sums[1] is not None
        return 2 / sum(self.counts) * self._sums[1].sum(0)

    @property
    def has_error(self) -> bool:
        """Whether there are positions in every half, with the values of the float network."""
        return self._error is not None and all(self.counts)

    @property
    def is_finite(self) -> bool:
        """Whether all means are finite."""
        return bool(self.hessian.isfinite().all()) and (self._error is None or bool(self._mean_error.isfinite().all()))

    def missed(self, rows: Tensor, own: slice) -> Tensor:
        """Return the mean of 2 W (x - x^) x^T, float64 [groups, rows, columns].

        rows: W, float64 [groups, rows, columns]; own: where it stands among `weights`.
        """
        return self._missed(self._mean_error, rows, own)

    def half(self, index: int, rows: Tensor, own: slice) -> tuple[Tensor, Tensor]:
        """Return `hessian` and `missed` over one half of the samples."""
        hessian, error = self._sums
        assert error is not None
        scale = 2 / self.counts[index]
        return scale * hessian[index], self._missed(scale * error[index], rows, own)

    def _missed(self, error: Tensor, rows: Tensor, own: slice) -> Tensor:
        return rows @ error if self._weights is None else error[:, own]


def _blocks(columns: int) -> list[slice]:
    """Return the blocks of columns of which symmetric products compute the upper half: one if there are few columns."""
    step = max(SMALLEST_BLOCK, -(-columns // BLOCKS))
    return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]
