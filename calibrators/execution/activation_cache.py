"""Activations of all calibration samples that cross between blocks of a network, kept while a block is at work.

A value is written once, read by random samples many times, and dropped when no later block reads it. Values beyond the
memory budget go to memory-mapped files; quantized values are kept as integer codes, which loses nothing.

Must not know: methods, blocks, how values are computed.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from calibrators.grid.numerics import dequantize, quantize
from calibrators.grid.spec import QParams
from calibrators.temporary import TemporaryFolder

__all__ = ["Cache", "Memory", "Recording"]


GPU_SHARE = 4
"""Divisor of the free memory of a GPU that caches may take when they are opened; training needs the rest."""


class Memory:
    """The storage of caches: memory of the device up to a budget, then files in a temporary folder, removed with it.

    budget:  bytes of the device's memory that all live caches together may take.
    used:    bytes of it that they take.
    spilled: bytes that went to files so far.
    """

    def __init__(self, budget: int, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        if self.device.type == "cuda":
            reserved, used = torch.cuda.memory_reserved(self.device), torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + reserved - used
            budget = min(budget, free // GPU_SHARE)
        self.budget, self.used, self.spilled = budget, 0, 0
        self._folder: TemporaryFolder | None = None
        self._files = 0

    def allocate(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor [rows, columns].

        raises: OSError if the tensor is spilled and the disk is full.
        """
        size = rows * columns * dtype.itemsize
        if self.used + size <= self.budget:
            self.used += size
            return torch.empty(rows, columns, dtype=dtype, device=self.device)
        data = self._mapped(size, dtype).view(rows, columns)
        self.spilled += size
        return data

    def _mapped(self, size: int, dtype: torch.dtype) -> Tensor:
        """Return a flat tensor of `size` bytes in a file that lasts as long as the tensor."""
        if self._folder is None:
            self._folder = TemporaryFolder()
        path = self._folder.path / f"activations-{self._files}.bin"
        self._files += 1
        try:
            with path.open("wb") as file:
                _reserve(file.fileno(), path, size)
            return torch.from_file(str(path), shared=True, size=size // dtype.itemsize, dtype=dtype)
        finally:
            with contextlib.suppress(PermissionError):  # a mapped file that cannot be removed yet goes with the folder
                path.unlink(missing_ok=True)  # elsewhere the mapping keeps the data until it is dropped

    def release(self, data: Tensor) -> None:
        """Count memory from `allocate` as free; a spilled tensor frees its disk space when it is dropped."""
        # torch knows the file of a shared mapping
        if data.device.type != "cpu" or data.untyped_storage().filename is None:
            self.used -= data.numel() * data.element_size()


def _reserve(descriptor: int, path: Path, size: int) -> None:
    """Reserve the disk space of a file now, so that a full disk is an error here and not a signal later.

    raises: OSError, ENOSPC for a full disk.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        elif size <= shutil.disk_usage(path.parent).free:
            os.truncate(descriptor, size)
        else:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        error.filename = str(path)
        raise


class Cache:
    """One tensor of every sample, [samples, ...], four dimensions kept channels last.

    like:    any batch of the tensor, which gives shape and dtype.
    qparams: grid of the values, which are then kept as codes; one scale for the whole tensor. None: kept as they are.
    """

    def __init__(self, memory: Memory, samples: int, like: Tensor, qparams: QParams | None = None) -> None:
        self.shape, self.dtype, self.qparams = tuple(like.shape[1:]), like.dtype, qparams
        self.data = memory.allocate(samples, math.prod(self.shape), qparams.spec.dtype if qparams else like.dtype)
        self.memory = memory

    def __len__(self) -> int:
        return len(self.data)

    def write(self, start: int, values: Tensor) -> None:
        """Store the samples [n, ...] from index `start` on."""
        values = quantize(values, self.qparams) if self.qparams else values
        ordered = values.permute(0, 2, 3, 1) if values.ndim == 4 else values
        self.data[start : start + len(values)] = ordered.reshape(len(values), -1)

    def gather(self, index: Tensor) -> Tensor:
        """Return the samples at `index`, [n, ...]."""
        return self._values(self.data.index_select(0, index.to(self.data.device, non_blocking=True)))

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Yield all samples in order, `size` at a time; those not kept as codes are views of the cache."""
        for rows in torch.split(self.data, size):
            yield self._values(rows)

    def _values(self, rows: Tensor) -> Tensor:
        if len(self.shape) == 3:
            channels, height, width = self.shape
            rows = rows.view(len(rows), height, width, channels).permute(0, 3, 1, 2)
        else:
            rows = rows.view(len(rows), *self.shape)
        return dequantize(rows, self.qparams) if self.qparams else rows

    def free(self) -> None:
        """Free the memory; the cache is empty afterwards."""
        self.memory.release(self.data)
        self.data = self.data[:0].clone()


class Recording:
    """Caches of named values, filled batch by batch; values without samples are left out.

    names: of the values that have samples.
    grid:  returns, by name, the grid on which a value is kept as codes, None for one that is kept as it is.
    """

    def __init__(
        self,
        memory: Memory,
        samples: int,
        names: Collection[str],
        grid: Callable[[str], QParams | None] = lambda name: None,
    ) -> None:
        self.memory, self.samples, self.names, self.grid = memory, samples, names, grid
        self.caches: dict[str, Cache] = {}
        self.recorded = 0

    def append(self, values: Mapping[str, Tensor], count: int) -> None:
        """Append the values of the next `count` samples."""
        if not self.recorded:
            per_sample = {name: x for name, x in values.items() if name in self.names}
            self.caches = {n: Cache(self.memory, self.samples, x, self.grid(n)) for n, x in per_sample.items()}
        for name, cache in self.caches.items():
            cache.write(self.recorded, values[name])
        self.recorded += count
