"""An export that torchrun shares between processes: the bytes of one process, one writer, one message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from exporter import export
from exporter.console import INTERRUPTED
from exporter.reporting.provenance import sha256_of

NETWORK = """
import os, signal, time
import numpy as np
import torch
from torch import nn

generator = torch.Generator().manual_seed(0)
x = torch.randn(200, 3, 8, 8, generator=generator)
y = torch.randint(4, (200,), generator=generator)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def data():
    for start in range(0, 200, 48):
        yield x[start : start + 48], y[start : start + 48]


def killed():
    for index, batch in enumerate(data()):
        if index == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def broken():
    for index, (x, y) in enumerate(data()):
        yield (x * torch.nan if index == 2 and os.environ["RANK"] == "1" else x), y


def shuffled():
    order = np.random.default_rng(int(os.environ["RANK"])).permutation(200)
    for start in range(0, 200, 48):
        yield x[order[start : start + 48]], y[order[start : start + 48]]


def raising():
    yield next(data())
    if os.environ["RANK"] == "1":
        raise RuntimeError("the disk is on fire")
    time.sleep(60)
"""

TIMES = ("time_s", "seconds")
"""Keys of the report whose values are times."""


@pytest.fixture
def network(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NETWORK, encoding="utf-8")
    return path


def shared(count: int, *arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.Popen(
        [*launcher, "-m", "exporter", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=Path(__file__).parents[2],
    )


def arguments(network: Path, data: str = "data") -> list[str]:
    return ["export", f"{network}:build", "--data", f"{network}:{data}", "--out", str(network.parent / "shared")]


def figures(value: Any) -> Any:
    """Return a report without times."""
    if isinstance(value, dict):
        return {key: figures(each) for key, each in value.items() if key not in TIMES}
    return [figures(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("method", ["gptq", "mse"])
@pytest.mark.parametrize("count", [2, 4])
def test_a_shared_export_is_that_of_one_process(network: Path, count: int, method: str) -> None:
    alone, together = network.parent / "alone", network.parent / "shared"
    settings = {"method": method, "weight_bits": 4, "latency_runs": 0, "parity_samples": 100, "accuracy_gate": True}
    process = shared(
        count, *arguments(network), "--eval", f"{network}:data", "-q", "--method", method, "--weight-bits", "4",
        "--parity-samples", "100", "--set", "latency_runs=0",
    )  # fmt: skip
    out, err = process.communicate()
    export(f"{network}:build", f"{network}:data", eval_data=f"{network}:data", out=alone, **settings)
    assert process.returncode == 0, err
    assert out.count("PASS") == 1
    assert sha256_of(together / "model.onnx") == sha256_of(alone / "model.onnx")
    ours, theirs = (figures(json.loads((path / "report.json").read_text())) for path in (alone, together))
    assert theirs == ours
    assert ours["parity"]["optimized"]["samples"] == 100 and ours["accuracy"]["samples"] == 200


@pytest.mark.parametrize(
    ("data", "options", "message", "code"),
    [
        ("raising", [], "the disk is on fire", 2),
        ("broken", [], "NaN or infinite", 2),
        ("shuffled", [], "the calibration data of process 1 differs from that of process 0", 2),
        ("killed", [], "another process of this export was killed", INTERRUPTED),
        ("data", ["--method", "brecq"], "method 'brecq' cannot be shared by 2 processes", 2),
        ("data", ["--dry-run"], "leave --dry-run", 2),
    ],
)
def test_all_processes_end_with_one_message_and_one_code(
    network: Path, data: str, options: list[str], message: str, code: int
) -> None:
    start = time.monotonic()
    process = shared(2, *arguments(network, data), "--method", "minmax", *options)
    out, err = process.communicate()
    assert time.monotonic() - start < 50  # nobody waits for who has gone
    assert process.returncode == 1 and not out  # which is torchrun's, whatever the processes' codes are
    assert err.count("error: ") + err.count("interrupted; ") == 1 and message in err
    codes = [line.split()[2] for line in err.splitlines() if line.strip().startswith("exitcode")]
    assert sorted(codes) == sorted([str(code), str(-signal.SIGKILL if data == "killed" else code)])
    assert not (network.parent / "shared").exists()


def test_three_processes_cannot_share_and_other_commands_are_not_shared(network: Path) -> None:
    _, err = shared(3, *arguments(network)).communicate()
    assert err.count("error: ") == 1 and "is shared by 2, 4, 8" in err
    _, err = shared(2, "methods").communicate()
    assert "torchrun starts export or demo" in err
