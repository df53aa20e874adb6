"""An export repeated from its own record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

from exporter.cli import app
from exporter.pipeline import export

NETWORK = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()

def data():
    return [torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
"""


PLAIN = ["--method", "minmax", "--layer", "0: weight_bits=6"]
AIMED = ["--method", "auto", "--set", "rungs=mse", "--weight-bits", "4", "--set", "first_last_bits=none",
         "--set", "room=0", "--eval", "net.py:data", "--gate", "sqnr_db>=19dB"]  # fmt: skip
"""A ladder that ends one rung earlier without its gate."""


@pytest.fixture(params=[PLAIN, pytest.param(AIMED, marks=pytest.mark.slow)], ids=["minmax", "auto"])
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "net.safetensors")
    command = ["export", "net.py:build", "--checkpoint", "net.safetensors", "--data", "net.py:data", "--out", "out"]
    command += [*request.param, "--set", "latency_runs=0", "--quiet"]
    command += ["--golden", "synthetic"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def test_the_same_files_come_out_until_something_changes(bundle: Path) -> None:
    def rebuilt() -> tuple[int, dict[str, list[str]]]:
        result = CliRunner().invoke(app, ["rebuild", "out", "--check", "--quiet", "--json"])
        return result.exit_code, json.loads(result.stdout) if result.stdout else {}

    code, found = rebuilt()
    assert code == 0 and "model.onnx" in found["compared"] and "golden/reference.pt2" in found["compared"]
    assert not found["differing"] and not found["changed"] and not found["data"]
    path = bundle.parent / "net.py"
    path.write_text(NETWORK.replace("manual_seed(i)", "manual_seed(i + 5)"))
    code, found = rebuilt()
    assert code == 1 and "model.onnx" in found["differing"], "other calibration data"
    before, now = found["data"]["calibration"]
    assert before == json.loads((bundle / "report.json").read_text())["data"]["calibration"]["sha256"] != now
    path.write_text(NETWORK.replace("nn.ReLU()", "nn.ReLU6()"))
    result = CliRunner().invoke(app, ["rebuild", "out", "--check", "--quiet"])
    assert result.exit_code == 1 and "the code of the model" in " ".join(result.stdout.split())
    path.write_text(NETWORK)
    weights = safetensors.torch.load_file("net.safetensors")
    safetensors.torch.save_file({name: 2 * each for name, each in weights.items()}, "net.safetensors")
    result = CliRunner().invoke(app, ["rebuild", "out"])
    assert result.exit_code == 2 and "its sha256 differs" in " ".join(result.stderr.split())


def test_bundles_of_python_objects_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    export(model, [torch.randn(8, 4)], out=tmp_path / "out", method="minmax", latency_runs=0)
    result = CliRunner().invoke(app, ["rebuild", str(tmp_path / "out")])
    assert result.exit_code == 2 and "Python objects" in " ".join(result.stderr.split())
