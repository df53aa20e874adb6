"""TensorFlow Lite: the program of the reference as an int8 LiteRT file, beside the ONNX file.

Its codes are int8, each 128 less than the uint8 codes of model.onnx. Every layer writes codes, linear ones too; the
batch is fixed to 1. Operands and result of a concatenation have one scale, and so have those of an average pool over
windows. Sigmoids, LeakyReLUs and products of two activations run in float.

LiteRT's reference kernels, of which those for microcontrollers are made, scale in fixed point and round twice. So
model.tflite has an arithmetic of its own, in which the reference computes it (calibrators.grid.fixed_point): some 0.2 %
of the codes of a convolution are one step off those of model.onnx.

Sources: LiteRT's 8-bit quantization specification; its kernels (tflite/kernels: what they demand of types and scales);
what LiteRT 2.3.0 computed of every pair of codes (tests/runtime_tests/runtimes/test_tflite.py).
"""

from __future__ import annotations

from dataclasses import replace

from calibrators.targets import ort_cpu, xnnpack

TARGET = replace(
    xnnpack.TARGET,
    name="tflite",
    summary="LiteRT (TensorFlow Lite), reference kernels",
    runtime="tflite",
    min_version="2.3",
    exact_on=("x86-vnni", "tflite"),
    proved_in="tflite",
    lowered_file="model.tflite",
    arithmetic="tflite",
    bias=ort_cpu.TARGET.bias,
    integer_ops=xnnpack.TARGET.integer_ops - {"avg_pool3d.default"} | {"avg_pool2d.default"},
    fused_ops=xnnpack.TARGET.fused_ops - {"avg_pool2d.default"},
    same_scale_ops=xnnpack.TARGET.same_scale_ops | {"upsample_nearest2d.vec", "amax.default", "pixel_shuffle.default"},
    joined_ops=xnnpack.TARGET.joined_ops | {"avg_pool2d.default"},
)
