"""Find forms of a QDQ graph that onnxruntime refuses, computes wrongly, or runs in float without need.

Rules read the structure of the file only; nothing is run. "error" means that the model does not load or that its
numbers are not those of the QDQ text; "warning" means that something runs in float or wastes space.
Must not know: who wrote the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from calibrators.grid.spec import Target
from runtime_tests.ort.meant_for import target_of
from runtime_tests.ort.onnx_operators import (
    DEQUANTIZE,
    NEED_QUANTIZER_WHEN_SIGNED,
    PRODUCTS,
    QUANTIZE,
    SHARE_PARAMETERS,
)
from runtime_tests.ort.operands import (
    Product,
    array,
    code_type,
    consumers,
    flag,
    inputs,
    operand,
    products,
    qparams,
    quantizers_after,
    type_range,
    where,
)
from runtime_tests.ort.sessions import Model, Source, loads

__all__ = ["RULES", "Finding", "Rule", "lint"]

Array = NDArray[Any]
Hits = Iterator[tuple[str, str]]  # place and message of each violation of a rule

SIGNED_FAILS_FROM_OPSET = 21
WIDE = (ir.DataType.INT16, ir.DataType.UINT16)
FOUR_BIT = (ir.DataType.INT4, ir.DataType.UINT4)
TWO_BIT = (ir.DataType.INT2, ir.DataType.UINT2)
NARROW = (*FOUR_BIT, *TWO_BIT)
BYTE = (ir.DataType.INT8, ir.DataType.UINT8)
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Finding:
    """One violation: its rule, severity ("error" or "warning"), node or value, and a message that says what to do."""

    rule: str
    severity: str
    where: str
    message: str


@dataclass(frozen=True)
class Rule:
    """A check of a whole model.

    why:      what goes wrong if the rule is broken.
    on_proto: whether the rule reads the protobuf, before it is known to be a graph.
    """

    name: str
    severity: str
    why: str
    check: Callable[[Any], Hits]
    on_proto: bool = False


Subject = TypeVar("Subject", bound="ir.Node | Product | _Quantizer | _Merge")


def lint(model: Source, target: Target | None = None) -> list[Finding]:
    """Return the findings of every rule, errors first; external weights are read only where a rule needs their values.

    A file whose names are not unique is not a graph; then only the rules on the protobuf run.

    target: the runtime that the file is meant for; None: the one that its metadata name, else the default.
    raises: ModelError for a file that is not an ONNX model, UnknownNameError for a target that its metadata name.
    """
    model = Model.of(model)
    ignored = (target or target_of(model)).ignored_rules
    rules = [rule for rule in RULES.values() if rule.name not in ignored]
    findings = [finding for rule in rules if rule.on_proto for finding in _apply(rule, model.proto)]
    if not any(finding.rule == "duplicate-name" for finding in findings):
        graphs = model.graph_model
        findings += [finding for rule in rules if not rule.on_proto for finding in _apply(rule, graphs)]
    return sorted(findings, key=lambda finding: finding.severity != "error")


def _apply(rule: Rule, model: Any) -> list[Finding]:
    return [Finding(rule.name, rule.severity, place, message) for place, message in rule.check(model)]


def _any(
    subjects: Callable[[ir.Model], Iterable[Subject]],
    broken: Callable[[Subject], object],
    message: str | Callable[[Subject], str],
) -> Callable[[ir.Model], Hits]:
    """Return the check that reports each of `subjects` that is `broken`; `message` is formatted with the subject."""

    def check(model: ir.Model) -> Hits:
        for subject in subjects(model):
            if broken(subject):
                text = message.format(subject) if isinstance(message, str) else message(subject)
                yield where(subject if isinstance(subject, ir.Node) else subject.node), text

    return check


# ---- subjects of rules


def _nodes(*ops: str) -> Callable[[ir.Model], Iterator[ir.Node]]:
    return lambda model: (node for graph in model.graphs() for node in graph if node.op_type in ops)


@dataclass(frozen=True, eq=False)
class _Quantizer:
    """A QuantizeLinear or DequantizeLinear; dtype: of its codes."""

    node: ir.Node
    scale: Array | None
    zero_point: Array | None
    dtype: ir.DataType | None

    @property
    def is_activation(self) -> bool:
        return array(self.node.inputs[0]) is None

    @property
    def is_one_channel(self) -> bool:
        """Whether parameters of shape [1] are per channel, because their constant has one channel."""
        data = array(self.node.inputs[0])
        return data is not None and data.ndim > 0 and data.shape[flag(self.node, "axis", 1 % data.ndim)] == 1


def _quantizers(*ops: str) -> Callable[[ir.Model], Iterator[_Quantizer]]:
    def find(model: ir.Model) -> Iterator[_Quantizer]:
        for node in _nodes(*ops)(model):
            scale, zero_point = (array(value) for value in inputs(node, 3)[1:])
            yield _Quantizer(node, scale, zero_point, code_type(node))

    return find


def _products(model: ir.Model) -> Iterator[Product]:
    return products(node for graph in model.graphs() for node in graph)


def _biased(model: ir.Model) -> Iterator[Product]:
    return (found for found in _products(model) if found.node.op_type != "MatMul" and found.bias_value is not None)


@dataclass(frozen=True, eq=False)
class _Merge:
    """A Relu or Clip and a QuantizeLinear that reads it, into which the runtime may merge it."""

    node: ir.Node
    quantizer: ir.Node

    @property
    def dtype(self) -> ir.DataType | None:
        return code_type(self.quantizer)

    def holds(self, low: Array | float | None, high: Array | float | None) -> bool:
        """Return whether the quantizer saturates at these bounds or within them."""
        return self._saturates(low, 0) and self._saturates(high, 1)

    def _saturates(self, bound: Array | float | None, end: int) -> bool:
        if bound is None:
            return True
        scale, zero_point = qparams(self.quantizer)
        if scale is None or zero_point is None or scale.size != 1:
            return False
        code = float((np.rint(np.float32(bound) / scale.astype(np.float32)) + zero_point).reshape(()))
        limit = type_range(self.dtype)[end]
        return code >= limit if end else code <= limit


def _merges(op: str) -> Callable[[ir.Model], Iterator[_Merge]]:
    """Return a search for nodes of type `op` before quantizers, except for 16-bit ones, into which none is merged."""

    def find(model: ir.Model) -> Iterator[_Merge]:
        pairs = (_Merge(node, after) for node in _nodes(op)(model) for after in quantizers_after(node.outputs[0]))
        return (pair for pair in pairs if pair.dtype not in WIDE)

    return find


# ---- conditions


def _has_kernel(value: ir.Value | None) -> bool:
    """Return whether `value` comes from an operator whose integer kernel absorbs a Relu after it."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type in PRODUCTS | {"Add", "Mul"} and operand(node.inputs[0]) is not None


def _dequantizer(node: ir.Node) -> str:
    """Return the name of the DequantizeLinear of an activation before `node`, '' if there is none."""
    before = operand(node.inputs[0])
    return "" if before is None or before.is_constant else where(before.node)


def _readers_of_codes(quantizer: _Quantizer) -> int:
    return sum(len(each.outputs[0].uses()) for each in consumers(quantizer.node.outputs[0]))


def _ends_quantized(value: ir.Value) -> bool:
    readers = consumers(value)
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = consumers(readers[0].outputs[0])
    return bool(readers) and not value.is_graph_output() and all(reader.op_type == QUANTIZE for reader in readers)


def _has_float_constant(node: ir.Node) -> bool:
    values = inputs(node, 2)
    is_float = any(array(value) is not None for value in values)
    return is_float and any(map(operand, values)) and bool(quantizers_after(node.outputs[0]))


def _is_between_quantizers(node: ir.Node) -> bool:
    return operand(node.inputs[0]) is not None and bool(quantizers_after(node.outputs[0]))


def _has_quantized_weight_alone(node: ir.Node) -> bool:
    x, weight = (operand(value) for value in inputs(node, 2))
    return x is None and weight is not None and weight.is_constant and not flag(node, "transB")


def _bias_scale_differs(found: Product) -> bool:
    """Return whether the scale of the bias differs from float32(input scale * weight scale) in any bit.

    Integer kernels assume that it does not. onnxruntime 1.31 does not compare the scales for Gemm, and accepts a
    difference of 1 % for Conv, so that the numbers are silently wrong; beyond that Conv runs in float.
    """
    scales = [codes.scale if codes is not None else None for codes in (found.bias, found.x, found.weight)]
    bias, x, weight = scales
    if bias is None or x is None or weight is None:
        return False
    expected = x * weight
    same_shape = expected.size in (1, bias.size)  # a scalar means one value for all channels
    same = expected.dtype == bias.dtype and same_shape and np.all(expected.reshape(-1) == bias.reshape(-1))
    return not same


# ---- rules with more than one message


def _duplicate_names(model: onnx.ModelProto) -> Hits:
    graph = model.graph
    made = Counter(name for node in graph.node for name in node.output if name)
    made.update({info.name for info in graph.input} | {tensor.name for tensor in graph.initializer})
    made.update(name for name, count in Counter(tensor.name for tensor in graph.initializer).items() if count > 1)
    for name, count in made.items():
        if count > 1:
            yield name, f"{count} nodes or initializers have this output name; rename all but one"


def _refused_versions(model: onnx.ModelProto) -> Hits:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    if not loads(opset=opset, ir_version=8):
        yield "opset", f"onnxruntime {ort.__version__} does not load opset {opset}; write opset 20 (21 for 4-bit types)"
    if not loads(opset=13, ir_version=model.ir_version):
        yield "ir_version", f"onnxruntime {ort.__version__} does not load IR version {model.ir_version}; write 10"


def _packed_data(model: onnx.ModelProto) -> Hits:
    narrow = {dtype.value for dtype in (*BYTE, *NARROW)}
    for tensor in model.graph.initializer:
        if tensor.data_type in narrow and tensor.int32_data:
            yield tensor.name, "its codes are stored in int32_data, one varint per code or pair; store them in raw_data"


def _qparam_shapes(model: ir.Model) -> Hits:
    for found in _quantizers(QUANTIZE, DEQUANTIZE)(model):
        scale, zero_point = found.scale, found.zero_point
        if scale is None:
            continue
        if zero_point is not None and zero_point.shape != scale.shape:
            shapes = f"scale has shape {list(scale.shape)}, zero point {list(zero_point.shape)}"
            yield where(found.node), f"{shapes}; make the shapes equal"
        if scale.shape == (1,) and not found.is_one_channel:
            yield where(found.node), "scale and zero point have shape [1]; make them 0-d, or fusion fails"


def _different_qparams(model: ir.Model) -> Hits:
    def is_same(a: ir.Value | None, b: ir.Value | None) -> bool:
        x, y = array(a), array(b)
        return a is b or (x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y))

    for node in _nodes(*SHARE_PARAMETERS)(model):
        before, mode = operand(node.inputs[0]), node.attributes.get("mode")
        if before is None or before.is_constant:
            continue
        if node.op_type == "Resize" and mode is not None and mode.as_string() != "nearest":
            continue
        for after in (reader for output in node.outputs for reader in quantizers_after(output)):
            if not all(map(is_same, inputs(before.node, 3)[1:], inputs(after, 3)[1:])):
                yield (
                    where(node),
                    f"{node.op_type} is between quantizers of different scale or zero point; give both the same",
                )


def _softmax_scales(model: ir.Model) -> Hits:
    for node in _nodes("Softmax")(model):
        for reader in quantizers_after(node.outputs[0]) if operand(node.inputs[0]) is not None else ():
            scale, _ = qparams(reader)
            steps = None if scale is None else np.float32(1) / scale.astype(np.float32)
            if steps is not None and np.any(steps != np.floor(steps)):
                yield where(reader), "1/scale is not an integer, and the softmax kernel rounds it down; use scale 1/256"


def _signed_moves(model: ir.Model) -> Hits:
    if model.graph.opset_imports.get("", 1) < SIGNED_FAILS_FROM_OPSET:
        return
    for node in _nodes(*NEED_QUANTIZER_WHEN_SIGNED)(model):
        before, readers = operand(node.inputs[0]), consumers(node.outputs[0])
        if before is None or before.is_constant or before.dtype != ir.DataType.INT8:
            continue
        if len(quantizers_after(node.outputs[0])) < max(1, len(readers)):
            yield where(node), f"{node.op_type} of int8 codes without a quantizer after it; use UINT8, or opset 20"


def _float_weights(model: ir.Model) -> Hits:
    for node in _nodes(*PRODUCTS)(model):
        if operand(node.inputs[0]) is not None and array(inputs(node, 2)[1]) is not None:
            yield where(node), "its activations are quantized but its weights are float; store the weights as codes"
    for found in _quantizers(QUANTIZE)(model):
        if not found.is_activation:
            yield where(found.node), "it quantizes a constant, so the file holds floats; store the codes"


def _overflows(model: ir.Model) -> Hits:
    for found in _biased(model):
        node, x, codes, weight = found.node, found.x, found.bias, found.weight.data
        if codes is None or codes.data is None or weight is None or x.zero_point is None or x.dtype in WIDE:
            continue  # not quantized, or computed in float
        reach = max(abs(x.lo - int(x.zero_point.min())), abs(x.hi - int(x.zero_point.max())))
        axis = 0 if node.op_type == "Conv" or flag(node, "transB") else weight.ndim - 1
        magnitudes = np.abs(np.moveaxis(weight.astype(np.int64), axis, 0))  # [channels, ...]
        sums = magnitudes.reshape(len(magnitudes), -1).sum(1)
        total = np.abs(codes.data.astype(np.int64)).reshape(-1) + reach * sums
        if total.max(initial=0) > INT32_MAX:
            yield where(node), f"bias and products can reach {int(total.max())}, beyond int32; use a larger scale"


# ---- the table

_both, _quantize = _quantizers(QUANTIZE, DEQUANTIZE), _quantizers(QUANTIZE)

_TABLE = (
    # the file
    Rule("duplicate-name", "error", "Two values share a name: the file is no graph.", _duplicate_names, on_proto=True),
    Rule("runtime-version", "error", "The installed onnxruntime does not load it.", _refused_versions, on_proto=True),
    Rule("packed-data", "warning", "int32_data takes up to four bytes per narrow code.", _packed_data, on_proto=True),
    # quantization parameters
    Rule("qparam-shape", "error", "Per tensor both must be 0-d, else have one shape.", _qparam_shapes),
    Rule("missing-zero-point", "error", "Without the zero point input Gemm is not fused.", _any(
        _nodes(QUANTIZE, DEQUANTIZE), lambda node: inputs(node, 3)[2] is None,
        "the zero point input is absent; write it even if it is 0")),
    Rule("float16-scale", "error", "Float16 scales are refused for float32 data and never fused.", _any(
        _both, lambda q: q.scale is not None and q.scale.dtype != np.float32,
        "its scale is {0.scale.dtype}, but integer kernels need float32; convert it")),
    Rule("double-qdq", "error", "Two pairs in a row are merged into one with new parameters.", _any(
        _nodes(QUANTIZE), _dequantizer,
        lambda q: f"it quantizes what {_dequantizer(q)} just dequantized; keep only one of the pairs")),
    Rule("different-qparams", "warning", "Data movement between different parameters runs in float.",
         _different_qparams),
    Rule("softmax-scale", "warning", "QLinearSoftmax multiplies by floor(1/scale).", _softmax_scales),
    # activations
    Rule("narrow-activation", "error", "4- and 2-bit activations do not load, or have wrong values.", _any(
        _both, lambda q: q.dtype in NARROW and q.is_activation,
        "activations are typed {0.dtype}; store them as UINT8 and narrow them by a Clip of the codes")),
    Rule("wide-activation", "warning", "16-bit activations have no integer kernels.", _any(
        _quantize, lambda q: q.dtype in WIDE and q.is_activation,
        "{0.dtype} activations are computed in float; use UINT8")),
    Rule("signed-fan-out", "warning", "int8 codes with several readers stay int8 on x86: the readers run in float.",
         _any(_quantize, lambda q: q.dtype == ir.DataType.INT8 and q.is_activation and _readers_of_codes(q) > 1,
              lambda q: f"int8 codes with {_readers_of_codes(q)} readers are not moved to uint8 kernels on x86; "
              "use UINT8")),
    Rule("signed-reshape", "error", "Sessions fail from opset 21 on.", _signed_moves),
    Rule("relu-narrow", "error", "A Relu before 4- or 2-bit codes is dropped whatever the zero point.", _any(
        _merges("Relu"), lambda m: m.dtype in NARROW and not m.holds(0.0, None),
        "onnxruntime drops this Relu before {0.dtype} codes, so negative values pass; use UINT8 codes")),
    Rule("relu-not-merged", "warning", "A Relu merges into a quantizer whose zero point is the lowest code.", _any(
        _merges("Relu"), lambda m: m.dtype not in NARROW and _has_kernel(m.node.inputs[0]) and not m.holds(0.0, None),
        "the zero point after this Relu is not the lowest code, so the operator before it stays in float")),
    Rule("clip-not-merged", "warning", "A Clip merges into a quantizer that saturates at least as early.", _any(
        _merges("Clip"), lambda m: not m.holds(*map(array, inputs(m.node, 3)[1:])),
        "the quantizer after this Clip holds codes beyond its bounds; clip the codes instead")),
    # operators in float
    Rule("bare-flatten", "warning", "Flatten does not pass quantization on: its readers compute in float.", _any(
        _nodes("Flatten"), lambda node: operand(node.inputs[0]) is not None
        and any(reader.op_type != QUANTIZE for reader in consumers(node.outputs[0])),
        "Flatten of codes without a quantizer after it; put the same parameters on both sides")),
    Rule("float-output", "warning", "Conv has integer kernels only where its output is quantized.", _any(
        _products, lambda p: p.node.op_type == "Conv" and not _ends_quantized(p.node.outputs[0]),
        "its output is not quantized (a Relu or Clip may stand between), so it runs in float")),
    Rule("float-operand", "warning", "Add and Mul have integer kernels for two quantized operands.", _any(
        _nodes("Add", "Mul"), _has_float_constant,
        "{0.op_type} with a float constant runs in float; store the constant as codes")),
    Rule("reduce-mean", "warning", "ReduceMean has no integer kernel.", _any(
        _nodes("ReduceMean"), _is_between_quantizers,
        "ReduceMean runs in float; over the image it can be written as GlobalAveragePool")),
    # weights
    Rule("narrow-weight", "error", "2-bit weights beside quantized activations: sessions do not build.", _any(
        _products, lambda p: p.weight.dtype in TWO_BIT,
        "{0.weight.dtype} weights do not load; store the codes as INT8")),
    Rule("float-kernel-weight", "warning", "4- and 16-bit weights are expanded to float at every run.", _any(
        _products, lambda p: p.weight.dtype in (*FOUR_BIT, *WIDE),
        "{0.weight.dtype} weights have no integer kernel here; store the codes as INT8")),
    Rule("unsigned-weight", "warning", "Unsigned weights use the slow kernels.", _any(
        _products, lambda p: p.weight.dtype == ir.DataType.UINT8,
        "UINT8 weights run at less than half the speed of INT8 weights; store INT8")),
    Rule("blocked-weight", "error", "Blocked 8-bit weights beside quantized activations fail at run time.", _any(
        _products, lambda p: flag(p.weight.node, "block_size") and p.weight.dtype in BYTE,
        "its weights have one scale per block, but integer kernels take one per channel or tensor")),
    Rule("weight-only", "warning", "MatMulNBits quantizes its float activations by itself.", _any(
        _nodes("MatMul", "Gemm"), _has_quantized_weight_alone,
        "only its weights are quantized: by default activations are rounded inside the kernel too; set "
        "session.qdq_matmulnbits_accuracy_level to 0")),
    Rule("float-weight", "warning", "Float weights are quantized at load time, or keep a layer in float.",
         _float_weights),
    # biases
    Rule("float-bias", "warning", "A float bias keeps Gemm in float, and onnxruntime itself rounds that of Conv.", _any(
        _biased, lambda p: p.bias is None,
        "its bias is float; store INT32 codes with scale float32(input scale * weight scale)")),
    Rule("bias-type", "warning", "The codes of a bias must be int32.", _any(
        _biased, lambda p: p.bias is not None and p.bias.dtype != ir.DataType.INT32,
        "its bias has {0.bias.dtype} codes, so it runs in float; store INT32")),
    Rule("bias-scale", "error", "Kernels add the codes of a bias and ignore its scale.", _any(
        _biased, _bias_scale_differs,
        "the scale of its bias is not float32(input scale * weight scale), as kernels assume; store that scale")),
    Rule("accumulator-overflow", "error", "Bias and the largest possible sum must fit int32.", _overflows),
)  # fmt: skip

RULES = {rule.name: rule for rule in _TABLE}
"""Every rule by name."""
