"""XNNPACK in ExecuTorch: the program of the reference as a .pte file, beside the ONNX file of the same integers.

ExecuTorch's codes are int8, each 128 less than the uint8 code of the reference. Every layer writes codes, linear ones
too; the batch is fixed to 1. Biases are float32 there, which XNNPACK quantizes by a product with the reciprocal of
their scale: that gives the same codes up to 22 bits. Average pools over windows, sigmoids, LeakyReLUs and products of
two activations have float kernels alone. Operands and result of a concatenation have one scale.

Sums, products and means are rounded otherwise than in onnxruntime where a result lies on a tie: scales move until both
round alike, so that both compute the same integers.

Sources: the partitioner of ExecuTorch 1.5.1 (backends/xnnpack/partition/config: `supported_precision_types` and
constraints of each operator), and what its runtime computed of every pair of codes (docs/targets.md). It delegates a
quantized concatenation of different scales, and then refuses to load the file.
"""

from __future__ import annotations

from dataclasses import replace

from calibrators.graph.operators import Operators
from calibrators.targets import ort_cpu

_IN_FLOAT = Operators("avg_pool2d.default", "avg_pool3d.default", "sigmoid.default", "leaky_relu.default")
_MOVES = Operators(
    *("view.default", "reshape.default", "flatten.using_ints", "squeeze.dim", "squeeze.dims", "unsqueeze.default"),
    *("permute.default", "transpose.int", "slice.Tensor", "clone.default", "contiguous.default"),
    *("max_pool2d.default", "pad.default"),
)

TARGET = replace(
    ort_cpu.TARGET,
    name="xnnpack",
    summary="ExecuTorch, XNNPACK",
    runtime="xnnpack",
    min_version="1.5.1",
    exact_on=("x86-vnni", "xnnpack"),
    proved_in="xnnpack",
    lowered_file="model.pte",
    static_shapes=True,
    widths=tuple(range(2, 9)),
    bias=replace(ort_cpu.TARGET.bias, bits=22),
    coded_tables=False,
    packed_weights=False,
    weighted_to_codes=Operators("conv1d.default", "conv2d.default", "linear.default"),
    weighted_to_float=Operators(),
    weight_only=Operators(),
    integer_ops=ort_cpu.TARGET.integer_ops - _IN_FLOAT,
    fused_ops=ort_cpu.TARGET.fused_ops | _IN_FLOAT,
    same_scale_ops=_MOVES,
    on_codes_ops=Operators("constant_pad_nd.default"),
    joined_ops=Operators("cat.default"),
    fixed_outputs={},
    costs={},
    drops_clips=False,
    free_factors=False,
)
