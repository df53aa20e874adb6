"""onnxruntime on every CPU: the operators that its QDQ fusion turns into integer kernels (measured on 1.31, 1.32).

Activations are uint8, because int8 ones keep branches in float on x86; weights are int8, symmetric, without -128;
biases are int32 with exactly the product of the two scales. Fewer bits use the same containers. 16-bit activations are
int16, which needs opset 21; operators that write or read them compute in float. Linear layers have a kernel that reads
only the weight as codes (MatMulNBits). CPUs with AVX2 but without VNNI add two products in int16, so pairs of weights
are limited.

Products of two activations and softmax have kernels too. Placement leaves them in float, so that they become integer
kernels only where codes stand around them anyway.
"""

from __future__ import annotations

from calibrators.graph.operators import LISTS, MOVES, Operators
from calibrators.grid.processors import PROCESSORS
from calibrators.grid.spec import QuantSpec
from calibrators.grid.target import Target
from calibrators.grid.x86_costs import X86_COSTS

TARGET = Target(
    name="ort-cpu",
    summary="onnxruntime, CPU execution provider, on every processor",
    runtime="onnxruntime",
    min_version="1.18",
    exact_on=tuple(PROCESSORS),
    opsets=(20, 25),
    activation=QuantSpec(bits=8, signed=False),
    wide_activation=QuantSpec(bits=16, signed=True),
    weight=QuantSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    bias=QuantSpec(bits=32, signed=True, symmetric=True, axis=0, narrow=True),
    weighted_to_codes=Operators("conv1d.default", "conv2d.default", "conv3d.default"),
    weighted_to_float=Operators("linear.default"),
    weight_only=Operators("linear.default"),
    integer_ops=Operators(
        "add.Tensor",
        "mul.Tensor",
        "cat.default",
        "adaptive_avg_pool2d.default",
        "avg_pool2d.default",
        "avg_pool3d.default",
        "sigmoid.default",
        "leaky_relu.default",
    ),
    fused_ops=Operators("matmul.default", "bmm.default", "mm.default", "softmax.int", "getitem") | LISTS,
    forms={
        "add.Tensor": ("tensors", "unscaled"),
        "mul.Tensor": ("tensors",),
        "adaptive_avg_pool2d.default": ("to-one-pixel", "images"),
        "avg_pool2d.default": ("whole-windows", "own-divisor", "images"),
        "avg_pool3d.default": ("whole-windows", "own-divisor", "images"),
    },
    same_scale_ops=MOVES - LISTS - {"getitem", "amin.default"} | {"pad.default"},
    on_codes_ops=Operators("constant_pad_nd.default", "amin.default", "maximum.default", "minimum.default"),
    constant_operands=Operators("add.Tensor", "mul.Tensor"),
    fixed_outputs={"sigmoid.default": (1.0 / 256.0, 0)},
    costs=X86_COSTS,
    drops_clips=True,
    free_factors=True,
    shields_floats=True,
)
