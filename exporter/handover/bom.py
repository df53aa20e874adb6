"""Write the origin and the result of an export in forms that supply-chain tools read.

`bom.json` is a CycloneDX 1.6 bill of materials with a model card; `parity.intoto.json` is an in-toto statement that the
model passed or failed the gates. Both depend on the report and the model file alone: they hold no time of day.

Must not know: how anything was measured, signatures.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from exporter.reporting.schema import DataSource, Report

__all__ = ["bill_of_materials", "statement"]

NAMESPACE = uuid.UUID("6a5a1c52-4bb4-5d0e-9b4f-8b5cf5a9b8d1")
"""Of the serial numbers of bills: a constant of this project."""

STATEMENT = "https://in-toto.io/Statement/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"


def bill_of_materials(report: Report, sha256: str) -> dict[str, Any]:
    """Return the bill of materials of a model file with this digest.

    source: CycloneDX 1.6, JSON: modelCard (machine-learning transparency), hashes, purl.
    """
    packages = report.provenance.packages if report.provenance else ()
    name = (report.model.source if report.model else "") or "model"
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, sha256)}",
        "version": 1,
        "metadata": {
            "tools": {"components": [_package(f"intact-export=={report.tool.version}")] if report.tool else []},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "model.onnx",
                "name": name,
                "version": sha256[:12],
                "hashes": [{"alg": "SHA-256", "content": sha256}],
                "modelCard": _model_card(report),
                "properties": [{"name": f"intact:{key}", "value": value} for key, value in _properties(report)],
            },
        },
        "components": [*_data(report), *map(_package, packages)],
    }


def _model_card(report: Report) -> dict[str, Any]:
    ports = report.model
    parameters: dict[str, Any] = {
        "datasets": [{"ref": each["bom-ref"]} for each in _data(report)],
    }
    if ports:
        parameters |= {
            kind: [{"format": f"{port.name}: {port.dtype} {list(port.shape)}"} for port in values]
            for kind, values in (("inputs", ports.inputs), ("outputs", ports.outputs))
        }
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(report))},
        "considerations": {
            "technicalLimitations": [
                f"{each.processor}: {each.status}; {each.condition}" for each in report.holds or ()
            ]
        },
    }


def _metrics(report: Report) -> Iterator[dict[str, Any]]:
    """Yield the scores in the runtime; a drop has its confidence interval."""
    accuracy = report.accuracy
    if accuracy is not None:
        for kind, value in (
            (accuracy.metric, accuracy.runtime),
            (f"{accuracy.metric} of the float model", accuracy.float),
        ):
            if value is not None:
                yield {"type": kind, "value": f"{value:.6g}"}
        if accuracy.drop_ci is not None and accuracy.float is not None and accuracy.runtime is not None:
            low, high = (f"{bound:.6g}" for bound in accuracy.drop_ci)
            yield {
                "type": "accuracy drop",
                "value": f"{accuracy.float - accuracy.runtime:.6g}",
                "confidenceInterval": {"lowerBound": low, "upperBound": high},
            }
    level = report.parity.optimized
    yield {"type": "differing integers", "value": f"{level.mismatched} of {level.values}"}


def _properties(report: Report) -> Iterator[tuple[str, str]]:
    yield "verdict", report.verdict
    yield "target", report.target
    yield "method", report.method
    yield "weight-bits", str(report.bits.weight)
    yield "activation-bits", str(report.bits.activation)
    if report.provenance and (git := report.provenance.git):
        yield "git-commit", git.commit
        yield "git-dirty", str(git.dirty).lower()
    if report.provenance and (checkpoint := report.provenance.checkpoint):
        yield "checkpoint", checkpoint.path
        yield "checkpoint-sha256", checkpoint.sha256


def _data(report: Report) -> list[dict[str, Any]]:
    """Return the data sets as components."""
    sources: list[tuple[str, DataSource | None]] = []
    if report.data:
        sources = [("calibration", report.data.calibration), ("evaluation", report.data.evaluation)]
    return [
        {
            "type": "data",
            "bom-ref": f"data:{kind}",
            "name": each.source or kind,
            "hashes": [{"alg": "SHA-256", "content": each.sha256}],
            "data": [{"type": "dataset", "name": kind, "contents": {"properties": [
                {"name": "intact:samples", "value": str(each.samples)},
                *({"name": f"intact:class:{name}", "value": str(n)} for name, n in (each.classes or {}).items()),
            ]}}],
        }
        for kind, each in sources
        if each is not None
    ]  # fmt: skip


def _package(requirement: str) -> dict[str, Any]:
    name, _, version = requirement.partition("==")
    purl = f"pkg:pypi/{quote(name)}@{quote(version)}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def statement(report: Report, digests: dict[str, str]) -> dict[str, Any]:
    """Return the statement of the gates about files with these SHA-256 digests.

    source: in-toto attestation framework, Statement v1 and predicate Test Result v0.1.
    """
    outcomes = {passed: [gate.expression for gate in report.gates if gate.passed is passed] for passed in (True, False)}
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())],
        "predicateType": TEST_RESULT,
        "predicate": {
            "result": "PASSED" if report.verdict == "pass" else "FAILED",
            "configuration": [
                {"name": f"{kind} data", "digest": {"sha256": each.sha256}}
                for kind, each in (("calibration", report.data.calibration), ("evaluation", report.data.evaluation))
                if each is not None
            ]
            if report.data
            else [],
            "passedTests": outcomes[True],
            "failedTests": outcomes[False],
        },
    }
