"""Measure outputs by what they are made of: sums with every term's absolute value in its place.

The rounding error of a sum follows its terms, not its result: the mean of a normalized value is 0 up to rounding, and
no two libraries agree in any of its digits. Operators that add and multiply are run on magnitudes; the result of any
other operator, and of a quantizer, is a value of its own.

Must not know: runtimes, tolerances, quantization.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind
from calibrators.graph.operators import LISTS, MOVES, POOLS, PRODUCTS, QUOTIENTS, SUMS, WEIGHTED, Operators
from calibrators.graph.walk import call, walk

__all__ = ["magnitudes"]

ADDING = (
    (MOVES - LISTS - {"getitem", "amax.default"})
    | POOLS
    | WEIGHTED
    | Operators("sum.default", "sum.dim_IntList", "mean.default", "mean.dim", "cumsum.default")
    | Operators("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "expand.default")
    | Operators("matmul.default", "bmm.default", "mm.default", "cat.default")
)
"""Operators that are monotonic and linear in each operand: on magnitudes they give the magnitude of the result."""


def magnitudes(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[float, ...]:
    """Return for each output of the graph the largest sum of the absolute values of the terms that make it."""
    sizes: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node, values in walk(graph, inputs):
            if node.op == "output":
                return tuple(_largest(sizes[output]) for output in node.args[0])  # type: ignore[union-attr, index]
            sizes[node] = _magnitude(node, values[node], sizes)
            for gone in sizes.keys() - values.keys():
                del sizes[gone]
    raise AssertionError("a graph has an output")


def _largest(value: Any) -> float:
    return float(value.double().max()) if isinstance(value, Tensor) and value.numel() else 0.0


def _magnitude(node: fx.Node, value: Any, sizes: dict[fx.Node, Any]) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if node.target in ADDING:
        return call(node, sizes)
    if node.target in SUMS | PRODUCTS | QUOTIENTS:
        left, right = (_absolute(argument, sizes) for argument in node.args[:2])
        if node.target in SUMS:
            return left + right * abs(bind(node).get("alpha", 1))
        return left * right if node.target in PRODUCTS else left / right
    return value.abs().where(value.isfinite(), 0.0)


def _absolute(argument: Any, sizes: dict[fx.Node, Any]) -> Any:
    return sizes[argument] if isinstance(argument, fx.Node) else abs(argument)
