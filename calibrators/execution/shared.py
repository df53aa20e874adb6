"""Results that calibrations of one network for several targets share: statistics, and integers that are the same.

Must not know: which targets and methods there are, ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from calibrators.graph.digest import graph_digest
from calibrators.graph.operators import Operators, name_of
from calibrators.placement.place import Placement
from calibrators.program.freeze import CalibrationResult

__all__ = ["Shared"]


class Shared:
    """Statistics (as execution.task.Kept) and results of calibrations that differ in nothing but their target."""

    def __init__(self) -> None:
        self._statistics: dict[str, tuple[Mapping[str, Tensor], dict[str, Any]]] = {}
        self._results: list[tuple[Placement, CalibrationResult]] = []

    def load(self, name: str) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the record of statistics, None if they were not saved."""
        return self._statistics.get(name)

    def save(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep statistics as long as this object."""
        self._statistics[name] = tensors, {**record}

    def add(self, placement: Placement, result: CalibrationResult) -> None:
        """Keep the result of a method that read nothing of the target but this placement and Target.computation."""
        self._results.append((placement, result))

    def result(self, placement: Placement) -> CalibrationResult | None:
        """Return the result that the same method would have for a placement, None if no other one is the same."""
        for other, result in self._results:
            if _are_same(placement, other):
                return replace(result, placement=placement)
        return None


def _are_same(one: Placement, other: Placement) -> bool:
    """Return whether two placements leave methods the same problem."""
    return (
        (one.sites, one.lookups, one.left) == (other.sites, other.lookups, other.left)
        and _computation(one) == _computation(other)
        and graph_digest(one.graph) == graph_digest(other.graph)
    )


def _computation(placement: Placement) -> dict[str, object]:
    """Return what the target says of the computation, of operators that the graph calls alone."""
    called = {name_of(node.target) for node in placement.graph.graph.nodes}
    fields = placement.target.computation.items()
    return {name: value & called if isinstance(value, Operators) else value for name, value in fields}
