"""onnxruntime on x86-64 CPUs: what its QDQ fusion turns into integer kernels (measured on 1.31 and 1.32).

Activations are uint8, because int8 activations keep branches in float there; weights int8, symmetric, without -128;
biases int32 with exactly the product of the two scales. Reduced ranges live in the same containers. Activations of 16
bits are int16, which opset 21 has; what writes or reads them is computed in float. Linear layers have a kernel that
reads codes of the weight alone (MatMulNBits).
"""

from __future__ import annotations

import torch

from calibrators.grid.spec import QuantSpec, Target

aten = torch.ops.aten

TARGET = Target(
    name="ort-cpu",
    summary="onnxruntime, CPU execution provider, x86-64 with AVX2 or newer",
    activation=QuantSpec(bits=8, signed=False),
    wide_activation=QuantSpec(bits=16, signed=True),
    weight=QuantSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    weighted_to_codes=frozenset({aten.conv1d.default, aten.conv2d.default}),
    weighted_to_float=frozenset({aten.linear.default}),
    weight_only=frozenset({aten.linear.default}),
    integer_ops=frozenset(
        {
            aten.add.Tensor,
            aten.mul.Tensor,
            aten.cat.default,
            aten.adaptive_avg_pool2d.default,
            aten.avg_pool2d.default,
            aten.sigmoid.default,
            aten.leaky_relu.default,
        }
    ),
    same_scale_ops=frozenset(
        {
            aten.max_pool1d.default,
            aten.max_pool2d.default,
            aten.amax.default,
            aten.pad.default,
            aten.reshape.default,
            aten.view.default,
            aten.flatten.using_ints,
            aten.permute.default,
            aten.transpose.int,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
            aten.slice.Tensor,
            aten.upsample_nearest2d.vec,
            aten.pixel_shuffle.default,
            aten.clone.default,
            aten.contiguous.default,
        }
    ),
    on_codes_ops=frozenset({aten.constant_pad_nd.default}),
    fixed_outputs={aten.sigmoid.default: (1.0 / 256.0, 0)},
    opset=20,
)
