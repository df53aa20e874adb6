"""Count the multiply-accumulates of a node from the shapes of what it reads and writes.

A multiply-accumulate is one multiplication of two values whose products are summed: convolutions, products of matrices,
recurrences, attention, and a Mul whose result a ReduceSum or ReduceMean adds up along an axis of both factors.
Elementwise products, norms and interpolation count none, as in other tools.

Must not know: which kernels are integer, how shapes were found, files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from runtime_tests.ort.onnx_operators import WEIGHT_INPUT, WITHOUT_PRODUCTS
from runtime_tests.ort.operands import array, consumers, flag

__all__ = ["macs", "reads_shapes"]

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Call:
    """One node with the shapes of its inputs (() for absent ones) and of its first output."""

    node: ir.Node
    inputs: Sequence[Shape]
    output: Shape

    def input(self, index: int) -> Shape:
        return self.inputs[index] if index < len(self.inputs) else ()

    @property
    def weight(self) -> Shape:
        return self.input(WEIGHT_INPUT[self.node.op_type])


def _convolution(call: _Call) -> int:
    return math.prod(call.output) * math.prod(call.weight[1:])


def _transposed_convolution(call: _Call) -> int:
    return math.prod(call.input(0)) * math.prod(call.weight[1:])


def _matrix_product(call: _Call) -> int:
    rows = call.weight[-1 if len(call.weight) == 1 or flag(call.node, "transB") else -2]
    return math.prod(call.output) * rows


def _blocks(call: _Call) -> int:
    return math.prod(call.output) * flag(call.node, "K")


def _recurrence(call: _Call) -> int:
    """Count the weights of the input and of the state, in all directions, for each step of each sample."""
    return math.prod(call.input(0)[:2]) * (math.prod(call.input(1)) + math.prod(call.input(2)))


def _einsum(call: _Call) -> int | None:
    """Return one per point of all subscripts; a single operand is not multiplied, several are joined one by one."""
    equation = call.node.attributes["equation"].as_string().replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, call.inputs, strict=True):
        before, dots, after = term.partition("...")
        missing = len(shape) - len(before) - len(after)
        if (missing > 0 and not dots) or missing < 0:
            return None
        named = [*before, *(f"...{index}" for index in range(-missing, 0)), *after]
        for name, size in zip(named, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return math.prod(sizes.values()) * (len(terms) - 1)


def _attention(call: _Call) -> int | None:
    """Count q k^T and p v of ONNX's Attention: heads and widths are in the shapes, or in attributes for 3-d inputs."""
    query, key, value = (call.input(index) for index in range(3))
    if len(query) != len(key) or len(key) != len(value) or len(query) not in (3, 4):
        return None
    steps = key[-2] + (call.input(4)[-2] if call.input(4) else 0)
    if len(query) == 4:
        return math.prod(query[:3]) * steps * (query[3] + value[3])
    heads, value_heads = flag(call.node, "q_num_heads"), flag(call.node, "kv_num_heads")
    if not heads or not value_heads:
        return None
    return query[0] * query[1] * steps * (query[2] + heads * value[2] // value_heads)


def _multi_head_attention(call: _Call) -> int | None:
    """Count q k^T and p v where query, key and value are three tensors [batch, steps, width]."""
    query, key, value = (call.input(index) for index in range(3))
    if any(len(shape) != 3 for shape in (query, key, value)) or call.input(6):
        return None
    return query[0] * query[1] * key[1] * (query[2] + value[2])


def _projected_attention(call: _Call) -> int | None:
    """Count the projection of onnxruntime's Attention, q k^T and p v, where nothing is kept from earlier calls."""
    x, weight = call.input(0), call.input(1)
    if len(x) != 3 or len(weight) != 2 or call.input(4) or "qkv_hidden_sizes" in call.node.attributes:
        return None
    return math.prod(x) * weight[1] + 2 * x[0] * x[1] * x[1] * (weight[1] // 3)


def _summed_product(call: _Call) -> int:
    """Count a Mul of two values whose products a reduction adds up: along an axis that both vary along."""
    left, right = call.node.inputs
    if left is right:
        return 0
    rank = len(call.output)
    aligned = [(1,) * (rank - len(shape)) + tuple(shape) for shape in call.inputs]
    both = {axis for axis in range(rank) if all(shape[axis] > 1 for shape in aligned)}
    sums = (reader for reader in consumers(call.node.outputs[0]) if reader.op_type in ("ReduceSum", "ReduceMean"))
    return math.prod(call.output) if any(both & _reduced(reader, rank) for reader in sums) else 0


def _reduced(node: ir.Node, rank: int) -> set[int]:
    stated = array(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = range(rank) if stated is None or not stated.size else stated.reshape(-1).tolist()
    return {int(axis) % rank for axis in axes}


_RULES: dict[tuple[str, str], Callable[[_Call], int | None]] = {
    **{
        ("", name): _convolution if "Conv" in name else _matrix_product
        for name in WEIGHT_INPUT
        if name != "ConvTranspose"
    },
    ("", "ConvTranspose"): _transposed_convolution,
    ("", "MatMulNBits"): _blocks,
    **dict.fromkeys([("", name) for name in ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")], _recurrence),
    ("", "Einsum"): _einsum,
    ("", "Attention"): _attention,
    ("com.microsoft", "Attention"): _projected_attention,
    ("com.microsoft", "MultiHeadAttention"): _multi_head_attention,
    ("", "Mul"): _summed_product,
}
"""How the products of each operator are counted; an empty domain stands for all that have no rule of their own."""

STANDARD = ("", "ai.onnx", "com.ms.internal.nhwc")
_MULTIPLY = frozenset({"DFT", "STFT", "Det", "CausalConvWithState", "LinearAttention"})
"""Operators of ONNX whose products no rule counts."""


def reads_shapes(node: ir.Node) -> bool:
    """Return whether `macs` needs the shapes of what the node reads."""
    return _rule(node) is not None


def macs(node: ir.Node, shapes: Mapping[str, Shape]) -> int | None:
    """Return the multiply-accumulates of one run of a node, None where they cannot be counted.

    A node that runs other nodes (If, Loop, Scan) cannot be counted if one of those has products.

    shapes: of the values that the node reads and writes, by name; constants need none.
    """
    if (rule := _rule(node)) is not None:
        inputs = [_shape(value, shapes) for value in node.inputs]
        output = next(value for value in node.outputs if value.name)
        return rule(_Call(node, inputs, _shape(output, shapes)))
    return None if _is_unknown(node) else 0


def _rule(node: ir.Node) -> Callable[[_Call], int | None] | None:
    return _RULES.get((node.domain, node.op_type)) or _RULES.get(("", node.op_type))


def _is_unknown(node: ir.Node) -> bool:
    """Return whether a node may have products that no rule counts, itself or in the nodes that it runs."""
    bodies = [
        attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH
    ]
    inside = [inner for body in bodies for inner in body]
    if any(_is_unknown(inner) or _rule(inner) not in (None, _summed_product) for inner in inside):
        return True
    return node.op_type in _MULTIPLY if node.domain in STANDARD else node.op_type not in WITHOUT_PRODUCTS


def _shape(value: ir.Value | None, shapes: Mapping[str, Shape]) -> Shape:
    if value is None:
        return ()
    if value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    return shapes[str(value.name)]
