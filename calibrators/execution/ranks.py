"""The processes that calibrate and prove one network together: who does which part, and sums over all of them.

Work is cut into units that do not depend on the number of processes, and every process does some of them. Integers,
extremes and lists in order come out the same whatever that number is. A sum of floats depends on its order, so the
samples are divided into SHARDS parts whose sums are added up in a fixed tree: a process owns a subtree.

Must not know: what is computed, methods, how processes are started and ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "COUNTS", "SHARDS", "ProcessLost", "Ranks", "TreeSum", "shards_of"]

SHARDS = 8
"""Parts of the samples whose sums of floats are kept apart. A process takes a whole number of them, so that at most
eight work at once; more would cost memory, as up to log2(SHARDS) sums wait for their neighbours."""

COUNTS = (1, 2, 4, 8)
"""Numbers of processes among which SHARDS can be divided into subtrees."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class ProcessLost(KeyboardInterrupt):
    """Another process of the same export has ended without a word.

    A signal may raise it anywhere, so it is no Exception, which libraries catch and take for an error of their own.
    """

    def __init__(self) -> None:
        super().__init__(
            "another process of this export was killed or ran out of memory, or the job was cancelled; nothing was "
            "written, and torchrun says which process ended and how"
        )


@dataclass(frozen=True)
class Ranks:
    """A process among those that work together, connected by torch.distributed where there is more than one.

    index: its number, from 0; count: number of all of them, one of COUNTS.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    def takes(self, unit: int) -> bool:
        """Return whether this process does a unit of work of which nothing but integers is summed."""
        return unit % self.count == self.index

    @property
    def shards(self) -> range:
        """The shards of this process."""
        return range(self.index * SHARDS // self.count, (self.index + 1) * SHARDS // self.count)

    def spread(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield work(item) for every item in order; each process does some, and all of them get all results."""
        left = iter(items)
        while group := list(islice(left, self.count)):
            mine = [work(item) for item in group[self.index : self.index + 1]]
            for found in self.gathered(mine):
                yield from found

    def gathered(self, value: Item) -> list[Item]:
        """Return the values of all processes in order."""
        if self.count == 1:
            return [value]
        found: list[Item] = [value] * self.count
        with _connected():
            dist.all_gather_object(found, value)
        return found

    def shared(self, value: Item) -> Item:
        """Return the value of the first process."""
        if self.count == 1:
            return value
        found = [value]
        with _connected():
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest of each value over all processes; `values` may be overwritten."""
        if self.count > 1:
            with _connected():
                dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, on the device of `values`, which may be overwritten.

        It is the same in all of them: in step k, neighbours of 2**k processes exchange the sums of their groups.
        """
        if self.count == 1:
            return values
        mine = values.cpu().contiguous()
        theirs = torch.empty_like(mine)
        step = 1
        while step < self.count:
            other = self.index ^ step
            with _connected():
                waits = [dist.isend(mine, other), dist.irecv(theirs, other)]
                for each in waits:
                    if each is not None:
                        each.wait()
            mine += theirs
            step *= 2
        return mine.to(values.device)


ALONE = Ranks()
"""A process that works for itself; nothing is sent anywhere."""


@contextmanager
def _connected() -> Iterator[None]:
    """Raise ProcessLost where the connection to another process breaks."""
    try:
        yield
    except RuntimeError as error:  # of torch.distributed
        raise ProcessLost from error


class TreeSum:
    """The sum of one tensor per shard, added in neighbouring pairs, then pairs of pairs.

    A process that adds its own shards holds the sum of their subtree. Sums that are complete wait for their neighbours.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Tensor | None]] = []  # sums and the number of their shards

    def add(self, shard: Tensor | None) -> None:
        """Add the sum of the next shard, None for a shard without samples; it may be overwritten."""
        size, right = 1, shard
        while self._waiting and self._waiting[-1][0] == size:
            _, left = self._waiting.pop()
            right = left if right is None else right if left is None else left.add_(right)
            size *= 2
        self._waiting.append((size, right))

    def result(self) -> Tensor | None:
        """Return the sum of a subtree; None if no shard has samples, or none was added."""
        ((_, found),) = self._waiting or [(0, None)]
        return found


def shards_of(units: Sequence[Item]) -> list[Sequence[Item]]:
    """Return the units of each shard: consecutive ones, as evenly as they divide."""
    ends = [len(units) * shard // SHARDS for shard in range(SHARDS + 1)]
    return [units[start:end] for start, end in pairwise(ends)]
