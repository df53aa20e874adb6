"""What every test shares: one torch thread, a seeded generator, one table of ONNX translations."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.onnx._internal.exporter import _registration


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Workers run side by side: more threads than cores only make them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def one_table_of_translations() -> Iterator[None]:
    """torch.onnx.export builds its table anew at every call, which takes longer than exporting a small network."""
    build = functools.cache(_registration.ONNXRegistry.from_torchlib)

    def from_torchlib(*args: Any, **kwargs: Any) -> Any:
        table = copy.copy(build(*args, **kwargs))
        table.functions = {target: [*entries] for target, entries in table.functions.items()}
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
