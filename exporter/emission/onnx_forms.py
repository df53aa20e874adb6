"""The table of ONNX forms: ATen operators that torch.onnx cannot translate, or not as integer runtimes fuse them.

Scales and zero points enter the model here, as inputs of QuantizeLinear and DequantizeLinear.

A value of torch.onnx (SymbolicTensor) is an ir.Value.

Must not know: graphs, files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript import opset21
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE

__all__ = ["NAME", "ONNX_FORMS"]

NAME = "intact.name"
"""Metadata key under which a node carries the name that its output gets."""


def _quantize(x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int, axis: int | None, site: str) -> Any:
    codes = op.QuantizeLinear(x, scale, zero_point)
    container = np.iinfo(zero_point.dtype.numpy())
    if (qmin, qmax) != (container.min, container.max):
        _keep_name(codes, f"{site}_saturated")
        codes = op.Clip(codes, _scalar(qmin, zero_point.dtype), _scalar(qmax, zero_point.dtype))
    return _keep_name(codes, f"{site}_quantized")


def _dequantize(
    codes: Any, scale: Any, zero_point: Any, axis: int | None, site: str, block_size: int | None = None
) -> Any:
    if block_size is not None:  # ONNX names the axis that is cut into blocks
        value = opset21.DequantizeLinear(codes, scale, zero_point, axis=1, block_size=block_size)
    else:
        value = op.DequantizeLinear(codes, scale, zero_point, **({} if axis is None else {"axis": axis}))
    return _keep_name(value, f"{site}_dequantized")


def _keep_name(value: Any, name: str) -> Any:
    """Record the name on the node for `annotate`, because torch.onnx names values itself."""
    value.producer().metadata_props[NAME] = name
    return value


def _scalar(value: float, dtype: ir.DataType) -> Any:
    return _tensor(np.array(value, dtype=dtype.numpy()))


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    tensor: Any = ir.tensor(array)
    return op.Constant(value=tensor)


def _adaptive_avg_pool2d(x: Any, output_size: Any) -> Any:
    """Pool globally or by a divisor where that is possible, else multiply by a matrix of averages on either side."""
    before, after = list(x.shape)[-2:], list(output_size)
    if after == [1, 1]:
        return op.GlobalAveragePool(x)
    if all(old % new == 0 for old, new in zip(before, after, strict=True)):
        kernel = [old // new for old, new in zip(before, after, strict=True)]
        return op.AveragePool(x, kernel_shape=kernel, strides=kernel)
    rows, columns = (_averages(old, new) for old, new in zip(before, after, strict=True))
    return op.MatMul(_tensor(rows), op.MatMul(x, _tensor(columns.T.copy())))


def _adaptive_avg_pool3d(x: Any, output_size: Any) -> Any:
    """Pool by a divisor where that is possible, else multiply by a matrix of averages along every axis."""
    before, after = list(x.shape)[-3:], list(output_size)
    if after == [1, 1, 1]:
        return op.ReduceMean(x, _tensor(np.array([-3, -2, -1])), keepdims=1)
    if all(old % new == 0 for old, new in zip(before, after, strict=True)):
        kernel = [old // new for old, new in zip(before, after, strict=True)]
        return op.AveragePool(x, kernel_shape=kernel, strides=kernel)
    depth = _averages(before[0], after[0])
    planes = op.MatMul(_tensor(depth), op.Reshape(x, _tensor(np.array([0, 0, before[0], -1]))))
    volume = op.Reshape(planes, _tensor(np.array([0, 0, after[0], *before[1:]])))
    rows, columns = (_averages(old, new) for old, new in zip(before[1:], after[1:], strict=True))
    return op.MatMul(_tensor(rows), op.MatMul(volume, _tensor(columns.T.copy())))


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any) -> Any:
    """Merge all axes before the last two into one of heads, because torch.onnx translates four axes alone."""
    if len(query.shape) == 4:
        return aten_scaled_dot_product_attention(query, key, value, attn_mask, *rest, **options)
    if attn_mask is not None and len(attn_mask.shape) > 2:
        sizes = op.Concat(op.Shape(query, end=-2), _tensor(np.array([1, 1])), axis=0)
        attn_mask = _heads(attn_mask, op.Expand(attn_mask, sizes))
    merged = (_heads(x, x) for x in (query, key, value))
    result = aten_scaled_dot_product_attention(*merged, attn_mask, *rest, **options)
    return op.Reshape(result, op.Concat(op.Shape(query, end=-1), op.Shape(value, start=-1), axis=0))


def _heads(like: Any, x: Any) -> Any:
    """Return x as [1, heads, ...], with the type and the last sizes of another value, which torch.onnx asks for."""
    heads = op.Reshape(x, op.Concat(_tensor(np.array([1, -1])), op.Shape(x, start=-2), axis=0))
    heads.dtype, heads.shape = like.dtype, ir.Shape([1, None, *like.shape[-2:]])
    return heads


def _averages(before: int, after: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return [after, before] whose row i averages floor(i * before / after) to ceil((i + 1) * before / after)."""
    matrix = np.zeros((after, before), np.float32)
    for row in range(after):
        start, end = row * before // after, -(-(row + 1) * before // after)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    return op.Clip(x, *(None if bound is None else _scalar(bound, x.dtype) for bound in (min, max)))


def _clamp_tensor(x: Any, min: Any = None, max: Any = None) -> Any:
    """Clip codes, as torch.onnx does, where the bounds are scalars; clamp by bounds of any shape elsewhere."""
    lo, hi = (None if bound is None else op.CastLike(bound, x) for bound in (min, max))
    if all(bound is None or not len(bound.shape) for bound in (min, max)):
        return op.Clip(x, lo, hi)
    x = x if lo is None else op.Max(x, lo)
    return x if hi is None else op.Min(x, hi)


def _elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    result = op.Elu(x if input_scale == 1 else op.Mul(x, _scalar(input_scale, x.dtype)), alpha=alpha)
    return result if scale == 1 else op.Mul(result, _scalar(scale, x.dtype))


def _group_norm(
    x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """Normalize each group as an instance, then scale and shift per channel."""
    channels = (x.shape[1], *[1] * (len(x.shape) - 2))
    ones, zeros = (_tensor(np.full(num_groups, value, x.dtype.numpy())) for value in (1, 0))
    groups = op.Reshape(x, _tensor(np.array([0, num_groups, -1], np.int64)))
    groups = op.InstanceNormalization(groups, ones, zeros, epsilon=eps)
    result = op.Reshape(groups, _tensor(np.array([-1, *x.shape[1:]], np.int64)))
    for combine, factor in ((op.Mul, weight), (op.Add, bias)):
        if factor is not None:
            result = combine(result, op.Reshape(factor, _tensor(np.array(channels, np.int64))))
    return result


def _pad(x: Any, pad: Any, value: Any = 0.0) -> Any:
    """Reorder the paddings: torch has (before, after) from the last dimension on, ONNX all befores, then all afters."""
    unpadded = [0] * (len(x.shape) - len(pad) // 2)
    before, after = [*unpadded, *pad[::2][::-1]], [*unpadded, *pad[1::2][::-1]]
    return op.Pad(x, _tensor(np.array(before + after, dtype=np.int64)), _scalar(value, x.dtype))


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Use Gemm for matrices, MatMul and Add otherwise: the forms that integer runtimes fuse.

    onnxruntime makes a kernel for weight-only layers from [in, out] weights if no quantizer, ReLU or clip follows the
    product directly; the sum with the bias may, and the kernel absorbs it.
    """
    weight_only = _is_dequantized(weight) and not _is_dequantized(x)
    if len(x.shape) == 2 and not weight_only:
        return op.Gemm(x, weight, bias, transB=1)
    columns = op.Transpose(weight, perm=[1, 0])
    product = (op.Gemm if len(x.shape) == 2 else op.MatMul)(x, columns)
    return product if bias is None else op.Add(product, bias)


def _is_dequantized(value: Any) -> bool:
    return value.producer() is not None and value.producer().op_type == "DequantizeLinear"


def _rnn(activation: str) -> Any:
    """Return the form of a recurrent layer with one gate, which torch.onnx unrolls over time."""

    def form(
        x: Any,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        directions, per = (2 if bidirectional else 1), (4 if has_biases else 2)
        first, swapped = _tensor(np.array([0])), [1, 0, 2]
        value, states = op.Transpose(x, perm=swapped) if batch_first else x, []  # [steps, samples, features]
        for layer in range(0, num_layers * directions, directions):
            own = [params[per * at : per * (at + 1)] for at in range(layer, layer + directions)]
            inner, outer = (op.Concat(*(op.Unsqueeze(s[i], first) for s in own), axis=0) for i in (0, 1))
            both = (op.Unsqueeze(op.Concat(*s[2:], axis=0), first) for s in own)
            bias = op.Concat(*both, axis=0) if has_biases else None
            start = op.Slice(hx, _tensor(np.array([layer])), _tensor(np.array([layer + directions])), first)
            steps, last = op.RNN(
                value,
                inner,
                outer,
                bias,
                None,
                start,
                activations=[activation] * directions,
                direction="bidirectional" if bidirectional else "forward",
                hidden_size=int(hx.shape[-1]),
            )
            value = op.Reshape(op.Transpose(steps, perm=[0, 2, 1, 3]), _tensor(np.array([0, 0, -1])))
            states.append(last)
        return op.Transpose(value, perm=swapped) if batch_first else value, op.Concat(*states, axis=0)

    return form


def _antialiased(mode: str) -> Any:
    """Return the form of a smoothed resize; torch.onnx drops its factors, which differ from the ratio of odd sizes."""

    def form(x: Any, output_size: Any, align_corners: bool, scale_factors: Any = None) -> Any:
        factors = None if scale_factors is None else _tensor(np.array([1, 1, *scale_factors], np.float32))
        sizes: Any = None
        if output_size is not None:
            free: list[Any] = [size if isinstance(size, ir.Value) else _tensor(np.array(size)) for size in output_size]
            parts = [op.Reshape(size, _tensor(np.array([1]))) for size in free]
            sizes = op.Concat(op.Shape(x, end=2), *parts, axis=0)
        where = "align_corners" if align_corners else "half_pixel"
        rest: dict[str, Any] = {"cubic_coeff_a": -0.5} if mode == "cubic" else {}
        return op.Resize(
            x,
            None,
            factors,
            sizes,
            mode=mode,
            coordinate_transformation_mode=where,
            antialias=1,
            exclude_outside=1,
            **rest,
        )

    return form


ONNX_FORMS: dict[Any, Any] = {
    torch.ops.aten._upsample_bilinear2d_aa.vec: _antialiased("linear"),
    torch.ops.aten._upsample_bicubic2d_aa.vec: _antialiased("cubic"),
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    torch.ops.aten.rnn_tanh.input: _rnn("Tanh"),
    torch.ops.aten.rnn_relu.input: _rnn("Relu"),
    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    torch.ops.aten.adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
    torch.ops.aten.clamp.default: _clamp,
    torch.ops.aten.clamp.Tensor: _clamp_tensor,
    torch.ops.aten.constant_pad_nd.default: _pad,
    torch.ops.aten.elu.default: _elu,
    torch.ops.aten.group_norm.default: _group_norm,
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}
