"""Recorded steps, and methods on a device that is not the CPU: a pretend one, and a GPU where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibrators import PlacementOptions, calibrate
from calibrators.methods import get_method
from calibrators.reconstruction.cuda_graphs import RECORDERS, WARM, Recorded
from tests.calibrators.reconstruction.on_pretend_device import CASES, NOT_TRAINED
from tests.support.folded import folded_network

KINDS = 2
"""Steps before and after the rounding regularizer starts to act."""


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python (2.10 and newer do)",
)
@pytest.mark.parametrize("case", CASES)
def test_methods_on_a_device(case: str) -> None:
    """The result is that of the CPU without random drop, else as good; recorded steps give the same bit for bit."""
    command = [sys.executable, "-m", "tests.calibrators.reconstruction.on_pretend_device", case]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cpu, plain = found["cpu"], found["plain"]
    assert cpu["cached"] == ["cpu"] and plain["cached"] == ["pretend"]
    if CASES[case][1] in {"brecq", *NOT_TRAINED}:
        assert plain["digest"] == cpu["digest"]
    else:
        assert plain["steps"] == cpu["steps"]
        assert sum(plain["errors"]) < 3 * sum(cpu["errors"])
    if CASES[case][1] not in NOT_TRAINED:
        recorded = found["recorded"]
        assert recorded["digest"] == plain["digest"]
        assert recorded["replays"] == sum(steps - KINDS * WARM for steps in recorded["steps"]) > 0
        assert found["refused"]["digest"] == plain["digest"]
        assert found["refused"]["replays"] == 0 and "slower: operation failed due to a previous error" in done.stderr


class Notes:
    """A recorder that runs what it records when it is replayed."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.recorded = 0

    def warm(self, call: Callable[[], Tensor]) -> Tensor:
        return call()

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        result = torch.empty(())
        return lambda: result.copy_(call()), result  # type: ignore[return-value]


class Stubborn(Notes):
    """A recorder that cannot."""

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")


def weighted(kind: Hashable, /, *groups: Sequence[Tensor]) -> Tensor:
    (x,), (y,) = groups
    return (x * y).sum() if kind == "product" else (x + y).sum()


def test_every_kind_is_recorded_once_and_reads_new_values(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Notes] = []
    monkeypatch.setitem(RECORDERS, "cpu", lambda *how: made.append(Notes(*how)) or made[-1])
    call = Recorded(weighted, torch.device("cpu"), [])
    for i in range(3 * WARM):
        x, y = torch.tensor([i, 1.0]), torch.tensor([2.0, 3.0])
        assert float(call("product", [x], [y])) == 2 * i + 3
        assert float(call("sum", [x], [y])) == i + 6
    assert [notes.recorded for notes in made] == [2]


def test_what_cannot_be_recorded_is_called_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", Stubborn)
    call = Recorded(weighted, torch.device("cpu"), [])
    x = torch.ones(2)
    for _ in range(WARM):
        call("sum", [x], [x])
    with pytest.warns(UserWarning, match="kernel by kernel, which is slower: operation not permitted"):
        assert float(call("sum", [x], [x])) == 4
    assert float(call("sum", [2 * x], [x])) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(
    ("method", "network", "settings"),
    [
        ("qdrop", "residual", {}),
        ("qdrop", "transformer", {"precision": "bfloat16"}),
        ("brecq", "residual", {"fisher": True}),
        ("repapq", "residual", {}),
        ("pdquant", "residual", {}),
        ("mrecg", "residual", {"groups": "1-2"}),
    ],
)
def test_cuda_graphs_give_what_plain_steps_give(
    method: str, network: str, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, inputs = folded_network(network)
    options = {"iters": 50, "batch": 8, **settings}
    errors = []
    launched = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: launched.append(replay(graph)))
    for recorders in (RECORDERS, {}):
        monkeypatch.setattr("calibrators.reconstruction.cuda_graphs.RECORDERS", recorders)
        result = calibrate(
            graph,
            [inputs],
            method=get_method(method, options),
            placement=PlacementOptions(weight_bits=4, activation_bits=4),
            device="cuda",
        )
        errors.append(sum(unit.after for unit in result.record.reconstruction.units))
    steps = [unit.steps for unit in result.record.reconstruction.units]
    assert len(launched) == sum(steps) - KINDS * WARM * len(steps)
    graphs, plain = errors
    assert graphs == pytest.approx(plain, rel=0.1)  # atomic sums have no order on a GPU
