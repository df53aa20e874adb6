"""Exports and bundles proved in a further runtime. It is the installed onnxruntime in a process of its own, so that
nothing has to be installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import junitparser
import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from calibrators.errors import InputError, ModelError
from exporter.cli import app
from exporter.pipeline import export
from exporter.reporting.schema import validate_report
from exporter.verify import verify
from runtime_tests.proof import Measurements, Proof
from runtime_tests.runtimes import get_runtime
from runtime_tests.workers.process import LoadedInWorker
from runtime_tests.workers.runtime import Array
from tests.runtime_tests.reference.programs import emitted, network
from tests.support.networks import build

THERE = f"ort=={onnxruntime.__version__}"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder takes the place of the packages, so that the process finds those of this environment."""
    monkeypatch.setenv("INTACT_RUNTIMES", str(tmp_path / "runtimes"))
    (component,) = get_runtime(THERE).components
    component.folder.mkdir(parents=True)
    (component.folder / ".recipe").write_text(repr(component))


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose last value is off by one in one place."""
    run = LoadedInWorker.run

    def off(self: LoadedInWorker, inputs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        outputs, probes = run(self, inputs)
        probes[-1].flat[0] ^= 1
        return outputs, probes

    monkeypatch.setattr(LoadedInWorker, "run", off)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("it cannot read this file")

    monkeypatch.setattr(LoadedInWorker, "__init__", refuse)


def exported(out: Path, *names: str) -> dict[str, object]:
    model, x = build("residual")
    return export(model, [x], method="mse", out=out, prove_on=names or (THERE,), latency_runs=0)


def test_an_export_and_its_bundle(tmp_path: Path) -> None:
    report = exported(tmp_path / "out")
    assert report["verdict"] == "pass"
    here, there = report["proved_on"]
    assert (here["runtime"], here["version"]) == ("ort", onnxruntime.__version__)
    assert (there["runtime"], there["version"], there["samples"]) == (THERE, onnxruntime.__version__, 8)
    assert there["processor"] == here["processor"] and there["flags"] == here["flags"]
    assert there["values"] == here["values"] > 0
    assert (there["mismatched"], there["kernel_mismatched"], there["violations"]) == (0, 0, 0)
    assert there["outputs_identical"] and there["largest_difference"] == 0.0
    assert "unproved_runtimes" in {gate["name"] for gate in report["gates"]}
    assert validate_report(json.loads((tmp_path / "out" / "report.json").read_text())).proved_on is not None
    assert THERE in (tmp_path / "out" / "report.html").read_text()
    suites = {suite.name: suite for suite in junitparser.JUnitXml.fromfile(str(tmp_path / "out" / "junit.xml"))}
    assert [case.name for case in suites["intact.proved_on"]] == ["ort", THERE]

    plain = verify(tmp_path / "out")
    assert [each["runtime"] for each in plain["proved_on"]] == ["ort"]
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--on", THERE], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    name = f"ort {onnxruntime.__version__} ({here['processor']})"
    assert f"proved on      {name}, {name}" in shown.stdout
    assert f"{THERE}  " in shown.stdout and "integers of 4 samples differ; outputs identical" in shown.stdout


def test_proving_changes_no_byte_of_the_model(tmp_path: Path) -> None:
    exported(tmp_path / "with")
    exported(tmp_path / "without", "ort")
    assert (tmp_path / "with" / "model.onnx").read_bytes() == (tmp_path / "without" / "model.onnx").read_bytes()


@pytest.mark.usefixtures("wrong")
def test_a_kernel_that_differs_fails_the_verdict(tmp_path: Path) -> None:
    report = exported(tmp_path / "out")
    assert report["verdict"] == "fail"
    here, there = report["proved_on"]
    assert (here["violations"], there["violations"]) == (0, 2)  # the value, and the output that follows from it
    assert (there["mismatched"], there["kernel_mismatched"]) == (2, 2)  # one in each of two batches
    assert len(there["worst"]) == 1
    failed = {gate["name"] for gate in report["gates"] if not gate["passed"]}
    assert failed == {"unproved_runtimes", "inexact_here"}  # the process runs on this machine's processor
    page = (tmp_path / "out" / "report.html").read_text()
    assert "differs" in page and "kernel by kernel 2" in page
    suites = {suite.name: suite for suite in junitparser.JUnitXml.fromfile(str(tmp_path / "out" / "junit.xml"))}
    assert suites["intact.proved_on"].failures == 1
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--on", THERE], env={"COLUMNS": "200"})
    assert shown.exit_code == 1 and "kernel by kernel 1" in shown.stdout
    assert f"failed gate    unproved_runtimes==0: not proved in {THERE}: 1 of " in shown.stdout
    assert f"; most at {report['proved_on'][1]['worst'][0]['site']}" in shown.stdout
    assert "export report  " in shown.stdout
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "out")]).exit_code == 0


def test_a_kernel_that_writes_floats_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LoadedInWorker.run

    def off(self: LoadedInWorker, inputs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        outputs, probes = run(self, inputs)
        return [np.nextafter(output, np.float32(np.inf)) for output in outputs], probes

    monkeypatch.setattr(LoadedInWorker, "run", off)
    report = exported(tmp_path / "out")
    there = report["proved_on"][-1]
    assert (there["kernel_mismatched"], there["violations"]) == (0, 1)
    holds = {each["processor"]: each for each in report["holds"]}
    assert holds[there["processor"]]["status"] == "differs"
    assert f"outputs differed in ort {onnxruntime.__version__}" in holds[there["processor"]]["condition"]
    failed = {gate["name"] for gate in report["gates"] if not gate["passed"]}
    assert failed == {"unproved_runtimes", "inexact_here"}


@pytest.mark.usefixtures("refusing")
def test_a_runtime_that_refuses_the_file_fails_the_verdict(tmp_path: Path) -> None:
    report = exported(tmp_path / "out")
    there = report["proved_on"][-1]
    assert (report["verdict"], there["values"], there["outputs_identical"]) == ("fail", 0, False)
    assert there["refused"] == "it cannot read this file"
    assert "it cannot read this file" in (tmp_path / "out" / "report.html").read_text()
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--on", THERE], env={"COLUMNS": "200"})
    assert shown.exit_code == 1 and "it cannot read this file" in shown.stdout


def test_a_process_that_ends_half_way_is_a_refusal() -> None:
    result, x = network("mobile", 8)
    proof = Proof(emitted("mobile", 8), result.program, runtimes=[get_runtime(THERE)])
    x = x[:3]
    proof.add(x[:1])
    proof._elsewhere[0]._comparison.runtime.worker._process.kill()
    proof.add(x[1:2])
    proof.add(x[2:])
    *_, there = proof.proved_on
    assert there.refused is not None and "ended without an answer" in there.refused
    assert (there.values, there.is_proved) == (0, False)
    assert proof.parity.optimized.samples == 3


def test_slow_runtimes_compare_the_first_samples_only() -> None:
    result, x = network("mobile", 8)
    runtime = get_runtime(THERE)
    object.__setattr__(runtime, "samples", 16)
    many = torch.cat([x] * (1 + 40 // len(x)))[:40]
    proof = Proof(emitted("mobile", 8), result.program, runtimes=[runtime])
    proof.add(many)
    here, there = proof.proved_on
    assert (here.samples, there.samples) == (40, 16)
    few = Measurements(parity_samples=8, golden_samples=4)
    proof = Proof(emitted("mobile", 8), result.program, runtimes=[runtime], measured=few)
    proof.add(many)
    assert [each.samples for each in proof.proved_on] == [8, 8] and proof.is_done


def test_openvino_is_a_runtime_like_the_others(tmp_path: Path) -> None:
    report = exported(tmp_path / "out", "openvino")
    assert report["parity"]["openvino"]["violations"] == 0
    assert [each["runtime"] for each in report["proved_on"]] == ["ort", "openvino"]
    assert "parity.openvino.violations" in {gate["name"] for gate in report["gates"]}


def test_the_reference_runs_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime_tests import proof as module

    calls = []
    run = module.run
    monkeypatch.setattr(module, "run", lambda plan, *rest, **more: calls.append(plan) or run(plan, *rest, **more))
    result, x = network("mobile", 8)
    Proof(emitted("mobile", 8), result.program, ("optimized",), runtimes=[get_runtime(THERE)]).add(x[:4])
    assert len(calls) == 1


def test_an_unknown_runtime_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown runtime 'haswell'"):
        exported(tmp_path / "out", "haswell")
    assert not (tmp_path / "out").exists()
