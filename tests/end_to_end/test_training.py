"""Exports with methods that train: report, page, memory, interruption, and what is refused before hours of work."""

from __future__ import annotations

import errno
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from typer.testing import CliRunner

from calibrators.errors import DataError, InputError
from calibrators.execution.activation_cache import Memory
from calibrators.execution.task import Problem
from calibrators.methods.mse import MSE
from calibrators.methods.qdrop import QDrop
from calibrators.program.freeze import CalibrationResult
from calibrators.record import Record
from exporter import intake, run_calibrators
from exporter.cli import app
from exporter.console import INTERRUPTED
from exporter.pipeline import export
from exporter.progress import Bar, Progress
from tests.support.networks import build

NETWORK = """
from tests.support.networks import build as network


def build():
    return network("residual")[0]


def calibration():
    for seed in range(3):
        yield network("residual", seed=seed)[1]
"""
TRAINING = ("--method", "qdrop", "--set", "iters=20")
SEARCH = ("--method", "lapq", "--set", "max_evals=20")
TINY = "1e-6"
"""GiB: a kilobyte, less than one sample's activations."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "net.py").write_text(NETWORK)
    return folder


def invoke(files: Path, out: Path, *arguments: str, method: tuple[str, ...] = TRAINING) -> Result:
    command = ["export", f"{files}/net.py:build", "--data", f"{files}/net.py:calibration", "--out", str(out), *method]
    quick = ("--weight-bits", "4", "--activation-bits", "4", "--set", "latency_runs=0", "--set", "simplify=false")
    return CliRunner().invoke(app, [*command, *quick, "--quiet", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def bundles(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same export with room for every activation, and with room for none."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, arguments in (("roomy", ()), ("tiny", ("--cache-gib", TINY))):
        result = invoke(files, folder / name, "--eval", f"{files}/net.py:calibration", *arguments)
        assert result.exit_code == 0, result.output
    return {name: folder / name for name in ("roomy", "tiny")}


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def test_a_trained_network_keeps_the_promise_of_the_proof(bundles: dict[str, Path]) -> None:
    report = report_of(bundles["roomy"])
    assert report["verdict"] == "pass"
    assert report["parity"]["optimized"]["mismatched"] == 0
    assert report["parity"]["optimized"]["outputs_identical"]
    assert report["bits"] == {"weight": 4, "activation": 4}
    assert report["data"]["calibration"]["samples"] == 24


def test_the_report_tells_what_training_did(bundles: dict[str, Path]) -> None:
    report = report_of(bundles["roomy"])
    units = report["reconstruction"]["units"]
    assert sum(unit["weights"] for unit in units) == 4, "every layer with weights belongs to one unit"
    assert all(0 < unit["after"] <= unit["before"] for unit in units)
    assert sum(unit["seconds"] for unit in units) <= report["time_s"]["calibrate"]
    assert report["reconstruction"]["spilled_bytes"] == 0
    assert {report["config"][name] for name in ("device", "cache_gib", "explain")} == {"cpu", 4.0, False}
    page = (bundles["roomy"] / "report.html").read_text()
    assert ">Reconstruction</h2>" in page
    assert all(unit["name"] in page for unit in units)
    assert page.count('<svg class="figure"') == (len(units) > 1)


def test_memory_changes_where_activations_lie_and_nothing_else(bundles: dict[str, Path]) -> None:
    assert report_of(bundles["tiny"])["reconstruction"]["spilled_bytes"] > 0
    assert "went to temporary files" in (bundles["tiny"] / "report.html").read_text()
    models = [(bundle / "model.onnx").read_bytes() for bundle in bundles.values()]
    assert models[0] == models[1]
    assert [report_of(bundle)["config"]["cache_gib"] for bundle in bundles.values()] == [4.0, 1e-6]


def test_a_search_keeps_the_promise_and_tells_what_it_found(files: Path, tmp_path: Path) -> None:
    result = invoke(files, tmp_path / "out", method=SEARCH)
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "out")
    assert report["parity"]["optimized"]["mismatched"] == 0
    search = report["lapq"]
    assert min(search["losses"].values()) == search["losses"]["final"]
    assert {"minmax", "percentile", "mse", "init"} < search["losses"].keys()
    assert 0 < search["evaluations"] <= 20 and search["seconds"] <= report["time_s"]["calibrate"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert ">Search of scales</h2>" in page and all(site in page for site in search["multipliers"])
    assert "landscape" not in search and "Curvature of the loss" not in page


def test_a_budget_gives_layers_their_own_bits_and_the_proof_holds(files: Path, tmp_path: Path) -> None:
    budget = ("--budget", "avg_weight_bits<=4", "--set", "first_last_bits=none")
    result = invoke(files, tmp_path / "out", *budget, method=("--method", "minmax"))
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "out")
    assert report["parity"]["optimized"]["mismatched"] == 0
    found = report["mixed_precision"]["found"]
    assert found["avg_weight_bits"] <= 4
    bits = {entry["site"]: entry["bits"] for entry in report["layers"] if entry["kind"] == "weight"}
    assert bits == {scale["site"]: scale["bits"] for scale in report["sensitivity"]["scales"]}
    assert len(set(bits.values())) > 1
    assert {rule["match"] for rule in report["rules"]} == {"budget"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert ">Mixed precision</h2>" in page and ">Sensitivity</h2>" in page


def test_sensitivity_alone_changes_nothing_in_the_model(files: Path, tmp_path: Path) -> None:
    for name, flags in (("plain", ()), ("told", ("--sensitivity",))):
        result = invoke(files, tmp_path / name, *flags, method=("--method", "minmax"))
        assert result.exit_code == 0, result.output
    assert (tmp_path / "plain" / "model.onnx").read_bytes() == (tmp_path / "told" / "model.onnx").read_bytes()
    report = report_of(tmp_path / "told")
    assert "mixed_precision" not in report
    assert {scale["kind"] for scale in report["sensitivity"]["scales"]} == {"weight", "activation"}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("weight_bytes<=1", "cannot be met"),
        ("weight_bites<=1M", "Did you mean 'weight_bytes'"),
        ("weight_bytes=1M", "write for example"),
    ],
)
def test_a_budget_that_cannot_be_is_bad_input(files: Path, tmp_path: Path, budget: str, message: str) -> None:
    result = invoke(files, tmp_path / "out", "--budget", budget, method=("--method", "minmax"))
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "out").exists()


# --- interruption and space ------------------------------------------------------------------------------------------


class _Interrupting(Progress):
    """Ctrl-C in the third step of training."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        class Interrupted:
            steps = 0

            def skip(self, steps: int) -> None:
                self.advance(steps)

            def advance(self, steps: int = 1) -> None:
                self.steps += steps
                if name == "reconstruct" and self.steps == 3:
                    raise KeyboardInterrupt

        yield Interrupted()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_ctrl_c_while_training_leaves_nothing(
    files: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.progress.console_progress", lambda **_: _Interrupting())
    result = invoke(files, tmp_path / "out", "--cache-gib", TINY)
    assert result.exit_code == INTERRUPTED, result.output
    assert result.stderr == "interrupted; nothing was written.\n"
    del result  # it holds the frames of the training
    gc.collect()
    left = [path for path in tmp_path.rglob("*") if not path.name.startswith("torchinductor_")]  # made by its import
    assert left == [temporary]


def test_a_disk_that_fills_with_activations_exits_2_with_advice(
    files: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Memory, "allocate", full)
    result = invoke(files, tmp_path / "out", "--cache-gib", TINY)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: No space left on device: {temporary} cannot hold the activations")
    assert "1e-06 GiB of memory" in result.stderr and "raise --cache-gib" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.rglob("*")) == [temporary]


def test_an_accelerator_without_memory_is_no_internal_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> CalibrationResult:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(run_calibrators, "calibrate", full)
    with pytest.raises(InputError, match=r"too little memory \(CUDA out of memory\. Tried to allocate 2\.00 GiB\.\)"):
        export(*residual(), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- what is refused before the work ---------------------------------------------------------------------------------


def residual() -> tuple[nn.Module, list[Tensor]]:
    model, x = build("residual")
    return model, [x]


@pytest.mark.parametrize("which", ["data", "eval_data"])
def test_a_generator_object_is_refused_before_the_work(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "capture", lambda *_: pytest.fail("work began"))
    model, batches = residual()
    sources: dict[str, Any] = {"data": batches, "eval_data": batches, which: (x for x in batches)}
    with pytest.raises(DataError, match=r"can be read only once, .* the function that makes the generator"):
        export(model, out=tmp_path / "out", method="qdrop", **sources)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda batches: batches, id="list"),
        pytest.param(lambda batches: lambda: (x for x in batches), id="generator function"),
        pytest.param(lambda batches: torch.cat(batches), id="tensor"),
        pytest.param(lambda batches: torch.utils.data.DataLoader(torch.cat(batches), 8), id="DataLoader"),
    ],
)
def test_every_source_is_read_as_often_as_a_method_wants(
    source: Callable[[list[Tensor]], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    def passes(graph: object, batches: Any, **_: object) -> CalibrationResult:
        read = [torch.cat([x for (x,) in batches]) for _ in range(3)]
        assert all(torch.equal(read[0], again) for again in read) and len(read[0]) == 24
        raise Enough

    monkeypatch.setattr(run_calibrators, "calibrate", passes)
    batches = [build("residual", seed=seed)[1] for seed in range(3)]
    with pytest.raises(Enough):
        export(residual()[0], source(batches), out=tmp_path / "out", method="qdrop")


# --- what reaches the method -----------------------------------------------------------------------------------------


def problem_of(monkeypatch: pytest.MonkeyPatch, data: Any, out: Path, **settings: Any) -> Problem:
    """The problem that the method of an export is given."""
    seen: list[Problem] = []

    class Seen(Exception):
        pass

    def fit(self: object, problem: Problem) -> CalibrationResult:
        seen.append(problem)
        raise Seen

    monkeypatch.setattr(QDrop, "fit", fit)
    with pytest.raises(Seen):
        export(residual()[0], data, out=out, method="qdrop", **settings)
    return seen[0]


def test_settings_reach_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"cache_gib": 0.5, "explain": True, "seed": 3}
    problem = problem_of(monkeypatch, residual()[1], tmp_path / "out", **settings)
    assert (problem.memory, problem.explain, problem.seed, problem.device.type) == (2**29, True, 3, "cpu")
    assert problem.labels is None
    assert not problem_of(monkeypatch, residual()[1], tmp_path / "out").explain


class Shuffled:
    """Labelled batches in another order in every pass; the label of a sample is the sign of its first value."""

    def __init__(self) -> None:
        self.x = torch.cat([build("residual", seed=seed)[1] for seed in range(4)])
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.passes))
        for x in self.x[order].split(5):
            yield x, self.labels(x)

    @staticmethod
    def labels(x: Tensor) -> Tensor:
        return (x[:, 0, 0, 0] > 0).long()


def test_labels_belong_to_their_samples_even_if_data_is_shuffled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QDrop, "needs_labels", True, raising=False)
    problem = problem_of(monkeypatch, Shuffled(), tmp_path / "out")
    (x,) = problem.select(torch.arange(problem.samples))
    assert problem.labels is not None and problem.labels.dtype == torch.int64
    assert torch.equal(problem.labels, Shuffled.labels(x)) and len(x) == 32
    assert problem_of(monkeypatch, Shuffled(), tmp_path / "out", calibration_batches=2).labels.shape == (10,)  # type: ignore[union-attr]


def test_labels_that_a_method_needs_and_the_data_lacks_are_missed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QDrop, "needs_labels", True, raising=False)
    monkeypatch.setattr(intake, "capture", lambda *_: pytest.fail("work began"))
    with pytest.raises(
        DataError, match=r"method 'qdrop' .* needs labels, but data \(list\) has none; yield \(x, labels\)"
    ):
        export(*residual(), out=tmp_path / "out", method="qdrop")


def test_methods_without_training_report_no_reconstruction() -> None:
    model, batches = residual()
    from exporter.frontend.capture import capture

    record = run_calibrators.calibrate(capture(model, (batches[0],)), batches, method=MSE()).record
    assert replace(record, limited_weights=None, settled=None, portability=None) == Record()


def test_wide_taps_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3)]
    with torch.no_grad():
        convolutions[1].weight[torch.arange(8), torch.arange(8), 1, 1] += 5.0  # a folded identity branch
    model = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2]).eval()
    settings = {"weight_bits": 2, "activation_bits": 4, "latency_runs": 0, "simplify": False}
    x = torch.randn(16, 3, 8, 8)
    told = export(model, [x], out=tmp_path / "wide", **settings)
    narrow = export(model, [x], out=tmp_path / "narrow", wide_taps=False, **settings)
    assert any("the identity taps of 1 kernel keep 8 bits" in warning for warning in told["warnings"])
    assert not any("identity branch" in warning for warning in narrow["warnings"])
    assert (told["verdict"], narrow["verdict"]) == ("pass", "pass")
    wide = {layer["site"]: layer["tap_bits"] for layer in told["layers"] if "tap_bits" in layer}
    assert wide == {"2.weight": 8}
