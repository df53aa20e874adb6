"""TensorRT with explicit quantization: int8 codes with zero point 0, float biases, opset 20.

A quantizer stands before a layer that computes on integers; the layer writes codes or floats, as the operators after it
read them. ReLUs and clips stay operators on floats, which TensorRT fuses. TensorRT does not run here: onnxruntime
executes the file as its QDQ text says, and nothing is proved on the device.

Sources: NVIDIA, "Working with quantized types" (symmetric INT8 with zero point 0, per tensor for activations, per
channel for weights, no INT32 dequantizers) and onnx-tensorrt's operators.md (opset); ModelOpt's default operators to
quantize (Add, Mul, pools, Concat).
"""

from __future__ import annotations

from dataclasses import replace

from calibrators.graph.operators import Operators
from calibrators.grid.spec import QuantSpec
from calibrators.targets import ort_cpu

_WITHOUT_KERNEL = Operators("sigmoid.default", "leaky_relu.default")

TARGET = replace(
    ort_cpu.TARGET,
    name="tensorrt",
    summary="TensorRT, explicit quantization",
    runtime="tensorrt",
    min_version="10.0",
    exact_on=("x86-vnni",),
    proof="qdq",
    opsets=(20, 20),
    activation=QuantSpec(bits=8, signed=True, symmetric=True),
    widths=(8,),
    float_bias=True,
    coded_tables=False,
    packed_weights=False,
    weighted_to_codes=Operators(),
    weighted_to_either=ort_cpu.TARGET.weighted,
    weighted_to_float=Operators(),
    weight_only=Operators(),
    integer_ops=ort_cpu.TARGET.integer_ops - _WITHOUT_KERNEL,
    on_codes_ops=Operators(),
    joined_ops=Operators("cat.default"),
    constant_operands=Operators(),
    fixed_outputs={},
    costs={},
    clips_codes=False,
    drops_clips=False,
    free_factors=False,
    shields_floats=False,
)
