"""NXP's eIQ Neutron."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    fixed_shapes,
    operators,
    quantized_results,
    symmetric_weights,
    weight_scales_per_tensor,
    weight_types,
)

__all__ = ["PROFILE"]

SCHEMES = "ExecuTorch documentation, NXP eIQ Neutron quantization"

OPERATORS = (
    *(
        "Abs",
        "Add",
        "AveragePool",
        "Clip",
        "Concat",
        "Conv",
        "Flatten",
        "Gemm",
        "GlobalAveragePool",
        "MatMul",
        "MaxPool",
    ),
    *("Mul", "Pad", "ReduceMean", "Relu", "Reshape", "Sigmoid", "Slice", "Softmax", "Tanh", "Transpose"),
)
"""The ONNX names of the operators that the quantizer of the backend lists."""

PROFILE = Profile(
    "nxp-neutron",
    "NXP eIQ Neutron",
    (
        fixed_shapes(SCHEMES),
        operators(OPERATORS, "warning", SCHEMES),
        activation_types(("INT8",), SCHEMES),
        weight_types(("INT8",), SCHEMES),
        symmetric_weights(SCHEMES),
        weight_scales_per_tensor(SCHEMES),
        quantized_results(("Conv", "Gemm", "MatMul"), "warning", SCHEMES),
    ),
)
