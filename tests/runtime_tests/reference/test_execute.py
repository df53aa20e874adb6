"""Which kernels the plan expects, that the runtime agrees, and how a plan is executed."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from calibrators.graph.aten import infer_shapes
from calibrators.graph.operators import name_of
from calibrators.program.qdq_program import DEQUANTIZE
from calibrators.targets import list_targets
from runtime_tests.ort.sessions import Model, session
from runtime_tests.parity.compare import unplanned_kernels
from runtime_tests.reference.execute import FLOAT, plan, run
from runtime_tests.reference.kernel_rules import RULES
from runtime_tests.runtimes.ort import OnnxRuntimeSession
from tests.runtime_tests.reference.programs import NETWORKS, X_SCALE, Program, file_of, network
from tests.support.onnx_models import Net, optimized_model

aten = torch.ops.aten
SIX = 6 / 255

CONV = ([1, 1], [1, 1], [1, 1], 1)


def conv(p: Program, x: fx.Node, **bias: Any) -> fx.Node:
    weight = p.weight(4, 4, 3, 3)
    return p.call(aten.conv2d.default, x, weight, p.bias(weight, **bias), *CONV)


def image(p: Program, **quantizer: Any) -> fx.Node:
    return p.quantized(p.input(2, 4, 6, 6), **quantizer)


def tokens(p: Program) -> fx.Node:
    return p.quantized(p.input(2, 3, 8))


def conv_then(operator: Any, *args: Any, **quantizer: Any) -> Callable[[Program], fx.Node]:
    return lambda p: p.quantized(p.call(operator, conv(p, image(p)), *args), **quantizer)


def linear(p: Program, x: fx.Node, bias: str = "int32") -> fx.Node:
    weight = p.weight(5, 8)
    biases = {"int32": lambda: p.bias(weight), "float": lambda: p.constant("b", torch.randn(5)), "none": lambda: None}
    return p.call(aten.linear.default, x, weight, biases[bias]())


def matrix(p: Program) -> fx.Node:
    return p.quantized(p.input(6, 8))


def float_reader(p: Program) -> fx.Node:
    value = conv(p, image(p))
    return p.call(aten.add.Tensor, p.quantized(value), p.call(aten.tanh.default, value))


def bad_bias(p: Program) -> fx.Node:
    return p.quantized(conv(p, image(p), factor=1.5))


def float_bias(p: Program) -> fx.Node:
    value = p.call(aten.conv2d.default, image(p), p.weight(4, 4, 3, 3), p.constant("b", torch.randn(4)), *CONV)
    return p.quantized(value)


def moved(p: Program) -> fx.Node:
    value = p.call(aten.relu.default, linear(p, tokens(p)))
    return p.quantized(p.call(aten.permute.default, p.call(aten.reshape.default, value, [6, 5]), [1, 0]), zero_point=0)


def read_through_a_move(p: Program) -> fx.Node:
    return p.quantized(conv(p, p.call(aten.slice.Tensor, image(p), 2, 0, 4)))


def unmoved_scale(p: Program, scale: float = X_SCALE) -> fx.Node:
    return p.quantized(p.call(aten.max_pool2d.default, image(p), [2, 2]), scale=scale)


def pair(operator: Any, *args: Any) -> Callable[[Program], fx.Node]:
    return lambda p: p.quantized(p.call(operator, image(p), image(p, zero_point=7), *args))


def pooled_line(p: Program) -> fx.Node:
    return p.quantized(p.call(aten.max_pool1d.default, p.quantized(p.input(2, 4, 9)), [3], [2], [1]))


def convolved_line(p: Program) -> fx.Node:
    weight = p.weight(4, 4, 3)
    value = p.call(aten.conv1d.default, p.quantized(p.input(2, 4, 9)), weight, p.bias(weight), [1], [1], [1], 1)
    return p.quantized(p.call(aten.max_pool1d.default, value, [2]))


def unary(operator: Any, *args: Any, scale: float = X_SCALE) -> Callable[[Program], fx.Node]:
    return lambda p: p.quantized(p.call(operator, image(p), *args), scale=scale)


def product(quantized: bool) -> Callable[[Program], fx.Node]:
    def build(p: Program) -> fx.Node:
        value = p.call(aten.matmul.default, p.quantized(p.input(2, 3, 8)), p.quantized(p.input(2, 8, 5)))
        return p.quantized(value) if quantized else value

    return build


def clipped_codes(p: Program) -> fx.Node:
    """A ReLU on codes: its input is read as it is by a sum, its result by a convolution."""
    value = p.quantized(conv(p, image(p)))
    codes, scale, zero_point = value.args[:3]
    clipped = p.call(aten.clamp.default, codes, 100, 180)
    inner = p.quantized(conv(p, p.call(DEQUANTIZE, clipped, scale, zero_point, None, "clipped")))
    return p.quantized(p.call(aten.add.Tensor, value, inner))


def shielded(p: Program) -> fx.Node:
    """A convolution with float weights between codes, and the clip that hides the codes in front of it."""
    value = p.call(aten.clamp.default, p.quantized(conv(p, image(p))), -2.0, 3.1)
    weight, bias = p.constant("w", torch.ones(4, 4, 3, 3)), p.constant("b", torch.ones(4))
    return p.quantized(p.call(aten.conv2d.default, value, weight, bias, *CONV))


def parts(cut: Any, *args: Any, scale: float = X_SCALE) -> Callable[[Program], fx.Node]:
    """Both halves of a value, each with its quantizer, multiplied."""

    def build(p: Program) -> fx.Node:
        whole = p.call(cut, p.quantized(conv(p, image(p))), *args)
        halves = (p.quantized(p.call(operator.getitem, whole, index), scale=scale) for index in range(2))
        return p.quantized(p.call(aten.mul.Tensor, *halves))

    return build


def part(cut: Any, *args: Any, scale: float = X_SCALE, coded: bool = True) -> Callable[[Program], fx.Node]:
    """The second half of a value."""

    def build(p: Program) -> fx.Node:
        value = image(p) if coded else p.call(aten.tanh.default, image(p))
        half = p.call(operator.getitem, p.call(cut, value, *args), 1)
        return p.quantized(p.call(aten.reshape.default, half, [-1]), scale=scale)

    return build


CASES: dict[str, tuple[Callable[[Program], fx.Node], str, str]] = {
    "conv": (lambda p: p.quantized(conv(p, image(p))), "QLinearConv", ""),
    "conv-float-result": (lambda p: conv(p, image(p)), FLOAT, "its result is not quantized"),
    "conv-relu": (conv_then(aten.relu.default, zero_point=0), "QLinearConv", ""),
    "conv-relu-zero-inside": (conv_then(aten.relu.default, zero_point=5), FLOAT, "a clip that no integer kernel"),
    "conv-clip-at-the-end": (conv_then(aten.clamp.default, 0, 6, scale=SIX, zero_point=0), "QLinearConv", ""),
    "conv-clip-beyond-the-end": (conv_then(aten.clamp.default, 0, 6, scale=0.02, zero_point=0), "QLinearConv", ""),
    "conv-clip-inside": (
        conv_then(aten.clamp.default, 0, 6, scale=0.024, zero_point=0),
        FLOAT,
        "a clip that no integer kernel",
    ),
    "conv-gelu": (conv_then(aten.gelu.default), FLOAT, "gelu has no integer kernel"),
    "conv-two-readers": (float_reader, FLOAT, "read both by a quantizer and as floats"),
    "conv-other-bias-scale": (bad_bias, FLOAT, "the scale of its bias"),
    "conv-float-bias": (float_bias, "QLinearConv", ""),
    "conv-behind-slice": (read_through_a_move, "QLinearConv", ""),
    "conv-int8": (lambda p: p.quantized(conv(p, image(p, dtype=torch.int8, zero_point=0))), FLOAT, "int8"),
    "linear-moved": (moved, "QGemm", ""),
    "linear-to-float": (lambda p: linear(p, matrix(p)), "QGemm", ""),
    "linear-to-float-no-bias": (lambda p: linear(p, matrix(p), "none"), "QGemm", ""),
    "linear-to-float-float-bias": (lambda p: linear(p, matrix(p), "float"), FLOAT, "its bias is float"),
    "linear-float-bias": (lambda p: p.quantized(linear(p, matrix(p), "float")), "QGemm", ""),
    "matmul": (product(quantized=True), "QLinearMatMul", ""),
    "matmul-to-float": (product(quantized=False), "MatMulIntegerToFloat", ""),
    "add": (pair(aten.add.Tensor), "QLinearAdd", ""),
    "add-number": (unary(aten.add.Tensor, 1.5), FLOAT, "one of its operands is a number"),
    "sub": (pair(aten.sub.Tensor), FLOAT, "sub has no integer kernel"),
    "mul": (pair(aten.mul.Tensor), "QLinearMul", ""),
    "cat": (lambda p: p.quantized(p.call(aten.cat.default, [image(p), image(p)], 1)), "QLinearConcat", ""),
    "global-pool": (unary(aten.adaptive_avg_pool2d.default, [1, 1]), "QLinearGlobalAveragePool", ""),
    "average-pool": (unary(aten.avg_pool2d.default, [2, 2]), "QLinearAveragePool", ""),
    "max-pool": (unmoved_scale, "MaxPool", ""),
    "max-pool-other-scale": (lambda p: unmoved_scale(p, scale=0.03), FLOAT, "between different scales"),
    "max-pool-1d": (pooled_line, "MaxPool", ""),
    "conv-max-pool-1d": (convolved_line, "QLinearConv", ""),
    "maximum": (unary(aten.amax.default, [2, 3], True), "ReduceMax", ""),
    "sigmoid": (unary(aten.sigmoid.default, scale=1 / 256), "QLinearSigmoid", ""),
    "leaky-relu": (unary(aten.leaky_relu.default, 0.1), "QLinearLeakyRelu", ""),
    "softmax": (unary(aten.softmax.int, 3, scale=1 / 256), "QLinearSoftmax", ""),
    "clipped-codes": (clipped_codes, "QLinearAdd", ""),
    "shielded": (shielded, FLOAT, "its weight is not quantized"),
    "chunk": (part(aten.chunk.default, 2, 1), "Split", ""),
    "split": (part(aten.split.Tensor, 2, 1), "Split", ""),
    "split-sizes": (part(aten.split_with_sizes.default, [1, 3], 1), "Split", ""),
    "unbind": (part(aten.unbind.int, 0), "Split", ""),
    "split-other-scale": (part(aten.split.Tensor, 2, 1, scale=0.03), FLOAT, "Split between different scales"),
    "split-of-floats": (part(aten.split.Tensor, 2, 1, coded=False), FLOAT, "its input tanh_default is not quantized"),
    "list-of-an-operator": (part(aten.var_mean.correction, [1]), FLOAT, "var_mean has no integer kernel"),
    "multiplied-parts": (parts(aten.unbind.int, 0), "QLinearMul", ""),
    "requantized": (lambda p: p.quantized(image(p), scale=0.05), FLOAT, "after another"),
}


def case(name: str) -> fx.GraphModule:
    p = Program()
    program = p.build(CASES[name][0](p))
    infer_shapes(program)
    return program


@pytest.mark.parametrize("name", CASES)
def test_plan_names_the_kernel_or_the_reason(name: str) -> None:
    _, kernel, reason = CASES[name]
    steps = [step for step in plan(case(name)).steps if step.kernel != "QuantizeLinear"]
    assert [step.kernel for step in steps][-1] == kernel
    assert reason in steps[-1].reason
    assert bool(steps[-1].reason) == (kernel == FLOAT)


FLOAT_MOVES = {"pad.default"}
"""Operators that keep the scale but have no integer kernel: the border is the code of zero either way."""


def test_every_operator_for_which_a_target_has_a_kernel_has_a_formula() -> None:
    formulas = {name_of(operator) for operator in RULES}
    for target in list_targets():
        assert target.kernels - FLOAT_MOVES <= formulas


IN_RUNTIME = [
    "conv-relu-zero-inside",
    "conv-two-readers",
    "conv-other-bias-scale",
    "conv-behind-slice",
    "linear-moved",
    "linear-to-float-no-bias",
    "linear-to-float-float-bias",
    "matmul-to-float",
    "max-pool-1d",
    "conv-max-pool-1d",
    "maximum",
    "clipped-codes",
    "shielded",
    "chunk",
    "split",
    "split-sizes",
    "unbind",
    "split-other-scale",
    "split-of-floats",
    "multiplied-parts",
    "requantized",
]
"""Cases whose rule is the optimizer's own and not to be read off the ONNX file."""


def test_runtime_agrees_with_the_plan() -> None:
    """The kernels that ran are the planned ones, and so are all codes and the outputs of planned kernels."""
    p = Program()
    program = p.build(*(CASES[name][0](p) for name in IN_RUNTIME))
    model, kernels = file_of(program), plan(program)
    executed = OnnxRuntimeSession(Model.of(model), ()).executed()
    assert unplanned_kernels(executed, kernels) == {}
    assert sum(kernels.counts.values()) > len(IN_RUNTIME) // 2
    codes, outputs = run(kernels, program.meta["example"])
    probes = [f"{site}_quantized" for site in kernels.sites]
    feeds = {key: x.numpy() for key, x in zip(program.meta["input_names"], program.meta["example"], strict=True)}
    runtime = session(model, probes=probes)
    found = [torch.from_numpy(value) for value in runtime.run([*program.meta["output_names"], *probes], feeds)]
    for exact, ours, theirs in zip(kernels.exact_outputs, outputs, found[: len(outputs)], strict=True):
        assert torch.equal(ours, theirs) or not exact
    for site, theirs in zip(kernels.sites, found[len(outputs) :], strict=True):
        assert torch.equal(codes[site], theirs), site


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [(6 / 254.4, 0), (6 / 254.6, 0), (6 / 255, 0), (6 / 255.4, 0), (0.02, 0), (0.02, 3)],
    ids=["short", "rounds-to-the-end", "at-the-end", "just-beyond", "beyond", "zero-inside"],
)
def test_clip_is_absorbed_when_the_runtime_drops_it(scale: float, zero_point: int) -> None:
    p = Program()
    value = p.call(aten.clamp.default, conv(p, image(p)), 0, 6)
    steps = plan(p.build(p.quantized(value, scale=scale, zero_point=zero_point))).steps
    net = Net()
    x = net.quantize(net.input("x", (1, 4, 6, 6)), -2.0, 2.0)
    bounds = [net.constant("bound", np.float32(bound)) for bound in (0, 6)]
    edge = net.quantize_with(net.op("Clip", net.conv(x, 4, 4), *bounds), scale, zero_point)
    kinds = {node.op_type for node in optimized_model(net.model(edge.name)).graph.node}
    assert (steps[-1].kernel == "QLinearConv") == ("QLinearConv" in kinds)


def test_site_called_like_a_node_keeps_its_own_step() -> None:
    """The name of a float result cannot hide the step of a site."""
    p = Program()
    inner = p.quantized(conv(p, image(p)))
    site = str(inner.args[-1])
    value = conv(p, inner)
    value.name = site
    kernels = plan(p.build(value))
    assert [step.kernel for step in kernels.steps if step.site == site] == ["QLinearConv", FLOAT]
    assert kernels.by_site[site].kernel == "QLinearConv"


# --- execution -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_qdq_execution_is_the_program(name: str) -> None:
    """Codes kept as codes until somebody needs floats: the same bits as the module called as a function."""
    result, x = network(name)
    with torch.no_grad():
        expected = result.program(x)
    _, outputs = run(plan(result.program, integer=False), (x,))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_both_ways_agree_but_for_ties(name: str) -> None:
    result, x = network(name)
    integers, _ = run(plan(result.program), (x,))
    floats, _ = run(plan(result.program, integer=False), (x,))
    assert list(integers) == list(floats) == list(plan(result.program).sites)
    steps = torch.cat([(integers[site].int() - floats[site].int()).abs().flatten() for site in integers])
    assert int(steps.max()) <= 2  # one from the node, one from its inputs
    assert float((steps > 0).float().mean()) < 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_batches_do_not_interact(name: str) -> None:
    result, x = network(name)
    kernels = plan(result.program)
    whole, _ = run(kernels, (x,))
    parts = [run(kernels, (part,))[0] for part in x.split(1)]
    if all(step.is_integer for step in kernels.steps):
        assert all(torch.equal(whole[site], torch.cat([part[site] for part in parts])) for site in whole)


def test_forced_codes_replace_the_computed_ones_downstream_only() -> None:
    result, x = network("residual")
    kernels = plan(result.program)
    free, free_outputs = run(kernels, (x,))
    own, own_outputs = run(kernels, (x,), free)
    assert all(torch.equal(own[site], free[site]) for site in free)
    assert torch.equal(own_outputs[0], free_outputs[0])
    first, second = kernels.sites[1:3]
    zeros = torch.zeros_like(free[first])
    forced, outputs = run(kernels, (x,), {first: zeros})
    assert torch.equal(forced[first], free[first]), "a forced site must record what it computed"
    assert not torch.equal(forced[second], free[second])
    assert not torch.equal(outputs[0], free_outputs[0])


def test_values_are_freed_when_their_last_reader_is_done() -> None:
    """At no time are more than two values of the chain alive, however long it is."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    counts: list[int] = []

    def tracked(x: Tensor) -> Tensor:
        result = torch.tanh(x)
        alive.add(result.untyped_storage())
        counts.append(len(alive))
        return result

    p = Program()
    value = p.input(2, 4)
    for _ in range(8):
        value = p.call(tracked, value)
    run(plan(p.build(value), integer=False), p.example)
    assert len(counts) == 8
    assert max(counts) <= 2


def test_reduced_precision_of_the_caller_changes_nothing() -> None:
    result, x = network("perceptron")
    kernels = plan(result.program)
    expected, _ = run(kernels, (x,))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found, _ = run(kernels, (x,))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(expected[site], found[site]) for site in expected)


@pytest.mark.parametrize("bits", [8, 4], ids=["8-bit", "4-bit"])
def test_narrow_codes_stay_in_their_range(bits: int) -> None:
    result, x = network("residual", bits)
    codes, _ = run(plan(result.program), (x * 2,))
    highest = {site: 2 ** result.placement.by_name[site].spec.bits - 1 for site in codes}
    assert all(int(v.max()) == highest[site] for site, v in codes.items() if v.ndim == 4 and v.shape[-1] > 1)
    assert all(int(v.max()) <= highest[site] for site, v in codes.items())
    assert min(highest.values()) == 2**bits - 1


def test_plan_without_optimizations_has_no_integer_kernel() -> None:
    program = network("mobile")[0].program
    steps = plan(program, integer=False).steps
    assert {step.kernel for step in steps} == {"QuantizeLinear", FLOAT}
