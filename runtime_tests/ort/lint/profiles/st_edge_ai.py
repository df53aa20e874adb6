"""ST Edge AI Core, for STM32 and Neural-ART."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    biases_of_codes,
    fixed_shapes,
    highest_opset,
    no_double_quantizers,
    quantized_results,
    symmetric_weights,
    weight_types,
)

__all__ = ["PROFILE"]

QUANTIZED = "ST Edge AI Core 3.0, Quantized model support"
TOOLBOX = "ST Edge AI Core 3.0, ONNX toolbox"

PROFILE = Profile(
    "st-edge-ai",
    "ST Edge AI Core, STM32 and Neural-ART",
    (
        highest_opset(20, TOOLBOX),
        fixed_shapes(QUANTIZED),
        activation_types(("INT8", "UINT8"), QUANTIZED),
        weight_types(("INT8",), QUANTIZED),
        symmetric_weights(QUANTIZED),
        *biases_of_codes(QUANTIZED),
        quantized_results(("Conv", "Gemm", "MatMul"), "warning", QUANTIZED),
        no_double_quantizers(QUANTIZED),
    ),
)
