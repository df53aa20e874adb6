"""Rewrites of the float graph that make it easier to quantize, each asked for by name, and the placement after them.

Must not know: methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from calibrators.errors import UnknownNameError
from calibrators.execution.measure import Batch
from calibrators.placement.place import Placement
from calibrators.record import Preparation
from calibrators.rewrites.absorb import absorb
from calibrators.rewrites.equalize import equalize
from calibrators.rewrites.migrate import migrate

__all__ = ["check_preparations", "prepare_and_place", "prepare_graph"]

FROM_WEIGHTS: Mapping[str, Callable[[fx.GraphModule], tuple[fx.GraphModule, Any]]] = {
    "cle": equalize,
    "absorb": absorb,
}
FROM_DATA: Mapping[str, Callable[[Placement, Iterable[Batch]], tuple[fx.GraphModule, Any]]] = {"migrate": migrate}
"""The preparations in the order in which they are done, whatever the order of the names: first those from weights."""


def check_preparations(names: Collection[str]) -> None:
    """Raise UnknownNameError unless all names are known.

    raises: UnknownNameError.
    """
    for name in names:
        if name not in (known := [*FROM_WEIGHTS, *FROM_DATA]):
            raise UnknownNameError("preparation", name, known)


def prepare_graph(graph: fx.GraphModule, names: Collection[str]) -> tuple[fx.GraphModule, Preparation]:
    """Return the graph after those of the named preparations that need no data, and their record.

    graph:  in integer forms (calibrators.graph.canonical). Returned unchanged without such names, else as a changed
            copy.
    raises: UnknownNameError.
    """
    check_preparations(names)
    done: dict[str, Any] = {}
    for name, rewrite in FROM_WEIGHTS.items():
        if name in names:
            graph, done[name] = rewrite(graph)
    return graph, Preparation(**done)


def prepare_and_place(
    graph: fx.GraphModule,
    names: Collection[str],
    place: Callable[[fx.GraphModule], Placement],
    batches: Iterable[Batch],
) -> tuple[Placement, Preparation]:
    """Return the placed graph after the named preparations, and their record.

    batches: calibration data, for the preparations that need some.
    raises:  UnknownNameError, DataError.
    """
    graph, done = prepare_graph(graph, names)
    placement = place(graph)
    for name, rewrite in FROM_DATA.items():
        if name in names:
            graph, record = rewrite(placement, batches)
            placement, done = place(graph), replace(done, **{name: record})
    return placement, done
