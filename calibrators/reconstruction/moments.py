"""Second moments of what a layer reads: in the network quantized so far, and of what quantization did to it.

Must not know: methods, how activations are computed and cached, rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, fx

from calibrators.execution.instructions import multiplies_int8
from calibrators.execution.ranks import ALONE, Ranks, TreeSum
from calibrators.graph.aten import bind, per_axis, shape_of
from calibrators.grid.spec import QParams

__all__ = ["Im2col", "Moments", "half_of"]

PIECE, LARGEST_PIECE = 4096, 1 << 26
"""Positions whose columns are copied, and multiplied, at a time; fewer where they would be more numbers than this."""

BLOCKS, SMALLEST_BLOCK = 8, 128
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

    @property
    def taps(self) -> int:
        """Positions of the input that an output reads."""
        return math.prod(self.kernel)

    def batched(self, x: Tensor) -> Tensor:
        """Return the input with a first dimension for samples, which single values lack."""
        return x if x.ndim >= len(self.kernel) + 2 else x[None]

    def draw(self, shape: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
        """Return the positions of an input [n, channels, ...] to be read, int64 in order: a share drawn at random."""
        total = math.prod(self._positions((*shape[:1], *shape[2:]) if self.kernel else shape[:-1]))
        if share >= 1:
            return torch.arange(total)
        return torch.randperm(total, generator=generator)[: math.ceil(share * total)].sort().values

    def take(self, values: Sequence[Tensor], drawn: Tensor) -> Iterator[list[Tensor]]:
        """Yield columns [groups, positions, taps * channels] of each of the values, at most PIECE positions at a time.

        values: inputs of one shape; drawn: the positions, the same for all of them.
        """
        values = [x.movedim(1, -1) if self.kernel else x for x in values]  # [n, *size, channels]
        sizes, channels = values[0].shape[:-1], values[0].shape[-1]
        positions = self._positions(sizes)
        for piece in torch.split(
            drawn.to(values[0].device), max(1, min(PIECE, LARGEST_PIECE // (self.taps * channels)))
        ):
            where, outside = self._read(torch.unravel_index(piece, positions), sizes)
            yield [self._columns(x.reshape(-1, channels).index_select(0, where), outside) for x in values]

    def _positions(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the numbers of outputs for an input of some sizes, without channels."""
        return (*sizes[:1], *map(self._outputs, range(len(self.kernel)), sizes[1:])) if self.kernel else tuple(sizes)

    def _outputs(self, axis: int, size: int) -> int:
        """Return the number of outputs along a spatial axis."""
        reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    def _read(self, place: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the rows [positions * taps] of the input that outputs read, and whether they lie in the padding.

        place: sample and position of each output, int64 [positions] each; sizes: of the input, without channels.
        """
        rows, outside = place[0][:, None], torch.zeros_like(place[0][:, None], dtype=torch.bool)  # [positions, taps]
        for axis, (output, size) in enumerate(zip(place[1:], sizes[1:], strict=True)):
            read = output[:, None]
            if self.kernel:
                taps = torch.arange(self.kernel[axis], device=output.device) * self.dilation[axis]
                read = read * self.stride[axis] - self.padding[axis] + taps
            inside = read.clamp(0, size - 1)
            rows = (rows[:, :, None] * size + inside[:, None]).flatten(1)
            outside = (outside[:, :, None] | (read != inside)[:, None]).flatten(1)
        return rows.flatten(), outside.flatten()

    def _columns(self, rows: Tensor, outside: Tensor) -> Tensor:
        """Return the columns of what outputs read, [positions * taps, channels]."""
        if any(self.padding):
            rows.index_fill_(0, outside.nonzero()[:, 0], 0.0)
        return rows.view(-1, self.taps, self.groups, rows.shape[1] // self.groups).permute(2, 0, 1, 3).flatten(2)


class Moments:
    """Means over the positions of a layer's inputs: x^ in the network quantized so far, x in the float network.

    Products are exact integers, whose float64 sums are exact too, or float32: these are added up in float64 shard by
    shard, and over shards in a tree, so that neither batches nor the number of processes change the result. The means
    are computed after `finish`. Columns arrive tap by tap, which is how they lie in memory; the means have them as
    weights do, channel by channel.

    cut:        how the layers cut their inputs into columns, of which each group has `columns`.
    with_error: whether x is given and the error of x^ is correlated with x^.
    grid:       of x^, one for all; None: it is on no grid. Products of codes are exact integers where that is fast.
    weights:    [groups, rows, columns] of all layers that will ask for the error of their outputs; None: any may.
    counts:     positions seen in each half of the samples.
    """

    def __init__(
        self,
        cut: Im2col,
        columns: int,
        device: torch.device,
        *,
        with_error: bool,
        weights: Tensor | None = None,
        grid: QParams | None = None,
    ) -> None:
        self._order = torch.arange(columns, device=device).view(-1, cut.taps).T.flatten()  # of what arrives
        # torch 2.13 returns uninitialized numbers for the product of a row and a column
        self._grid = grid if cut.groups == 1 and columns > 1 and multiplies_int8(device) else None
        few = weights is not None and 2 * weights.shape[1] < columns  # then products with them take less time
        self._weights = weights.to(device)[:, :, self._order] if weights is not None and few else None
        groups, rows = cut.groups, columns if self._weights is None else self._weights.shape[1]
        nothing = partial(torch.zeros, dtype=torch.float64, device=device)
        self._hessian = nothing(HALVES, groups, columns, columns)  # upper half; of int8 values, if there is a grid
        self._totals = nothing(HALVES, groups, columns)  # of int8 values
        self._error = nothing(HALVES, groups, rows, columns) if with_error else None
        self._finished = TreeSum(), TreeSum()  # sums of floats of the shards before: of _hessian and of _error
        self._waiting: list[list[Tensor]] = [[] for _ in range(HALVES)]
        self.counts = [0] * HALVES
        self._unfinished = 0  # positions of the shard at work

    def add(self, half: int, quantized: Tensor, exact: Tensor | None = None) -> None:
        """Include columns [groups, positions, taps * channels] of one half of the samples: x^, and x where needed."""
        if self._error is not None and exact is not None:
            error = (exact - quantized).mT
            self._error[half] += (error if self._weights is None else self._weights @ error) @ quantized
        if self._grid is not None:
            quantized = (quantized * (1 / self._grid.scale)).round_().sub_(_middle(self._grid)).to(torch.int8)
        self._waiting[half].append(quantized)
        self.counts[half] += quantized.shape[1]
        self._unfinished += quantized.shape[1]
        waiting = sum(x.shape[1] for x in self._waiting[half])
        if waiting >= PIECE or waiting * quantized.shape[0] * quantized.shape[2] >= LARGEST_PIECE:
            self._square(half)

    def _square(self, half: int) -> None:
        """Add the products of the columns that wait; many positions at a time, because sums in float64 are slow."""
        if not self._waiting[half]:
            return
        columns = torch.cat(self._waiting[half], 1)
        self._waiting[half].clear()
        if self._grid is not None:
            self._totals[half] += torch._int_mm(columns.new_ones(1, columns.shape[1]), columns[0])
        for block in _blocks(columns.shape[2]):
            left, right = columns[:, :, block].mT, columns[:, :, block.start :]
            product = left @ right if self._grid is None else torch._int_mm(left[0], right[0])
            self._hessian[half, :, block, block.start :] += product

    def next_shard(self) -> None:
        """Put the sums of the shard at work aside, and begin the next one."""
        if self._grid is None:
            for half in range(HALVES):
                self._square(half)
            self._finished[0].add(self._hessian if self._unfinished else None)
            self._hessian = torch.zeros_like(self._hessian)
        if self._error is not None:
            self._finished[1].add(self._error if self._unfinished else None)
            self._error = torch.zeros_like(self._error)
        self._unfinished = 0

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Add up the shards, and what other processes measured; nothing is added after that."""
        if self._unfinished:
            self.next_shard()
        for half in range(HALVES):
            self._square(half)
        hessian, error = (done.result() for done in self._finished)
        self._hessian = self._hessian if hessian is None else hessian
        self._error = self._error if error is None else error
        if ranks.count > 1:
            for block in _blocks(self._hessian.shape[2]):
                upper = self._hessian[:, :, block, block.start :]
                upper.copy_(ranks.total(upper.clone()))
            self._totals = ranks.total(self._totals)
            self._error = self._error if self._error is None else ranks.total(self._error)
            self.counts = ranks.total(torch.tensor(self.counts)).tolist()

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor | None]:
        sums, factor = self._hessian, 1.0
        if self._grid is not None:  # of codes less their zero points: sum (a + middle) (b + middle)
            middle, factor = _middle(self._grid), float(self._grid.scale) ** 2
            totals, counts = middle * self._totals, sums.new_tensor(self.counts)[:, None, None, None]
            sums.add_(totals[..., None]).add_(totals[:, :, None] + counts * middle**2)
        hessian = sums.float().mul_(factor)
        for block in _blocks(hessian.shape[2]):
            hessian[:, :, block.stop :, block] = hessian[:, :, block, block.stop :].mT
        place = self._order.argsort()
        error = None if self._error is None else self._error.float()[..., place]
        if error is not None and self._weights is None:
            error = error[:, :, place]
        return hessian[:, :, place][..., place], error

    @cached_property
    def hessian(self) -> Tensor:
        """Mean over all samples of 2 x^ x^T, float32 [groups, columns, columns]."""
        return self._sums[0].sum(0).mul_(2 / sum(self.counts))

    @cached_property
    def _mean_error(self) -> Tensor:
        assert self._sums[1] is not None
        return self._sums[1].sum(0).mul_(2 / sum(self.counts))

    @property
    def has_error(self) -> bool:
        """Whether there are positions in every half, with the values of the float network."""
        return self._error is not None and all(self.counts)

    @property
    def is_finite(self) -> bool:
        """Whether all means are finite."""
        return bool(self.hessian.isfinite().all()) and (self._error is None or bool(self._mean_error.isfinite().all()))

    def missed(self, rows: Tensor, own: slice) -> Tensor:
        """Return the mean of 2 W (x - x^) x^T, float32 [groups, rows, columns].

        rows: W, float32 [groups, rows, columns]; own: where it stands among `weights`.
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


def _middle(grid: QParams) -> int:
    """Return the code that int8 counts from, less the zero point."""
    return (grid.spec.qmin + grid.spec.qmax + 1) // 2 - int(grid.zero_point)


def _blocks(columns: int) -> list[slice]:
    """Return the blocks of columns of which symmetric products compute the upper half: one if there are few columns."""
    step = max(SMALLEST_BLOCK, -(-columns // BLOCKS))
    return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]
