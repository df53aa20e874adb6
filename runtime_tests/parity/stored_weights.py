"""Compare the weights of the file with those of the reference, integer by integer, for layers that compute in float.

Wrong codes of integer kernels show in their results. Float kernels round, so that a wrong code could hide within a
tolerance; their codes, zero points and scales are therefore compared as the file holds them.

Must not know: sessions, what a kernel computes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from calibrators.graph.aten import bind, constant
from calibrators.grid.numerics import along_axis
from runtime_tests.ort.onnx_operators import DEQUANTIZE
from runtime_tests.ort.operands import Operand, operand
from runtime_tests.ort.sessions import Model, Source
from runtime_tests.reference.kernel_rules import is_weight_only

__all__ = ["differing_weights"]

Array = NDArray[Any]


def differing_weights(model: Source, program: fx.GraphModule) -> dict[str, Tensor | None]:
    """Return by site how far each weight of a float kernel is from the reference; None for one that the file lacks.

    returns: int32 [out, in]: |code - zero point| apart in steps, at least 1 where a zero point or scale differs.
    """
    weights = [bind(node)["weight"] for node in program.graph.nodes if is_weight_only(node)]
    if not weights:
        return {}
    stored = {
        str(node.inputs[0].name): operand(node.outputs[0])
        for node in Model.of(model).graph_model.graph
        if node.op_type == DEQUANTIZE and node.inputs[0] is not None
    }
    return {
        str(bind(weight)["site"]): _distance(program, weight, stored.get(f"{bind(weight)['site']}_quantized"))
        for weight in weights
    }


def _distance(program: fx.GraphModule, weight: fx.Node, stored: Operand | None) -> Tensor | None:
    bound = bind(weight)
    codes, scale, zero_point = (constant(program, bound[name]) for name in ("codes", "scale", "zero_point"))
    if stored is None or stored.data is None or stored.scale is None or stored.zero_point is None:
        return None
    arrays = (stored.data.astype(np.int32), stored.scale, stored.zero_point.astype(np.int32))
    theirs = [torch.from_numpy(np.array(array.T, order="C")) for array in arrays]  # [in, out] in the file
    ours = codes.to(torch.int32), scale, zero_point.to(torch.int32)
    if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return None

    def spread(values: Tensor) -> Tensor:
        return along_axis(values, codes, bound["axis"], bound["block_size"])

    shifted = spread(ours[2] - theirs[2])
    rescaled = spread(ours[1].view(torch.int32) - theirs[1].view(torch.int32))
    changed = (rescaled != 0) | (shifted != 0)
    return torch.maximum((ours[0] - theirs[0] - shifted).abs(), changed.to(torch.int32))
