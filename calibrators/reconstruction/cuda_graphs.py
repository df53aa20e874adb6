"""Calls that differ in the values of their tensors alone: a GPU records their kernels once and launches them together.

A step of training is a few hundred small kernels; a GPU has finished each before the next one is launched. A CUDA graph
launches all of them at once. Elsewhere calls are just calls.

source: CUDA graphs as in the PyTorch notes: warm up aside, capture, copy new inputs over the old ones, replay.

Must not know: training, what is computed.
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
"""Plain calls of every kind before one is recorded: libraries choose their kernels, optimizers make their state."""


class Function(Protocol):
    """What is called: `kind` says which kernels run, tensors come in groups, all on one device."""

    def __call__(self, kind: Hashable, /, *groups: Sequence[Tensor]) -> Tensor:
        """A result that may be overwritten by the next call.

        It may change tensors that outlive it and draw random numbers from known generators of the device, but neither
        read values on the host nor depend on any number there that is not the same in all calls of a kind.
        """


class Recorder(Protocol):
    """How a device records."""

    def warm(self, call: Callable[[], Tensor]) -> Tensor:
        """Call without recording, where it can be recorded later."""

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record a call without computing anything: what computes it, on the values that its tensors have then, and
        the tensor that holds the result afterwards.
        """


class CudaGraphs:
    """A recorder for CUDA; `generators` are those that the calls draw from."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()  # of all graphs: they take turns and keep nothing for each other
        self.generators = generators

    def warm(self, call: Callable[[], Tensor]) -> Tensor:
        """Call on the stream that records."""
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            result = call()
        outside.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A graph, launched as a whole."""
        outside = torch.cuda.current_stream(self.stream.device)
        graph = torch.cuda.CUDAGraph()
        before = [(generator, generator.clone_state()) for generator in self.generators]
        try:
            with torch.cuda.device(self.stream.device):
                for generator in self.generators:
                    graph.register_generator_state(generator)
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    result = call()
        except RuntimeError as error:  # a capture that failed leaves its stream, and generators in the state they had
            torch.cuda.set_stream(outside)
            for generator, state in before:
                generator.graphsafe_set_state(state)
            cause = error.__context__  # of ending the capture, when the call has failed already
            raise (cause if isinstance(cause, RuntimeError) else error) from None
        return graph.replay, result


RECORDERS: dict[str, Callable[[torch.device, Sequence[torch.Generator]], Recorder]] = {"cuda": CudaGraphs}
"""By type of device; one that is not here is called plainly."""


@dataclass(frozen=True, eq=False)
class _Recording:
    """A recorded call: its arguments, whose memory is read again, what computes it, its result."""

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
    """The function to call instead of `function`: arguments may be on any device, and shapes depend on the kind alone.

    A call that cannot be recorded is made plainly from then on, with a warning.
    """

    def __init__(self, function: Function, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.function, self.device = function, device
        factory = RECORDERS.get(device.type)
        self.recorder = factory(device, generators) if factory else None
        self.recordings: dict[Hashable, _Recording] = {}
        self.calls: Counter[Hashable] = Counter()

    def __call__(self, kind: Hashable, *groups: Sequence[Tensor]) -> Tensor:
        """The result of function(kind, *groups), until the next call."""
        if kind in self.recordings:
            return self.recordings[kind].replay(groups)
        record = self.recorder is not None and self.calls[kind] == WARM  # into memory of its own
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
            refused = str(error)  # and nothing else: its traceback holds the memory of the call
        if not refused:
            return self.recordings[kind].replay(groups)
        warnings.warn(f"steps are launched kernel by kernel, which is slow: {refused}", stacklevel=2)
        self.recorder = None
        return call()
