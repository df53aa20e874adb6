"""Check a file before a runtime loads it: exported files hold standard operators and their own data, and no loops.

Must not know: which operators a runtime has, what the numbers mean.
"""

from __future__ import annotations

from calibrators.errors import ModelError
from runtime_tests.ort.lint.files import LARGEST_GRAPH, graphs, size_of
from runtime_tests.ort.lint.stored_data import faults
from runtime_tests.ort.sessions import Model

__all__ = ["check_foreign"]

STANDARD = frozenset({"", "ai.onnx"})
"""Domains of operators in exported files."""

ENDLESS = frozenset({"Loop"})
"""Operators that may run for any time."""


def check_foreign(model: Model) -> None:
    """Check a file of a stranger by reading it.

    raises: ModelError for a file that cannot be read or is too large, operators of other domains, functions, loops, and
            data that is missing, lies outside the folder of the file, or has another size than is stated.
    """
    if (size := size_of(model.proto)) > LARGEST_GRAPH:
        raise ModelError(f"{model.source} has {size:,} nodes and constants, more than any network; do not use it.")
    if model.proto.functions:
        raise ModelError(f"{model.source} defines functions, which exported files do not; do not use it.")
    for graph, _ in graphs(model.proto.graph, names=False):
        for node in graph.node:
            if node.domain not in STANDARD or node.op_type in ENDLESS:
                name = ".".join(filter(None, (node.domain, node.op_type)))
                raise ModelError(f"{model.source} calls {name!r}, which exported files do not; do not use it.")
    for name, fault in faults(model):
        raise ModelError(f"{model.source}: {name}: {fault}.")
