"""Find forms of a QDQ graph that onnxruntime refuses, computes wrongly, or runs in float without need.

Rules read the file; nothing is run. "error" means that the model does not load, or that its numbers are not those
of the QDQ text on a processor of its target; "warning" means that something runs in float or wastes space.

Must not know: who wrote the file.
"""

from __future__ import annotations

import numpy as np

from calibrators.grid.target import Target
from calibrators.targets import DEFAULT_TARGET, get_target
from runtime_tests.ort.lint.files import (
    FORM_RULES,
    GRAPH_RULES,
    LOADING_RULES,
    READING_RULES,
    STRUCTURE_RULES,
    VALIDITY_RULES,
    VERSION_RULES,
)
from runtime_tests.ort.lint.operators import OPERATOR_RULES
from runtime_tests.ort.lint.parameters import PARAMETER_RULES, SCALE_RULES, TYPE_RULES
from runtime_tests.ort.lint.portability import PORTABILITY_RULES
from runtime_tests.ort.lint.rule import Case, Finding, Rule
from runtime_tests.ort.lint.weights import WEIGHT_RULES
from runtime_tests.ort.meant_for import target_of
from runtime_tests.ort.sessions import Model, Source
from runtime_tests.ort.versions import Version, installed

__all__ = ["RULES", "Finding", "Rule", "lint", "structural_findings"]

STAGES: tuple[tuple[Rule, ...], ...] = (
    READING_RULES,
    STRUCTURE_RULES,
    GRAPH_RULES,
    VERSION_RULES,
    (*VALIDITY_RULES, *TYPE_RULES),
    SCALE_RULES,
    (*FORM_RULES, *PARAMETER_RULES, *OPERATOR_RULES, *WEIGHT_RULES, *PORTABILITY_RULES),
)
"""The rules in the order in which they run. Those of a stage presume that the stages before it found no error."""

RULES = {rule.name: rule for stage in (*STAGES, LOADING_RULES) for rule in stage}
"""Every rule by name."""


def lint(
    model: Source, target: Target | None = None, *, min_ort: Version | None = None, load: bool = False
) -> list[Finding]:
    """Return the findings of every rule, errors first; external weights are read only where a rule needs their values.

    A file that cannot be read, is no graph or has meaningless scales gets findings about that alone.

    target:  the runtime that the file is meant for; None: the one that its metadata name, else the default.
    min_ort: the oldest onnxruntime that has to load it; None: the installed one.
    load:    also load the file, and report what onnxruntime warns of.
    raises:  UnknownNameError for a target that its metadata name.
    """
    model, oldest = Model.of(model), min_ort or installed()
    findings = _findings(READING_RULES, Case(model, target or get_target(DEFAULT_TARGET), oldest))
    if findings:
        return findings
    case = Case(model, target or target_of(model), oldest)
    with np.errstate(all="ignore"):  # of scales as small as files may hold
        for stage in (*STAGES[1:], *([LOADING_RULES] if load else [])):
            findings += _findings(stage, case)
            if any(finding.severity == "error" for finding in findings):
                break
    return sorted(findings, key=lambda finding: finding.severity != "error")


def structural_findings(model: Model) -> list[Finding]:
    """Return what keeps a file from being a graph that can be read; nothing but the file itself is looked at."""
    case = Case(model, get_target(DEFAULT_TARGET), installed())
    return _findings(READING_RULES, case) or _findings(STRUCTURE_RULES, case)


def _findings(rules: tuple[Rule, ...], case: Case) -> list[Finding]:
    return [
        Finding(rule.name, rule.severity, _text(place), message)
        for rule in rules
        if rule.name not in case.target.ignored_rules
        for place, message in rule.check(case)
    ]


def _text(name: str | bytes) -> str:
    """Return a name of a damaged file, which need not be UTF-8, as text."""
    return name if isinstance(name, str) else name.decode(errors="backslashreplace")
