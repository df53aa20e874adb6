"""Whole sweeps of a tiny network: what each job leaves, what is run again, and what the table says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from exporter.cli import app
from exporter.console import INTERRUPTED
from exporter.sweeping.plan import read_sweep
from tests.support.html_page import HtmlPage

NETWORK = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
"""
SWEEP = """
model = "net.py:build"
data = "calib.npz"
eval = "eval.npz"
out = "out"
latency_runs = 0
simplify = false
accuracy_gate = false

[sweep]
method = ["minmax", "mse"]
layers = [[], [{match = "nowhere", weight_bits = 4}]]
"""

PATIENCE_S = 600.0
"""Seconds that a busy machine may take for some exports."""


def write_files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("calib", "eval"):
        x = rng.standard_normal((16, 8), dtype=np.float32)
        np.savez(folder / f"{name}.npz", x=x, labels=rng.integers(0, 4, 16))
    (folder / "net.py").write_text(NETWORK)
    (folder / "sweep.toml").write_text(SWEEP)


def intact(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["sweep", "sweep.toml", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    """Return the folder of a sweep whose jobs were run one by one, and what each printed."""
    folder = tmp_path_factory.mktemp("sweep")
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        keys = [each.key for each in read_sweep(Path("sweep.toml")).jobs]
        return folder, [intact("--run", key, "--quiet") for key in keys[:3]]


@pytest.fixture
def folder(swept: tuple[Path, list[Result]], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(swept[0])
    return swept[0]


def test_jobs_leave_a_bundle_or_a_reason(folder: Path, swept: tuple[Path, list[Result]]) -> None:
    jobs = read_sweep(Path("sweep.toml")).jobs
    assert [each.exit_code for each in swept[1]] == [0, 2, 0]
    assert [each.is_finished for each in jobs] == [True, False, True, False]
    assert json.loads((jobs[0].bundle / "report.json").read_text())["verdict"] == "pass"
    reason = json.loads(jobs[1].error.read_text())
    assert reason["exit_code"] == 2 and "nowhere" in reason["message"]
    assert f"error: {reason['message']}" in swept[1][1].stderr.replace("\n", " ")


def test_statistics_are_shared(folder: Path) -> None:
    assert [*(folder / "out" / "cache").rglob("*.safetensors")]


def test_what_is_finished_is_not_run_again(folder: Path) -> None:
    job = read_sweep(Path("sweep.toml")).jobs[0]
    before = (job.bundle / "manifest.json").stat()
    again = intact("--run", job.key)
    assert again.exit_code == 0 and "is finished" in again.stderr
    assert (job.bundle / "manifest.json").stat() == before
    assert intact("--run", job.key, "--overwrite", "--quiet").exit_code == 0
    assert (job.bundle / "manifest.json").stat().st_ino != before.st_ino


def test_the_table_has_every_job(folder: Path) -> None:
    found = intact("--gather")
    assert found.exit_code == 1
    assert max(map(len, found.stdout.splitlines()[:-1])) <= 80 or "exit code 2" in found.stdout
    assert "4 jobs: 2 pass, 1 without results, 1 not run." in found.stdout
    assert "2 (minmax, match=nowhere weight_bits=4), exit code 2:" in found.stdout
    table = json.loads((folder / "out" / "sweep.json").read_text())
    assert [each["state"] for each in table["results"]] == ["pass", "error", "pass", "open"]
    report = json.loads((folder / "out" / table["results"][0]["bundle"] / "report.json").read_text())
    figures = table["results"][0]
    assert table["quality"] == "accuracy" and figures["accuracy"] == report["accuracy"]["runtime"]
    assert figures["kl"] == report["accuracy"]["mean_kl"] and figures["size_bytes"] == report["size"]["bytes"]
    printed = json.loads(intact("--gather", "--json").stdout)
    assert printed == table
    page = HtmlPage((folder / "out" / "sweep.html").read_text())
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 2 and all((folder / "out" / str(link)).is_file() for link in links)
    assert "| 1 | minmax | none | pass |" in (folder / "out" / "sweep.md").read_text()


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"exit_code": "<b>", "message": 3}'], ids=repr)
def test_what_cannot_be_read_is_a_row_without_results(text: str, folder: Path) -> None:
    good, bad, *_ = read_sweep(Path("sweep.toml")).jobs
    files = (good.bundle / "report.json", bad.error)
    before = [path.read_bytes() for path in files]
    try:
        for path in files:
            path.write_text(text)
        found = intact("--gather")
        assert found.exit_code == 1 and "4 jobs: 1 pass, 2 without results, 1 not run." in found.stdout
        assert found.stdout.count("--overwrite makes it anew") == 2
        again = intact("--run", good.key)
        assert again.exit_code == 2 and "error: " in again.stderr
    finally:
        for path, content in zip(files, before, strict=True):
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('prepare = ["cle", "migrat"]', "0, migrat: unknown preparation 'migrat'. Did you mean 'migrate'"),
        ('gates = [["sizes<=1"]]', "0, sizes<=1: unknown gate metric 'sizes'"),
        ('layers = [[{match = "a", method = "gptq"}]]', "method"),
    ],
    ids=["preparation", "gate", "method"],
)
def test_names_are_checked_before_any_job_runs(
    setting: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path)
    (tmp_path / "sweep.toml").write_text(SWEEP.partition("method =")[0] + f"seed = [0, 1]\n{setting}\n")
    monkeypatch.chdir(tmp_path)
    found = intact()
    assert found.exit_code == 2 and message in found.stderr
    assert not Path("out").exists()


def started(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "exporter", "sweep", "sweep.toml", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL], ids=lambda stop: stop.name)
def test_a_sweep_that_is_stopped_goes_on(stop: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path)
    (tmp_path / "sweep.toml").write_text(SWEEP.partition("method =")[0] + 'seed = [0, 1, 2, 3]\nmethod = ["minmax"]\n')
    monkeypatch.chdir(tmp_path)
    sweep = read_sweep(Path("sweep.toml"))
    process = started(tmp_path, "--jobs", "2")
    deadline = time.monotonic() + PATIENCE_S
    while not any(each.is_finished for each in sweep.jobs) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(stop)
    output = process.communicate(timeout=PATIENCE_S)[0].decode()
    if stop is signal.SIGTERM:
        assert process.returncode == INTERRUPTED and "run it again to continue" in output
        assert not [*Path("out").glob("*.error.json")]
    finished = {each.key: (each.bundle / "manifest.json").stat() for each in sweep.jobs if each.is_finished}
    assert finished and (stop is signal.SIGKILL or len(finished) < 4)
    again = started(tmp_path, "--jobs", "2")
    output = again.communicate(timeout=PATIENCE_S)[0].decode()
    assert again.returncode == 0 and "4 jobs: 4 pass." in output, output
    for each in sweep.jobs:
        if each.key in finished:
            assert (each.bundle / "manifest.json").stat() == finished[each.key]
    if stop is signal.SIGTERM:  # after a kill the jobs that ran then may still be at work
        assert not [*Path("out").glob(".intact-*")]
