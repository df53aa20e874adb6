"""The command doing real work on a tiny network: exit codes, what it prints, what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from click.testing import Result
from onnx import numpy_helper
from torch import nn
from typer.testing import CliRunner

from exporter.cli import app
from exporter.console import INTERRUPTED
from exporter.handover.bundle import write_bundle
from exporter.reporting.ci import workflow_commands
from exporter.reporting.schema import validate_report

NETWORK = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def raising():
    return nn.Conv2d(1, 4, 3, groups=3)


def without_onnx_form():
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)
    return nn.Sequential(nn.Conv2d(1, 4, 3), Bessel(), nn.Flatten())


def slow_data():
    import pathlib, time
    yield torch.randn(4, 1, 6, 6)
    (pathlib.Path(__file__).parent / "running").touch()
    time.sleep(60)
"""

MAIN = (
    "import signal, sys; from exporter.cli import main; "
    "signal.signal(signal.SIGINT, signal.default_int_handler); main()"  # a background job inherits an ignored signal
)
QUICK = ("--set", "latency_runs=0", "--set", "simplify=false", "--quiet")
MADE_BY_LIBRARIES = (".ses", "torchinductor_")
"""Entries that onnxruntime and torch make in the folder for temporary files as soon as they are imported."""

STARTED_AFTER_S = 60.0
"""Seconds that a busy machine may take to import torch and reach the data."""


def network() -> nn.Module:
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)
    model: nn.Module = scope["build"]()
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.py, calibration.npz, evaluation.npz (labelled by the network itself)."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "net.py").write_text(NETWORK)
    generator = torch.Generator().manual_seed(0)
    x, held_out = torch.randn(2, 48, 1, 6, 6, generator=generator)
    with torch.no_grad():
        labels = network()(held_out).argmax(1)
    np.savez(folder / "calibration.npz", x=x.numpy())
    np.savez(folder / "evaluation.npz", x=held_out.numpy(), labels=labels.numpy())
    return folder


@pytest.fixture
def intact(files: Path, tmp_path: Path) -> Callable[..., Result]:
    """`export` of the tiny network in this process, to tmp_path/out unless the arguments say otherwise."""

    def invoke(*arguments: str, model: str = "build", data: str = "calibration.npz") -> Result:
        command = ["export", f"{files}/net.py:{model}", "--data", f"{files}/{data}", "--out", f"{tmp_path}/out"]
        return CliRunner().invoke(app, [*command, *QUICK, *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})

    return invoke


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


# --- from a shell ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shell(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The whole command as a process of its own, and the bundle it wrote."""
    out = tmp_path_factory.mktemp("shell") / "new" / "out"
    command = [sys.executable, "-m", "exporter", "export", "net.py:build", "--data", "calibration.npz"]
    command += ["--eval", "evaluation.npz", "--out", str(out), "--gate", "agreement>=0.5", "--set", "latency_runs=3"]
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=files, env=environment, capture_output=True, text=True, check=False)
    return done, out


def test_an_export_writes_the_bundle_and_tells_the_verdict(
    shell: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, out = shell
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout and "report.html" in done.stdout
    assert "0 of " in done.stdout and "integers differ" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert "calibrate" in done.stderr and "\x1b" not in done.stderr, "progress without a terminal is plain lines"
    files = {path.name for path in out.iterdir()}
    assert files == {
        "model.onnx",
        "report.json",
        "report.html",
        "junit.xml",
        "manifest.json",
        "golden",
        "check.py",
        "README.md",
        "evaluation.npz",
        "bom.json",
        "parity.intoto.json",
    }
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing stays beside the bundle"
    report = report_of(out)
    assert report["verdict"] == "pass"
    assert report["model"]["source"] == "net.py:build"
    assert report["accuracy"]["samples"] == report["data"]["calibration"]["samples"] == 48


def test_a_bundle_verifies_until_somebody_changes_it(
    shell: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    _, out = shell
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    good = CliRunner().invoke(app, ["verify", str(copy)])
    assert good.exit_code == 0, good.output
    assert "PASS" in good.stdout
    model = onnx.load(copy / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name.endswith("weight_quantized"))
    codes = numpy_helper.to_array(tensor).copy()
    codes.flat[0] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    onnx.save(model, copy / "model.onnx")
    bad = CliRunner().invoke(app, ["verify", str(copy)])
    assert bad.exit_code == 2
    assert_one_error(bad, "model.onnx was changed")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_half_way_leaves_nothing(files: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C, and what ends a job that takes too long."""
    shutil.copy(files / "net.py", tmp_path)
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-c", MAIN, "export", "net.py:build", "--data", "net.py:slow_data", "--out", "out"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(Path(__file__).parents[2]),
                   "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + STARTED_AFTER_S
    while not (tmp_path / "running").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=STARTED_AFTER_S)
    assert process.returncode == INTERRUPTED, stderr
    assert "interrupted; nothing was written" in stderr and "Traceback" not in stderr
    assert {path.name for path in tmp_path.iterdir()} == {"net.py", "tmp", "running"}
    left = [path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith(MADE_BY_LIBRARIES)]
    assert left == []


def test_an_export_is_compared_with_an_earlier_one(
    shell: tuple[subprocess.CompletedProcess[str], Path], intact: Callable[..., Result], files: Path, tmp_path: Path
) -> None:
    """The second one has another method and fails a gate on the difference; it says so where CI looks."""
    _, earlier = shell
    gates = ("--gate", "baseline_drop<=0.9", "--gate", "baseline_error<=0.5", "--gate", "baseline_now_float==0")
    data = ("--eval", f"{files}/evaluation.npz", "--method", "minmax", "--summary", f"{tmp_path}/summary.md")
    result = intact("--baseline", str(earlier), *gates, *data, "--json")
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    assert report == report_of(tmp_path / "out")
    baseline, old = report["baseline"], report_of(earlier)
    assert baseline["before"] == str(earlier) and baseline["verdicts"] == ["pass", "fail"]
    assert {"name": "method", "before": "gptq", "after": "minmax"} in baseline["settings"]
    assert baseline["error"]["value"] == pytest.approx(
        report["accuracy"]["mean_kl"] / old["accuracy"]["mean_kl"], rel=1e-4
    )
    drop = old["accuracy"]["runtime"] - report["accuracy"]["runtime"]
    assert baseline["drop"]["drop"]["value"] == pytest.approx(drop)
    failed = [gate["name"] for gate in report["gates"] if not gate["passed"]]
    assert failed == ["baseline_error"]
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("## FAIL: out") and "baseline\\_error" in summary


def test_github_gets_a_summary_and_annotations(
    shell: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = shell
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page.md"))
    (tmp_path / "page.md").write_text("# Earlier step\n")
    report = report_of(out)
    report["gates"] = [{"name": "size", "limit": 1.0, "value": 2.0, "passed": False, "expression": "size<=1"}]
    assert list(workflow_commands(validate_report(report))) == [
        "::error title=intact::size<=1: it is 2 B, the limit is 1 B"
    ]
    assert CliRunner().invoke(app, ["verify", str(out)]).exit_code == 0
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Earlier step\n## PASS (exact; accuracy measured on 48 samples only): out")
    assert "| parity | 0 of " in page


# --- settings --------------------------------------------------------------------------------------------------------


def test_an_accuracy_that_collapses_fails_unless_its_gate_is_removed_or_replaced(
    intact: Callable[..., Result], files: Path, tmp_path: Path
) -> None:
    few = ["--weight-bits", "2", "--activation-bits", "2", "--set", "first_last_bits=none", "--method", "minmax"]
    few += ["--eval", f"{files}/evaluation.npz", "--overwrite"]
    result = intact(*few)
    assert result.exit_code == 1, result.output
    shown = result.stdout.splitlines()
    assert shown[0].startswith("╭─ FAIL ─") and "accuracy_drop_lower<=0.01: it is " in shown[1]
    assert "layers that cost the prediction most: " in shown[2] and "--method qdrop" in shown[3]
    report = report_of(tmp_path / "out")
    assert [gate["name"] for gate in report["gates"] if not gate["passed"]] == ["accuracy_drop_lower"]
    removed = intact(*few, "--no-accuracy-gate")
    assert removed.exit_code == 0 and "PASS (exact; accuracy not gated)" in removed.stdout, removed.output
    replaced = intact(*few, "--gate", "accuracy_drop<=100pp")
    assert replaced.exit_code == 0 and "PASS (exact; accuracy measured on 48 samples only)" in replaced.stdout
    assert intact("--overwrite").stdout.startswith("╭─ PASS (exact; accuracy not measured) ─")


def test_a_failed_gate_writes_the_bundle_and_exits_1(intact: Callable[..., Result], tmp_path: Path) -> None:
    result = intact("--gate", "size_ratio<=0.001")
    assert result.exit_code == 1, result.output
    assert "FAIL" in result.stdout and "size_ratio" in result.stdout
    report = report_of(tmp_path / "out")
    assert report["verdict"] == "fail"
    assert [gate["name"] for gate in report["gates"] if not gate["passed"]] == ["size_ratio"]


def test_rules_for_layers_are_kept_and_told(intact: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text('[[layers]]\nmatch = "*"\nweight_bits = 5\nactivation_bits = 6\n')
    layers = ["--layer", "2: weight_bits=3, granularity=tensor", "--layer", "5: symmetric=true"]
    result = intact("--config", str(tmp_path / "rules.toml"), *layers)
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "out")
    assert report["parity"]["optimized"]["mismatched"] == 0
    grids = {
        entry["module"]: (entry["bits"], entry["input_bits"], entry["granularity"], entry["symmetric"])
        for entry in report["layers"] if entry["kind"] == "weight"
    }  # fmt: skip
    assert grids == {"0": (5, 6, "channel", False), "2": (3, 6, "tensor", False), "5": (5, 6, "channel", True)}
    assert report["rules"] == [
        {"match": "first and last layer", "settings": {"weight_bits": 8, "activation_bits": 8}, "layers": []},
        {"match": "*", "settings": {"weight_bits": 5, "activation_bits": 6}, "layers": ["0", "2", "5"]},
        {"match": "2", "settings": {"weight_bits": 3, "granularity": "tensor"}, "layers": ["2"]},
        {"match": "5", "settings": {"symmetric": True}, "layers": ["5"]},
    ]
    assert report["config"]["layers"][0] == {"match": "*", "weight_bits": 5, "activation_bits": 6}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Rules for layers" in page and "weight bits 3, granularity tensor" in page


def test_preparations_are_done_and_told(intact: Callable[..., Result], tmp_path: Path) -> None:
    result = intact("--prepare", "cle,absorb", "--per-tensor-weights")
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "out")
    assert report["parity"]["optimized"]["mismatched"] == 0
    assert report["config"]["prepare"] == ["cle", "absorb"]
    done = report["preparation"]
    assert [(pair["first"], pair["second"]) for pair in done["cle"]["pairs"]] == [("0", "2"), ("2", "5")]
    assert done["absorb"]["pairs"] == [] and {each["where"] for each in done["absorb"]["skipped"]} == {"0", "2", "5"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 pairs equalized" in page and "no batch norm tells the range of its values" in page


def test_a_file_of_settings_and_options_of_the_method(intact: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('method = "percentile"\nweight-bits = 6\n[options]\nq = 99.0\n')
    result = intact("--config", str(tmp_path / "settings.toml"), "--set", "q=99.9", "--weight-bits", "7")
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "out")
    assert report["method"] == "percentile"
    assert report["config"]["options"] == {"q": 99.9}
    assert report["bits"] == {"weight": 7, "activation": 8}


def test_weights_come_from_either_kind_of_checkpoint(
    intact: Callable[..., Result], shell: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    state = {name: -2 * value for name, value in network().state_dict().items()}
    torch.save({"model": state}, tmp_path / "net.pt")
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    models = []
    for index, name in enumerate(("net.pt", "net.safetensors")):
        out = tmp_path / f"out{index}"
        result = intact("--checkpoint", str(tmp_path / name), "--out", str(out))
        assert result.exit_code == 0, result.output
        models.append((out / "model.onnx").read_bytes())
    assert models[0] == models[1]
    assert codes_of(models[0]).keys() == codes_of((shell[1] / "model.onnx").read_bytes()).keys()
    assert any((codes_of(models[0])[name] == -value).all() and value.any()
               for name, value in codes_of((shell[1] / "model.onnx").read_bytes()).items())  # fmt: skip


def codes_of(model: bytes) -> dict[str, np.ndarray]:
    """Weight codes by name."""
    graph = onnx.ModelProto.FromString(model).graph
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("weight_quantized")}


# --- what goes wrong -------------------------------------------------------------------------------------------------


def assert_one_error(result: Result, *parts: str) -> None:
    """One message of one line on stderr that says all parts."""
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def arrays(path: Path, **values: Any) -> str:
    np.savez(path, **values)
    return str(path)


GOOD = np.ones((4, 1, 6, 6), np.float32)
DATA: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"x": np.full_like(GOOD, np.nan)}, "NaN"),
    "infinite": ({"x": np.full_like(GOOD, np.inf)}, "infinite"),
    "empty": ({"x": GOOD[:0]}, "no "),
    "channels": ({"x": np.ones((4, 2, 6, 6), np.float32)}, "shape"),
    "two-inputs": ({"x": GOOD, "z": GOOD}, "input"),
    "text": ({"x": np.array(["a"] * 4)}, "a type that torch does not know"),
}


@pytest.mark.parametrize("kind", DATA)
def test_bad_data_exits_2(intact: Callable[..., Result], tmp_path: Path, kind: str) -> None:
    content, message = DATA[kind]
    result = intact("--data", arrays(tmp_path / "bad.npz", **content))
    assert result.exit_code == 2, result.output
    assert_one_error(result, message)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


LABELS: dict[str, tuple[Any, str]] = {
    "out-of-range": (np.full(4, 9), "classes 0..2"),
    "too-few": (np.zeros(3, np.int64), "labels"),
    "fractions": (np.full(4, 0.5), "integers"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_bad_labels_exit_2(intact: Callable[..., Result], tmp_path: Path, kind: str) -> None:
    labels, message = LABELS[kind]
    data = arrays(tmp_path / "bad.npz", x=GOOD, labels=labels)
    result = intact("--eval", data, "--gate", "accuracy_drop<=1")
    assert result.exit_code == 2, result.output
    assert_one_error(result, message)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


EVALUATION: dict[str, tuple[Any, str]] = {
    "shape": (np.ones((4, 1, 7, 6), np.float32), "[n, 1, 6, 6] float32 in --data and [n, 1, 7, 6] float32 in --eval"),
    "dtype": (np.ones((4, 1, 6, 6), np.int64), "[n, 1, 6, 6] float32 in --data and [n, 1, 6, 6] int64 in --eval"),
}


@pytest.mark.parametrize("kind", EVALUATION)
def test_evaluation_data_that_does_not_fit_exits_2(intact: Callable[..., Result], tmp_path: Path, kind: str) -> None:
    content, message = EVALUATION[kind]
    result = intact("--eval", arrays(tmp_path / "bad.npz", x=content))
    assert result.exit_code == 2, result.output
    assert_one_error(result, message)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_a_folder_that_cannot_be_replaced_is_refused_at_once(
    intact: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for folder, why in ((".", "the current folder"), ("/dev/shm", "a mount point")):
        result = intact("--out", folder)
        assert result.exit_code == 2, result.output
        assert_one_error(result, why, "give --out a folder inside it")


def test_a_folder_of_images_may_have_a_colon(intact: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    result = intact("--data", str(tmp_path / "a:b"))
    assert result.exit_code == 2
    assert_one_error(result, "a:b", "image")


def test_a_package_beside_the_user_is_found(tmp_path: Path) -> None:
    """An installed command has its own folder first on the path, not the current one."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "net.py").write_text(NETWORK)
    np.savez(tmp_path / "x.npz", x=GOOD)
    code = f"import sys; sys.path[0] = {str(Path(__file__).parents[2])!r}; from exporter.cli import main; main()"
    command = [sys.executable, "-c", code, "export", "package.net:build", "--data", "x.npz", "--out", "out", *QUICK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_lint_reads_any_file(shell: tuple[Any, Path], tmp_path: Path) -> None:
    clean = CliRunner().invoke(app, ["lint", str(shell[1] / "model.onnx")])
    assert (clean.exit_code, clean.stdout) == (0, "Nothing found for ort-cpu.\n")
    other = CliRunner().invoke(app, ["lint", str(shell[1] / "model.onnx"), "--target", "vitis-ai"])
    assert "Nothing found for" not in other.stdout and other.stdout
    model = onnx.load(shell[1] / "model.onnx")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("bias_scale"))
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
    onnx.save(model, tmp_path / "bad.onnx")
    bad = CliRunner().invoke(app, ["lint", str(tmp_path / "bad.onnx")], env={"COLUMNS": "200"})
    assert bad.exit_code == 1 and "error" in bad.stdout and "bias" in bad.stdout
    (tmp_path / "text.onnx").write_text("no model")
    unreadable = CliRunner().invoke(app, ["lint", str(tmp_path / "text.onnx")], env={"COLUMNS": "400"})
    assert unreadable.exit_code == 1 and "cannot be read as an ONNX model" in unreadable.stdout
    refused = CliRunner().invoke(app, ["lint", str(tmp_path / "none.onnx")])
    assert refused.exit_code == 2
    assert_one_error(refused, "is not a file")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(["--method", "entropi"], ["Did you mean 'entropy'"], id="method"),
        pytest.param(["--target", "ort-cpo"], ["Did you mean 'ort-cpu'"], id="target"),
        pytest.param(["--method", "percentile", "--set", "qq=99"], ["'qq'", "Known: "], id="option"),
        pytest.param(["--method", "percentile", "--set", "q=lots"], ["q", "lots"], id="value-of-an-option"),
        pytest.param(["--exclude", "convv*"], ["'convv*'"], id="pattern"),
        pytest.param(["--layer", "convv*: weight_bits=4"], ["unknown --layer pattern 'convv*'"], id="layer"),
        pytest.param(
            ["--layer", "relu: weight_bits=4"], ["'relu'", "no quantized layer with weights"], id="no-weights"
        ),
        pytest.param(["--layer", "0: weight_bits=17"], ["rule for layers '0'", "2 to 8"], id="bits-of-a-layer"),
        pytest.param(["--prepare", "cle,absorp"], ["unknown preparation 'absorp'", "Did you mean"], id="preparation"),
        pytest.param(["--layer", "0 weight_bits=4"], ["is not GLOB: key=value"], id="malformed-layer"),
        pytest.param(["--gate", "agreement>=0.9"], ["--eval"], id="gate-without-data"),
        pytest.param(["--out", "/dev/null/out"], ["/dev/null"], id="folder"),
    ],
)
def test_bad_settings_exit_2(
    intact: Callable[..., Result], tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    result = intact(*arguments)
    assert result.exit_code == 2, result.output
    assert_one_error(result, *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        pytest.param("buidl", ["'buidl'", "Did you mean 'build'"], id="unknown"),
        pytest.param("raising", ["ValueError", "net.py:"], id="raising"),
        pytest.param("slow_data", ["generator", "torch.nn.Module"], id="no-module"),
    ],
)
def test_bad_factories_exit_2(intact: Callable[..., Result], tmp_path: Path, model: str, parts: list[str]) -> None:
    result = intact(model=model)
    assert result.exit_code == 2, result.output
    assert_one_error(result, *parts)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_onnx_form_exits_3_and_is_named(intact: Callable[..., Result], tmp_path: Path) -> None:
    result = intact(model="without_onnx_form")
    assert result.exit_code == 3, result.output
    assert_one_error(result, "special_bessel_j0", "net.py:")
    assert list(tmp_path.iterdir()) == []


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def checkpoint(kind: str, folder: Path) -> Path:
    """A bad checkpoint of one kind."""
    path = folder / ("net.safetensors" if kind == "no-safetensors" else "net.pt")
    if kind == "hostile":
        path.write_bytes(pickle.dumps({"0.weight": Payload(folder / "proof")}))
    elif kind == "truncated":
        torch.save(network().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "nan":
        torch.save({name: value * np.nan for name, value in network().state_dict().items()}, path)
    elif kind == "other-network":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    else:
        path.write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    return path


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("hostile", "net.pt"),
        ("truncated", "damaged"),
        ("nan", "NaN"),
        ("other-network", "does not fit the model"),
        ("no-safetensors", "not a readable safetensors"),
    ],
)
def test_bad_checkpoints_exit_2_and_run_nothing(
    intact: Callable[..., Result], tmp_path: Path, kind: str, part: str
) -> None:
    path = checkpoint(kind, tmp_path)
    result = intact("--checkpoint", str(path))
    assert result.exit_code == 2, result.output
    assert_one_error(result, part)
    assert list(tmp_path.iterdir()) == [path], "a payload ran, or something was written"


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: what a full disk does, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_at_the_model_exits_2_and_leaves_nothing(
    intact: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with largest_file(64):
        result = intact()
    assert result.exit_code == 2, result.output
    assert_one_error(result, "File too large")
    assert list(tmp_path.rglob("*")) == [tmp_path / "tmp"]


def test_a_disk_that_fills_at_the_bundle_exits_2_and_leaves_nothing(
    intact: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(*arguments: Any, **rest: Any) -> Path:
        with largest_file(1024):
            return write_bundle(*arguments, **rest)

    monkeypatch.setattr("exporter.pipeline.write_bundle", limited)
    result = intact("--out", str(tmp_path / "new" / "out"))
    assert result.exit_code == 2, result.output
    assert_one_error(result, "cannot write the bundle", "File too large")
    assert list(tmp_path.iterdir()) == []
