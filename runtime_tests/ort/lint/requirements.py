"""Requirements of runtimes and compilers other than onnxruntime, each a function that makes a rule of the linter.

A profile is a table of calls of these functions: what is required, how bad it is to miss it, and who says so.

Must not know: which profiles there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from runtime_tests.ort.lint.parameters import PARAMETER_RULES
from runtime_tests.ort.lint.portability import PORTABILITY_RULES
from runtime_tests.ort.lint.rule import Case, Hits, Rule, each
from runtime_tests.ort.lint.subjects import Quantizer, biased, merges, nodes, quantizers, weighted
from runtime_tests.ort.lint.weights import bias_scale_differs
from runtime_tests.ort.onnx_operators import DEQUANTIZE, PRODUCTS, QUANTIZE
from runtime_tests.ort.operands import Product, array, consumers, inputs, operand, quantizers_after, where

__all__ = [
    "activation_types",
    "bias_bits",
    "biases_in_float",
    "biases_of_codes",
    "fixed_shapes",
    "highest_opset",
    "no_clips_of_codes",
    "no_double_quantizers",
    "no_early_quantizers",
    "no_skipped_clips",
    "no_symmetric_relus",
    "no_unfused_clips",
    "one_scale_per_value",
    "operators",
    "powers_of_two",
    "quantized_results",
    "same_scales",
    "same_ties",
    "symmetric_activations",
    "symmetric_inputs",
    "symmetric_weights",
    "weight_scales_per_tensor",
    "weight_types",
]

BOTH, WRITERS = quantizers(QUANTIZE, DEQUANTIZE), quantizers(QUANTIZE)
LAYERS = PRODUCTS | {"ConvTranspose"}
ALWAYS = frozenset({QUANTIZE, DEQUANTIZE, "Constant", "Identity"})
ACTIVATIONS = ("Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Sigmoid", "Swish", "Tanh")


def operators(supported: Iterable[str], severity: str, source: str) -> Rule:
    """Require that every operator is in a list."""
    known = ALWAYS | frozenset(supported)

    def check(case: Case) -> Hits:
        for graph in case.graphs.graphs():
            for node in graph:
                if node.op_type not in known:
                    yield where(node), f"{node.op_type} is not supported; rewrite it, or expect it on the CPU in float"

    return Rule("unsupported-operator", severity, "It is refused, or leaves the accelerator.", check, source)


def highest_opset(opset: int, source: str) -> Rule:
    """Require an opset that the importer reads."""

    def check(case: Case) -> Hits:
        found = case.graphs.graph.opset_imports.get("", 1)
        if found > opset:
            yield "model", f"it has opset {found}, but at most {opset} is read; export it with a lower one"

    return Rule("opset", "error", "The importer does not know operators of later opsets.", check, source)


def fixed_shapes(source: str) -> Rule:
    """Require inputs whose dimensions are all numbers."""

    def check(case: Case) -> Hits:
        for value in case.graphs.graph.inputs:
            if value.shape is None or not value.shape.is_static():
                yield value.name or "input", f"its shape is {value.shape}; fix every dimension"

    return Rule("dynamic-shape", "error", "The compiler needs fixed shapes.", check, source)


def activation_types(types: Iterable[str], source: str) -> Rule:
    """Require types of the codes of activations, such as "INT8"."""
    allowed = frozenset(types)
    return Rule("activation-type", "error", "Codes of another type are refused.", each(
        WRITERS, lambda q: q.is_activation and q.dtype is not None and q.dtype.name not in allowed,
        "activations are {0.dtype}; allowed: " + ", ".join(sorted(allowed))), source)  # fmt: skip


def weight_types(types: Iterable[str], source: str) -> Rule:
    """Require types of the codes of weights."""
    allowed = frozenset(types)
    return Rule("weight-type", "error", "Codes of another type are refused, or the layer runs in float.", each(
        weighted, lambda p: p.weight.dtype is not None and p.weight.dtype.name not in allowed,
        "weights are {0.weight.dtype}; allowed: " + ", ".join(sorted(allowed))), source)  # fmt: skip


def symmetric_activations(source: str, readers: Iterable[str] | None = None) -> Rule:
    """Require zero point 0 of activations; readers: operators that need it, None for all."""
    only = None if readers is None else frozenset(readers)

    def broken(quantizer: Quantizer) -> bool:
        if not quantizer.is_activation or quantizer.zero_point is None or not quantizer.zero_point.any():
            return False
        dequantizers = consumers(quantizer.node.outputs[0])
        return only is None or any(x.op_type in only for y in dequantizers for x in consumers(y.outputs[0]))

    return Rule("activation-zero-point", "error", "The arithmetic has no zero points there.", each(
        WRITERS, broken, "its zero point is not 0; use a symmetric grid"), source)  # fmt: skip


def symmetric_weights(source: str) -> Rule:
    """Require zero point 0 of weights."""
    return Rule("weight-zero-point", "error", "The arithmetic has no zero points of weights.", each(
        weighted, lambda p: p.weight.zero_point is not None and bool(p.weight.zero_point.any()),
        "its weights have a zero point; use a symmetric grid"), source)  # fmt: skip


def symmetric_inputs(source: str) -> Rule:
    """Require zero point 0 of the inputs of the model."""
    return Rule("input-zero-point", "error", "Inputs are converted without a zero point.", each(
        WRITERS, lambda q: q.node.inputs[0] is not None and q.node.inputs[0].is_graph_input()
        and q.zero_point is not None and bool(q.zero_point.any()),
        "it reads an input of the model and its zero point is not 0; use a symmetric grid"), source)  # fmt: skip


def weight_scales_per_tensor(source: str, ops: Iterable[str] = LAYERS, severity: str = "error") -> Rule:
    """Require one scale per weight of these layers."""

    def broken(node: ir.Node) -> bool:
        weight = operand(node.inputs[1])
        return weight is not None and weight.is_constant and weight.scale is not None and weight.scale.size > 1

    return Rule("weight-granularity", severity, "Scales per channel are refused there.", each(
        nodes(*ops), broken, "its weights have a scale per channel; use one per tensor"), source)  # fmt: skip


def powers_of_two(source: str) -> Rule:
    """Require scales that are powers of two, except of biases, whose scales follow."""

    def broken(quantizer: Quantizer) -> bool:
        if quantizer.scale is None or quantizer.is_bias:
            return False
        mantissa, _ = np.frexp(quantizer.scale.astype(np.float64))
        return bool(np.any(mantissa != 0.5))

    return Rule("power-of-two", "error", "Scales are shifts, so that others are rounded or refused.", each(
        BOTH, broken, "its scale is not a power of two"), source)  # fmt: skip


def biases_in_float(source: str) -> Rule:
    """Require that biases are float."""
    return Rule("bias-not-float", "error", "Dequantizers of int32 codes are refused.", each(
        biased, lambda p: p.bias is not None, "its bias is stored as codes; store floats"), source)  # fmt: skip


def biases_of_codes(source: str) -> tuple[Rule, Rule]:
    """Require biases of int32 codes whose scale is that of the input times that of the weight."""
    return (
        Rule("float-bias", "warning", "A float bias is quantized by the compiler, or keeps the layer in float.", each(
            biased, lambda p: p.bias is None, "its bias is float; store INT32 codes"), source),
        Rule("bias-scale", "error", "The scale of a bias is not read: it is taken for this product.", each(
            biased, bias_scale_differs, "the scale of its bias is not input scale * weight scale"), source),
    )  # fmt: skip


def bias_bits(bits: int, source: str) -> Rule:
    """Require codes of biases that a number of bits holds."""
    largest = 2 ** (bits - 1) - 1

    def broken(found: Product) -> bool:
        codes = None if found.bias is None else found.bias.data
        return codes is not None and bool(np.any(np.abs(codes.astype(np.int64)) > largest))

    return Rule("bias-range", "error", "The float32 number that holds a larger bias stands for other codes.", each(
        biased, broken, f"its bias has codes beyond {largest}; use a larger scale of its weights"), source)  # fmt: skip


def same_ties(source: str) -> Rule:
    """Require scales at which the families of processors of the target round alike."""
    (rule,) = (rule for rule in PORTABILITY_RULES if rule.name == "different-ties")
    return replace(rule, source=source)


def quantized_results(ops: Iterable[str], severity: str, source: str) -> Rule:
    """Require that a quantizer reads the result of these operators, after a ReLU or clip at most."""

    def ends(value: ir.Value) -> bool:
        readers = consumers(value)
        if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
            readers = consumers(readers[0].outputs[0])
        return bool(readers) and all(reader.op_type == QUANTIZE for reader in readers)

    return Rule("float-result", severity, "A layer on codes has to write codes.", each(
        nodes(*ops), lambda node: operand(node.inputs[0]) is not None and not ends(node.outputs[0]),
        "{0.op_type} writes floats; quantize its result"), source)  # fmt: skip


def same_scales(ops: Iterable[str], severity: str, source: str) -> Rule:
    """Require one scale and zero point of all operands and the result of these operators."""

    def pairs(node: ir.Node) -> Iterator[tuple[Any, ...]]:
        read = [found.node for value in node.inputs if (found := operand(value)) is not None]
        for quantizer in (*read, *quantizers_after(node.outputs[0])):
            values = map(array, inputs(quantizer, 3)[1:])
            yield tuple(None if value is None else value.tobytes() for value in values)

    return Rule("shared-scale", severity, "Codes are copied, so that different scales need a step of their own.", each(
        nodes(*ops), lambda node: len(set(pairs(node))) > 1,
        "the operands and the result of {0.op_type} have different scales or zero points; give all the same"),
        source)  # fmt: skip


def no_clips_of_codes(source: str) -> Rule:
    """Require that nothing clips codes."""
    return Rule("clip-of-codes", "error", "There is no such operator on integers.", each(
        nodes("Clip", "Max", "Min"), lambda node: node.inputs[0] is not None and _is_codes(node.inputs[0]),
        "{0.op_type} of codes; clip the floats before the quantizer"), source)  # fmt: skip


def no_unfused_clips(source: str) -> Rule:
    """Require that a clip between a layer and its quantizer has the lower bound 0."""

    def broken(node: ir.Node) -> bool:
        made = node.inputs[0].producer() if node.inputs[0] is not None else None
        low = array(inputs(node, 2)[1])
        is_layer = made is not None and made.op_type in PRODUCTS and operand(made.inputs[0]) is not None
        return is_layer and low is not None and bool(np.any(low != 0)) and bool(quantizers_after(node.outputs[0]))

    return Rule("unfused-clip", "error", "A layer is not joined with its quantizer across such a clip.", each(
        nodes("Clip"), broken, "it stands between a layer and its quantizer; quantize before it too"),
        source)  # fmt: skip


def no_skipped_clips(source: str) -> Rule:
    """Require that a clip of the codes of a layer has both bounds within their grid, or neither."""

    def broken(node: ir.Node) -> bool:
        codes, bounds = operand(node.inputs[0]), [array(value) for value in inputs(node, 3)[1:]]
        if codes is None or codes.scale is None or codes.zero_point is None or codes.node.inputs[0] is None:
            return False
        quantizer = codes.node.inputs[0].producer()
        made = quantizer.inputs[0].producer() if quantizer is not None and quantizer.inputs[0] is not None else None
        low, high = ((code - codes.zero_point) * codes.scale for code in (codes.lo, codes.hi))
        beyond = bounds[0] is None or np.all(bounds[0] <= low), bounds[1] is None or np.all(bounds[1] >= high)
        return made is not None and made.op_type in LAYERS and any(beyond) and not all(beyond)

    return Rule("skipped-clip", "error", "A clip is skipped if one of its bounds changes no code.", each(
        nodes("Clip"), broken, "one of its bounds is at the end of the grid of its input or beyond; write Max or Min"),
        source)  # fmt: skip


def _is_codes(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == QUANTIZE


def one_scale_per_value(source: str) -> Rule:
    """Require that codes are dequantized with the scale and zero point with which they were quantized."""

    def broken(node: ir.Node) -> bool:
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        if maker is None or maker.op_type != QUANTIZE:
            return False
        mine, theirs = ([array(value) for value in inputs(each, 3)[1:]] for each in (node, maker))
        pairs = zip(mine, theirs, strict=True)
        return any(a is not None and b is not None and not np.array_equal(a, b) for a, b in pairs)

    return Rule("dequantizer-scale", "error", "A tensor has one scale.", each(
        nodes(DEQUANTIZE), broken, "its scale or zero point is not that of the quantizer of these codes"),
        source)  # fmt: skip


def no_early_quantizers(source: str) -> Rule:
    """Require that no quantizer stands between a product and an activation function."""

    def broken(node: ir.Node) -> bool:
        before = operand(node.inputs[0])
        quantizer = before.node.inputs[0].producer() if before is not None and before.node.inputs[0] else None
        made = quantizer.inputs[0].producer() if quantizer is not None and quantizer.inputs[0] is not None else None
        return made is not None and made.op_type in PRODUCTS

    return Rule("early-quantizer", "warning", "The activation function is not fused into the product.", each(
        nodes(*ACTIVATIONS), broken, "a quantizer stands between {0.op_type} and the layer before it; remove it"),
        source)  # fmt: skip


def no_symmetric_relus(source: str) -> Rule:
    """Require that the lowest code after a ReLU is 0."""
    return Rule("symmetric-relu", "warning", "Half of the codes are never used.", each(
        merges("Relu"), lambda m: operand(m.node.inputs[0]) is None and not m.holds(0.0, None),
        "the zero point after this Relu is not the lowest code; use an asymmetric grid"), source)  # fmt: skip


def no_double_quantizers(source: str) -> Rule:
    """Require that nothing is quantized that was just dequantized."""
    (rule,) = (rule for rule in PARAMETER_RULES if rule.name == "double-qdq")
    check: Callable[[Case], Hits] = rule.check
    return Rule(rule.name, "warning", "Two pairs in a row round twice.", check, source)
