"""Rules about scales, zero points and the types of codes of activations.

Must not know: weights, biases, kernels of operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime_tests.ort.lint.rule import Case, Hits, Rule, each
from runtime_tests.ort.lint.subjects import NARROW, WIDE, Quantizer, nodes, quantizers
from runtime_tests.ort.onnx_operators import DEQUANTIZE, QUANTIZE, SHARE_PARAMETERS
from runtime_tests.ort.operands import array, consumers, flag, inputs, operand, quantizers_after, where

__all__ = ["PARAMETER_RULES", "SCALE_RULES", "TYPE_RULES"]

Array = NDArray[Any]

SMALLEST_NORMAL = np.finfo(np.float32).tiny

BOTH, QUANTIZE_ONLY = quantizers(QUANTIZE, DEQUANTIZE), quantizers(QUANTIZE)


def _dequantizer(node: ir.Node) -> str:
    """Return the name of the DequantizeLinear of an activation before `node`, '' if there is none."""
    before = operand(node.inputs[0])
    return "" if before is None or before.is_constant else where(before.node)


def _readers_of_codes(quantizer: Quantizer) -> int:
    return sum(len(each.outputs[0].uses()) for each in consumers(quantizer.node.outputs[0]))


def _qparam_shapes(case: Case) -> Hits:
    for found in quantizers(QUANTIZE, DEQUANTIZE)(case.graphs):
        scale, zero_point = found.scale, found.zero_point
        if scale is None:
            continue
        form = (lambda parameter: parameter.size) if found.is_bias else np.shape
        if zero_point is not None and form(zero_point) != form(scale):
            shapes = f"scale has shape {list(scale.shape)}, zero point {list(zero_point.shape)}"
            yield where(found.node), f"{shapes}; make the shapes equal"
        if scale.shape == (1,) and not found.is_one_channel and not found.is_bias:
            yield where(found.node), "scale and zero point have shape [1]; make them 0-d, or fusion fails"


def _scales(condition: Callable[[Array], Array], what: str) -> Callable[[Case], Hits]:
    """Return the check that counts the scales of each quantizer for which `condition` holds."""

    def check(case: Case) -> Hits:
        for found in BOTH(case.graphs):
            bad = 0 if found.scale is None else int(np.count_nonzero(condition(found.scale.astype(np.float64))))
            if bad:
                yield where(found.node), what.format(f"{bad} of {found.scale.size}")  # type: ignore[union-attr]

    return check


def _is_no_scale(scale: Array) -> Array:
    return np.asarray(~np.isfinite(scale) | (scale <= 0))


def _is_denormal(scale: Array) -> Array:
    return np.asarray((scale > 0) & (scale < SMALLEST_NORMAL))


def _channels_differ(case: Case) -> Hits:
    for found in BOTH(case.graphs):
        data, scale = array(found.node.inputs[0]), found.scale
        if data is None or scale is None or scale.ndim != 1 or not data.ndim or flag(found.node, "block_size"):
            continue
        axis = flag(found.node, "axis", 1)
        size = data.shape[axis] if -data.ndim <= axis < data.ndim else 0
        if scale.size not in (1, size):
            yield where(found.node), f"{scale.size} scales for the {size} channels of axis {axis}; give one per channel"


def _different_qparams(case: Case) -> Hits:
    def is_same(a: ir.Value | None, b: ir.Value | None) -> bool:
        x, y = array(a), array(b)
        return a is b or (x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y))

    for node in nodes(*SHARE_PARAMETERS)(case.graphs):
        before, mode = operand(node.inputs[0]), node.attributes.get("mode")
        if before is None or before.is_constant:
            continue
        if node.op_type == "Resize" and mode is not None and mode.as_string() != "nearest":
            continue
        for after in (reader for output in node.outputs for reader in quantizers_after(output)):
            if not all(map(is_same, inputs(before.node, 3)[1:], inputs(after, 3)[1:])):
                yield (
                    where(node),
                    f"{node.op_type} is between quantizers of different scale or zero point; give both the same",
                )


SCALE_RULES = (
    Rule("bad-scale", "error", "A scale that is 0, negative, infinite or NaN makes the values meaningless.",
         _scales(_is_no_scale, "{} scales are 0, negative, infinite or NaN; quantize this tensor again")),
    Rule("scale-count", "error", "Per channel there must be one scale for each channel.", _channels_differ),
)  # fmt: skip
"""Rules on scales without which no other rule can compute."""

TYPE_RULES = (
    Rule("float16-scale", "error", "Float16 scales are refused for float32 data and never fused.", each(
        BOTH, lambda q: q.scale is not None and q.scale.dtype != np.float32,
        "its scale is {0.scale.dtype}, but integer kernels need float32; convert it")),
)  # fmt: skip
"""Rules on types that shape inference would refuse in general words."""

PARAMETER_RULES = (
    Rule("qparam-shape", "error", "Per tensor both must be 0-d, else have one shape.", _qparam_shapes),
    Rule("denormal-scale", "warning", "Runtimes that flush denormal numbers to 0 divide by 0.",
         _scales(_is_denormal, "{} scales are below 1.2e-38, the smallest normal float32; use a larger scale")),
    Rule("missing-zero-point", "error", "Without the zero point input Gemm is not fused.", each(
        BOTH, lambda q: inputs(q.node, 3)[2] is None and not q.is_bias,
        "the zero point input is absent; write it even if it is 0")),
    Rule("double-qdq", "error", "Two pairs in a row are merged into one with new parameters.", each(
        nodes(QUANTIZE), _dequantizer,
        lambda q: f"it quantizes what {_dequantizer(q)} just dequantized; keep only one of the pairs")),
    Rule("different-qparams", "warning", "Data movement between different parameters runs in float.",
         _different_qparams),
    Rule("narrow-activation", "error", "4- and 2-bit activations do not load, or have wrong values.", each(
        BOTH, lambda q: q.dtype in NARROW and q.is_activation,
        "activations are typed {0.dtype}; store them as UINT8 and narrow them by a Clip of the codes")),
    Rule("wide-activation", "warning", "16-bit activations have no integer kernels.", each(
        QUANTIZE_ONLY, lambda q: q.dtype in WIDE and q.is_activation,
        "{0.dtype} activations are computed in float; use UINT8")),
    Rule("signed-fan-out", "warning", "int8 codes with several readers stay int8 on x86: the readers run in float.",
         each(QUANTIZE_ONLY, lambda q: q.dtype == ir.DataType.INT8 and q.is_activation and _readers_of_codes(q) > 1,
              lambda q: f"int8 codes with {_readers_of_codes(q)} readers are not moved to uint8 kernels on x86; "
              "use UINT8")),
)  # fmt: skip
