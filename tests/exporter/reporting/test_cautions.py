from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from exporter.reporting.cautions import cautions
from exporter.reporting.html import render_html
from exporter.reporting.schema import validate_report
from exporter.reporting.terminal import summary_rows, verdict_panel
from tests.exporter.reporting.sample_report import sample_report


def found(*, lint: Sequence[dict[str, str]] = (), **changes: Any) -> list[str]:
    report = sample_report(3) | {"lint": lint}
    for key, change in changes.items():
        report[key] |= change
    return list(cautions(validate_report(report)))


def test_a_report_without_fault_gives_none() -> None:
    assert found() == []


def test_a_slower_file_names_what_takes_its_time() -> None:
    slower = {"float": 3.0, "quantized": 4.5, "ratio": 1.5, "ratio_interval": [1.45, 1.52]}
    [text] = found(latency_ms=slower)
    assert text.startswith("the file is 1.50x slower than float: LayerNormalization takes 15 % of its time")
    assert "batch norm folds" in text
    [text] = found(latency_ms=slower, time_shares={"quantizers": 0.4})
    assert text.endswith("quantizers take 40 % of its time")
    [text] = found(latency_ms=slower, time_shares={"integer": 0.7, "quantizers": 0.2})
    assert text.endswith("its integer kernels alone, 70 % of its time, take longer than the float model")


def test_times_of_onnxruntime_are_not_those_of_another_runtime() -> None:
    report = sample_report(3) | {"target": "xnnpack"}
    report["latency_ms"] |= {"float": 3.0, "quantized": 4.5, "ratio": 1.5, "ratio_interval": [1.45, 1.52]}
    report["size"] |= {"lowered_bytes": 1234}
    checked = validate_report(report)
    assert not [text for text in cautions(checked) if "slower" in text]
    rows = dict(summary_rows(checked))
    assert rows["latency"].endswith("; onnxruntime, not xnnpack") and rows["integer time"].endswith("not xnnpack")
    assert rows["size"].endswith("; model.pte 1.23 kB")
    page = render_html(checked)
    assert "of model.onnx in onnxruntime, not of xnnpack" in page and "model.pte 1.23 kB" in page


def test_a_difference_within_the_noise_is_none() -> None:
    assert found(latency_ms={"float": 3.0, "quantized": 3.1, "ratio": 1.03, "ratio_interval": [1.02, 1.05]}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "3.92 ms (3.91 to 3.94) in 200 runs, 3.17x faster than float (3.15x to 3.18x)"),
        ({"ratio": 1.01, "ratio_interval": [0.95, 1.04]}, "in 200 runs, as fast as float (0.96x to 1.05x)"),
        ({"ratio": 2.0, "ratio_interval": [1.9, 2.1]}, "2.00x slower than float (1.90x to 2.10x)"),
        (
            {"iqr": {"float": 0.3, "quantized": 1.96}, "reliable": False},
            "in 200 runs, unreliable (half of the times spread over 50 % of the median; measure on an idle machine)",
        ),
        ({"interval": None, "ratio_interval": None, "reliable": None}, "3.92 ms in 200 runs, 3.17x faster than float"),
    ],
    ids=["faster", "equal", "slower", "unreliable", "earlier-version"],
)
def test_a_latency_is_a_headline_only_where_it_was_measured_well(changes: dict[str, Any], words: str) -> None:
    report = sample_report(3)
    report["latency_ms"] |= changes
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(verdict_panel(validate_report(report), Path("out")))
    assert words in console.export_text()


def test_a_larger_file_uncounted_products_and_saturation_are_said() -> None:
    assert "1.50x larger" in found(size={"float_bytes": 2000, "bytes": 3000})[0]
    assert found(coverage={"uncounted": ["Scan loop"], "integer_macs": None})[0].endswith("counted: Scan loop")
    assert found(saturation={"affected_here": True})[0].endswith("saturate on this processor in 1 layer")


def test_warnings_of_the_linter_are_grouped_by_rule() -> None:
    lint = [
        {"rule": "bias-scale", "severity": "warning", "where": where, "message": "bias scale was widened"}
        for where in ("fc", "head")
    ]
    assert found(lint=lint) == ["lint, bias-scale: bias scale was widened (at fc, and in 1 more place)"]


@pytest.mark.parametrize("count", [3, 9])
def test_the_box_shows_the_first_warnings_in_80_columns(count: int) -> None:
    report = sample_report(3) | {"warnings": [f"[input] {index} is not read" for index in range(count)]}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(verdict_panel(validate_report(report), Path("out")))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("is not read") == min(count, 5)
    assert ("4 more in the report" in text) == (count == 9)
    assert "[input] 0 is not read" in text


def test_the_box_says_where_the_time_goes_and_which_nodes_are_integer() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(verdict_panel(validate_report(sample_report(3)), Path("out")))
    text = console.export_text()
    assert "62 %; float operators 21 % (LayerNormalization 15 %), quantizers 12 %, moves 5 %" in text
    assert "99.87 %; 14 of 16 compute nodes" in text


def test_the_box_says_that_macs_are_not_known() -> None:
    report = sample_report(3)
    report["coverage"] |= {"integer_macs": None, "uncounted": ["Scan loop"]}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(verdict_panel(validate_report(report), Path("out")))
    assert "not measured: 1 operator cannot be counted" in console.export_text()
