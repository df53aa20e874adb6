"""A device of its own for machines without a GPU: tensors say that they are on it, their values are in memory.

It refuses what a GPU refuses: operators whose operands are on two devices and, while steps are recorded, looks at
values from the host and copies from or to it. `Tape` records like a CUDA graph: recording computes nothing, replaying
computes the same operators in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"

aten = torch.ops.aten

DEPENDENT = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
"""Operators whose results the host has to look at."""

Step = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class OnDevice(Tensor):
    """A tensor of the device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        self: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretend_device() -> Iterator[None]:
    """The device exists."""
    _register()
    lifting = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its tensors on the CPU and sends them
    try:
        with _Device():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifting)


@cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME)  # type: ignore[no-untyped-call]


class Tape:
    """A recorder as calibrators.reconstruction.cuda_graphs wants it."""

    current: ClassVar[Tape | None] = None
    replays: ClassVar[int] = 0

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators
        self.steps: list[Step] = []
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def warm(self, call: Callable[[], Tensor]) -> Tensor:
        return call()

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        states = [generator.get_state() for generator in self.generators]
        self.steps, self.kept, Tape.current = [], {}, self
        try:
            result = call()
        finally:
            Tape.current = None
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)
            for memory, before in self.kept.values():
                memory.copy_(before)
        return partial(_replay, self.steps), result

    def before(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what the operator is going to overwrite."""
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree_leaves(value):
                    memory = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())  # type: ignore[call-overload]
                    self.kept.setdefault(memory.data_ptr(), (memory, memory.clone()))


class Refusing(Tape):
    """A recorder that finds out while it records that it cannot."""

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        super().record(call)
        raise RuntimeError("operation failed due to a previous error during capture")


def _replay(steps: Sequence[Step]) -> None:
    Tape.replays += 1
    for func, args, kwargs, made in steps:
        again = func(*args, **kwargs)
        for argument, old, new in zip(func._schema.returns, _listed(made), _listed(again), strict=False):
            if argument.alias_info is None:  # neither a view nor changed in place
                for memory, values in zip(tree_leaves(old), tree_leaves(new), strict=True):
                    if isinstance(memory, Tensor):
                        memory.copy_(values.reshape(memory.shape))  # matmul squeezes its result in place


def _listed(result: Any) -> Sequence[Any]:
    return result if isinstance(result, tuple) else (result,)


def _inner(x: Tensor) -> Tensor:
    return x.inner if isinstance(x, OnDevice) else x


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = any(isinstance(x, OnDevice) for x in operands)
    there = any(not isinstance(x, OnDevice) for x in operands)
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if func is aten._to_copy.default:
        crosses = (target or args[0].device.type) != args[0].device.type
    elif func is aten.copy_.default:
        crosses = here and there
    else:
        looks = func in DEPENDENT or (func is aten.index.Tensor and any(x.dtype is torch.bool for x in operands[1:]))
        crosses = here and (looks or there)
        if here and any(not isinstance(x, OnDevice) and x.ndim for x in operands):
            raise RuntimeError(f"{func}: operands on two devices")
    if crosses and Tape.current is not None:
        raise RuntimeError(f"{func}: operation not permitted when the device is recording")
    if target is not None:
        here = target == NAME
        kwargs = kwargs | {"device": torch.device("cpu") if here else kwargs["device"]}
    inside, named = tree_map_only(OnDevice, _inner, (args, kwargs))
    recording = Tape.current if here else None
    if recording is not None:
        recording.before(func, inside, named)
    made = func(*inside, **named)
    if recording is not None:
        recording.steps.append((func, inside, named, made))
    if not here or func is aten._local_scalar_dense.default:
        return made
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnDevice, made))
