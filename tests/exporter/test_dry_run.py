"""A dry run tells what an export does, refuses what it refuses, and writes nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
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


def test_it_tells_what_the_export_then_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dry_run("net.py:build", "net.py:data", eval_data="net.py:data", exclude=("head",), out="out")
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["net.py"]
    samples = sum(len(build("residual", seed=seed)[1]) for seed in range(3))
    assert found.samples == (samples, samples) and found.method == "gptq"
    assert all(seconds > 0 for seconds in vars(found.time_s).values()) and found.memory and found.memory > 1e6
    assert "DRY RUN" in repr(found) and "gptq" in repr(found) and len(repr(found)) < 1500
    floats = tuple(replace(found.coverage.float_nodes[0], op=op) for op in ("Sub", "Div", "Div"))
    assert "2 Divs, 1 Sub: " in repr(replace(found, coverage=replace(found.coverage, float_nodes=floats)))
    settings = {"latency_runs": 0, "parity_samples": 4, "exclude": ("head",)}
    report = export("net.py:build", "net.py:data", out=folder / "out", method="minmax", **settings)
    command = ["export", "net.py:build", "--data", "net.py:data", "--out", "out", "--dry-run", "--quiet"]
    taken = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert taken.exit_code == 2 and "choose another --out" in taken.output, "it is refused here already"
    monkeypatch.setattr(sys.modules["exporter.dry_run"], "dry_run", lambda *_, **__: found)
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert told["fold"] == report["fold"] and told["size"]["by_type"] == report["size"]["by_type"]
    for part in ("integer_nodes", "compute_nodes", "integer_macs", "by_op"):
        assert told["coverage"][part] == report["coverage"][part]


@pytest.mark.parametrize(
    ("model", "data", "more", "code", "words"),
    [
        pytest.param("Unknown", "data", [], 3, "has no ONNX form", id="operator"),
        pytest.param("build", "nothing", [], 2, "nothing", id="data"),
        pytest.param("build", "data", ["--summary", "s.md"], 2, "--summary", id="summary"),
        pytest.param("build", "data", ["--budget", "weight_bytes<=1"], 2, "cannot be met", id="budget",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_it_refuses_what_the_export_refuses(
    model: str, data: str, more: list[str], code: int, words: str, folder: Path
) -> None:
    command = ["export", f"net.py:{model}", "--data", f"net.py:{data}", "--dry-run", "--quiet", *more]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == code and words in result.output


def test_more_work_has_more_effort() -> None:
    for method in list_methods():
        effort = get_method(method.name).effort
        assert effort(100) >= get_method("minmax").effort(100) > 0 and effort(200) > effort(100), method.name
    assert get_method("qdrop", {"iters": 2000}).effort(100) > 3 * get_method("qdrop").effort(100)
