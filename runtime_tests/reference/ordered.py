"""Order equal values as ONNX does: the lower index first.

torch leaves the order of equal values open, and codes are often equal. In the file these operators are TopK, whose
definition breaks ties by index, so that indices and all that is gathered by them have one right value.

Must not know: kernels, plans, ONNX files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind

__all__ = ["ORDERED", "in_order"]

aten = torch.ops.aten

ORDERED = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
"""Operators that put values in order."""


def in_order(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return the result of a call of an operator of ORDERED: values and indices, or indices."""
    bound = fx.map_arg(bind(node), values.__getitem__)
    x, dim = bound["self"], bound["dim"]
    descending = bound["largest"] if "largest" in bound else bound["descending"]
    ordered = torch.sort(x, dim=dim, descending=descending, stable=True)
    if "k" in bound:
        return _first(ordered.values, dim, bound["k"]), _first(ordered.indices, dim, bound["k"])
    return ordered.indices if node.target in (aten.argsort.default, aten.argsort.stable) else tuple(ordered)


def _first(values: Tensor, dim: int, count: int) -> Tensor:
    return values.narrow(dim, 0, count) if values.ndim else values
