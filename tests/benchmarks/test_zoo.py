"""The table of whole exports: its rows, and what a second run does with a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import zoo

from tests.exporter.reporting.sample_report import sample_report

Outcome = tuple[int, dict[str, Any] | None, str]


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> dict[str, Outcome]:
    """Outcomes of exports by model, instead of exports; each is taken once."""
    outcomes: dict[str, Outcome] = {}
    monkeypatch.setattr(zoo, "export", lambda model, data, bits, arguments: outcomes.pop(f"{model} on {data}"))
    return outcomes


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Run the benchmark; return the rows of its file by network, a row by title."""
    monkeypatch.setattr(sys, "argv", ["zoo.py", *arguments, "--json", str(path)])
    zoo.main()
    content = json.loads(path.read_text())
    titles = [column["title"] for column in content["columns"]]
    return {cells[titles.index("network")]: dict(zip(titles, cells, strict=True)) for cells in content["rows"]}


def test_a_row_has_what_the_report_says(
    exports: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = sample_report()
    exports["nets.py:small on nets.py:data_small"] = (0, report, "")
    (tmp_path / "list.txt").write_text("convnext nets.py:small\n")
    row = run(monkeypatch, tmp_path / "table.json", f"@{tmp_path / 'list.txt'}", "--bits", "4/8")["small"]
    assert (row["family"], row["bits"]) == ("convnext", "4/8")
    assert row["inputs"] == "3x64x64"
    assert row["folded"] == report["fold"]["regions"]
    assert row["integer MACs"] == 100 * report["coverage"]["integer_macs"]
    assert row["latency"] == report["latency_ms"]["ratio"]
    assert row["emit, s"] == report["time_s"]["emit"]


def test_a_second_run_goes_on_and_again_repeats_what_did_not_pass(
    exports: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, models = tmp_path / "table.json", ("--data", "nets.py:data", "nets.py:crashes", "nets.py:small")
    exports["nets.py:crashes on nets.py:data"] = (70, None, "internal error: why")
    exports["nets.py:small on nets.py:data"] = (0, sample_report() | {"gates": []}, "")
    first = run(monkeypatch, path, *models)
    assert [row["result"] for row in first.values()] == ["internal error", "pass"]
    assert "internal error: why" in capsys.readouterr().err
    path.write_text(json.dumps(json.loads(path.read_text()) | {"notes": ["Kept."]}))

    exports["nets.py:new on nets.py:data"] = (2, None, "error: refused")
    second = run(monkeypatch, path, *models, "nets.py:new")
    assert [row["result"] for row in second.values()] == ["internal error", "pass", "refused"]
    assert second["small"] == first["small"]

    exports["nets.py:crashes on nets.py:data"] = exports["nets.py:new on nets.py:data"] = (0, None, "")
    third = run(monkeypatch, path, *models, "nets.py:new", "--again")
    assert [(network, row["result"]) for network, row in third.items()] == [
        ("crashes", "pass"),
        ("small", "pass"),
        ("new", "pass"),
    ]
    assert json.loads(path.read_text())["notes"] == ["Kept."]
