"""Compare the weights and biases of the file with those of the reference, integer by integer, as the file holds them.

A wrong code shows in the results of a kernel only for inputs that bring it to light. Codes, zero points and scales are
therefore compared themselves.

Must not know: sessions, what a kernel computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from calibrators.graph.aten import bind, constant, is_constant
from calibrators.grid.numerics import along_axis
from calibrators.program.qdq_program import DEQUANTIZE as DEQUANTIZE_NODE
from runtime_tests.ort.onnx_operators import DEQUANTIZE
from runtime_tests.ort.operands import Operand, operand
from runtime_tests.ort.sessions import Model, Source
from runtime_tests.parity.results import Agreement

__all__ = ["stored_constants"]

Array = NDArray[Any]
NARROW = [dtype.numpy() for dtype in (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2)]
Coded = tuple[Tensor, Tensor, Tensor]
"""Codes, scale and zero point."""


def stored_constants(model: Source, program: fx.GraphModule) -> dict[str, Agreement | None]:
    """Return by site how each weight and bias of the file agrees with the reference; None for one that it lacks.

    A step is one code, seen from the zero point; where zero point or scale differ, each code differs by one at least.
    """
    stored = {
        str(name): operand(node.outputs[0])
        for node in Model.of(model).graph_model.graph
        if node.op_type == DEQUANTIZE and node.inputs[0] is not None
        for name in (node.inputs[0].name, node.outputs[0].name)
    }
    nodes = [node for node in program.graph.nodes if node.target is DEQUANTIZE_NODE and is_constant(node.args[0])]
    found = {}
    for node in nodes:
        site = str(bind(node)["site"])
        values, codes = (stored.get(f"{site}_{what}") for what in ("dequantized", "quantized"))
        found[site] = _agreement(program, node, values or codes)  # the simplifier merges codes that are equal
    return found


def _agreement(program: fx.GraphModule, node: fx.Node, stored: Operand | None) -> Agreement | None:
    bound = bind(node)
    ours: Coded = tuple(constant(program, bound[name]) for name in ("codes", "scale", "zero_point"))  # type: ignore[assignment]
    if stored is None or stored.data is None or stored.scale is None or stored.zero_point is None:
        return None
    arrays = (_plain(stored.data), stored.scale, _plain(stored.zero_point))
    if any(array.dtype.kind not in "iuf" for array in arrays):
        return None
    found = [
        _compared(ours, theirs, bound["axis"], bound["block_size"])
        for theirs in _layouts(arrays)
        if theirs[0].shape == ours[0].shape
    ]
    return min(found, key=lambda each: each.mismatched, default=None)


def _plain(codes: Array) -> Array:
    """Return codes in a type that torch knows; those of 4 and 2 bits fit into int8."""
    return codes.astype(np.int8) if codes.dtype in NARROW else codes


def _layouts(arrays: tuple[Array, Array, Array]) -> Iterator[Coded]:
    """Yield the tensors as they are and, as files hold weights of linear layers, transposed."""
    for turned in (arrays, tuple(array.T for array in arrays)):
        yield tuple(torch.from_numpy(np.array(array, order="C")) for array in turned)  # type: ignore[misc]


def _compared(ours: Coded, theirs: Coded, axis: int | None, block_size: int | None) -> Agreement:
    codes, scale, zero_point = ours
    scales, zero_points = (_like(found, expected) for found, expected in zip(theirs[1:], ours[1:], strict=True))
    same_grid = torch.equal(scales, scale) and torch.equal(zero_points.long(), zero_point.long())
    if same_grid and torch.equal(theirs[0].to(codes.dtype), codes):
        return Agreement(codes.numel(), 0, 0)
    shifted = along_axis(zero_point.long() - zero_points.long(), codes, axis, block_size)
    changed = (shifted != 0) | (along_axis(scale != scales, codes, axis, block_size))
    steps = torch.maximum((codes.long() - theirs[0].long() - shifted).abs(), changed.long())
    return Agreement(codes.numel(), int(steps.count_nonzero()), int(steps.max()))


def _like(found: Tensor, expected: Tensor) -> Tensor:
    """Return parameters in the shape of those of the reference; one number stands for all. Others differ everywhere."""
    if found.numel() == 1 or found.shape == expected.shape:
        return found.reshape(-1)[0].expand(expected.shape) if found.numel() == 1 else found
    return torch.full_like(expected, -1)
