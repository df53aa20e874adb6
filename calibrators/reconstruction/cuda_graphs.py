"""Record the kernels of a call once and launch them together on a GPU, for calls that differ only in tensor values.

A training step is a few hundred small kernels, each of which a GPU finishes before the next is launched; a CUDA graph
launches them all at once. On other devices, calls are made as they are.

source: CUDA graphs as in the PyTorch notes: warm up on a side stream, capture, copy new inputs over the old, replay.

Must not know: training, or what is computed.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["RECORDERS", "Function", "Recorded", "Recorder"]

WARM = 3
"""Plain calls of every kind before one is recorded, during which libraries choose kernels and optimizers make state."""


class Function(Protocol):
    """A function of groups of tensors on one device, whose `kind` decides which kernels run."""

    def __call__(self, kind: Hashable, /, *groups: Sequence[Tensor]) -> Tensor:
        """Return a result that the next call may overwrite.

        The function may change tensors that outlive it and draw from known generators of the device, but must neither
        read values on the host nor depend on host numbers that differ between the calls of a kind.
        """


class Recorder(Protocol):
    """The way in which a device records calls."""

    def warm(self, call: Callable[[], Tensor]) -> Tensor:
        """Call without recording, where recording will be possible later."""

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record a call without computing it; return a function that computes it and the tensor of its result.

        The function reads the values that the tensors have when it is called.
        """


class CudaGraphs:
    """A recorder for CUDA, with the generators that the calls draw from."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()  # shared, since graphs take turns and keep nothing for each other
        self.generators = generators

    def warm(self, call: Callable[[], Tensor]) -> Tensor:
        """Call on the recording stream."""
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            result = call()
        outside.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record a CUDA graph."""
        outside = torch.cuda.current_stream(self.stream.device)
        graph = torch.cuda.CUDAGraph()
        before = [(generator, generator.clone_state()) for generator in self.generators]
        try:
            with torch.cuda.device(self.stream.device):
                for generator in self.generators:
                    graph.register_generator_state(generator)
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    result = call()
        except RuntimeError as error:  # restore the stream and the generators
            torch.cuda.set_stream(outside)
            for generator, state in before:
                generator.graphsafe_set_state(state)
            cause = error.__context__  # the error of the call, where ending the capture failed because of it
            raise (cause if isinstance(cause, RuntimeError) else error) from None
        return graph.replay, result


RECORDERS: dict[str, Callable[[torch.device, Sequence[torch.Generator]], Recorder]] = {"cuda": CudaGraphs}
"""Recorders by type of device; on other devices all calls are plain."""


@dataclass(frozen=True, eq=False)
class _Recording:
    """A recorded call: its arguments, whose memory every replay reads, the computation, and the result."""

    arguments: Sequence[Sequence[Tensor]]
    compute: Callable[[], None]
    result: Tensor

    def replay(self, groups: Sequence[Sequence[Tensor]]) -> Tensor:
        for old, new in zip(self.arguments, groups, strict=True):
            for memory, values in zip(old, new, strict=True):
                memory.copy_(values, non_blocking=True)
        self.compute()
        return self.result


class Recorded:
    """A stand-in for `function` with arguments on any device, whose shapes depend only on the kind.

    After a call that cannot be recorded, all calls are plain, with a warning.
    """

    def __init__(self, function: Function, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.function, self.device = function, device
        factory = RECORDERS.get(device.type)
        self.recorder = factory(device, generators) if factory else None
        self.recordings: dict[Hashable, _Recording] = {}
        self.calls: Counter[Hashable] = Counter()

    def __call__(self, kind: Hashable, *groups: Sequence[Tensor]) -> Tensor:
        """Return the result of function(kind, *groups), valid until the next call."""
        if kind in self.recordings:
            return self.recordings[kind].replay(groups)
        record = self.recorder is not None and self.calls[kind] == WARM  # with copies of the arguments
        arguments = [[x.to(self.device, copy=record) for x in group] for group in groups]
        call = partial(self.function, kind, *arguments)
        if self.recorder is None:
            return call()
        if not record:
            self.calls[kind] += 1
            return self.recorder.warm(call)
        refused = ""
        try:
            self.recordings[kind] = _Recording(arguments, *self.recorder.record(call))
        except RuntimeError as error:
            refused = str(error)  # the traceback would hold the memory of the call
        if not refused:
            return self.recordings[kind].replay(groups)
        warnings.warn(
            f"training steps cannot be recorded and are launched kernel by kernel, which is slower: {refused}",
            stacklevel=2,
        )
        self.recorder = None
        return call()
