"""Multiply-accumulates, counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtime_tests.ort.coverage import coverage
from tests.support.onnx_models import Net

STEPS, BATCH, WIDTH, STATE = 5, 2, 3, 4


def recurrent(op: str, gates: int, *, directions: int = 1) -> onnx.ModelProto:
    """A recurrence on [STEPS, BATCH, WIDTH]; its first output is left out."""
    net = Net()
    x = net.input("x", (STEPS, BATCH, WIDTH))
    w = net.constant("w", np.ones((directions, gates * STATE, WIDTH), np.float32))
    r = net.constant("r", np.ones((directions, gates * STATE, STATE), np.float32))
    direction = "bidirectional" if directions == 2 else "forward"
    net.nodes.append(helper.make_node(op, [x, w, r], ["", "last"], hidden_size=STATE, direction=direction))
    return net.model("last")


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrences_multiply_all_their_weights_at_every_step(op: str, gates: int, directions: int) -> None:
    found = coverage(recurrent(op, gates, directions=directions))
    assert found.macs == STEPS * BATCH * directions * gates * STATE * (WIDTH + STATE)
    assert found.integer_macs == 0.0
    assert [(node.op, node.macs) for node in found.float_nodes] == [(op, found.macs)]


def product_by_einsum(net: Net, a: str, b: str) -> str:
    return net.op("Einsum", a, b, equation="bik, bkj -> bij")


def product_by_ellipsis(net: Net, a: str, b: str) -> str:
    return net.op("Einsum", a, b, equation="...ik,...kj->...ij")


def product_by_matmul(net: Net, a: str, b: str) -> str:
    return net.op("MatMul", a, b)


def product_by_sum(net: Net, a: str, b: str, reduce: str = "ReduceSum") -> str:
    left = net.op("Unsqueeze", a, net.constant("last", np.array([3])))
    right = net.op("Unsqueeze", b, net.constant("second", np.array([1])))
    return net.op(reduce, net.op("Mul", left, right), net.constant("axes", np.array([2])), keepdims=0)


def product_by_mean(net: Net, a: str, b: str) -> str:
    return product_by_sum(net, a, b, "ReduceMean")


@pytest.mark.parametrize(
    "product", [product_by_einsum, product_by_ellipsis, product_by_matmul, product_by_sum, product_by_mean]
)
def test_a_product_of_matrices_counts_the_same_in_every_spelling(product: Callable[[Net, str, str], str]) -> None:
    net = Net(opset=18)
    a, b = net.input("a", (2, 3, 5)), net.input("b", (2, 5, 7))
    assert coverage(net.model(product(net, a, b))).macs == 2 * 3 * 5 * 7


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bn,anm,bm->ba", [(2, 3), (4, 3, 5), (2, 5)], 2 * 2 * 4 * 3 * 5),
        ("ij->ji", [(2, 3)], 0),
        ("ij,ij->ij", [(2, 3), (2, 1)], 6),
    ],
    ids=["bilinear", "transpose", "broadcast"],
)
def test_einsum_counts_a_point_of_its_subscripts_once_per_product(
    equation: str, shapes: list[tuple[int, ...]], macs: int
) -> None:
    net = Net()
    operands = [net.input(f"x{index}", shape) for index, shape in enumerate(shapes)]
    assert coverage(net.model(net.op("Einsum", *operands, equation=equation))).macs == macs


def test_scaling_before_a_pool_and_squares_are_not_products() -> None:
    net = Net(opset=18)
    x, gate = net.input("x", (2, 3, 4, 4)), net.input("gate", (2, 3, 1, 1))
    axes = net.constant("axes", np.array([2, 3]))
    pooled = net.op("ReduceMean", net.op("Mul", x, gate), axes)
    squares = net.op("ReduceMean", net.op("Mul", x, x), axes)
    assert coverage(net.model(net.op("Add", pooled, squares))).macs == 0


@pytest.mark.parametrize("four", [True, False], ids=["4-d", "3-d"])
def test_attention_counts_both_of_its_products(four: bool) -> None:
    net = Net(opset=23)
    shapes = [(1, 4, 3, 8), (1, 2, 5, 8), (1, 2, 5, 6)] if four else [(1, 3, 32), (1, 5, 16), (1, 5, 12)]
    operands = [net.input(f"x{index}", shape) for index, shape in enumerate(shapes)]
    heads = {} if four else {"q_num_heads": 4, "kv_num_heads": 2}
    found = coverage(net.model(net.op("Attention", *operands, **heads)))
    assert found.macs == 4 * 3 * 5 * 8 + 4 * 3 * 5 * 6
    assert found.integer_macs == 0.0


def test_attention_of_onnxruntime_is_counted_where_it_is_three_tensors() -> None:
    net = Net()
    operands = [net.input(name, (2, steps, 32)) for name, steps in (("q", 3), ("k", 5), ("v", 5))]
    model = net.model(net.op("MultiHeadAttention", *operands, domain="com.microsoft", num_heads=4))
    assert coverage(model).macs == 2 * 2 * 3 * 5 * 32


def test_attention_with_its_projection_is_counted() -> None:
    net = Net()
    weight = net.constant("w", np.ones((16, 48), np.float32))
    bias = net.constant("b", np.ones(48, np.float32))
    node = net.op("Attention", net.input("x", (2, 3, 16)), weight, bias, domain="com.microsoft", num_heads=4)
    model = net.model(node)
    assert coverage(model).macs == 2 * 3 * 16 * 48 + 2 * 2 * 3 * 3 * 16


def loop_of(*ops: str) -> onnx.ModelProto:
    """A Scan whose body applies operators to a slice [3] and a constant."""
    values = ["slice", *(f"y{index}" for index in range(len(ops)))]
    nodes = [
        helper.make_node(op, [x, "matrix"] if op == "MatMul" else [x], [y])
        for op, x, y in zip(ops, values, values[1:], strict=False)
    ]
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes,
        "body",
        [info("slice", TensorProto.FLOAT, [3])],
        [info(values[-1], TensorProto.FLOAT, [3])],
        [helper.make_tensor("matrix", TensorProto.FLOAT, [3, 3], np.ones(9, np.float32))],
    )
    net = Net()
    return net.model(net.op("Scan", net.input("x", (4, 3)), num_scan_inputs=1, body=body))


def test_a_loop_over_a_product_cannot_be_counted_and_is_listed() -> None:
    found = coverage(loop_of("Tanh", "MatMul"))
    assert found.integer_macs is None and found.weight_only_macs is None
    assert len(found.uncounted) == 1 and found.uncounted[0].startswith("Scan ")
    assert found.float_nodes[0].macs is None


def test_a_loop_without_products_counts_nothing() -> None:
    found = coverage(loop_of("Tanh", "Abs"))
    assert (found.macs, found.integer_macs, found.uncounted) == (0, 1.0, ())


def test_an_operator_that_nobody_knows_cannot_be_counted() -> None:
    net = Net()
    model = net.model(net.op("Inverse", net.input("x", (1, 3, 3)), domain="com.microsoft"))
    assert [name.partition(" ")[0] for name in coverage(model).uncounted] == ["Inverse"]
