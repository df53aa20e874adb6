"""Transposed convolutions as convolutions: each computes all outputs between two inputs, and moves put them in place.

Output o of a transposed convolution of stride s and padding p is o + p = s m + r: row r of a group of s outputs. It is
the sum of x[m - j] w[s j + r] over j, a convolution with 1 / s of the taps. One convolution with s times the channels
computes all groups; with its channels last, two views and a permutation make rows of them, and a slice cuts the padding
off. Channels are (group, rows, columns, channel), so that whole runs of channels move: in onnxruntime 1.32 that takes
half the time of DepthToSpace, which moves single codes. Each group of outputs has weight scales of its own.

A ReLU or another activation that alone reads the result is moved before the moves, where a kernel can absorb it.

Must not know: targets, scales, ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, convolution, is_constant, is_free, per_axis, shape_of
from calibrators.graph.operators import Operators, facts
from calibrators.graph.rewrite import Call, call_before, constant_before, constant_of, meta_of_part

__all__ = ["transposed_convolution"]

aten = torch.ops.aten

ACTIVATIONS = Operators(
    *("relu.default", "relu6.default", "clamp.default", "hardtanh.default", "leaky_relu.default", "sigmoid.default"),
    *("silu.default", "hardsigmoid.default", "hardswish.default", "tanh.default", "gelu.default", "elu.default"),
)
"""Operators on one value that do not depend on its place."""


@dataclass(frozen=True)
class _Axis:
    """One spatial axis of a transposed convolution.

    size, out: its input and output.
    kernel:    taps, with the zeros of its dilation where the stride is not 1.
    """

    size: int
    out: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def taps(self) -> int:
        """Taps of the convolution."""
        return -(-self.kernel // self.stride)

    @property
    def reach(self) -> int:
        """Inputs between its first and its last tap."""
        return self.dilation * (self.taps - 1)

    @property
    def padded(self) -> int:
        """Padding of the convolution at both ends, at which it computes every output."""
        last = (self.padding + self.out - 1) // self.stride
        return max(0, self.reach - self.padding // self.stride, last - self.size + 1)

    @property
    def groups(self) -> int:
        """Outputs of the convolution."""
        return self.size + 2 * self.padded - self.reach

    @property
    def first(self) -> int:
        """Place of the first output among all that the convolution computes."""
        return self.padding - self.stride * (self.reach - self.padded)


def transposed_convolution(node: fx.Node) -> None:
    """Rewrite a transposed convolution with constant weights whose sizes do not depend on the batch."""
    bound, space = bind(node), facts(node.target).spatial
    x, biases = bound["input"], [bound["bias"]] if bound["bias"] is not None else []
    if not all(map(is_constant, (bound["weight"], *biases))) or any(is_free(x, 2 + axis) for axis in range(space)):
        return
    if len(shape_of(x)) != space + 2:
        return
    weight, groups = constant_of(bound["weight"]), bound["groups"]  # [in, out / groups, ...]
    stride, padding, dilation = (per_axis(bound[name], space) for name in ("stride", "padding", "dilation"))
    spread = [d if s > 1 else 1 for s, d in zip(stride, dilation, strict=True)]
    weight = _with_zeros(weight, spread)
    geometry = zip(
        shape_of(x)[2:], shape_of(node)[2:], weight.shape[2:], stride, padding, dilation, spread, strict=True
    )
    axes = [_Axis(size, out, k, s, p, d // z) for size, out, k, s, p, d, z in geometry]
    bias = constant_of(biases[0]) if biases else weight.new_zeros(weight.shape[1] * groups)
    name = f"{bound['weight'].target}_spread"
    constants = (
        constant_before(node, name, _weight(weight, axes, groups)),
        constant_before(node, f"{name}_bias", _bias(bias, axes, groups)),
    )
    arguments = [1] * space, [axis.padded for axis in axes], [axis.dilation for axis in axes], groups
    made = call_before(node, convolution(space), x, *constants, *arguments)
    _move(node, made, _moves(axes, groups, len(bias)))


def _with_zeros(weight: Tensor, spread: Sequence[int]) -> Tensor:
    """Return the kernel with the zeros of its dilation written out."""
    sizes = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], spread, strict=True)]
    wide = weight.new_zeros(*weight.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, step) for step in spread))
    wide[places] = weight
    return wide


def _weight(weight: Tensor, axes: Sequence[_Axis], groups: int) -> Tensor:
    """Return the weight [(group, strides..., out / groups), in / groups, taps...] of the convolution."""
    space, inputs, outputs = len(axes), *weight.shape[:2]
    padding = [(0, axis.taps * axis.stride - axis.kernel) for axis in reversed(axes)]
    full = torch.nn.functional.pad(weight, [size for sides in padding for size in sides])
    cut = full.reshape(groups, inputs // groups, outputs, *(n for axis in axes for n in (axis.taps, axis.stride)))
    taps, rows = ([3 + 2 * axis + part for axis in range(space)] for part in (0, 1))
    ordered = cut.permute(0, *rows, 2, 1, *taps).flip([*range(-space, 0)])
    return ordered.reshape(-1, inputs // groups, *(axis.taps for axis in axes))


def _bias(bias: Tensor, axes: Sequence[_Axis], groups: int) -> Tensor:
    """Return the bias of the convolution for that of the transposed one, [out]."""
    return bias.reshape(groups, 1, -1).expand(-1, math.prod(axis.stride for axis in axes), -1).flatten()


def _moves(axes: Sequence[_Axis], groups: int, channels: int) -> list[Call]:
    """Return the moves after the convolution: channels last, groups of outputs into rows, cut, channels first."""
    space, strides = len(axes), [axis.stride for axis in axes]
    cuts = [(axis, each) for axis, each in enumerate(axes, 1) if each.out != each.groups * each.stride]
    if set(strides) == {1}:
        return [(aten.slice.Tensor, (..., 1 + axis, each.first, each.first + each.out)) for axis, each in cuts]
    group = [groups] if groups > 1 else []
    # of one group, the columns of a row and their channels stay side by side: one dimension less
    runs = [*strides, channels // groups] if group else [*strides[:-1], strides[-1] * channels]
    parts = [-1, *(axis.groups for axis in axes), *group, *runs]
    row = 1 + space + len(group)
    order = [
        0,
        *(place for axis in range(space) for place in (1 + axis, row + axis)),
        *range(1 + space, row),
        *range(row + space, len(parts)),
    ]
    ordered = [(aten.reshape.default, (..., parts)), (aten.permute.default, (..., order))]
    return [
        (aten.permute.default, (..., [0, *range(2, space + 2), 1])),
        *(ordered if order != sorted(order) else []),
        (aten.reshape.default, (..., [-1, *(axis.groups * axis.stride for axis in axes), channels])),
        *((aten.slice.Tensor, (..., axis, each.first, each.first + each.out)) for axis, each in cuts),
        (aten.permute.default, (..., [0, space + 1, *range(1, space + 1)])),
    ]


def _move(node: fx.Node, made: fx.Node, moves: Sequence[Call]) -> None:
    """Replace `node` by the moved value, after the activation that alone reads it if there is one."""
    reader = next(iter(node.users))
    last = reader if len(node.users) == 1 and reader.target in ACTIVATIONS else node
    value, after = (last, last.next) if last is not node else (made, node)
    last.replace_input_with(node, made)
    readers = list(last.users)
    for target, arguments in moves:
        value = call_before(after, target, *(value if argument is ... else argument for argument in arguments))
        value.meta = meta_of_part(last)
    value.meta = dict(last.meta)
    for user in readers:
        user.replace_input_with(last, value)
    node.graph.erase_node(node)
