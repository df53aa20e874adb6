"""The documentation's generated parts: every marker resolves, and figures in prose are those of the measured tables."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from calibrators.methods import list_methods
from calibrators.placement.layer_rules import LayerRule
from exporter.config import ExportConfig
from exporter.reporting.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(name: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return entry


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_marker_resolves(page: Path, generate: ModuleType) -> None:
    assert "<!-- generated:" not in re.sub(r"`[^`]*`", "", generate.fill(page.read_text(encoding="utf-8")))


def test_every_method_has_a_page_with_all_its_options(generate: ModuleType) -> None:
    for info in list_methods():
        page = generate.method(info.name)
        assert info.summary in page
        assert [option.name for option in info.options if f"| `{option.name}` |" not in page] == []


def test_settings_gates_and_flags_are_complete(generate: ModuleType) -> None:
    assert [name for name in ExportConfig.model_fields if f"| `{name}` |" not in generate.settings()] == []
    assert [name for name in METRICS if f"| `{name}` |" not in generate.gates()] == []
    commands = generate.commands()
    assert [flag for flag in ("--weight-bits", "--budget", "--layer", "--quiet") if f"`{flag}`" not in commands] == []
    assert "[bold]" not in commands


def test_the_settings_of_a_rule_are_described() -> None:
    page = (DOCS / "layers.md").read_text(encoding="utf-8")
    assert [name for name in LayerRule.model_fields if name != "match" and f"| `{name}` |" not in page] == []


def test_every_measured_table_is_shown_once_and_well_formed() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in sorted((DOCS / "results").glob("*.json")):
        entry = measured(path.stem)
        assert text.count(f"\n<!-- generated: results {path.stem} -->\n") == 1
        assert {len(row) for row in entry["rows"]} == {len(entry["columns"])}
        assert entry["command"].startswith(("python benchmarks/", "intact export "))
        assert {"date", "cpu", "versions"} <= entry["measured"].keys()


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (None, "{}", "–"),
        ("chance", "{:.2f} %", "chance"),
        (90.35, "{:.2f} %", "90.35 %"),
        (80150528, "{:,}", "80,150,528"),
        ({"mean": 84.23, "spread": 0.24, "seeds": 3}, "{:.2f} %", "84.23 ± 0.24 % (3 seeds)"),
        ({"value": 83.3, "note": "(2 seeds)"}, "{:.2f} %", "83.30 % (2 seeds)"),
        ({"value": -0.35, "error": 0.214}, "{:+.2f}", "-0.35 ± 0.21"),
        ({"value": 0.4124, "low": 0.38, "high": 0.447}, "{:.3f}", "0.412 [0.380, 0.447]"),
    ],
)
def test_cells(generate: ModuleType, value: object, form: str, text: str) -> None:
    assert generate.cell(value, form) == text


def test_the_readme_holds_the_measured_figures(generate: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    entry = measured("networks")
    forms = [column.get("format", "{}") for column in entry["columns"]]
    for row in entry["rows"]:
        cells = [generate.cell(value, form) for value, form in zip(row, forms, strict=True)]
        name, _, top1, runtime, compared, differ, _, _, macs, size, latency, *_ = cells
        line = f"| {' | '.join((name, top1, runtime, compared, differ, macs, size, latency))} |"
        assert line in readme


def test_the_readme_links_to_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", readme)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_paths_named_in_the_documentation_exist() -> None:
    named = re.compile(r"`((?:calibrators|exporter|runtime_tests|tests|benchmarks|examples|docs)/[\w/.]*)`")
    pages = [ROOT / "README.md", *PAGES]
    missing = {path for page in pages for path in named.findall(page.read_text(encoding="utf-8"))
               if not (ROOT / path).exists() and "NAME" not in path}  # fmt: skip
    assert missing == set()
