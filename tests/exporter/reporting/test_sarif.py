"""Findings of the linter as SARIF: valid against the schema of the standard, with nodes as logical locations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
from typer.testing import CliRunner

from exporter.cli import app
from tests.runtime_tests.ort.test_lint_profiles import BROKEN, KEPT, File

SCHEMA = json.loads(Path(__file__).with_name("sarif-2.1.0.json").read_text(encoding="utf-8"))


def linted(path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    found = CliRunner().invoke(app, ["lint", str(path), "--sarif", *flags])
    document: dict[str, Any] = json.loads(found.stdout)
    jsonschema.Draft7Validator(SCHEMA).validate(document)
    return found.exit_code, document["runs"][0]


@pytest.mark.parametrize(("target", "rule"), [("tensorrt", "bias-not-float"), ("tidl", "dynamic-shape")])
def test_a_finding_names_its_rule_its_source_and_its_node(target: str, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "a b%20#1.onnx"
    onnx.save(File(**{**KEPT[target], **BROKEN[rule]}).model, path)
    code, run = linted(path, "--target", target)
    (result,) = run["results"]
    described = run["tool"]["driver"]["rules"][result["ruleIndex"]]
    assert (code, result["ruleId"], result["level"], described["id"]) == (1, rule, "error", rule)
    assert described["help"]["text"].startswith("Source: ")
    (place,) = result["locations"]
    assert place["logicalLocations"][0]["name"].startswith("x" if rule == "dynamic-shape" else "Conv_")
    assert place["physicalLocation"]["artifactLocation"]["uri"] == path.as_uri()


def test_files_without_findings_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(File(**KEPT["ort-qnn"]).model, path)
    assert linted(path, "--target", "ort-qnn")[1]["results"] == []
    path.write_bytes(b"no model")
    code, run = linted(path)
    assert (code, [each["ruleId"] for each in run["results"]]) == (1, ["unreadable-file"])


def test_an_unknown_target_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(File().model, path)
    found = CliRunner().invoke(app, ["lint", str(path), "--target", "rknn"])
    assert found.exit_code == 2 and "vitis-ai" in found.stderr
    both = CliRunner().invoke(app, ["lint", str(path), "--sarif", "--json"])
    assert both.exit_code == 2 and "leave one of them out" in both.stderr


def test_a_uri_is_relative_where_the_path_is_and_a_name_is_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("x:y #1.onnx")
    onnx.save(File(**{**KEPT["tidl"], **BROKEN["dynamic-shape"]}).model, path)
    (result,) = linted(path, "--target", "tidl")[1]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "x%3Ay%20%231.onnx"
    Path("\udcff.onnx").write_bytes(b"")
    for flags in ([], ["--json"], ["--sarif"]):
        found = CliRunner().invoke(app, ["lint", "\udcff.onnx", *flags])
        assert found.exit_code == 2 and "rename the file" in found.stderr
