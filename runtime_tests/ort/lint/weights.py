"""Rules about weights and biases of products.

Must not know: activations beyond their scale, zero point and range.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from runtime_tests.ort.lint.rule import Case, Hits, Rule, each
from runtime_tests.ort.lint.subjects import BYTE, FOUR_BIT, TWO_BIT, WIDE, biased, nodes, quantizers, weighted
from runtime_tests.ort.onnx_operators import PRODUCTS, QUANTIZE
from runtime_tests.ort.operands import Product, array, flag, inputs, operand, where
from runtime_tests.ort.saturation import blocks, needs_unsigned

__all__ = ["WEIGHT_RULES", "bias_scale_differs"]

INT32_MAX = 2**31 - 1


def _has_quantized_weight_alone(node: ir.Node) -> bool:
    x, weight = (operand(value) for value in inputs(node, 2))
    return x is None and weight is not None and weight.is_constant and not flag(node, "transB")


def bias_scale_differs(found: Product) -> bool:
    """Return whether the scale of the bias differs from float32(input scale * weight scale) in any bit.

    Integer kernels assume that it does not. onnxruntime 1.31 does not compare the scales for Gemm, and accepts a
    difference of 1 % for Conv, so that the numbers are silently wrong; beyond that Conv runs in float.
    """
    scales = [codes.scale if codes is not None else None for codes in (found.bias, found.x, found.weight)]
    bias, x, weight = scales
    if bias is None or x is None or weight is None or x.size != 1:
        return False
    expected = x * weight
    same_shape = expected.size in (1, bias.size)  # a scalar means one value for all channels
    same = expected.dtype == bias.dtype and same_shape and np.all(expected.reshape(-1) == bias.reshape(-1))
    return not same


def _float_weights(case: Case) -> Hits:
    for node in nodes(*PRODUCTS)(case.graphs):
        if operand(node.inputs[0]) is not None and array(inputs(node, 2)[1]) is not None:
            yield where(node), "its activations are quantized but its weights are float; store the weights as codes"
    for found in quantizers(QUANTIZE)(case.graphs):
        if not found.is_activation:
            yield where(found.node), "it quantizes a constant, so the file holds floats; store the codes"


def _unsigned_weights(case: Case) -> Hits:
    """Report UINT8 weights, except where INT8 ones would saturate on a processor of the target."""
    for found in weighted(case.graphs):
        if found.weight.dtype == ir.DataType.UINT8 and not (case.target.pair_sum and needs_unsigned(found)):
            yield where(found.node), "UINT8 weights run at less than half the speed of INT8 weights; store INT8"


def _overflows(case: Case) -> Hits:
    for found in biased(case.graphs):
        node, x, codes, weight = found.node, found.x, found.bias, found.weight.data
        if codes is None or codes.data is None or weight is None or x.zero_point is None or x.dtype in WIDE:
            continue  # not quantized, or computed in float
        reach = max(abs(x.lo - int(x.zero_point.min())), abs(x.hi - int(x.zero_point.max())))
        axis = 0 if node.op_type == "Conv" or flag(node, "transB") else weight.ndim - 1
        channels = np.moveaxis(weight, axis, 0)
        rows = channels.reshape(len(channels), math.prod(channels.shape[1:]))
        sums = np.concatenate([np.abs(block.astype(np.int64)).sum(1) for block in blocks(rows)])
        if codes.data.size not in (1, len(sums)):
            continue  # refused by shape inference
        total = np.abs(codes.data.astype(np.int64)).reshape(-1) + reach * sums
        if total.max(initial=0) > INT32_MAX:
            yield where(node), f"bias and products can reach {int(total.max())}, beyond int32; use a larger scale"


WEIGHT_RULES = (
    Rule("narrow-weight", "error", "2-bit weights beside quantized activations: sessions do not build.", each(
        weighted, lambda p: p.weight.dtype in TWO_BIT,
        "{0.weight.dtype} weights do not load; store the codes as INT8")),
    Rule("float-kernel-weight", "warning", "4- and 16-bit weights are expanded to float at every run.", each(
        weighted, lambda p: p.weight.dtype in (*FOUR_BIT, *WIDE),
        "{0.weight.dtype} weights have no integer kernel here; store the codes as INT8")),
    Rule("unsigned-weight", "warning", "Unsigned weights use the slow kernels.", _unsigned_weights),
    Rule("blocked-weight", "error", "Blocked 8-bit weights beside quantized activations fail at run time.", each(
        weighted, lambda p: flag(p.weight.node, "block_size") and p.weight.dtype in BYTE,
        "its weights have one scale per block, but integer kernels take one per channel or tensor")),
    Rule("weight-only", "warning", "MatMulNBits quantizes its float activations by itself.", each(
        nodes("MatMul", "Gemm"), _has_quantized_weight_alone,
        "only its weights are quantized: by default activations are rounded inside the kernel too; set "
        "session.qdq_matmulnbits_accuracy_level to 0")),
    Rule("float-weight", "warning", "Float weights are quantized at load time, or keep a layer in float.",
         _float_weights),
    Rule("float-bias", "warning", "A float bias keeps Gemm in float, and onnxruntime itself rounds that of Conv.", each(
        biased, lambda p: p.bias is None,
        "its bias is float; store INT32 codes with scale float32(input scale * weight scale)")),
    Rule("bias-type", "warning", "The codes of a bias must be int32.", each(
        biased, lambda p: p.bias is not None and p.bias.dtype != ir.DataType.INT32,
        "its bias has {0.bias.dtype} codes, so it runs in float; store INT32")),
    Rule("bias-scale", "error", "Kernels add the codes of a bias and ignore its scale.", each(
        biased, bias_scale_differs,
        "the scale of its bias is not float32(input scale * weight scale), as kernels assume; store that scale")),
    Rule("accumulator-overflow", "error", "Bias and the largest possible sum must fit int32.", _overflows),
)  # fmt: skip
