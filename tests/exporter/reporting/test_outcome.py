"""The result of an export as Python and notebooks show it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.reporting.outcome import Outcome
from exporter.reporting.schema import validate_report
from tests.exporter.reporting.sample_report import sample_report


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_text_and_page_are_the_verdict_box(verdict: str) -> None:
    report = sample_report() | {"verdict": verdict}
    outcome = Outcome(report, Path("build/<net>"))
    assert outcome == report and json.loads(json.dumps(outcome)) == json.loads(json.dumps(report))
    assert outcome.passed is (verdict == "pass") and outcome.folder == Path("build/<net>")
    assert verdict.upper() in repr(outcome).splitlines()[0] and "build/<net>/report.html" in repr(outcome)
    page = outcome._repr_html_()
    assert page.startswith("<pre") and "build/&lt;net&gt;/report.html" in page and "<net>" not in page
    assert "color" in page and "\x1b" not in repr(outcome)


def test_reprs_are_short() -> None:
    report = validate_report(sample_report(300))
    assert len(repr(report)) < 300 and report.method in repr(report)


def test_a_notebook_shows_the_box_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("it is displayed beside what is returned"))
    outcome = Outcome(sample_report(1), Path("build/net"))
    assert "build/net" in repr(outcome) and "build/net" in outcome._repr_html_()
