"""Rules about files that compute other integers on some of the processors of their target.

Must not know: how a target is chosen, how codes were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from calibrators.grid.kernel_tables import KERNELS, CodeGrid, differing
from calibrators.grid.processors import FAMILIES
from runtime_tests.ort.lint.rule import Case, Hits, Rule
from runtime_tests.ort.lint.subjects import BYTE, nodes
from runtime_tests.ort.operands import (
    Operand,
    code_bounds,
    code_type,
    consumers,
    inputs,
    operand,
    qparams,
    quantizers_after,
    type_range,
    where,
)
from runtime_tests.ort.saturation import layers_at_risk

__all__ = ["PORTABILITY_RULES"]

KERNEL_OF = {"Add": "add", "Mul": "mul", "Sigmoid": "sigmoid", "GlobalAveragePool": "mean"}
"""Kernels that round differently on some processors, by their operator in ONNX."""


def _saturating_pairs(case: Case) -> Hits:
    if case.target.pair_sum is None:
        return
    for layer in layers_at_risk(case.model)[0]:
        yield (
            layer.name,
            f"{layer.pairs} of {layer.pairs_total} pairs of weights can exceed 16 bits, so this {layer.op} computes "
            "other integers on x86 CPUs with AVX2 but without VNNI; use coarser scales or UINT8 weights, or lint for "
            "ort-cpu-vnni",
        )


def _different_ties(case: Case) -> Hits:
    alike = case.target.rounding_alike
    processors = [FAMILIES[name] for name in alike]
    for node in nodes(*KERNEL_OF)(case.graphs):
        kernel = KERNEL_OF[node.op_type]
        operands = [operand(value) for value in inputs(node, KERNELS[kernel])]
        grids = [_grid_of(each, _count(node)) for each in operands]
        for output in _written(node):
            if None in grids or output is None:
                continue
            found = differing(kernel, [g for g in grids if g], output, processors, broadcast=_is_broadcast(node))
            if found.any():
                yield (
                    where(node),
                    f"{int(found.sum())} of {found.size} inputs lie on ties that {', '.join(alike)} do "
                    "not round alike; change the scale of its output by a few ulp",
                )


def _grid_of(found: Operand | None, count: int | None) -> CodeGrid | None:
    if found is None or count is None:
        return None
    grid = _grid(found.node, found.dtype, found.lo, found.hi)
    return None if grid is None else replace(grid, count=count)


def _count(node: ir.Node) -> int | None:
    """Return how many codes a kernel adds up to one; None where the file does not say."""
    if KERNEL_OF[node.op_type] != "mean":
        return 1
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    sizes = [] if shape is None else [size for size in shape.dims[2:] if isinstance(size, int)]
    return math.prod(sizes) if shape is not None and len(sizes) == len(shape.dims) - 2 else None


def _written(node: ir.Node) -> Iterator[CodeGrid | None]:
    """Yield the grids of the codes that a kernel writes; it absorbs a Relu after it."""
    readers = consumers(node.outputs[0])
    relu = readers[0] if len(readers) == 1 and readers[0].op_type == "Relu" else node
    for quantizer in quantizers_after(relu.outputs[0]):
        codes, dtype = quantizer.outputs[0], code_type(quantizer)
        readers = consumers(codes)
        clipped = readers[0].outputs[0] if len(readers) == 1 and readers[0].op_type == "Clip" else codes
        yield _grid(quantizer, dtype, *code_bounds(clipped, dtype))


def _grid(node: ir.Node, dtype: ir.DataType | None, low: int, high: int) -> CodeGrid | None:
    scale, zero_point = qparams(node)
    if scale is None or zero_point is None or {scale.size, zero_point.size} != {1} or dtype not in BYTE:
        return None
    return CodeGrid(float(scale.reshape(())), int(zero_point.reshape(())), low, high, type_range(dtype)[0])


def _is_broadcast(node: ir.Node) -> bool:
    shapes = [value.shape for value in node.inputs if value is not None]
    return len(shapes) == KERNELS["add"] and None not in shapes and shapes[0] != shapes[1]


PORTABILITY_RULES = (
    Rule("saturating-pair", "error", "x86 CPUs with AVX2 but without VNNI add two products in 16 bits.",
         _saturating_pairs),
    Rule("different-ties", "warning", "Some sums, products, means and sigmoids are rounded by one step differently.",
         _different_ties),
)  # fmt: skip
