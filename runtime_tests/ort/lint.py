"""Forms of a QDQ graph that onnxruntime refuses, computes wrongly or runs in float although an integer form exists.

Each rule reads the structure of the file only; nothing is run. "error" means that the model does not load or that its
numbers are not those of the QDQ text; "warning" that something leaves the integer path or wastes space.

Must not know: who wrote the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from runtime_tests.ort.operands import (
    DEQUANTIZE,
    QUANTIZE,
    Operand,
    array,
    consumers,
    inputs,
    operand,
    qparams,
    stated_type,
    type_range,
    where,
)
from runtime_tests.ort.sessions import loads, readable

__all__ = ["RULES", "Finding", "Rule", "lint"]

Array = NDArray[Any]
Hits = Iterator[tuple[str, str]]
"""Place and message of each violation."""


@dataclass(frozen=True)
class Finding:
    """One violation: which rule, how bad ("error" or "warning"), which node or value, what to do."""

    rule: str
    severity: str
    where: str
    message: str


@dataclass(frozen=True)
class Rule:
    """A check of a whole model; `on_proto` rules read the file itself, before it is known to be a graph."""

    name: str
    severity: str
    check: Callable[[Any], Hits]
    on_proto: bool = False


RULES: dict[str, Rule] = {}
"""Every rule by name."""


def lint(model: onnx.ModelProto | str | Path) -> list[Finding]:
    """Findings of every rule, errors first; external weights are read only where a rule needs their values.

    A file whose names are not unique is no graph: then only the rules on the file itself run.

    raises: ModelError for what is no ONNX file.
    """
    if isinstance(model, onnx.ModelProto):
        proto = model
    else:
        with readable(model):
            proto = onnx.load(model, load_external_data=False)
    findings = [finding for rule in RULES.values() if rule.on_proto for finding in _apply(rule, proto)]
    if not any(finding.rule == "duplicate-name" for finding in findings):
        loaded = ir.from_proto(proto) if isinstance(model, onnx.ModelProto) else ir.load(model)
        findings += [finding for rule in RULES.values() if not rule.on_proto for finding in _apply(rule, loaded)]
    return sorted(findings, key=lambda finding: finding.severity != "error")


def _apply(rule: Rule, model: Any) -> list[Finding]:
    return [Finding(rule.name, rule.severity, place, message) for place, message in rule.check(model)]


def _rule(
    name: str, severity: str, *, on_proto: bool = False
) -> Callable[[Callable[[Any], Hits]], Callable[[Any], Hits]]:
    def register(check: Callable[[Any], Hits]) -> Callable[[Any], Hits]:
        RULES[name] = Rule(name, severity, check, on_proto)
        return check

    return register


# ---- reading

WEIGHTED = frozenset(("Conv", "Gemm", "MatMul"))
SAME_QPARAMS = frozenset(
    (
        "DepthToSpace",
        "Flatten",
        "MaxPool",
        "ReduceMax",
        "Reshape",
        "Resize",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
)
"""Operators that onnxruntime runs on codes if the quantizers on both sides have the same parameters."""

NEEDS_QUANTIZER_WHEN_SIGNED = frozenset(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool"))
SIGNED_FAILS_FROM_OPSET = 21
WIDE = (ir.DataType.INT16, ir.DataType.UINT16)
NARROW = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2)
TWO_BIT = (ir.DataType.INT2, ir.DataType.UINT2)
INT32_MAX = 2**31 - 1


def _nodes(model: ir.Model, *ops: str) -> Iterator[ir.Node]:
    return (node for graph in model.graphs() for node in graph if node.op_type in ops)


def _weighted(model: ir.Model) -> Iterator[tuple[ir.Node, Operand, Operand]]:
    """Conv, Gemm and MatMul of quantized activations and constant quantized weights."""
    for node in _nodes(model, *WEIGHTED):
        x, weight = (operand(value) for value in inputs(node, 2))
        if x is not None and weight is not None and weight.is_constant and not x.is_constant:
            yield node, x, weight


def _is_activation(node: ir.Node) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear works on something computed."""
    return array(node.inputs[0]) is None


def _code_type(node: ir.Node) -> ir.DataType | None:
    """Type of the codes that a QuantizeLinear makes or a DequantizeLinear reads."""
    if node.op_type == QUANTIZE:
        return stated_type(node.outputs[0])
    found = operand(node.outputs[0])
    return found.dtype if found is not None else None


def _flag(node: ir.Node, name: str) -> int:
    stated = node.attributes.get(name)
    return stated.as_int() if stated is not None else 0


def _same_qparams(one: ir.Node, other: ir.Node) -> bool:
    """Whether two quantizers have equal constant parameters, or the same computed ones."""
    pairs = zip(inputs(one, 3)[1:], inputs(other, 3)[1:], strict=True)
    return all(a is b or _equal(array(a), array(b)) for a, b in pairs)


def _equal(a: Array | None, b: Array | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)


def _quantized_behind(value: ir.Value) -> list[ir.Node]:
    """QuantizeLinear nodes that read `value`."""
    return [node for node in consumers(value) if node.op_type == QUANTIZE]


# ---- the file


@_rule("duplicate-name", "error", on_proto=True)
def _duplicate_name(model: onnx.ModelProto) -> Hits:
    """A value made twice: the file is no graph."""
    graph = model.graph
    made = Counter(name for node in graph.node for name in node.output if name)
    made.update({info.name for info in graph.input} | {tensor.name for tensor in graph.initializer})
    made.update(name for name, count in Counter(tensor.name for tensor in graph.initializer).items() if count > 1)
    for name, count in made.items():
        if count > 1:
            yield name, f"{count} nodes or initialisers make this value; rename all but one"


@_rule("runtime-version", "error", on_proto=True)
def _runtime_version(model: onnx.ModelProto) -> Hits:
    """An opset or IR version the installed onnxruntime does not load."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    if not loads(opset=opset, ir_version=8):
        yield "opset", f"onnxruntime {ort.__version__} does not load opset {opset}; write opset 20 (21 for 4-bit types)"
    if not loads(opset=13, ir_version=model.ir_version):
        yield "ir_version", f"onnxruntime {ort.__version__} does not load IR version {model.ir_version}; write 10"


@_rule("packed-data", "warning", on_proto=True)
def _packed_data(model: onnx.ModelProto) -> Hits:
    """Narrow integers in int32_data: up to four bytes per code."""
    narrow = {getattr(onnx.TensorProto, name) for name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")}
    for tensor in model.graph.initializer:
        if tensor.data_type in narrow and tensor.int32_data:
            yield tensor.name, "its codes are stored in int32_data, one varint per code or pair; write raw_data"


# ---- quantization parameters


@_rule("qparam-shape", "error")
def _qparam_shape(model: ir.Model) -> Hits:
    """Per-tensor parameters must be 0-d, and scale and zero point of one shape."""
    for node in _nodes(model, QUANTIZE, DEQUANTIZE):
        scale, zero_point = (array(value) for value in inputs(node, 3)[1:])
        if scale is None:
            continue
        if zero_point is not None and zero_point.shape != scale.shape:
            yield (
                where(node),
                f"scale has shape {list(scale.shape)}, zero point {list(zero_point.shape)}; make them equal",
            )
        if scale.shape == (1,) and not _is_one_channel(node):
            yield where(node), "scale and zero point have shape [1]; per tensor they must be 0-d, or fusion fails"


def _is_one_channel(node: ir.Node) -> bool:
    """Whether a parameter of shape [1] is per-channel: the constant it belongs to has one channel."""
    data = array(node.inputs[0])
    axis = node.attributes.get("axis")
    return data is not None and data.ndim > 0 and data.shape[axis.as_int() if axis is not None else 1 % data.ndim] == 1


@_rule("missing-zero-point", "error")
def _missing_zero_point(model: ir.Model) -> Hits:
    """Without the zero point input Gemm is not fused."""
    for node in _nodes(model, QUANTIZE, DEQUANTIZE):
        if inputs(node, 3)[2] is None:
            yield where(node), "the zero point input is absent; write it even where it is 0"


@_rule("float16-scale", "error")
def _float16_scale(model: ir.Model) -> Hits:
    """Float16 scales: refused beside float32 data, never fused."""
    for node in _nodes(model, QUANTIZE, DEQUANTIZE):
        scale = array(inputs(node, 3)[1])
        if scale is not None and scale.dtype != np.float32:
            yield where(node), f"its scale is {scale.dtype}; integer kernels need float32 scales"


@_rule("double-qdq", "error")
def _double_qdq(model: ir.Model) -> Hits:
    """Q -> DQ -> Q: onnxruntime merges two pairs in a row into one with new parameters."""
    for node in _nodes(model, QUANTIZE):
        before = operand(node.inputs[0])
        if before is not None and not before.is_constant:
            yield (
                where(node),
                f"it quantizes what {where(before.node)} just dequantized; keep one pair, or put an op between",
            )


@_rule("different-qparams", "warning")
def _different_qparams(model: ir.Model) -> Hits:
    """Data movement between quantizers of different parameters is done in float."""
    for node in _nodes(model, *SAME_QPARAMS):
        before = operand(node.inputs[0])
        if before is None or before.is_constant or (node.op_type == "Resize" and not _is_nearest(node)):
            continue
        for reader in (reader for output in node.outputs for reader in _quantized_behind(output)):
            if not _same_qparams(before.node, reader):
                yield (
                    where(node),
                    f"{node.op_type} stands between quantizers of different scale or zero point; share them",
                )


def _is_nearest(node: ir.Node) -> bool:
    mode = node.attributes.get("mode")
    return mode is None or mode.as_string() == "nearest"


@_rule("softmax-scale", "warning")
def _softmax_scale(model: ir.Model) -> Hits:
    """QLinearSoftmax multiplies by floor(1/scale)."""
    for node in _nodes(model, "Softmax"):
        if operand(node.inputs[0]) is None:
            continue
        for reader in _quantized_behind(node.outputs[0]):
            scale, _ = qparams(reader)
            steps = None if scale is None else np.float32(1) / scale.astype(np.float32)
            if steps is not None and np.any(steps != np.floor(steps)):
                yield where(reader), "1/scale is not an integer, and the softmax kernel rounds it down; use scale 1/256"


# ---- activations


@_rule("narrow-activation", "error")
def _narrow_activation(model: ir.Model) -> Hits:
    """4- and 2-bit typed activations: sessions that do not build, or wrong values."""
    for node in _nodes(model, QUANTIZE, DEQUANTIZE):
        dtype = _code_type(node)
        if dtype in NARROW and _is_activation(node):
            yield (
                where(node),
                f"activations are typed {dtype}; store them as UINT8 and narrow them by a Clip of the codes",
            )


@_rule("wide-activation", "warning")
def _wide_activation(model: ir.Model) -> Hits:
    """16-bit activations have no integer kernels."""
    for node in _nodes(model, QUANTIZE):
        dtype = _code_type(node)
        if dtype in WIDE and _is_activation(node):
            yield where(node), f"{dtype} activations are computed in float; use UINT8"


@_rule("signed-fan-out", "warning")
def _signed_fan_out(model: ir.Model) -> Hits:
    """int8 codes that several nodes read stay int8 on x86, and what touches them float."""
    for node in _nodes(model, QUANTIZE):
        if _code_type(node) != ir.DataType.INT8 or not _is_activation(node):
            continue
        readers = [use for each in consumers(node.outputs[0]) for use in each.outputs[0].uses()]
        if len(readers) > 1:
            yield (
                where(node),
                f"int8 codes with {len(readers)} readers are not moved to uint8 kernels on x86; use UINT8",
            )


@_rule("signed-reshape", "error")
def _signed_reshape(model: ir.Model) -> Hits:
    """DQ(int8) -> Reshape and the like without Q behind: sessions fail from opset 21 on."""
    if model.graph.opset_imports.get("", 1) < SIGNED_FAILS_FROM_OPSET:
        return
    for node in _nodes(model, *NEEDS_QUANTIZER_WHEN_SIGNED):
        before = operand(node.inputs[0])
        if before is None or before.is_constant or before.dtype != ir.DataType.INT8:
            continue
        if len(_quantized_behind(node.outputs[0])) < max(1, len(consumers(node.outputs[0]))):
            yield where(node), f"{node.op_type} of int8 codes without quantizer behind it; use UINT8, or opset 20"


@_rule("relu-narrow", "error")
def _relu_narrow(model: ir.Model) -> Hits:
    """Relu before a 4- or 2-bit QuantizeLinear is removed although its zero point is not the lowest code."""
    for relu, reader in _before_quantizer(model, "Relu"):
        dtype = _code_type(reader)
        if dtype in NARROW and not _reaches_bottom(reader, 0.0):
            yield where(relu), f"onnxruntime drops this Relu before {dtype} codes: negative values come through"


@_rule("relu-not-merged", "warning")
def _relu_not_merged(model: ir.Model) -> Hits:
    """Relu behind a quantized op merges into the quantizer only at the lowest code."""
    for relu, reader in _before_quantizer(model, "Relu"):
        if _code_type(reader) not in NARROW and _has_kernel(relu.inputs[0]) and not _reaches_bottom(reader, 0.0):
            yield where(relu), "the zero point behind this Relu is not the lowest code: the op before it stays float"


@_rule("clip-not-merged", "warning")
def _clip_not_merged(model: ir.Model) -> Hits:
    """Float Clip merges into the quantizer only where that saturates at least as early."""
    for clip, reader in _before_quantizer(model, "Clip"):
        low, high = (array(value) for value in inputs(clip, 3)[1:])
        bottom = low is None or _reaches_bottom(reader, float(low))
        top = high is None or _reaches_top(reader, float(high))
        if not (bottom and top):
            yield where(clip), "the quantizer behind this Clip holds codes beyond its bounds; clip the codes instead"


def _before_quantizer(model: ir.Model, op: str) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Nodes of type `op` and the QuantizeLinear behind each, those aside that no kernel could merge it into."""
    pairs = ((node, reader) for node in _nodes(model, op) for reader in _quantized_behind(node.outputs[0]))
    return ((node, reader) for node, reader in pairs if _code_type(reader) not in WIDE)


def _has_kernel(value: ir.Value | None) -> bool:
    """Whether `value` comes from an operator that takes a following Relu into its integer kernel."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type in WEIGHTED | {"Add", "Mul"} and operand(node.inputs[0]) is not None


def _reaches_bottom(node: ir.Node, value: float) -> bool:
    """Whether `value` already has the lowest code of a per-tensor QuantizeLinear."""
    code, (lowest, _) = _code_of(node, value)
    return code is not None and code <= lowest


def _reaches_top(node: ir.Node, value: float) -> bool:
    """Whether `value` already has the highest code of a per-tensor QuantizeLinear."""
    code, (_, highest) = _code_of(node, value)
    return code is not None and code >= highest


def _code_of(node: ir.Node, value: float) -> tuple[float | None, tuple[int, int]]:
    """Code of `value` before saturation, None where the parameters are not constant, and the range of the codes."""
    scale, zero_point = qparams(node)
    if scale is None or zero_point is None or scale.size != 1:
        return None, type_range(_code_type(node))
    code = np.rint(np.float32(value) / scale.astype(np.float32)) + zero_point
    return float(code.reshape(())), type_range(_code_type(node))


# ---- operators in float


@_rule("bare-flatten", "warning")
def _bare_flatten(model: ir.Model) -> Hits:
    """Flatten does not pass quantization on: what reads it computes in float."""
    for node in _nodes(model, "Flatten"):
        readers = consumers(node.outputs[0])
        if operand(node.inputs[0]) is not None and any(reader.op_type != QUANTIZE for reader in readers):
            yield where(node), "DQ -> Flatten without quantizer behind it; put the same parameters on both sides"


@_rule("float-output", "warning")
def _float_output(model: ir.Model) -> Hits:
    """A convolution has integer kernels only if its output, or that of its Relu or Clip, is quantized."""
    for node, _, _ in _weighted(model):
        if node.op_type == "Conv" and not _ends_quantized(node.outputs[0]):
            yield where(node), "its output is not quantized (a Relu or Clip may stand between), so it runs in float"


def _ends_quantized(value: ir.Value) -> bool:
    readers = consumers(value)
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = consumers(readers[0].outputs[0])
    return bool(readers) and not value.is_graph_output() and all(reader.op_type == QUANTIZE for reader in readers)


@_rule("float-operand", "warning")
def _float_operand(model: ir.Model) -> Hits:
    """Add and Mul have integer kernels only if both operands are quantized."""
    for node in _nodes(model, "Add", "Mul"):
        operands = [operand(value) for value in inputs(node, 2)]
        constants = [array(value) for value in inputs(node, 2)]
        if any(operands) and any(each is not None for each in constants) and _quantized_behind(node.outputs[0]):
            yield where(node), f"{node.op_type} with a float constant runs in float; store the constant as codes"


@_rule("reduce-mean", "warning")
def _reduce_mean(model: ir.Model) -> Hits:
    """ReduceMean has no integer kernel."""
    for node in _nodes(model, "ReduceMean"):
        if operand(node.inputs[0]) is not None and _quantized_behind(node.outputs[0]):
            yield where(node), "ReduceMean runs in float; over the image it can be written as GlobalAveragePool"


# ---- weights


@_rule("narrow-weight", "error")
def _narrow_weight(model: ir.Model) -> Hits:
    """2-bit typed weights beside quantized activations: sessions do not build."""
    for node, _, weight in _weighted(model):
        if weight.dtype in TWO_BIT:
            yield where(node), f"{weight.dtype} weights do not load; store the codes as INT8"


@_rule("float-kernel-weight", "warning")
def _float_kernel_weight(model: ir.Model) -> Hits:
    """4- and 16-bit typed weights are expanded to float at every run."""
    for node, _, weight in _weighted(model):
        if weight.dtype in (ir.DataType.INT4, ir.DataType.UINT4, *WIDE):
            yield where(node), f"{weight.dtype} weights have no integer kernel here; store the codes as INT8"


@_rule("unsigned-weight", "warning")
def _unsigned_weight(model: ir.Model) -> Hits:
    """Unsigned weights use the slow kernels."""
    for node, _, weight in _weighted(model):
        if weight.dtype == ir.DataType.UINT8:
            yield where(node), "UINT8 weights run at less than half the speed of INT8 ones"


@_rule("blocked-weight", "error")
def _blocked_weight(model: ir.Model) -> Hits:
    """Blocked 8-bit weights beside quantized activations fail at run time."""
    for node, _, weight in _weighted(model):
        if _flag(weight.node, "block_size") and weight.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
            yield where(node), "its weights have one scale per block; integer kernels take one per channel or tensor"


@_rule("weight-only", "warning")
def _weight_only(model: ir.Model) -> Hits:
    """Quantized weights with float activations become MatMulNBits, which quantizes the activations by itself."""
    for node in _nodes(model, "MatMul", "Gemm"):
        x, weight = (operand(value) for value in inputs(node, 2))
        if x is None and weight is not None and weight.is_constant and not _flag(node, "transB"):
            yield (
                where(node),
                "only its weights are quantized: by default activations are rounded inside the kernel too; set "
                "session.qdq_matmulnbits_accuracy_level to 0",
            )


@_rule("float-weight", "warning")
def _float_weight(model: ir.Model) -> Hits:
    """Float weights beside quantized activations, or quantized at load time from float initialisers."""
    for node in _nodes(model, *WEIGHTED):
        value = inputs(node, 2)[1]
        if operand(node.inputs[0]) is not None and array(value) is not None:
            yield where(node), "its activations are quantized and its weights float; store the weights as codes"
    for node in _nodes(model, QUANTIZE):
        if not _is_activation(node):
            yield where(node), "it quantizes a constant, whose floats stay in the file; store the codes"


# ---- biases


def _biased(model: ir.Model) -> Iterator[tuple[ir.Node, Operand, Operand, ir.Value]]:
    for node, x, weight in _weighted(model):
        bias = inputs(node, 3)[2]
        if node.op_type != "MatMul" and bias is not None:
            yield node, x, weight, bias


@_rule("float-bias", "warning")
def _float_bias(model: ir.Model) -> Hits:
    """A float bias keeps Gemm in float, and onnxruntime rounds that of Conv by itself."""
    for node, _, _, bias in _biased(model):
        if operand(bias) is None:
            yield where(node), "its bias is float; store INT32 codes with scale float32(input scale * weight scale)"


@_rule("bias-type", "warning")
def _bias_type(model: ir.Model) -> Hits:
    """Bias codes must be int32."""
    for node, _, _, bias in _biased(model):
        codes = operand(bias)
        if codes is not None and codes.dtype != ir.DataType.INT32:
            yield where(node), f"its bias has {codes.dtype} codes, so it runs in float; store INT32"


@_rule("bias-scale", "error")
def _bias_scale(model: ir.Model) -> Hits:
    """The scale of the bias must be float32(input scale * weight scale), bit for bit.

    The integer kernels add the codes of the bias as if it were. onnxruntime 1.31 does not compare the scales for Gemm
    and accepts a difference of 1 % for Conv: silently other numbers. Beyond that Conv runs in float.
    """
    for node, x, weight, bias in _biased(model):
        codes = operand(bias)
        if codes is None or codes.scale is None or x.scale is None or weight.scale is None:
            continue
        expected = x.scale * weight.scale
        if expected.dtype != codes.scale.dtype or not _same_bits(expected, codes.scale):
            yield where(node), "the scale of its bias is not float32(input scale * weight scale): kernels ignore it"


def _same_bits(a: Array, b: Array) -> bool:
    """Whether two scales are equal, a scalar standing for one value per channel."""
    return a.size in (1, b.size) and bool(np.all(a.reshape(-1) == b.reshape(-1)))


@_rule("accumulator-overflow", "error")
def _accumulator_overflow(model: ir.Model) -> Hits:
    """Bias codes plus the largest possible sum of products must fit int32."""
    for node, x, weight, bias in _biased(model):
        codes = operand(bias)
        if codes is None or codes.data is None or weight.data is None or x.zero_point is None or x.dtype in WIDE:
            continue  # not quantized, or computed in float
        reach = max(abs(x.lo - int(x.zero_point.min())), abs(x.hi - int(x.zero_point.max())))
        total = np.abs(codes.data.astype(np.int64)).reshape(-1) + reach * _absolute_sums(node, weight.data)
        if total.max(initial=0) > INT32_MAX:
            yield where(node), f"bias and products can reach {int(total.max())}, beyond int32; use a larger scale"


def _absolute_sums(node: ir.Node, weight: Array) -> Array:
    """Sum of the magnitudes of the weights behind each output channel, [channels] int64."""
    axis = 0 if node.op_type == "Conv" or _flag(node, "transB") else weight.ndim - 1
    magnitudes = np.abs(np.moveaxis(weight.astype(np.int64), axis, 0))
    return np.asarray(magnitudes.reshape(len(magnitudes), -1).sum(1))
