"""Elementwise operators in canonical form: activations as the sums, products and clips for which there are kernels.

- SiLU -> x * sigmoid(x)
- ReLU6, hardtanh, clamp by constant tensors of one element -> clamp by numbers
- PReLU -> leaky ReLU where all slopes agree, else max(x, slope * x) where none is above 1
- hard sigmoid -> clamp(x / 6 + 1 / 2, 0, 1); hard swish -> x times that
- sum, difference, product or quotient with a number or constant -> sum or product with a constant second operand;
  with nothing but zeros or ones -> the value itself
- scale * (x * factor), one factor per channel -> x * conv1x1(factor): layer scale after a squeeze-excite

Must not know: targets, scales, ONNX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, is_constant, overloads, shape_of
from calibrators.graph.operators import PRODUCTS, QUOTIENTS, REVERSED, SUMS, name_of
from calibrators.graph.rewrite import Rule, constant_before, constant_of, replace_by, replace_call

__all__ = ["ELEMENTWISE", "constant_operand", "restore_activations"]

aten = torch.ops.aten


def constant_operand(node: fx.Node) -> fx.Node | None:
    """Return the constant by which a sum or product in canonical form changes a value; None for anything else."""
    other = node.args[1] if node.target in (aten.add.Tensor, aten.mul.Tensor) else None
    return other if is_constant(other) and not is_constant(node.args[0]) else None


# Activations ---------------------------------------------------------------------------------------------------------


def _silu(node: fx.Node) -> None:
    x = node.args[0]
    replace_call(node, (aten.sigmoid.default, (x,)), (aten.mul.Tensor, (x, ...)))


def _hardtanh(node: fx.Node) -> None:
    bound = bind(node)
    lo, hi = bound.get("min_val", 0), bound.get("max_val", 6)
    replace_call(node, (aten.clamp.default, (bound["self"], float(lo), float(hi))))


def _clamp_by_constants(node: fx.Node) -> None:
    """Clamp by numbers where constants of one element are the bounds."""
    x, *limits = bind(node).values()
    constant = all(limit is None or (is_constant(limit) and constant_of(limit).numel() == 1) for limit in limits)
    if constant and len(shape_of(x)) == len(shape_of(node)):
        numbers = (None if limit is None else float(constant_of(limit)) for limit in limits)
        replace_call(node, (aten.clamp.default, (x, *numbers)))


def _prelu(node: fx.Node) -> None:
    x, weight = bind(node).values()
    if not is_constant(weight) or is_constant(x):
        return
    slopes = constant_of(weight)
    if bool((slopes == slopes.flatten()[0]).all()):
        replace_call(node, (aten.leaky_relu.default, (x, float(slopes.flatten()[0]))))
    elif bool((slopes <= 1).all()) and len(shape_of(x)) > 1:
        by_channel = constant_before(node, f"{weight.target}_slopes", slopes.reshape(-1, *[1] * (len(shape_of(x)) - 2)))
        replace_call(node, (aten.mul.Tensor, (x, by_channel)), (aten.maximum.default, (x, ...)))


HARD_SIGMOID = {"slope": 1 / 6, "offset": 1 / 2}
"""The constants of clamp(slope * x + offset, 0, 1)."""


def _hard_sigmoid(node: fx.Node) -> None:
    x = bind(node)["self"]
    slope, offset = (
        constant_before(node, f"{node.name}_{name}", torch.tensor(value, dtype=_dtype(x)))
        for name, value in HARD_SIGMOID.items()
    )
    linear = (aten.mul.Tensor, (x, slope)), (aten.add.Tensor, (..., offset))
    product = [(aten.mul.Tensor, (x, ...))] if node.target is aten.hardswish.default else []
    replace_call(node, *linear, (aten.clamp.default, (..., 0.0, 1.0)), *product)


def restore_activations(graph: fx.GraphModule) -> None:
    """Write every hard sigmoid that nothing quantizes in between as the one operator that it is."""
    for clip in graph.graph.find_nodes(op="call_function", target=aten.clamp.default):
        total: Any = clip.args[0]
        product: Any = total.args[0] if _has_constant(total, aten.add.Tensor, HARD_SIGMOID["offset"]) else None
        is_unit = tuple(clip.args[1:]) == (0.0, 1.0)
        if is_unit and _has_constant(product, aten.mul.Tensor, HARD_SIGMOID["slope"]):
            replace_call(clip, (aten.hardsigmoid.default, (product.args[0],)))


def _has_constant(node: Any, target: Any, value: float) -> bool:
    """Return whether a call with one reader combines a value with this number."""
    if not isinstance(node, fx.Node) or node.target is not target or len(node.users) != 1:
        return False
    operand = constant_operand(node)
    return operand is not None and torch.equal(constant_of(operand), torch.tensor(value))


# Constants -----------------------------------------------------------------------------------------------------------


def _constant_operand(node: fx.Node) -> None:
    """Replace a combination of a value with a number or constant by a sum or product with a constant second operand."""
    bound = bind(node)
    operands = [bound["self"], bound["other"]]
    values = [x for x in operands if isinstance(x, fx.Node) and not is_constant(x)]
    if len(values) != 1 or not _dtype(values[0]).is_floating_point or _dtype(node) != _dtype(values[0]):
        return
    x, is_first = values[0], operands[0] is values[0]
    is_plain = is_first or (node.target in PRODUCTS | SUMS and bound.get("alpha", 1) == 1)
    if node.target in REVERSED or not is_plain or (not is_first and "sub" in name_of(node.target)):
        return
    value = _combined(node, operands[is_first], bound.get("alpha", 1), _dtype(x))
    if not bool(value.isfinite().all()):
        return
    target, neutral = (aten.add.Tensor, 0) if node.target in SUMS else (aten.mul.Tensor, 1)
    if bool((value == neutral).all()) and shape_of(node) == shape_of(x):
        replace_by(node, x)
        return
    node.args = (x, constant_before(node, f"{node.name}_constant", value))
    node.target, node.kwargs = target, {}


def _combined(node: fx.Node, operand: Any, alpha: float, dtype: torch.dtype) -> Tensor:
    """Return what is added to or multiplied with the value, in its dtype."""
    value = constant_of(operand).double() if is_constant(operand) else torch.tensor(operand, dtype=torch.float64)
    if node.target in SUMS:
        value = value * (-alpha if "sub" in name_of(node.target) else alpha)
    return (1 / value if node.target in QUOTIENTS else value).to(dtype)


def _dtype(node: fx.Node) -> torch.dtype:
    """Return the dtype of a value; bool, with which nothing is computed, for anything but one tensor."""
    return getattr(node.meta.get("tensor_meta"), "dtype", torch.bool)


def _scaled_factor(node: fx.Node) -> None:
    """Multiply the constant into the factors, which are few, by a depthwise 1x1 convolution with an integer kernel."""
    product, scale = bind(node)["self"], constant_operand(node)
    if scale is None or product.target is not aten.mul.Tensor or len(product.users) != 1:
        return
    factor = next((x for x in product.all_input_nodes if len(shape_of(x)) == 4 and shape_of(x)[2:] == (1, 1)), None)
    x = next((x for x in product.all_input_nodes if x is not factor), None)
    if factor is None or x is None or is_constant(x):
        return
    channels = shape_of(factor)[1]
    if constant_of(scale).shape not in ((channels, 1, 1), (1, channels, 1, 1)):
        return
    weight = constant_before(node, f"{scale.target}_gate", constant_of(scale).reshape(channels, 1, 1, 1))
    bias = constant_before(node, f"{scale.target}_gate_bias", constant_of(weight).new_zeros(channels))
    convolution = (aten.conv2d.default, (factor, weight, bias, [1, 1], [0, 0], [1, 1], channels))
    replace_call(node, convolution, (aten.mul.Tensor, (x, ...)))


ELEMENTWISE: dict[Any, tuple[Rule, ...]] = {
    aten.silu.default: (_silu,),
    **dict.fromkeys((aten.hardtanh.default, aten.relu6.default), (_hardtanh,)),
    aten.clamp.Tensor: (_clamp_by_constants,),
    aten.prelu.default: (_prelu,),
    **dict.fromkeys((aten.hardsigmoid.default, aten.hardswish.default), (_hard_sigmoid,)),
    **dict.fromkeys(overloads(SUMS | PRODUCTS | QUOTIENTS), (_constant_operand,)),
    aten.mul.Tensor: (_constant_operand, _scaled_factor),
}
