"""The advice of an export that misses its gate, pasted into a second export, makes the gate pass."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

from exporter import export
from exporter.reporting.failures import failures
from exporter.reporting.html import render_html
from exporter.reporting.schema import validate_report
from tests.support.spectrum import Spectrum

FIXED = {"gates": ["sqnr_db>=25dB"], "method": "mse", "latency_runs": 0, "simplify": False}


def test_the_line_of_the_advice_makes_the_gate_pass(tmp_path: Path) -> None:
    """8 bits destroy the small outputs of the first layer; its noise beside its largest outputs says nothing of it."""
    network = Spectrum().eval()
    x = torch.randn(96, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    first = export(network, [x[:64]], out=tmp_path / "first", eval_data=[x[64:]], **FIXED)
    report = validate_report(first)
    [failure] = failures(report)
    assert failure.gate.name == "sqnr_db" and failure.causes.startswith("layers that cost the prediction most: filters")
    [text] = [text for text in failure.advice if "layers=" in text]
    layers = ast.literal_eval(text.rpartition(": layers=")[2])
    assert layers == ["filters: float=true"]
    assert "layers=[&#39;filters: float=true&#39;]" in render_html(report)

    second = export(network, [x[:64]], out=tmp_path / "second", eval_data=[x[64:]], layers=layers, **FIXED)
    assert second.passed and "costly_layers" not in second
    assert second["accuracy"]["sqnr_db"] > first["accuracy"]["sqnr_db"] + 10
