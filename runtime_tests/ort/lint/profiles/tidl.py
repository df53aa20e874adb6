"""TI's deep learning compiler (edgeai-tidl-tools) for files that are quantized already."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    biases_of_codes,
    fixed_shapes,
    no_double_quantizers,
    symmetric_activations,
    symmetric_inputs,
    symmetric_weights,
    weight_scales_per_tensor,
    weight_types,
)

__all__ = ["PROFILE"]

QUANTIZATION = "TI edgeai-tidl-tools, docs/quantization.md, TIDL layer quantization restrictions"
MODELS = "TI edgeai-tidl-tools, docs/model_compilation.md"

SYMMETRIC = (
    *("ArgMax", "AveragePool", "BatchNormalization", "ConvTranspose", "DepthToSpace", "Elu", "Div", "Gather"),
    *("GlobalAveragePool", "GridSample", "HardSigmoid", "MaxPool", "Mul", "PRelu", "Pad", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "Relu", "Resize", "ScatterElements", "Sigmoid", "Slice", "Split", "Squeeze", "Sub", "Tanh", "TopK"),
)
"""Operators whose operands have no zero point. The others of the table take one."""

PROFILE = Profile(
    "tidl",
    "TI Deep Learning, ONNX QDQ import",
    (
        fixed_shapes(MODELS),
        activation_types(("INT8", "UINT8", "INT16", "UINT16"), QUANTIZATION),
        symmetric_inputs(QUANTIZATION),
        symmetric_activations(QUANTIZATION, SYMMETRIC),
        weight_types(("INT8",), QUANTIZATION),
        symmetric_weights(QUANTIZATION),
        weight_scales_per_tensor(QUANTIZATION, ("ConvTranspose",)),
        *biases_of_codes(QUANTIZATION),
        no_double_quantizers(QUANTIZATION),
    ),
)
