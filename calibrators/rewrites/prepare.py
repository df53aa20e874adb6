"""Rewrites of the float graph that make it easier to quantize, each asked for by name.

Must not know: data, targets, methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import fx

from calibrators.errors import UnknownNameError
from calibrators.record import Preparation
from calibrators.rewrites.absorb import absorb
from calibrators.rewrites.equalize import equalize

__all__ = ["PREPARATIONS", "check_preparations", "prepare_graph"]

PREPARATIONS: Mapping[str, Callable[[fx.GraphModule], tuple[fx.GraphModule, Any]]] = {
    "cle": equalize,
    "absorb": absorb,
}
"""The preparations in the order in which they are done, whatever the order of the names."""


def check_preparations(names: Collection[str]) -> None:
    """Raise UnknownNameError unless all names are known.

    raises: UnknownNameError.
    """
    for name in names:
        if name not in PREPARATIONS:
            raise UnknownNameError("preparation", name, PREPARATIONS)


def prepare_graph(graph: fx.GraphModule, names: Collection[str]) -> tuple[fx.GraphModule, Preparation]:
    """Return the graph after the named preparations, and their record.

    graph:  in integer forms (calibrators.graph.canonical). Returned unchanged without names, else as a changed copy.
    raises: UnknownNameError.
    """
    check_preparations(names)
    done: dict[str, Any] = {}
    for name, rewrite in PREPARATIONS.items():
        if name in names:
            graph, done[name] = rewrite(graph)
    return graph, Preparation(**done)
