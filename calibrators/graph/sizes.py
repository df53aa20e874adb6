"""Sizes as arguments of reshapes: numbers, -1 for one free size, and computed from the inputs for more of them.

Must not know: which operators there are, quantization, ONNX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

__all__ = ["reshape_sizes"]


def reshape_sizes(node: fx.Node, shape: tuple[Any, ...]) -> list[Any] | None:
    """Return a shape as arguments of a reshape that is inserted before `node`.

    shape:   as capture saw it, free sizes as symbols.
    returns: at most one -1; nodes that compute further free sizes from those of the inputs; None for an empty value or
             a size that does not follow from the inputs.
    """
    free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if 0 in shape:
        return None
    sizes: list[Any] = [size if isinstance(size, int) else -1 for size in shape]
    for axis in free[1:] if len(free) > 1 else ():
        size = _computed(node, shape[axis])
        if size is None:
            return None
        sizes[axis] = size
    return sizes


def _computed(node: fx.Node, size: torch.SymInt) -> fx.Node | None:
    """Insert what computes a size before `node`."""
    expression = size.node.expr
    sources = _sources(node.graph)
    if not expression.free_symbols <= sources.keys():
        return None
    tracer = fx.proxy.GraphAppendingTracer(node.graph)
    with node.graph.inserting_before(node):
        known = {
            symbol: fx.Proxy(node.graph.call_function(torch.ops.aten.sym_size.int, sources[symbol]), tracer)
            for symbol in sorted(expression.free_symbols, key=str)
        }
        result = sympy_interp(PythonReferenceAnalysis, known, expression)
    assert isinstance(result, fx.Proxy)
    return result.node


def _sources(graph: fx.Graph) -> dict[Any, tuple[fx.Node, int]]:
    """Return by symbol the input and the axis whose size it is."""
    found: dict[Any, tuple[fx.Node, int]] = {}
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, (node, axis))
    return found
