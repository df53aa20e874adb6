"""Check a file before a runtime loads it: exported files hold standard operators and their own data, and no loops.

Must not know: which operators a runtime has, what the numbers mean.
"""

from __future__ import annotations

from calibrators.errors import ModelError
from runtime_tests.ort.lint import structural_findings
from runtime_tests.ort.lint.files import graphs
from runtime_tests.ort.sessions import Model

__all__ = ["check_foreign"]

STANDARD = frozenset({"", "ai.onnx"})
"""Domains of operators in exported files."""

ENDLESS = frozenset({"Loop"})
"""Operators that may run for any time."""


def check_foreign(model: Model) -> None:
    """Check a file of a stranger by reading it.

    raises: ModelError for a file that is no graph or too large a one, functions, operators of other domains, loops, and
            data that is missing, lies outside the folder of the file, or has another size than is stated.
    """
    for finding in structural_findings(model):
        raise ModelError(f"{model.source}: {finding.where}: {finding.message}.")
    if model.proto.functions:
        raise ModelError(f"{model.source} defines functions, which exported files do not; do not use it.")
    for graph, _ in graphs(model.proto.graph, names=False):
        for node in graph.node:
            if node.domain not in STANDARD or node.op_type in ENDLESS:
                name = ".".join(filter(None, (node.domain, node.op_type)))
                raise ModelError(f"{model.source} calls {name!r}, which exported files do not; do not use it.")
