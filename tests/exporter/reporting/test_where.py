"""Lines of the verdict box on where a file holds, and the failure on a machine where it does not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from rich.console import Console
from torch import nn

from exporter import export
from exporter.reporting import sections
from exporter.reporting.schema import validate_report
from exporter.reporting.terminal import verdict_panel
from exporter.reporting.where import not_exact_here, where_rows
from exporter.verify import UNKNOWN_PROCESSOR, verify
from runtime_tests.ort.saturation import Cpu
from runtime_tests.reference.where_exact import Holds

HASWELL = Cpu("X86_64", "Intel Haswell", ("avx2", "fma"))
EVERYWHERE = ("x86-vnni", "x86-avx2", "x86-sse", "arm64", "wasm")


def entries(status: Any, *names: str, condition: str = "why") -> list[Holds]:
    return [Holds(name, status, condition) for name in names]


@pytest.mark.parametrize(
    ("holds", "rows"),
    [
        pytest.param(
            [*entries("proved", EVERYWHERE[0]), *entries("follows", *EVERYWHERE[1:])],
            {
                "exact on": "x86-64 with and without VNNI, 64-bit ARM, WebAssembly with SIMD (follows from "
                "arithmetic); needs onnxruntime 1.19 or newer"
            },
            id="everywhere",
        ),
        pytest.param(
            [
                *entries("proved", "x86-vnni", condition="in onnxruntime 1.32"),
                *entries("differs", "x86-avx2", condition="pairs"),
                *entries("unknown", "arm64", condition="ties"),
            ],
            {
                "exact on": "x86-64 with VNNI (proved by running it); needs onnxruntime 1.19 or newer",
                "not exact on": "x86-64 with AVX2, without VNNI: pairs",
                "unknown on": "64-bit ARM: ties",
            },
            id="one-of-each",
        ),
        pytest.param(
            entries("follows", "arm64", condition="x; values after float operators may differ"),
            {
                "exact on": "64-bit ARM (follows from arithmetic); values after float operators may differ; "
                "needs onnxruntime 1.19 or newer"
            },
            id="float-operators",
        ),
    ],
)
def test_lines_of_the_box(holds: list[Holds], rows: dict[str, str]) -> None:
    assert dict(where_rows(holds, "1.19")) == rows


def test_reports_of_earlier_versions_have_no_lines() -> None:
    assert list(where_rows((), None)) == []
    assert not_exact_here((), None) is None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bundle for VNNI alone, with pairs of weights that saturate without it."""
    out = tmp_path_factory.mktemp("where") / "out"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    report = export(model, [torch.randn(8, 3, 8, 8)], target="ort-cpu-vnni", method="minmax", latency_runs=0, out=out)
    return out, report


def text_of(report: dict[str, Any]) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(verdict_panel(validate_report(report), Path("out")))
    return console.export_text()


def test_file_report_and_manifest_say_where_it_holds(bundle: tuple[Path, dict[str, Any]]) -> None:
    out, report = bundle
    found = {each["processor"]: each["status"] for each in report["holds"]}
    assert found["x86-avx2"] == "differs"
    assert found["arm64"] == "follows"
    assert f"needs onnxruntime {report['emission']['min_onnxruntime']} or newer" in text_of(report)
    assert "not exact on" in text_of(report) and "without VNNI: pairs of weights can saturate" in text_of(report)
    metadata = {entry.key: entry.value for entry in onnx.load(out / "model.onnx").metadata_props}
    assert metadata["intact.exact_on"] == "x86-vnni, x86-sse, arm64, wasm"
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["holds"] == report["holds"]
    assert "Where the verdict holds" in (out / "report.html").read_text(encoding="utf-8")


def test_verify_fails_where_the_file_is_not_exact(
    bundle: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "this_cpu", lambda: HASWELL)
    report = verify(bundle[0])
    assert report["verdict"] == "fail"
    assert [gate["name"] for gate in report["gates"] if not gate["passed"]] == ["inexact_here"]
    assert "this machine is x86-64 with AVX2, without VNNI, where pairs of weights can saturate" in text_of(report)


def test_verify_says_that_a_processor_is_not_known(
    bundle: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "this_cpu", lambda: Cpu("RISCV_64", "", ()))
    report = verify(bundle[0])
    assert report["verdict"] == "pass"
    assert UNKNOWN_PROCESSOR in report["warnings"]
