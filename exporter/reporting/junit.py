"""The report for dashboards: JUnit XML. A failed case always means a failed verdict.

Must not know: files, graphs, ONNX, how a number was measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import junitparser

from exporter.reporting.failures import failures, unplanned_kernels
from exporter.reporting.number_format import differ, percent, significant
from exporter.reporting.proofs import UNOPTIMIZED_DIFFERS, found_on
from exporter.reporting.schema import Report
from exporter.reporting.standing import remark
from runtime_tests.parity.results import Level

__all__ = ["render_junit"]

_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot hold


def render_junit(report: Report) -> str:
    """Return JUnit XML with the suites gates, parity by level, fold, coverage and lint, without empty ones."""
    parity = report.parity
    suites = {
        "gates": _gates(report),
        "parity.optimized": _parity(parity.optimized, gated=True),
        "parity.unoptimized": _parity(parity.unoptimized, gated=False),
        **({"parity.openvino": _parity(parity.openvino, gated=True)} if parity.openvino else {}),
        "proved_on": _proved_on(report),
        "fold": _fold(report),
        "coverage": _coverage(report),
        "lint": _lint(report),
    }
    document = junitparser.JUnitXml("intact")
    for name, cases in suites.items():
        if found := list(cases):
            document.add_testsuite(_suite(f"intact.{name}", found))
    return str(document.tostring().decode("utf-8")) + "\n"  # type: ignore[no-untyped-call]


def _suite(name: str, cases: Iterable[junitparser.TestCase]) -> junitparser.TestSuite:
    suite = junitparser.TestSuite(name)
    for case in cases:
        case.classname = name
        suite.add_testcase(case)
    return suite


def _case(name: str, *, failure: str = "", skipped: str = "", note: str = "") -> junitparser.TestCase:
    case = junitparser.TestCase(_xml(name), time=0)
    if failure:
        case.result = [junitparser.Failure(_xml(failure))]
    elif skipped:
        case.result = [junitparser.Skipped(_xml(skipped))]
    if note:
        case.system_out = _xml(note)
    return case


def _xml(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _gates(report: Report) -> Iterator[junitparser.TestCase]:
    failed = {each.gate.expression: each for each in failures(report)}
    for gate in report.gates:
        if (each := failed.get(gate.expression)) is None:
            yield _case(gate.expression)
        else:
            note = "\n".join(filter(None, [each.causes, *each.advice]))
            yield _case(gate.expression, failure=f"Gate {gate.expression} failed: {each.found}", note=note)
    if left_open := remark(report.accuracy_standing, report.accuracy):
        yield _case("accuracy", skipped=left_open)


def _parity(level: Level, *, gated: bool) -> Iterator[junitparser.TestCase]:
    """Yield one case per compared site and output and one for the kernels; they fail where the default gates do."""
    for node in level.nodes:
        message = f"{differ(node)} values differ, by at most {node.max_lsb} ({node.kernel})"
        why = f"; {UNOPTIMIZED_DIFFERS}" if node.mismatched and not gated else ""
        yield _case(node.site, failure="" if node.legal or not gated else message, note=f"{message}{why}")
    for output in level.outputs:
        message = f"the output differs by {significant(output.relative)} of its largest value"
        yield _case(f"output {output.name}", failure=message if gated and not output.legal else "")
    if gated and level.unplanned is not None:
        yield _case("kernels as planned", failure=unplanned_kernels(level.unplanned))


def _proved_on(report: Report) -> Iterator[junitparser.TestCase]:
    """Yield one case per runtime in which the file was run."""
    for each in report.proved_on or ():
        yield _case(each.runtime, failure="" if each.is_proved else found_on(each), note=found_on(each))


def _fold(report: Report) -> Iterator[junitparser.TestCase]:
    for region in report.fold.folded:
        note = f"kernel {region.kernel}, relative error {region.rel_error:.3g} in float64"
        yield _case(f"folded {region.where}", note=note)
    for refusal in report.fold.refused:
        yield _case(f"not folded {refusal.where}", skipped=refusal.why)


def _coverage(report: Report) -> Iterator[junitparser.TestCase]:
    coverage = report.coverage
    nodes = f"{coverage.integer_nodes} of {coverage.compute_nodes} compute nodes"
    yield _case("integer share", note=f"{nodes}, {percent(coverage.integer_macs)} of the multiply-accumulates")
    for name in coverage.uncounted:
        yield _case(f"counted {name}", skipped="its multiply-accumulates cannot be counted")
    for node in coverage.float_nodes:
        yield _case(f"{node.name} ({node.op})", skipped=node.why)


def _lint(report: Report) -> Iterator[junitparser.TestCase]:
    for finding in report.lint or ():
        broken = finding.message if finding.severity == "error" else ""
        yield _case(f"{finding.rule} at {finding.where}", failure=broken, note=finding.message)
