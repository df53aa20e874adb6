"""Conditions under which an operator has an integer kernel: one check for each name that targets use.

Must not know: which operators have kernels, methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from calibrators.graph.aten import bind, shape_of
from calibrators.graph.operators import facts, name_of
from calibrators.grid.target import Form, Target

__all__ = ["is_float", "missing_form"]

IMAGE = 2
"""Spatial dimensions of an image; pools that go by another number state it (calibrators.graph.operators)."""


def is_float(node: fx.Node) -> bool:
    """Return whether a value is a float32 tensor."""
    meta = node.meta.get("tensor_meta")
    return getattr(meta, "dtype", None) == torch.float32


def missing_form(node: fx.Node, target: Target) -> str | None:
    """Return why the target has no integer kernel for this form of an operator, None if it has one."""
    forms = target.forms.get(name_of(node.target), ())
    return next((why for holds, why in map(_CHECKS.__getitem__, forms) if not holds(node)), None)


def _has_tensors(node: fx.Node) -> bool:
    return all(isinstance(operand, fx.Node) and is_float(operand) for operand in node.args[:2])


_CHECKS: Mapping[Form, tuple[Callable[[fx.Node], bool], str]] = {
    "tensors": (_has_tensors, "one of its operands is a number"),
    "unscaled": (lambda node: bind(node)["alpha"] == 1, "a sum with a factor (alpha) has no integer kernel"),
    "to-one-pixel": (
        lambda node: list(bind(node)["output_size"]) == [1, 1],
        "only pooling to 1x1 has an integer kernel",
    ),
    "images": (
        lambda node: len(shape_of(node)) == 2 + (facts(node.target).spatial or IMAGE),
        "only a batch of images has an integer kernel",
    ),
    "whole-windows": (
        lambda node: not bind(node)["ceil_mode"],
        "average pooling with ceil_mode has no integer kernel",
    ),
    "own-divisor": (
        lambda node: bind(node)["divisor_override"] is None,
        "average pooling with divisor_override has no integer kernel",
    ),
}
"""By name: a check of the operator, and why there is no integer kernel where it fails."""
