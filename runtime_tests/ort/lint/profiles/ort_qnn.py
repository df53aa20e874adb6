"""onnxruntime with the QNN provider, on Qualcomm's HTP."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    biases_of_codes,
    fixed_shapes,
    no_clips_of_codes,
    no_double_quantizers,
    no_skipped_clips,
    no_symmetric_relus,
    no_unfused_clips,
    one_scale_per_value,
    operators,
    quantized_results,
    weight_types,
)

__all__ = ["PROFILE"]

PROVIDER = "onnxruntime documentation, QNN execution provider"
CONFIG = "onnxruntime, quantization/execution_providers/qnn/quant_config.py"
EXPERIMENT = "experiment: HTP simulator of onnxruntime-qnn 2.7.0 (tests/runtime_tests/runtimes)"

OPERATORS = (
    *("Abs", "Add", "And", "ArgMax", "ArgMin", "Asin", "Atan", "AveragePool", "BatchNormalization", "Cast", "Clip"),
    *("Concat", "Conv", "ConvTranspose", "Cos", "DepthToSpace", "Div", "Elu", "Equal", "Exp", "Expand", "Flatten"),
    *("Floor", "Gather", "Gelu", "Gemm", "GlobalAveragePool", "Greater", "GreaterOrEqual", "GridSample", "HardSigmoid"),
    *("HardSwish", "InstanceNormalization", "LRN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log"),
    *("LogSoftmax", "LpNormalization", "MatMul", "Max", "MaxPool", "Mean", "Min", "Mul", "Neg", "Not", "Or", "PRelu"),
    *("Pad", "Pow", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Resize"),
    *("Round", "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub"),
    *("Tanh", "Tile", "TopK", "Transpose", "Unsqueeze", "Where"),
)

PROFILE = Profile(
    "ort-qnn",
    "onnxruntime, QNN provider, Qualcomm HTP",
    (
        fixed_shapes(PROVIDER),
        operators(OPERATORS, "warning", PROVIDER),
        activation_types(("UINT8", "UINT16"), CONFIG),
        weight_types(("INT8", "UINT8", "INT4"), CONFIG),
        *biases_of_codes(CONFIG),
        no_clips_of_codes(EXPERIMENT),
        no_unfused_clips(EXPERIMENT),
        no_skipped_clips(EXPERIMENT),
        quantized_results(("Conv", "Gemm", "MatMul"), "error", EXPERIMENT),
        one_scale_per_value(EXPERIMENT),
        no_symmetric_relus(CONFIG),
        no_double_quantizers(CONFIG),
    ),
)
