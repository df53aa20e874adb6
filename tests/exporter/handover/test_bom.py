"""The bill of materials and the statement of a bundle, against the published schema and the files they speak of."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from exporter.handover.bom import bill_of_materials, statement
from exporter.reporting.provenance import provenance
from exporter.reporting.schema import validate_report
from tests.exporter.reporting.sample_report import sample_report

SHA = hashlib.sha256(b"model").hexdigest()


def test_bill_is_valid_and_names_model_data_and_packages(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"weights")
    report = sample_report()
    report["provenance"] = {
        "checkpoint": {"path": "net.pt", "sha256": SHA, "key": None},
        "git": {"commit": "0" * 40, "dirty": True},
        "threads": 1,
        "packages": ["torch==2.13.0+cpu", "numpy==2.4.6"],
    }
    report["data"]["calibration"]["classes"] = {"cat": 3, "dog": 5}
    bill = bill_of_materials(validate_report(report), SHA)
    text = json.dumps(bill)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert text == json.dumps(bill_of_materials(validate_report(report), SHA)), "the same bytes every time"
    component = bill["metadata"]["component"]
    assert component["hashes"] == [{"alg": "SHA-256", "content": SHA}] and component["type"] == "machine-learning-model"
    assert "pkg:pypi/torch@2.13.0%2Bcpu" in {each["bom-ref"] for each in bill["components"]}
    digests = {each["hashes"][0]["content"] for each in bill["components"] if each["type"] == "data"}
    assert report["data"]["calibration"]["sha256"] in digests
    assert '{"name": "intact:class:dog", "value": "5"}' in text
    card = component["modelCard"]
    assert {each["type"] for each in card["quantitativeAnalysis"]["performanceMetrics"]} >= {"top1", "accuracy drop"}
    assert {"name": "intact:git-dirty", "value": "true"} in component["properties"]


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_statement_is_about_the_files_and_lists_gates(verdict: str) -> None:
    report = sample_report() | {"verdict": verdict}
    found = statement(validate_report(report), {"model.onnx": SHA, "model.onnx.data": SHA})
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert [each["name"] for each in found["subject"]] == ["model.onnx", "model.onnx.data"]
    assert found["predicate"]["result"] == {"pass": "PASSED", "fail": "FAILED"}[verdict]
    gates = found["predicate"]["passedTests"] + found["predicate"]["failedTests"]
    assert sorted(gates) == sorted(gate["expression"] for gate in report["gates"])


def test_origin_names_checkpoint_commit_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance(None, None).git is None and provenance(None, None).checkpoint is None
    checkpoint = tmp_path / "net.pt"
    checkpoint.write_bytes(b"model")

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "net.pt")
    git("commit", "-qm", "one")
    found = provenance(checkpoint, "ema")
    assert found.checkpoint is not None and (found.checkpoint.sha256, found.checkpoint.key) == (SHA, "ema")
    assert found.git is not None and found.git.commit == git("rev-parse", "HEAD") and not found.git.dirty
    checkpoint.write_bytes(b"other")
    (tmp_path / "build").mkdir()
    assert (changed := provenance(None, None).git) is not None and changed.dirty
    names = [each.partition("==")[0] for each in found.packages]
    assert names == sorted(set(names)) and any(name.startswith("torch==") for name in found.packages)
