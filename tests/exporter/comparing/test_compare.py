"""Differences of two bundles whose differences are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from calibrators.errors import InputError
from exporter.cli import app
from exporter.comparing.compare import (
    NO_SCORES,
    OTHER_DATA,
    OTHER_PROCESSOR,
    TIMED_APART,
    UNRELIABLE,
    compare,
    read_export,
)
from exporter.comparing.pages import html_page, markdown_page
from exporter.handover import bundle as bundle_module
from exporter.handover.bundle import write_bundle
from exporter.handover.scores import SCORES, read_scores, write_scores
from exporter.reporting.difference_tables import sections, summary
from exporter.reporting.failures import found_by
from exporter.reporting.gates import evaluate, parse
from exporter.reporting.html import render_html
from exporter.reporting.schema import validate_report
from runtime_tests.measure.paired import SampleScores
from tests.exporter.reporting.sample_report import sample_report

SAMPLES = 400
RIGHT = np.arange(SAMPLES) % 10 != 0
ERROR = np.linspace(0.001, 0.003, SAMPLES, dtype=np.float32)
GOLDEN = ({"image": np.zeros((1, 2), np.float32)}, {"logits": np.zeros((1, 2), np.float32)})


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that costs no time."""
    monkeypatch.setattr(bundle_module, "render_html", lambda report: "<!doctype html>")


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a bundle; `edit` changes the report, `model` is the file."""

    def write(
        name: str,
        edit: Callable[[Any], None] = lambda report: None,
        *,
        model: bytes = b"one",
        right: Any = RIGHT,
        error: Any = ERROR,
    ) -> Path:
        report = sample_report(8)
        report["config"] = {"method": "gptq", "options": {"sweeps": 3}}
        edit(report)

        def files(folder: Path) -> None:
            (folder / "model.onnx").write_bytes(model)
            if error is not None:
                write_scores(folder, SampleScores(error, right))

        return write_bundle(
            tmp_path / name, files=files, report=validate_report(report), golden=[GOLDEN], config={"seed": 0}
        )

    return write


def test_equal_exports_differ_in_nothing(written: Callable[..., Path]) -> None:
    found = compare(read_export(written("a")), read_export(written("b")))
    assert found.identical and not (found.layers or found.gates or found.settings or found.origins or found.notes)
    assert found.drop is not None and (found.drop.lost, found.drop.gained, found.drop.p_value) == (0, 0, 1.0)
    assert found.error is not None and found.error.value == 1.0
    assert all(figure.before == figure.after for figure in found.figures)
    assert "Both model files hold the same bytes." in summary(found)
    assert any(text.startswith("The error against the float model is what it was (95 %") for text in summary(found))


def test_accuracy_is_compared_by_sample(written: Callable[..., Path]) -> None:
    worse = RIGHT.copy()
    worse[1:13] = False  # 11 of them were right
    worse[0] = True
    found = compare(read_export(written("a")), read_export(written("b", right=worse, error=ERROR * 3)))
    assert found.drop is not None and (found.drop.lost, found.drop.gained) == (11, 1)
    assert found.drop.drop.value == 10 / SAMPLES and found.drop.p_value == pytest.approx(2 * 13 / 2**12)
    assert found.error is not None and found.error.value == pytest.approx(3, rel=1e-5)
    assert any(sentence.startswith("Accuracy changed: −2.50 points") for sentence in summary(found))
    assert any("float model is 3 times the earlier one (" in sentence for sentence in summary(found))


def test_other_data_are_not_compared_by_sample(written: Callable[..., Path]) -> None:
    def other(report: Any) -> None:
        report["data"]["evaluation"]["sha256"] = "0" * 64
        report["environment"]["cpu"] = "another"

    found = compare(read_export(written("a")), read_export(written("b", other)))
    assert found.drop is None and found.error is None and found.notes == (OTHER_DATA, OTHER_PROCESSOR)
    earlier = compare(read_export(written("c", error=None)), read_export(written("d")))
    assert earlier.drop is None and earlier.notes == (NO_SCORES,)


def test_layers_settings_gates_and_nodes_that_changed_are_named(written: Callable[..., Path]) -> None:
    def changed(report: Any) -> None:
        first, second, third = report["layers"][:3]
        first["bits"] = 4
        second["scale_max"] *= 2
        third["sqnr_db"] -= 7
        report["config"] = {"method": "mse", "options": {}}
        report["gates"][0]["passed"] = not report["gates"][0]["passed"]
        report["coverage"]["float_nodes"] = [
            *report["coverage"]["float_nodes"], {"name": "/new", "op": "Gelu", "why": "", "macs": 0}
        ]  # fmt: skip
        report["size"]["bytes"] *= 2

    found = compare(read_export(written("a")), read_export(written("b", changed, model=b"two")))
    assert not found.identical
    changes = {layer.site: layer for layer in found.layers}
    sites = [layer["site"] for layer in sample_report(8)["layers"][:3]]
    assert [*changes] == sites
    assert changes[sites[0]].bits == (8, 4) and changes[sites[1]].scale == 2
    assert changes[sites[2]].noise_added_db == pytest.approx(7)
    assert {(each.name, each.before, each.after) for each in found.settings} == {
        ("method", "gptq", "mse"), ("options.sweeps", 3, None)
    }  # fmt: skip
    assert len(found.gates) == 1 and found.gates[0].before != found.gates[0].after
    assert found.now_float == ("Gelu /new",) and not found.now_integer
    assert next(figure.ratio for figure in found.figures if figure.name == "size") == 2
    titles = [section.title for section in sections(found)]
    assert titles == ["Figures", "Gates", "Nodes", "Layers", "Settings"]
    assert [*sections(found)[2].rows] == [("Gelu /new", "not in float", "in float")], "the earlier file lacks it"
    assert next(section for section in sections(found) if section.title == "Layers").rows[0][2] == "8 to 4"


def test_pages_escape_what_they_show(written: Callable[..., Path]) -> None:
    def hostile(report: Any) -> None:
        report["layers"][0] |= {"site": "a|b<script>`x`", "bits": 4}

    found = compare(read_export(written("a")), read_export(written("b", hostile)))
    assert "<script>" not in html_page(found) and "a|b&lt;script&gt;" in html_page(found)
    assert r"a\|b&lt;script>\`x\`" in markdown_page(found)


def test_the_report_shows_the_baseline(written: Callable[..., Path]) -> None:
    found = compare(read_export(written("a")), read_export(written("b", error=ERROR * 2)))
    report = replace(validate_report(sample_report(8)), baseline=found)
    page = render_html(report)
    assert 'id="baseline"' in page and "The error against the float model is 2 times" in page
    assert 'id="baseline"' not in render_html(replace(report, baseline=None))


def test_command_writes_pages_and_judges_gates(written: Callable[..., Path], tmp_path: Path) -> None:
    one, two = written("a"), written("b", lambda report: report["size"].update(bytes=10**9), error=ERROR * 2)
    runner, files = CliRunner(), ["--markdown", str(tmp_path / "c.md"), "--html", str(tmp_path / "c.html")]
    passed = runner.invoke(app, ["compare", str(one), str(two), "--gate", "baseline_error<=2.5", *files])
    assert passed.exit_code == 0 and "Figures" in passed.stdout
    assert (tmp_path / "c.md").read_text().startswith("# a → b") and "<h2>Figures" in (tmp_path / "c.html").read_text()
    failed = runner.invoke(app, ["compare", str(one), str(two), "--gate", "baseline_size<=1.05", "--json"])
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["gates"][0]["passed"] is False
    assert json.loads(failed.stdout)["difference"]["error"]["value"] == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}", "nowhere"], "nowhere is not a folder"),
        (["{a}", "{a}", "--gate", "baseline_drop"], "is not METRIC OP NUMBER"),
        (["{a}", "{a}", "--gate", "size<=10kB"], "begin with baseline_"),
        (["{a}", "{a}", "--html", "no/where.html"], "there is no folder no"),
        (["{a}", "{unlabelled}", "--gate", "baseline_drop<=0.1"], "export both with --eval and labels"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, written: Callable[..., Path]) -> None:
    bundles = {"a": written("a"), "unlabelled": written("unlabelled", right=None)}
    result = CliRunner().invoke(app, ["compare", *(text.format(**bundles) for text in arguments)])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_damaged_scores_are_refused(tmp_path: Path) -> None:
    assert read_scores(tmp_path) is None
    (tmp_path / SCORES).write_bytes(b"PK\3\4")
    with pytest.raises(InputError, match="not a readable"):
        read_scores(tmp_path)
    write_scores(tmp_path, SampleScores(np.zeros((2, 2), np.float32), None))
    with pytest.raises(InputError, match="other arrays"):
        read_scores(tmp_path)


@pytest.mark.parametrize("reliable", [True, False])
def test_latencies_are_compared_with_a_caveat_or_not_at_all(written: Callable[..., Path], reliable: bool) -> None:
    def edit(report: Any) -> None:
        report["latency_ms"] |= {"quantized": report["latency_ms"]["quantized"] * 2, "reliable": reliable}

    found = compare(read_export(written("a")), read_export(written("b", edit)))
    figures = {figure.name: figure for figure in found.figures if figure.name.startswith("latency")}
    latency, relative = figures["latency"], figures["latency over that of the float model"]
    assert found.notes[-1] == (TIMED_APART if reliable else UNRELIABLE)
    assert latency.ratio == (pytest.approx(2) if reliable else None)
    assert relative.ratio == (1 if reliable else None)
    (row,) = [row for table in sections(found) for row in table.rows if row[0] == "latency"]
    assert row[3] == ("x 2" if reliable else "–")


def test_a_gate_on_scores_that_are_not_paired_says_why(written: Callable[..., Path]) -> None:
    def other(report: Any) -> None:
        report["data"]["evaluation"]["sha256"] = "f" * 64

    arguments = ["compare", str(written("a")), str(written("b", other)), "--gate", "baseline_drop<=0.01"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "cannot be answered. " + OTHER_DATA in " ".join(result.stderr.split())
    report = sample_report(8) | {"baseline": asdict(compare(*(read_export(Path(each)) for each in arguments[1:3])))}
    (gate,) = evaluate([parse("baseline_drop<=0.01")], report)
    assert found_by(gate, validate_report(report)).startswith(f"it was not measured ({OTHER_DATA}")
