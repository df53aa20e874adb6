"""Operators with weights that train in another arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from calibrators.execution.parametric import GRADIENTS, ParametricOp

aten = torch.ops.aten

BFLOAT16 = 2.0**-8
"""Largest relative error of rounding to bfloat16; two rounded operands, and the rounding of the result."""

OPERATORS: dict[str, tuple[Callable[..., Tensor], Sequence[int], Sequence[int], Sequence[Any]]] = {
    "linear": (aten.linear.default, (4, 6, 16), (8, 16), ()),
    "vector": (aten.linear.default, (4, 16), (8, 16), ()),
    "conv1d": (aten.conv1d.default, (4, 16, 9), (8, 16, 3), ([2], [1], [1], 1)),
    "conv2d": (aten.conv2d.default, (4, 16, 7, 6), (8, 16, 3, 3), ([2, 1], [1, 1], [1, 2], 1)),
    "conv3d": (aten.conv3d.default, (2, 4, 5, 5, 5), (8, 4, 3, 3, 3), ([1] * 3, [1] * 3, [1] * 3, 1)),
}


def test_every_operator_with_a_gradient_of_its_own_is_tried() -> None:
    assert {operator for operator, *_ in OPERATORS.values()} == set(GRADIENTS)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", OPERATORS)
def test_values_are_exact_and_gradients_rounded(name: str, biased: bool, generator: torch.Generator) -> None:
    operator, shape, weight_shape, arguments = OPERATORS[name]
    given = [torch.randn(size, generator=generator).requires_grad_() for size in (shape, weight_shape)]
    bias = torch.randn(weight_shape[0], generator=generator).requires_grad_() if biased else None
    leaves = [*given, *([bias] if bias is not None else [])]
    module = ParametricOp(operator, dense=True).train()
    module.train_in(torch.float32, torch.bfloat16)
    found, expected = module(*given, bias, *arguments), operator(*given, bias, *arguments)
    assert torch.equal(found, expected)
    weights = torch.randn(found.shape, generator=generator)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), leaves) for y in (found, expected))
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == exact.shape
        assert 0 < float((mine - exact).norm() / exact.norm()) < 3 * BFLOAT16


def test_only_wanted_gradients_are_computed(generator: torch.Generator) -> None:
    """The input of a unit needs none."""
    operator, shape, weight_shape, arguments = OPERATORS["conv2d"]
    x, weight = torch.randn(shape, generator=generator), torch.randn(weight_shape, generator=generator).requires_grad_()
    module = ParametricOp(operator, dense=True).train()
    module.train_in(torch.float32, torch.bfloat16)
    module(x, weight, None, *arguments).sum().backward()
    assert x.grad is None and weight.grad is not None


@pytest.mark.parametrize("case", ["grouped", "evaluated", "float32"])
def test_float32_where_rounding_would_not_pay(case: str, generator: torch.Generator) -> None:
    operator, shape, weight_shape, arguments = OPERATORS["conv2d"]
    x = torch.randn(shape, generator=generator).requires_grad_()
    weight = torch.randn(weight_shape, generator=generator)
    module = ParametricOp(operator, dense=case != "grouped").train(case != "evaluated")
    module.train_in(torch.float32, torch.float32 if case == "float32" else torch.bfloat16)
    found, expected = (
        torch.autograd.grad(y.sum(), x)
        for y in (module(x, weight, None, *arguments), operator(x, weight, None, *arguments))
    )
    assert torch.equal(found[0], expected[0])
