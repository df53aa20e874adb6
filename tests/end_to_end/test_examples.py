"""The projects in examples/ run as their scripts are, and their bundles pass."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
LIMIT_S = 600


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with `intact` and `python` of this interpreter, for the PATH of a script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, arguments in (("python", ""), ("intact", "-m exporter ")):
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        file.chmod(0o755)
    return folder


def run(script: str, commands: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["bash", str(EXAMPLES / script), *arguments]
    return subprocess.run(
        command, cwd=commands.parent, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def passed(result: subprocess.CompletedProcess[str], bundle: Path) -> dict[str, Any]:
    """The report of a bundle whose script ended well and whose gates passed."""
    assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, Any] = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "pass"
    assert report["parity"]["optimized"]["kernel_mismatched"] == 0
    return report


@pytest.mark.slow
def test_a_network_from_timm(tmp_path: Path, commands: Path) -> None:
    probe = subprocess.run([sys.executable, "-c", "import timm"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"timm cannot be imported here: {probe.stderr.strip().splitlines()[-1]}")
    passed(run("timm_network/run.sh", commands, str(tmp_path / "out")), tmp_path / "out")


@pytest.mark.slow
def test_a_detector_keeps_the_names_of_its_outputs(tmp_path: Path, commands: Path) -> None:
    result = run("detector/run.sh", commands, str(tmp_path / "out"))
    passed(result, tmp_path / "out")
    outputs = [output.name for output in onnx.load(tmp_path / "out" / "model.onnx").graph.output]
    assert outputs == [f"{kind}_{stride}" for stride in (8, 16) for kind in ("scores", "boxes", "centreness")]
    assert "80 boxes" in result.stdout  # 8 x 8 cells and 4 x 4 cells, decoded in onnxruntime


@pytest.mark.slow
def test_a_text_encoder_with_integer_inputs(tmp_path: Path, commands: Path) -> None:
    report = passed(run("text_encoder/run.sh", commands, str(tmp_path / "out")), tmp_path / "out")
    inputs = onnx.load(tmp_path / "out" / "model.onnx").graph.input
    assert [(i.name, i.type.tensor_type.elem_type) for i in inputs] == [
        ("ids", onnx.TensorProto.INT64),
        ("mask", onnx.TensorProto.INT64),
    ]
    assert report["accuracy"]["metric"] == "top1"
    assert report["accuracy"]["float"] > 0.9  # the network has learned its task
    with np.load(tmp_path / "out.work" / "calib.npz") as calibration:
        assert set(calibration.files) == {"ids", "mask"}


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells run in order in one namespace, and the last expression of each is what the notebook would show."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    notebook = json.loads((EXAMPLES / "notebook" / "export.ipynb").read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {}
    shown = [show("".join(each["source"]), namespace) for each in notebook["cells"] if each["cell_type"] == "code"]
    boxes = [each._repr_html_() for each in shown if hasattr(each, "_repr_html_")]
    assert len(boxes) == 2 and all("PASS" in box for box in boxes)
    assert shown[2][0] is True and namespace["smaller"]["baseline"]["drop"]["samples"] == 500
    assert any("The verdict was PASS and is PASS." in each for each in shown if isinstance(each, list))
    assert shown[-1].endswith("images")


def show(source: str, namespace: dict[str, Any]) -> Any:
    """Run a cell; return the value of its last expression, None if it ends in something else."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


def test_every_example_is_listed_in_the_documentation() -> None:
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    folders = sorted(entry.name for entry in EXAMPLES.iterdir() if entry.is_dir() and entry.name != "__pycache__")
    assert folders
    assert [name for name in folders if f"`examples/{name}/`" not in page] == []
