"""The limit on memory for files of strangers: one message where it is reached, and nothing left of it afterwards."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from calibrators.errors import InputError
from exporter.memory import LEAST, limited_memory
from runtime_tests.reference.kernels import Grid, prepare_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and limits what a process has")


@pytest.mark.parametrize("take", [lambda n: np.ones(n, np.uint8), lambda n: torch.ones(n, dtype=torch.uint8)])
def test_more_than_the_file_explains_is_one_message(tmp_path: Path, take: object) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(InputError, match=r"takes more than 1 GiB of memory.*--memory"), limited_memory(tmp_path):
        take(64 * LEAST)  # type: ignore[operator]
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_other_errors_and_enough_memory_pass(tmp_path: Path) -> None:
    with limited_memory(tmp_path, 0.5):
        np.ones(1 << 20)
    with pytest.raises(RuntimeError, match="something else"), limited_memory(tmp_path):
        raise RuntimeError("something else")


def test_large_weights_are_prepared_in_little_more_than_they_take(tmp_path: Path) -> None:
    codes = torch.ones(2048, 8192, dtype=torch.int8)  # 64 MiB in float32
    grid = Grid(torch.tensor(0.1), 0, 0, 255, torch.uint8)
    with limited_memory(tmp_path, 0.2):
        weights = prepare_weights(codes, torch.zeros(2048, dtype=torch.int8), torch.ones(2048), None, grid)
    assert [part.shape[0] for _, part in weights.parts] == [2048]
