"""Calls that differ in the values of their tensors alone: a GPU records their kernels once and launches them together.

A step of training is a few hundred small kernels; a GPU has finished each before the next one is launched. A CUDA graph
launches all of them at once. Elsewhere calls are just calls.

source: CUDA graphs as in the PyTorch notes: warm up aside, capture, copy new inputs over the old ones, replay.

Must not know: training, what is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
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

    def record(self, call: Callable[[], Tensor]) -> Tensor:
        """Record a call without computing anything; the tensor that holds the result after a replay."""

    def replay(self) -> None:
        """Compute what was recorded, on the values that its tensors have now."""


class CudaGraph:
    """A recorder for CUDA; `generators` are those that the calls draw from."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)

    def warm(self, call: Callable[[], Tensor]) -> Tensor:
        """Call on the stream that records."""
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True.*")  # an optimizer that is not captured yet
            result = call()
        outside.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], Tensor]) -> Tensor:
        """Capture."""
        with torch.cuda.graph(self.graph, stream=self.stream):
            return call()

    def replay(self) -> None:
        """One launch."""
        self.graph.replay()


RECORDERS: dict[str, Callable[[torch.device, Sequence[torch.Generator]], Recorder]] = {"cuda": CudaGraph}
"""By type of device; one that is not here is called plainly."""


@dataclass(frozen=True, eq=False)
class _Recording:
    """A recorded call: its arguments, whose memory is read again, and its result."""

    recorder: Recorder
    arguments: Sequence[Sequence[Tensor]]
    result: Tensor

    def replay(self, groups: Sequence[Sequence[Tensor]]) -> Tensor:
        for old, new in zip(self.arguments, groups, strict=True):
            for memory, values in zip(old, new, strict=True):
                memory.copy_(values, non_blocking=True)
        self.recorder.replay()
        return self.result


class Recorded:
    """The function to call instead of `function`: arguments may be on any device, and shapes depend on the kind alone.

    A call that cannot be recorded is made plainly from then on, with a warning.
    """

    def __init__(self, function: Function, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.function, self.device, self.generators = function, device, generators
        self.factory = RECORDERS.get(device.type)
        self.recordings: dict[Hashable, _Recording] = {}
        self.warming: dict[Hashable, tuple[Recorder, int]] = {}

    def __call__(self, kind: Hashable, *groups: Sequence[Tensor]) -> Tensor:
        """The result of function(kind, *groups), until the next call."""
        if kind in self.recordings:
            return self.recordings[kind].replay(groups)
        arguments = [[x.to(self.device) for x in group] for group in groups]
        if self.factory is None:
            return self.function(kind, *arguments)
        recorder, calls = self.warming.get(kind) or (self.factory(self.device, self.generators), 0)
        if calls < WARM:
            self.warming[kind] = recorder, calls + 1
            return recorder.warm(lambda: self.function(kind, *arguments))
        try:
            result = recorder.record(lambda: self.function(kind, *arguments))
        except RuntimeError as error:
            warnings.warn(f"steps are launched kernel by kernel, which is slow: {error}", stacklevel=2)
            self.factory = None
            return self.function(kind, *arguments)
        self.recordings[kind] = _Recording(recorder, arguments, result)
        return self.recordings[kind].replay(groups)
