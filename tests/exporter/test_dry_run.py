"""A dry run tells what an export does, refuses what it refuses, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calibrators.methods import get_method, list_methods
from exporter.cli import app
from exporter.dry_run import dry_run
from exporter.pipeline import export
from tests.support.networks import build

NETWORK = """
import torch
from torch import nn
from tests.support.networks import build as network

class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.special.bessel_j0(self.stem(x).mean((2, 3)))

def build():
    return network("residual")[0]

def data():
    return [network("residual", seed=seed)[1] for seed in range(3)]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path


def test_it_tells_what_the_export_then_does(folder: Path) -> None:
    command = ["export", "net.py:build", "--data", "net.py:data", "--eval", "net.py:data", "--exclude", "head"]
    command += ["--out", "out", "--dry-run", "--quiet"]
    told = CliRunner().invoke(app, [*command, "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["net.py"]
    data = [build("residual", seed=seed)[1] for seed in range(3)]
    samples = sum(map(len, data))
    assert found["samples"] == [samples, samples] and found["method"] == "gptq"
    settings = {"latency_runs": 0, "parity_samples": 4, "exclude": ("head",), "simplify": True}
    report = export(build("residual")[0], data, out=folder / "out", method="minmax", **settings)
    assert found["fold"] == report["fold"] and found["size"]["by_type"] == report["size"]["by_type"]
    for part in ("integer_nodes", "compute_nodes", "integer_macs", "by_op"):
        assert found["coverage"][part] == report["coverage"][part]
    assert all(seconds > 0 for seconds in found["time_s"].values()) and found["memory"] > 1e6
    again = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert again.exit_code == 2 and "choose another --out" in again.output, "a taken folder is refused here already"


def test_it_refuses_what_the_export_refuses(folder: Path) -> None:
    def code(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["export", *arguments, "--dry-run", "--quiet"], env={"COLUMNS": "200"})
        return result.exit_code, result.output

    assert code("net.py:Unknown", "--data", "net.py:data")[0] == 3
    assert code("net.py:build", "--data", "net.py:nothing")[0] == 2
    found = code("net.py:build", "--data", "net.py:data", "--budget", "weight_bytes<=1")
    assert found[0] == 2 and "cannot be met" in found[1]
    found = code("net.py:build", "--data", "net.py:data", "--summary", "s.md")
    assert found[0] == 2 and "--summary" in found[1]


def test_python_shows_the_box(folder: Path) -> None:
    found = dry_run("net.py:build", "net.py:data", method="minmax")
    assert "DRY RUN" in repr(found) and "minmax" in repr(found) and len(repr(found)) < 1500
    assert found._repr_html_().startswith("<pre")


def test_more_work_has_more_effort() -> None:
    for method in list_methods():
        effort = get_method(method.name).effort
        assert effort(100) >= get_method("minmax").effort(100) > 0 and effort(200) > effort(100), method.name
    assert get_method("qdrop", {"iters": 2000}).effort(100) > 3 * get_method("qdrop").effort(100)
