"""Rules about operators that run in float although their values are quantized, and about activation functions.

Must not know: weights, biases, other files.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from runtime_tests.ort.lint.rule import Case, Hits, Rule, each
from runtime_tests.ort.lint.subjects import NARROW, merges, nodes, weighted
from runtime_tests.ort.onnx_operators import NEED_QUANTIZER_WHEN_SIGNED, PRODUCTS, QUANTIZE
from runtime_tests.ort.operands import array, consumers, inputs, operand, qparams, quantizers_after, where

__all__ = ["OPERATOR_RULES"]

SIGNED_FAILS_FROM_OPSET = 21


def _has_kernel(value: ir.Value | None) -> bool:
    """Return whether `value` comes from an operator whose integer kernel absorbs a Relu after it."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type in PRODUCTS | {"Add", "Mul"} and operand(node.inputs[0]) is not None


def _ends_quantized(value: ir.Value) -> bool:
    readers = consumers(value)
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = consumers(readers[0].outputs[0])
    return bool(readers) and not value.is_graph_output() and all(reader.op_type == QUANTIZE for reader in readers)


def _has_float_constant(node: ir.Node) -> bool:
    values = inputs(node, 2)
    is_float = any(array(value) is not None for value in values)
    return is_float and any(map(operand, values)) and bool(quantizers_after(node.outputs[0]))


def _is_between_quantizers(node: ir.Node) -> bool:
    return operand(node.inputs[0]) is not None and bool(quantizers_after(node.outputs[0]))


def _signed_moves(case: Case) -> Hits:
    if case.graphs.graph.opset_imports.get("", 1) < SIGNED_FAILS_FROM_OPSET:
        return
    for node in nodes(*NEED_QUANTIZER_WHEN_SIGNED)(case.graphs):
        before, readers = operand(node.inputs[0]), consumers(node.outputs[0])
        if before is None or before.is_constant or before.dtype != ir.DataType.INT8:
            continue
        if len(quantizers_after(node.outputs[0])) < max(1, len(readers)):
            yield where(node), f"{node.op_type} of int8 codes without a quantizer after it; use UINT8, or opset 20"


def _softmax_scales(case: Case) -> Hits:
    for node in nodes("Softmax")(case.graphs):
        for reader in quantizers_after(node.outputs[0]) if operand(node.inputs[0]) is not None else ():
            scale, _ = qparams(reader)
            steps = None if scale is None else np.float32(1) / scale.astype(np.float32)
            if steps is not None and np.any(steps != np.floor(steps)):
                yield where(reader), "1/scale is not an integer, and the softmax kernel rounds it down; use scale 1/256"


OPERATOR_RULES = (
    Rule("signed-reshape", "error", "Sessions fail from opset 21 on.", _signed_moves),
    Rule("relu-narrow", "error", "A Relu before 4- or 2-bit codes is dropped whatever the zero point.", each(
        merges("Relu"), lambda m: m.dtype in NARROW and not m.holds(0.0, None),
        "onnxruntime drops this Relu before {0.dtype} codes, so negative values pass; use UINT8 codes")),
    Rule("relu-not-merged", "warning", "A Relu merges into a quantizer whose zero point is the lowest code.", each(
        merges("Relu"), lambda m: m.dtype not in NARROW and _has_kernel(m.node.inputs[0]) and not m.holds(0.0, None),
        "the zero point after this Relu is not the lowest code, so the operator before it stays in float")),
    Rule("clip-not-merged", "warning", "A Clip merges into a quantizer that saturates at least as early.", each(
        merges("Clip"), lambda m: not m.holds(*map(array, inputs(m.node, 3)[1:])),
        "the quantizer after this Clip holds codes beyond its bounds; clip the codes instead")),
    Rule("bare-flatten", "warning", "Flatten does not pass quantization on: its readers compute in float.", each(
        nodes("Flatten"), lambda node: operand(node.inputs[0]) is not None
        and any(reader.op_type != QUANTIZE for reader in consumers(node.outputs[0])),
        "Flatten of codes without a quantizer after it; put the same parameters on both sides")),
    Rule("float-output", "warning", "Conv has integer kernels only where its output is quantized.", each(
        weighted, lambda p: p.node.op_type == "Conv" and not _ends_quantized(p.node.outputs[0]),
        "its output is not quantized (a Relu or Clip may stand between), so it runs in float")),
    Rule("float-operand", "warning", "Add and Mul have integer kernels for two quantized operands.", each(
        nodes("Add", "Mul"), _has_float_constant,
        "{0.op_type} with a float constant runs in float; store the constant as codes")),
    Rule("reduce-mean", "warning", "ReduceMean has no integer kernel.", each(
        nodes("ReduceMean"), _is_between_quantizers,
        "ReduceMean runs in float; over the image it can be written as GlobalAveragePool")),
    Rule("softmax-scale", "warning", "QLinearSoftmax multiplies by floor(1/scale).", _softmax_scales),
)  # fmt: skip
