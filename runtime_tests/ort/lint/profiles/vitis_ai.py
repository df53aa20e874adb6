"""AMD's Vitis AI and Ryzen AI NPUs, XINT8."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    highest_opset,
    operators,
    powers_of_two,
    symmetric_activations,
    symmetric_weights,
    weight_scales_per_tensor,
    weight_types,
)

__all__ = ["PROFILE"]

QUARK = "AMD Quark documentation, XINT8"
RYZEN = "AMD Ryzen AI documentation, model quantization (opset 17 recommended)"
MQBENCH = "MQBench, user guide, hardware/vitis.rst (aligned with the DPU)"

OPERATORS = ("Add", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MaxPool", "Relu", "Reshape", "Resize")

PROFILE = Profile(
    "vitis-ai",
    "AMD Vitis AI and Ryzen AI, XINT8",
    (
        highest_opset(17, RYZEN),
        operators(OPERATORS, "warning", MQBENCH),
        activation_types(("INT8",), QUARK),
        symmetric_activations(QUARK),
        weight_types(("INT8",), QUARK),
        symmetric_weights(QUARK),
        weight_scales_per_tensor(MQBENCH),
        powers_of_two(QUARK),
    ),
)
