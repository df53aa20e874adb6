"""XNNPACK in ExecuTorch, for files that are to become a program of it with the same integers."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    bias_bits,
    biases_of_codes,
    fixed_shapes,
    no_double_quantizers,
    one_scale_per_value,
    quantized_results,
    same_scales,
    same_ties,
    symmetric_weights,
    weight_types,
)

__all__ = ["PROFILE"]

PARTITIONER = "ExecuTorch 1.5.1, backends/xnnpack/partition/config"
SERIALIZER = "ExecuTorch 1.5.1, backends/xnnpack/operators"
EXPERIMENT = "experiment: ExecuTorch 1.5.1 (tests/runtime_tests/runtimes/test_xnnpack.py)"

PROFILE = Profile(
    "xnnpack",
    "ExecuTorch, XNNPACK",
    (
        fixed_shapes(PARTITIONER),
        activation_types(("INT8", "UINT8"), PARTITIONER),
        weight_types(("INT8",), PARTITIONER),
        symmetric_weights(SERIALIZER),
        *biases_of_codes(SERIALIZER),
        bias_bits(22, SERIALIZER),
        quantized_results(("Conv", "Gemm"), "error", PARTITIONER),
        same_scales(("Concat",), "error", EXPERIMENT),
        one_scale_per_value(SERIALIZER),
        same_ties(EXPERIMENT),
        no_double_quantizers(SERIALIZER),
    ),
)
