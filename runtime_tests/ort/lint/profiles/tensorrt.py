"""TensorRT with explicit quantization."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    biases_in_float,
    highest_opset,
    no_clips_of_codes,
    no_double_quantizers,
    same_scales,
    symmetric_activations,
    symmetric_weights,
    weight_types,
)

__all__ = ["PROFILE"]

TYPES = "NVIDIA TensorRT documentation, Working with quantized types"
PARSER = "onnx-tensorrt, docs/operators.md"
OPSETS = (
    "NVIDIA TensorRT documentation, ONNX opset guide (25 since version 11; before, onnx-tensorrt, docs/operators.md)"
)
MODELOPT = "NVIDIA ModelOpt, onnx/quantization (concat_elimination)"

PROFILE = Profile(
    "tensorrt",
    "TensorRT, explicit quantization",
    (
        highest_opset(20, OPSETS),
        activation_types(("INT8",), TYPES),
        symmetric_activations(TYPES),
        weight_types(("INT8", "INT4"), TYPES),
        symmetric_weights(TYPES),
        biases_in_float(PARSER),
        no_clips_of_codes(PARSER),
        same_scales(("Concat",), "warning", MODELOPT),
        no_double_quantizers(TYPES),
    ),
)
