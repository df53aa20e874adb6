"""The lines on where a file was proved."""

from __future__ import annotations

from typing import Any

from exporter.reporting.proofs import proof_rows
from runtime_tests.parity.results import ProvedOn


def found(runtime: str, version: str = "1.32.0", **changed: Any) -> ProvedOn:
    counts = {
        "values": 4000,
        "mismatched": 0,
        "max_lsb": 0,
        "samples": 16,
        "kernel_values": 3000,
        "kernel_mismatched": 0,
        "float_values": 1000,
        "float_mismatched": 0,
        "outputs_identical": True,
        "largest_difference": 0.0,
        "violations": 0,
        "worst": (),
    }
    return ProvedOn(**{**counts, **changed}, runtime=runtime, version=version, processor="arm64", flags=())


def test_variants_are_told_apart_and_versions_named_once() -> None:
    entries = [found("ort"), found("ort==1.19.2", "1.19.2"), found("arm64==cortex-a53")]
    assert dict(proof_rows(entries))["proved on"] == (
        "ort 1.32.0 (arm64), ort 1.19.2 (arm64), arm64==cortex-a53 1.32.0 (arm64)"
    )


def test_what_differs_and_where() -> None:
    travelled = found("avx2", mismatched=70, float_mismatched=2, outputs_identical=False, largest_difference=0.01234)
    kernels = found("web", mismatched=9, kernel_mismatched=9, violations=1, float_values=0)
    refused = found("sse", values=0, outputs_identical=False, refused="it refuses the model")
    lines = dict(proof_rows([found("ort"), travelled, kernels, refused]))
    assert lines == {
        "proved on": "ort 1.32.0 (arm64), avx2 1.32.0 (arm64)",
        "avx2": "70 of 4,000 integers of 16 samples differ end to end; kernel by kernel 0, and 2 after float "
        "operators; outputs differ by up to 0.0123",
        "web": "9 of 4,000 integers of 16 samples differ end to end; kernel by kernel 9; outputs identical",
        "sse": "it refuses the model",
    }


def test_nothing_was_proved() -> None:
    assert [title for title, _ in proof_rows([found("ort", violations=1)])] == []
