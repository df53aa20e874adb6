"""TensorFlow Lite, for files that are to become a LiteRT file with the same codes of weights and biases."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    biases_of_codes,
    fixed_shapes,
    no_double_quantizers,
    one_scale_per_value,
    quantized_results,
    same_scales,
    symmetric_weights,
    weight_types,
)

__all__ = ["PROFILE"]

SPECIFICATION = "LiteRT, 8-bit quantization specification"
KERNELS = "LiteRT 2.3.0, tflite/kernels: what Prepare demands of types and scales"
EXPERIMENT = "experiment: LiteRT 2.3.0 (tests/runtime_tests/runtimes/test_tflite.py)"

PROFILE = Profile(
    "tflite",
    "LiteRT (TensorFlow Lite), reference kernels",
    (
        fixed_shapes(EXPERIMENT),
        activation_types(("INT8", "UINT8"), SPECIFICATION),
        weight_types(("INT8",), SPECIFICATION),
        symmetric_weights(SPECIFICATION),
        *biases_of_codes(SPECIFICATION),
        quantized_results(("Conv", "Gemm"), "error", KERNELS),
        same_scales(("Concat", "AveragePool"), "error", SPECIFICATION),
        one_scale_per_value(SPECIFICATION),
        no_double_quantizers(KERNELS),
    ),
)
