"""Rewrites of the float graph that make it easier to quantize, each asked for by name.

Must not know: data, targets, methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import fx

from calibrators.errors import UnknownNameError
from calibrators.rewrites.absorb import absorb
from calibrators.rewrites.equalize import equalize

__all__ = ["PREPARATIONS", "check_preparations", "prepare_graph"]

PREPARATIONS: Mapping[str, Callable[[fx.GraphModule], tuple[fx.GraphModule, dict[str, Any]]]] = {
    "cle": equalize,
    "absorb": absorb,
}
"""In the order in which they are done, whatever the order of the names."""


def check_preparations(names: Collection[str]) -> None:
    """Nothing, if all names are known.

    raises: UnknownNameError.
    """
    for name in names:
        if name not in PREPARATIONS:
            raise UnknownNameError("preparation", name, PREPARATIONS)


def prepare_graph(graph: fx.GraphModule, names: Collection[str]) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The graph after the named preparations, and what each of them did.

    graph:  in integer forms (calibrators.graph.canonical). Returned as it is without names, else as a changed copy.
    raises: UnknownNameError.
    """
    check_preparations(names)
    record: dict[str, Any] = {}
    for name, rewrite in PREPARATIONS.items():
        if name in names:
            graph, record[name] = rewrite(graph)
    return graph, record
