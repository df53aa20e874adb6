"""Findings of the linter in SARIF 2.1.0, which code hosts and editors show.

A finding's place is a logical location: the name of a node or value of the graph.

Must not know: how findings are made, the command line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from exporter.about import __version__
from runtime_tests.ort.lint import Finding, Rule

__all__ = ["sarif"]

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(findings: Sequence[Finding], rules: Sequence[Rule], file: Path) -> dict[str, Any]:
    """Return the document of one run.

    rules: those that were checked; file: path of the model, as the user gave it.
    """
    uri = file.as_uri() if file.is_absolute() else quote(os.fsencode(file.as_posix()))
    indices = {rule.name: index for index, rule in enumerate(rules)}
    driver = {
        "name": "intact lint",
        "version": __version__,
        "rules": [
            {
                "id": rule.name,
                "shortDescription": {"text": rule.why},
                "help": {"text": f"Source: {rule.source}."},
                "defaultConfiguration": {"level": rule.severity},
            }
            for rule in rules
        ],
    }
    results = [
        {
            "ruleId": finding.rule,
            "ruleIndex": indices[finding.rule],
            "level": finding.severity,
            "message": {"text": f"{finding.where}: {finding.message}"},
            "locations": [
                {
                    "physicalLocation": {"artifactLocation": {"uri": uri}},
                    "logicalLocations": [{"name": finding.where, "kind": "object"}],
                }
            ],
        }
        for finding in findings
    ]
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
