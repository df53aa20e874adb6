"""Order equal values as ONNX does, the lower index first, and follow a runtime that orders nearly equal ones otherwise.

torch leaves the order of equal values open, and codes are often equal. In the file these operators are TopK, ArgMax and
ArgMin, whose definitions break ties by index, so that indices and all that is gathered by them have one right value.
Floats that differ in their last bits may come in another order in a runtime. Its indices then replace those of the
reference, once it is known how much worse the scores are that they choose.

Must not know: kernels, plans, ONNX files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind

__all__ = ["CHOICES", "gap", "in_order", "indices_of"]

aten = torch.ops.aten

ORDERED = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
BEST = {aten.argmax.default: True, aten.max.dim: True, aten.argmin.default: False, aten.min.dim: False}
INDICES_ALONE = (aten.argsort.default, aten.argsort.stable, aten.argmax.default, aten.argmin.default)

CHOICES: Mapping[Any, str] = {
    **dict.fromkeys(ORDERED, "TopK"),
    **{target: "ArgMax" if largest else "ArgMin" for target, largest in BEST.items()},
}
"""Operators that choose values by their scores, with the ONNX operator that writes the indices."""


def in_order(node: fx.Node, values: Mapping[fx.Node, Any], indices: Tensor | None = None) -> Any:
    """Return the result of a call of an operator of CHOICES: values and indices, or indices.

    indices: what a runtime chose, in place of the own choice.
    """
    bound = fx.map_arg(bind(node), values.__getitem__)
    if node.target in BEST and bound["dim"] is None:
        found: Tensor = node.target(**bound)
        return found
    chosen = _own(node, bound) if indices is None else indices
    if node.target in INDICES_ALONE:
        return chosen
    return _taken(node, bound, chosen), chosen


def gap(node: fx.Node, values: Mapping[fx.Node, Any], indices: Tensor) -> Tensor:
    """Return how far the scores at some indices are from those at the own ones, in units of the largest score."""
    bound = fx.map_arg(bind(node), values.__getitem__)
    apart = _taken(node, bound, indices).double() - _taken(node, bound, _own(node, bound)).double()
    largest: Tensor = bound["self"].double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return apart.abs() / largest


def indices_of(node: fx.Node, result: Any) -> Tensor:
    """Return the indices in the result of an operator of CHOICES."""
    found: Tensor = result if isinstance(result, Tensor) else result[1]
    return found


def _own(node: fx.Node, bound: Mapping[str, Any]) -> Tensor:
    x, dim = bound["self"], bound["dim"]
    if node.target in BEST:
        best = x.argmax if BEST[node.target] else x.argmin
        return best(dim, bound["keepdim"])  # type: ignore[no-any-return]
    descending = bound["largest"] if "largest" in bound else bound["descending"]
    indices = torch.sort(x, dim=dim, descending=descending, stable=True).indices
    return indices.narrow(dim, 0, bound["k"]) if "k" in bound and x.ndim else indices


def _taken(node: fx.Node, bound: Mapping[str, Any], indices: Tensor) -> Tensor:
    """Return the scores at some indices."""
    x, dim = bound["self"], bound["dim"]
    if not x.ndim:
        return x  # type: ignore[no-any-return]
    if node.target in BEST and not bound["keepdim"]:
        return x.gather(dim, indices.unsqueeze(dim)).squeeze(dim)  # type: ignore[no-any-return]
    return x.gather(dim, indices)  # type: ignore[no-any-return]
