"""Tables in which a model looks its inputs up: an index beyond a table is a fault of the data.

Must not know: how programs are captured, where data come from, quantization, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from calibrators.errors import DataError
from calibrators.graph.aten import where
from calibrators.graph.operators import MOVES, Operators

__all__ = ["Lookup", "check_indices", "lookups_of"]

TABLES = Operators("embedding.default", "embedding_bag.default", "embedding_bag.padding_idx", "_embedding_bag.default")
"""Operators that look rows of their first operand up at the indices that are the second."""
SAME_INDICES = MOVES | Operators("to.dtype", "_to_copy.default", "alias.default", "detach.default")


@dataclass(frozen=True)
class Lookup:
    """An input that holds indices of the rows of a table; `place` says where the model reads it."""

    input: int
    rows: int
    place: str


def lookups_of(graph: fx.Graph, inputs: Sequence[fx.Node]) -> tuple[Lookup, ...]:
    """Return the tables of a graph that are read at its inputs; indices that are computed are left out."""
    found = []
    for node in graph.nodes:
        if node.target not in TABLES:
            continue
        table, indices = node.args[:2]
        while indices.target in SAME_INDICES:
            indices = indices.args[0]
        meta = table.meta.get("val", table.meta.get("tensor_meta"))
        if indices in inputs and meta is not None:
            found.append(Lookup(list(inputs).index(indices), int(meta.shape[0]), where(node)))
    return tuple(found)


def check_indices(lookups: Iterable[Lookup], inputs: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise DataError for an index beyond a table, naming input, index and table."""
    for lookup in lookups:
        x = inputs[lookup.input]
        if x.dtype.is_floating_point or x.dtype == torch.bool or not x.numel():
            continue
        low, high = (int(each) for each in x.aminmax())
        if low < 0 or high >= lookup.rows:
            raise DataError(
                f"input {names[lookup.input]!r} holds {low if low < 0 else high}, but the table of {lookup.place} has "
                f"rows 0 to {lookup.rows - 1}; give ids of the vocabulary that the model was trained with"
            )
