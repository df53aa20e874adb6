"""The ONNX operators that the checks of a file know, in one table; each check reads the columns that it needs.

Must not know: models, files, sessions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DEQUANTIZE",
    "ELEMENTWISE",
    "FLOAT_PRODUCTS",
    "INTEGER_INSIDE",
    "KEEP_CODES",
    "MOVE_DATA",
    "NEED_QUANTIZER_WHEN_SIGNED",
    "PRODUCTS",
    "QUANTIZE",
    "SHARE_PARAMETERS",
    "WEIGHT_INPUT",
    "WEIGHT_ONLY",
    "WITHOUT_PRODUCTS",
]

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

WEIGHT_ONLY = "MatMulNBits"
"""Float kernel that reads the codes of its weight alone."""


@dataclass(frozen=True)
class _Operator:
    """The properties of one operator.

    moves:       it moves, converts or describes data; every other operator computes.
    keeps_codes: each output code is an input code, or a bound of a Clip.
    shares:      it runs on codes where the quantizers before and after it have the same parameters.
    signed:      after int8 codes it needs a quantizer of its own.
    weight:      index of the input that holds the weights or the second matrix.
    has_kernel:  an integer kernel takes its place if its operands and its result are quantized.
    is_kernel:   it is an integer kernel whose output may be wider than a code.
    fused:       it is the runtime's own, and occurs in optimized graphs alone.
    plain:       it is the runtime's own, and sums up no products.
    """

    moves: bool = False
    keeps_codes: bool = False
    shares: bool = False
    signed: bool = False
    weight: int | None = None
    has_kernel: bool = False
    is_kernel: bool = False
    fused: bool = False
    plain: bool = False


def _all(names: str, **facts: Any) -> dict[str, _Operator]:
    return dict.fromkeys(names.split(), _Operator(**facts))


_OPERATORS = {
    # data
    **_all(f"{QUANTIZE} {DEQUANTIZE} Cast Constant ConstantOfShape Dropout Expand Gather Range", moves=True),
    **_all("ReorderInput ReorderOutput Shape Size SpaceToDepth Tile", moves=True),
    **_all("DepthToSpace Split", moves=True, shares=True),
    **_all("Identity", moves=True, keeps_codes=True),
    **_all("Flatten", moves=True, shares=True, keeps_codes=True),
    **_all("Reshape Slice Squeeze Transpose Unsqueeze", moves=True, shares=True, keeps_codes=True, signed=True),
    # selection
    **_all("Clip", keeps_codes=True),
    **_all("ReduceMax Resize", shares=True),
    **_all("MaxPool", shares=True, keeps_codes=True, signed=True, has_kernel=True),
    # arithmetic
    **_all("Add AveragePool Concat GlobalAveragePool LeakyRelu Mul Sigmoid Softmax", has_kernel=True),
    # the runtime's own
    **_all("BiasGelu DynamicQuantizeLinear ExpandDims FastGelu GatherBlockQuantized GatherND Gelu", plain=True),
    **_all("GridSample NhwcMaxPool Pad QLinearAdd QLinearAveragePool QLinearConcat", plain=True),
    **_all("QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid", plain=True),
    **_all("QLinearSoftmax QLinearWhere QuickGelu RotaryEmbedding SimplifiedLayerNormalization", plain=True),
    **_all("SkipLayerNormalization SkipSimplifiedLayerNormalization Trilu Unique", plain=True),
    # products
    **_all("Conv Gemm MatMul", weight=1, has_kernel=True),
    **_all("FusedConv FusedGemm FusedMatMul", weight=1, has_kernel=True, fused=True),
    **_all("ConvTranspose GemmFastGelu NhwcFusedConv", weight=1),
    **_all("ConvInteger DynamicQuantizeMatMul MatMulInteger MatMulIntegerToFloat", weight=1, is_kernel=True),
    **_all("QGemm", weight=3, is_kernel=True),
    **_all("QLinearConv QLinearMatMul", weight=3),
}


def _where(holds: Callable[[_Operator], object]) -> frozenset[str]:
    return frozenset(name for name, operator in _OPERATORS.items() if holds(operator))


MOVE_DATA = _where(lambda op: op.moves)
KEEP_CODES = _where(lambda op: op.keeps_codes)
SHARE_PARAMETERS = _where(lambda op: op.shares)
NEED_QUANTIZER_WHEN_SIGNED = _where(lambda op: op.signed)
INTEGER_INSIDE = _where(lambda op: op.is_kernel)
ELEMENTWISE = _where(lambda op: op.has_kernel and op.weight is None)
FLOAT_PRODUCTS = _where(lambda op: op.has_kernel and op.weight is not None) | {"ConvTranspose"}
PRODUCTS = _where(lambda op: op.has_kernel and op.weight is not None and not op.fused)
WITHOUT_PRODUCTS = _where(lambda op: op.plain or op.moves)
"""Operators of the runtime's own domains without multiply-accumulates; others of them may hide some."""
WEIGHT_INPUT = {name: op.weight for name, op in _OPERATORS.items() if op.weight is not None}
"""Index of the input with the weights, or the second matrix, by operator."""
