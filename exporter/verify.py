"""Prove a bundle again, and what that shares with the first proof.

Must not know: the command line, how pages look, how the model was made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from calibrators.errors import InputError
from calibrators.execution.measure import Batch
from exporter.frontend.capture import alike
from exporter.frontend.reference import load_reference
from exporter.inputs.batches import cut, feed
from exporter.progress import Progress
from exporter.reporting.bundle import read_golden, verify_manifest
from exporter.reporting.gates import DEFAULT_GATES, Gate, evaluate, parse, verdict
from exporter.reporting.schema import Report, read_report
from exporter.reporting.sections import environment, saturation_entry
from runtime_tests.ort.coverage import coverage
from runtime_tests.ort.lint import lint
from runtime_tests.ort.saturation import Saturation, saturation
from runtime_tests.ort.sessions import Model, session
from runtime_tests.parity.openvino import check_installed
from runtime_tests.parity.results import FLOAT_OUTPUT_ERROR
from runtime_tests.proof import Proof

__all__ = ["REFERENCE", "file_entries", "gates_of", "judge", "levels_of", "parity_entry", "verify"]

REFERENCE = "golden/reference.pt2"
"""The reference program inside a bundle: what `verify` compares the runtime with."""


def verify(folder: str | Path, progress: Progress | None = None) -> Report:
    """Prove a bundle again on this machine; return its report with this machine's parity, coverage and gates.

    Files are checked against the manifest, then the runtime against the reference program on the golden inputs, every
    quantized value. Accuracy and latency keep the numbers of the export; nothing is written.

    raises: InputError for a missing, damaged or changed file, or where OpenVINO was asked for and is not installed.
    """
    folder, progress = Path(folder), progress or Progress()
    with progress.stage("manifest"):
        verify_manifest(folder)
    report = read_report(folder / "report.json")
    openvino = "openvino" in report["parity"]
    if openvino:
        check_installed()
    program = load_reference(folder / REFERENCE)
    inputs, expected = _golden(folder, program)
    batch = tuple(torch.from_numpy(np.array(inputs[name])) for name in program.meta["input_names"])
    model = Model(folder / "model.onnx")
    with progress.stage("compare"):
        proof = Proof(model, program, levels_of(openvino=openvino), threads=torch.get_num_threads())
        proof.add(batch)
        levels = parity_entry(proof)
        found = session(model).run(list(expected), inputs)
    pairs = [
        (torch.from_numpy(np.array(a)), torch.from_numpy(b)) for a, b in zip(expected.values(), found, strict=True)
    ]
    levels["optimized"]["outputs_identical"] &= all(alike(a, b, 0.0) for a, b in pairs)
    levels["optimized"]["violations"] += sum(not alike(a, b, FLOAT_OUTPUT_ERROR) for a, b in pairs)
    with progress.stage("measure"):
        entries, _ = file_entries(model, program, batch, report["config"]["threads"])
    report = cast(Report, {**report, "parity": levels, **entries})
    judge(report, gates_of(report["config"]["gates"], openvino=openvino))
    return report


def _golden(folder: Path, program: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs, expected = read_golden(folder)
    for kind, arrays in (("input", inputs), ("output", expected)):
        if [*arrays] != [*program.meta[f"{kind}_names"]]:
            raise InputError(
                f"the golden {kind}s of {folder} are not those of its reference program; take it from its source again."
            )
    return inputs, expected


def levels_of(*, openvino: bool) -> tuple[str, ...]:
    """Return the levels at which a file is compared."""
    return ("unoptimized", "optimized", *(["openvino"] if openvino else []))


def parity_entry(proof: Proof) -> dict[str, Any]:
    """Return the "parity" part of report.json."""
    return {name: asdict(level) for name, level in proof.levels.items()}


def file_entries(
    model: Model, program: fx.GraphModule, batch: Batch, threads: int
) -> tuple[dict[str, Any], Saturation]:
    """Return the parts of report.json that say how this machine runs the file, measured with a sample of `batch`."""
    saturating = saturation(model)
    entries = {
        "coverage": coverage(model, sample=feed(program, cut(program, batch))).to_dict(),
        "lint": [asdict(finding) for finding in lint(model)],
        "environment": environment(saturating, threads),
        "saturation": saturation_entry(saturating),
    }
    return entries, saturating


def gates_of(expressions: Iterable[str], *, openvino: bool) -> list[Gate]:
    """Return the gates of every export, of OpenVINO where it is asked for, and the user's."""
    second = [parse("parity.openvino.violations==0")] if openvino else []
    return [*DEFAULT_GATES, *second, *map(parse, expressions)]


def judge(report: Report, gates: Iterable[Gate]) -> None:
    """Put the results of the gates and the verdict into the report."""
    report["gates"] = evaluate(gates, report)
    report["verdict"] = verdict(report["gates"])
