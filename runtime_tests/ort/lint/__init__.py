"""Find forms of a QDQ graph that a runtime refuses, computes wrongly, or runs in float without need.

Rules read the file; nothing is run. "error" means that the model does not load, or that its numbers are not those
of the QDQ text on a processor of its target; "warning" means that something runs in float or wastes space. A target
that is not onnxruntime's, and a compiler to which nothing is exported, have rules of their own (`profiles`).

Must not know: who wrote the file.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from calibrators.errors import UnknownNameError
from calibrators.grid.target import Target
from calibrators.targets import DEFAULT_TARGET, get_target, list_targets
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
from runtime_tests.ort.lint.profiles import list_profiles
from runtime_tests.ort.lint.rule import Case, Finding, Rule
from runtime_tests.ort.lint.weights import WEIGHT_RULES
from runtime_tests.ort.meant_for import target_of
from runtime_tests.ort.sessions import Model, Source
from runtime_tests.ort.versions import Version, installed

__all__ = ["RULES", "Finding", "Rule", "checked_rules", "lint", "names", "rules_for", "structural_findings"]

Stages = tuple[tuple[Rule, ...], ...]


def _from(source: str, *rules: Rule) -> tuple[Rule, ...]:
    return tuple(rule if rule.source else replace(rule, source=source) for rule in rules)


FILE_STAGES: Stages = (
    _from("the ONNX specification", *READING_RULES),
    _from("the ONNX specification", *STRUCTURE_RULES),
    _from("the ONNX specification", *GRAPH_RULES),
    _from("experiment: releases of onnxruntime (benchmarks/ort_versions.py)", *VERSION_RULES),
    _from("the ONNX specification; the checker of onnx", *VALIDITY_RULES, *TYPE_RULES),
    _from("the ONNX specification", *SCALE_RULES),
)
"""Rules about every file, in the order in which they run."""

STAGES: Stages = (
    *FILE_STAGES,
    _from(
        "experiment: onnxruntime 1.31 and 1.32 (tests/runtime_tests/ort)",
        *(*FORM_RULES, *PARAMETER_RULES, *OPERATOR_RULES, *WEIGHT_RULES, *PORTABILITY_RULES),
    ),
)
"""The rules of onnxruntime. Those of a stage presume that the stages before it found no error."""

LOADING = _from("experiment: it is loaded", *LOADING_RULES)

RULES = {rule.name: rule for stage in (*STAGES, LOADING) for rule in stage}
"""Every rule of onnxruntime by name."""


def names() -> tuple[str, ...]:
    """Return what a file can be read for: the targets, and compilers to which nothing is exported."""
    return tuple(sorted({*(target.name for target in list_targets()), *list_profiles()}))


def rules_for(name: str) -> Stages:
    """Return the rules of a target or profile in stages: those of its profile, or of onnxruntime if it has none."""
    profile = list_profiles().get(name)
    return (
        STAGES if profile is None else (*FILE_STAGES, (*_from("the ONNX specification", *FORM_RULES), *profile.rules))
    )


def lint(
    model: Source, target: Target | str | None = None, *, min_ort: Version | None = None, load: bool = False
) -> list[Finding]:
    """Return the findings of every rule, errors first; external weights are read only where a rule needs their values.

    A file that cannot be read, is no graph or has meaningless scales gets findings about that alone.

    target:  the runtime that the file is meant for, or one of `names`; None: the one that its metadata name, else the
             default.
    min_ort: the oldest onnxruntime that has to load it; None: the installed one.
    load:    also load the file, and report what onnxruntime warns of.
    raises:  UnknownNameError for a target that is not known.
    """
    model, oldest = Model.of(model), min_ort or installed()
    if isinstance(target, str) and target not in names():
        raise UnknownNameError("target", target, names())
    findings = _findings(FILE_STAGES[0], Case(model, get_target(DEFAULT_TARGET), oldest))
    if findings:
        return findings
    name, meant = _meant(model, target)
    case = Case(model, meant, oldest)
    with np.errstate(all="ignore"):  # of scales as small as files may hold
        for stage in (*rules_for(name)[1:], *([LOADING] if load else [])):
            findings += _findings(stage, case)
            if any(finding.severity == "error" for finding in findings):
                break
    return sorted(findings, key=lambda finding: finding.severity != "error")


def checked_rules(model: Source, target: str | None = None) -> list[Rule]:
    """Return the rules that `lint` checks; those about reading alone for a file that cannot be read."""
    model = Model.of(model)
    if _findings(FILE_STAGES[0], Case(model, get_target(DEFAULT_TARGET), installed())):
        return [*FILE_STAGES[0]]
    return [rule for stage in rules_for(_meant(model, target)[0]) for rule in stage]


def _meant(model: Model, target: Target | str | None) -> tuple[str, Target]:
    """Return the name of the rules, and the target; the default one for a compiler to which nothing is exported."""
    if isinstance(target, str):
        known = {each.name: each for each in list_targets()}
        return target, known.get(target, known[DEFAULT_TARGET])
    target = target or target_of(model)
    return target.name, target


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
