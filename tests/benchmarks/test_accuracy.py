"""The accuracy benchmark from its command line to its table, on a network of two layers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accuracy
import numpy as np
import peers
import pytest
from accuracy_table import markdown

NETWORK = """
import numpy as np
import torch
from torch import nn


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()


def regressor():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, 1)).eval()


def images(seed, labelled):
    draw = np.random.default_rng(seed)
    for _ in range(2):
        x = draw.normal(size=(32, 3, 6, 6)).astype(np.float32)
        yield (x, draw.integers(0, 4, 32)) if labelled else x


def calibration(): return images(0, False)
def evaluation(): return images(1, True)
def unlabelled(): return images(1, False)


PASSES = []
def shuffled():
    PASSES.append(0)
    return images(len(PASSES), True)
"""

Benchmark = Callable[..., tuple[list[list[str]], str]]


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Benchmark:
    """Run a command line on networks and evaluation data of net.py; the lines of the tables as cells, and stderr."""
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, networks: str = "classifier", evaluation: str = "evaluation") -> tuple[list[Any], str]:
        specs = [f"net.py:{name}" for name in networks.split()]
        data = ["--data", "net.py:calibration", *(["--eval", f"net.py:{evaluation}"] if evaluation else [])]
        monkeypatch.setattr(sys, "argv", ["accuracy.py", *specs, *data, "--quiet", *arguments])
        accuracy.main()
        out, err = capsys.readouterr()
        return [line.strip("| ").split(" | ") for line in out.splitlines() if line], err

    return run


def test_a_table_and_its_file(benchmark: Benchmark, tmp_path: Path) -> None:
    lines, _ = benchmark("--bits", "4/8", "--method", "gptq", "--seeds", "2", "--json", "out.json")
    head, _, nearest, gptq, *means = lines
    assert (
        head[:5] == ["network", "bits", "method", "float", "top-1"] and "mean bits" in head and "per step" not in head
    )
    assert [nearest[index] for index in (0, 1, 2)] == ["classifier", "4/8", "`mse`"]
    cell = dict(zip(head, gptq, strict=True))
    assert cell["method"] == "`gptq`" and cell["top-1"].endswith("(2 seeds)")
    assert means[-1] == ["4/8", "`gptq`", "1", cell["KL ratio to `mse`"]]

    entry = json.loads((tmp_path / "out.json").read_text())
    assert entry["command"].startswith("python benchmarks/accuracy.py net.py:classifier ")
    assert entry["methods"] == ["gptq", "mse"] and {"date", "cpu", "versions"} <= entry["measured"].keys()
    assert {len(row) for row in entry["rows"]} == {len(entry["columns"])}
    assert markdown(entry["columns"], entry["rows"]).splitlines()[3] == "| " + " | ".join(gptq) + " |"
    with np.load(tmp_path / "out.samples.npz") as stored:
        kls = [stored[f"{index}.kl"] for index in range(3)]
    assert [len(each) for each in kls] == [64, 64, 64]
    ratio = float(np.mean([kls[1], kls[2]]) / kls[0].mean())
    assert cell["KL ratio to `mse`"].startswith(f"{ratio:.3f} [")


def test_resume_measures_what_is_missing(benchmark: Benchmark, tmp_path: Path) -> None:
    first, _ = benchmark("--bits", "8/8", "--json", "out.json")
    again, err = benchmark("--bits", "8/8", "4/8", "--json", "out.json", "--resume")
    started, finished = err.splitlines()
    assert started == "net.py:classifier 4/8 mse seed 0"
    assert finished.startswith("  top-1 ") and "KL" in finished
    assert again[2] == first[2] and len(again) == 4
    _, err = benchmark("--bits", "4/8", "--json", "out.json", "--resume")
    assert err == "" and len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 2


def test_files_of_earlier_versions_are_resumed(benchmark: Benchmark, tmp_path: Path) -> None:
    """Without scores of samples there is nothing to pair."""
    benchmark("--bits", "4/8", "--json", "out.json")
    entry = json.loads((tmp_path / "out.json").read_text())
    runs = [{key: value for key, value in run.items() if key not in ("agreement", "noise", "kl", "tool")}
            for run in entry["runs"]]  # fmt: skip
    (tmp_path / "out.json").write_text(json.dumps({"inputs": entry["inputs"], "environment": {}, "runs": runs}))
    (tmp_path / "out.samples.npz").unlink()
    lines, err = benchmark("--bits", "4/8", "--method", "minmax", "--json", "out.json", "--resume")
    assert err.splitlines()[0].startswith("out.samples.npz is missing")
    head, _, nearest, minmax = lines
    assert "KL ratio to `mse`" not in head
    assert (nearest[head.index("SQNR")], minmax[head.index("SQNR")][-2:]) == ("–", "dB")


def test_without_labels_there_is_no_top1(benchmark: Benchmark) -> None:
    (head, *_), _ = benchmark("--bits", "4/8", networks="classifier", evaluation="unlabelled")
    assert {"KL, nats", "SQNR", "agreement"} < {*head} and not {"float", "top-1", "top-1 minus float, points"} & {*head}


def test_without_evaluation_data_calibration_data_is_held_out(benchmark: Benchmark, tmp_path: Path) -> None:
    """Of two batches the first calibrates and the second judges, without labels."""
    (head, _, nearest, shifted, *_), _ = benchmark(
        "--bits", "4/8", "--method", "minmax", "--bias-correction", "--json", "out.json", evaluation=""
    )
    assert "KL, nats" in head and "top-1" not in head and nearest != shifted
    with np.load(tmp_path / "out.samples.npz") as stored:
        assert len(stored["0.kl"]) == 32
    entry = json.loads((tmp_path / "out.json").read_text())
    assert entry["inputs"]["eval"] is None and entry["inputs"]["bias_correction"]


def test_without_classes_there_is_only_sqnr(benchmark: Benchmark) -> None:
    (head, *_), _ = benchmark("--bits", "4/8", "--method", "minmax", networks="regressor")
    assert "SQNR" in head and not {"top-1", "KL, nats", "agreement", "KL ratio to `mse`"} & {*head}


def test_geometric_mean_over_networks(benchmark: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORK.replace("def regressor", "wider = lambda: classifier()\ndef regressor"))
    lines, _ = benchmark("--bits", "4/8", "--method", "minmax", "--json", "out.json", networks="classifier wider")
    assert lines[-1][:3] == ["4/8", "`minmax`", "2"]
    last = json.loads((tmp_path / "out.json").read_text())["rows"][-1]
    assert last[:3] == ["geometric mean of 2", "4/8", "`minmax`"] and last.count(None) == len(last) - 4


def test_data_that_change_from_pass_to_pass_are_refused(
    benchmark: Benchmark, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark("--bits", "8/8", evaluation="shuffled")
    assert "differs from pass to pass" in capsys.readouterr().err


def test_quantize_static_stands_in_the_same_table(benchmark: Benchmark) -> None:
    lines, _ = benchmark("--bits", "8/8", "--peers", "quantize_static", "--json", "runs.json")
    head, _, nearest, static, *_ = lines
    assert static[:3] == ["classifier", "8/8", "`quantize_static`"]
    assert static[head.index("float")] == nearest[head.index("float")]
    assert float(static[head.index("SQNR")].split()[0]) > 20
    assert float(static[head.index("KL ratio to `mse`")].split()[0]) > 0
    costs = [head.index(name) for name in ("to the file", "peak memory", "latency over float")]
    for row in (nearest, static):
        seconds, mib, ratio = (float(row[index].split()[0].replace(",", "")) for index in costs)
        assert 0 <= seconds < 600 and 0 <= mib < 10_000 and ratio > 0
    runs = json.loads(Path("runs.json").read_text())["runs"]
    assert runs[1]["file_seconds"] == runs[1]["seconds"] and runs[0]["file_seconds"] > runs[0]["seconds"] > 0


@pytest.mark.slow
def test_nncf_stands_in_the_same_table(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        python = peers.nncf_python(tmp_path / "cache")
    except peers.PeerError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(peers, "nncf_python", lambda: python)
    lines, err = benchmark("--bits", "8/8", "--peers", "nncf")
    assert "left out" not in err
    assert lines[3][:3] == ["classifier", "8/8", "`nncf`"]
    assert float(lines[3][lines[0].index("SQNR")].split()[0]) > 20


def test_a_peer_that_cannot_be_installed_is_left_out(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise peers.PeerError("nncf cannot be installed (no network)")

    monkeypatch.setattr(peers, "nncf_python", missing)
    lines, err = benchmark("--bits", "8/8", "--peers", "nncf", "quantize_static")
    assert "  nncf cannot be installed (no network); left out" in err.splitlines()
    assert [line[2] for line in lines[2:4]] == ["`mse`", "`quantize_static`"]


@pytest.mark.parametrize(
    "arguments", [("--bits", "4/8"), ("--bits", "8/8", "--prepare", "cle"), ("--bits", "8/8", "--per-tensor-weights")]
)
def test_peers_are_compared_at_their_own_bits(
    arguments: tuple[str, ...], benchmark: Benchmark, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark(*arguments, "--peers", "quantize_static")
    assert capsys.readouterr().err.startswith("error: --peers ")
