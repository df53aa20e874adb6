"""One spelling per meaning: rewrite the many names of views, moves and products into the few that the tables know.

- aliases (`ALIASES` in calibrators.graph.operators) -> the operator they stand for
- views, flattened and added axes -> reshape to constant sizes, one free size as -1, more computed from the inputs
- squeezes -> squeeze of the axes that have size 1
- swapped, moved and transposed axes -> permute
- narrow -> slice; flips -> flip; rotations -> transpose and flip
- stack, hstack, vstack, dstack -> concatenation; splits of a named axis -> splits
- channel shuffle, pixel unshuffle -> reshape, permute, reshape
- values made from the sizes of others alone -> constants; empty parts of a concatenation -> nothing
- inner products and tensordot -> matmul of matrices; addmm and baddbmm -> matmul and a sum
- one-sided clamps, a threshold at 0 -> clamp

Must not know: which operators have integer kernels, quantization, ONNX.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, is_constant, operator_name, overloads
from calibrators.graph.operators import ALIASES
from calibrators.graph.rewrite import Call, Rule, call_before, origin, replace_by, replace_call
from calibrators.graph.sizes import reshape_sizes

__all__ = ["SPELLINGS"]

aten = torch.ops.aten


def _shape(node: Any) -> tuple[Any, ...]:
    """Return the sizes of a value as capture saw them, a free one as a symbol."""
    return tuple(node.meta["val"].shape)


def _is_known(node: fx.Node) -> bool:
    """Return whether capture recorded the values that a call reads and writes."""
    return all(isinstance(each.meta.get("val"), Tensor) for each in (node, *node.all_input_nodes))


def _axes(node: fx.Node, name: str = "dims") -> list[int]:
    """Return an argument of axes, counted from the first one."""
    rank = len(_shape(node.args[0]))
    axes = bind(node)[name]
    return [axis % rank for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]


def _part(node: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    """Insert a call that computes a part of what `node` does; its shape is not that of `node`."""
    part = call_before(node, target, *arguments)
    part.meta = origin(node)
    return part


# Views and moves -----------------------------------------------------------------------------------------------------


def _alias(node: fx.Node) -> None:
    (node.target,) = overloads([ALIASES[str(node.target.__name__)]])  # type: ignore[union-attr]


def _reshape(node: fx.Node) -> None:
    """Replace a view by a reshape, which takes any memory layout."""
    is_view = node.target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
    shape = _shape(node) if isinstance(node.meta.get("val"), Tensor) else (0,)
    several = sum(not isinstance(size, int) for size in shape) > 1
    sizes = None if is_view and several else reshape_sizes(node, shape)  # a view has computed them already
    if sizes:
        node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], sizes), {}
    elif is_view:
        node.target = aten.reshape.default


def _squeeze(node: fx.Node) -> None:
    """Name the axes of size 1 that a squeeze removes; without any it returns its input."""
    if not _is_known(node):
        return
    before = _shape(node.args[0])
    named = range(len(before)) if node.target is aten.squeeze.default else _axes(node, list(bind(node))[1])
    removed = [axis for axis in named if isinstance(before[axis], int) and before[axis] == 1]
    if len(before) - len(removed) != len(_shape(node)):
        return
    if removed:
        node.target, node.args, node.kwargs = aten.squeeze.dims, (node.args[0], sorted(removed)), {}
    else:
        replace_by(node, node.args[0])  # type: ignore[arg-type]


def _permute(node: fx.Node) -> None:
    """Read the order of axes off the sizes that the operator gives to a tensor without data."""
    if not _is_known(node) or node.meta["val"].is_complex():
        return
    probe = torch.empty(*range(2, 2 + len(_shape(node.args[0]))), device="meta")
    moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    node.target, node.args, node.kwargs = aten.permute.default, (node.args[0], [n - 2 for n in moved.shape]), {}


def _narrow(node: fx.Node) -> None:
    x, dim, start, length = bind(node).values()
    if isinstance(start, int) and isinstance(length, int) and start >= 0:
        node.target, node.args = aten.slice.Tensor, (x, dim, start, start + length)


def _flip(node: fx.Node) -> None:
    axis = 1 if node.target is aten.fliplr.default else 0
    node.target, node.args = aten.flip.default, (node.args[0], [axis])


def _rotate(node: fx.Node) -> None:
    first, second = _axes(node)
    transpose, flip = aten.transpose.int, aten.flip.default
    x = node.args[0]
    turns: dict[int, tuple[Call, ...]] = {
        0: ((aten.alias.default, (x,)),),
        1: ((flip, (x, [second])), (transpose, (..., first, second))),
        2: ((flip, (x, [first, second])),),
        3: ((flip, (x, [first])), (transpose, (..., first, second))),
    }
    if _is_known(node):
        replace_call(node, *turns[bind(node)["k"] % 4])


def _regroup(node: fx.Node) -> None:
    """Spell a channel shuffle or pixel unshuffle out: cut axes, move them, merge them."""
    x, count = node.args[:2]
    if not _is_known(node) or len(_shape(x)) != 4 or not isinstance(count, int):
        return
    batch, channels, height, width = _shape(x)
    if node.target is aten.channel_shuffle.default:
        cut, order = reshape_sizes(node, (batch, count, channels // count, height, width)), [0, 2, 1, 3, 4]
    else:
        cells = (height // count, count, width // count, count)
        cut, order = reshape_sizes(node, (batch, channels, *cells)), [0, 1, 3, 5, 2, 4]
    merged = reshape_sizes(node, _shape(node))
    if cut is not None and merged is not None:
        moved = _part(node, aten.permute.default, _part(node, aten.reshape.default, x, cut), order)
        replace_call(node, (aten.reshape.default, (moved, merged)))


# Several tensors -----------------------------------------------------------------------------------------------------


def _stack(node: fx.Node) -> None:
    tensors, dim = bind(node).values()
    if _is_known(node):
        axis = dim % len(_shape(node))
        replace_call(node, (aten.cat.default, ([_part(node, aten.unsqueeze.default, x, axis) for x in tensors], axis)))


def _stack_by_name(node: fx.Node) -> None:
    """Concatenate along the axis that the operator's name stands for, if all values have that axis."""
    axis = {"hstack": 1, "column_stack": 1, "dstack": 2}.get(operator_name(node.target), 0)
    if _is_known(node) and all(len(_shape(x)) > max(axis, 1) for x in node.all_input_nodes):
        node.target, node.args, node.kwargs = aten.cat.default, (node.args[0], axis), {}


def _split_by_name(node: fx.Node) -> None:
    axis = {"hsplit": 1, "dsplit": 2}.get(operator_name(node.target), 0)
    how = bind(node).get("sections", bind(node).get("indices"))
    target = aten.tensor_split.sections if isinstance(how, int) else aten.tensor_split.indices
    if len(_shape(node.args[0])) > max(axis, 1):
        node.target, node.args, node.kwargs = target, (node.args[0], how, axis), {}


def _fill(node: fx.Node) -> None:
    """Make a value of one number without the tensor that lends it sizes or type, whose layer would count as read."""
    value, bound = node.meta.get("val"), bind(node)
    sizes = list(value.shape) if isinstance(value, Tensor) else [None]
    number = bound.get("fill_value", 1 if "ones" in operator_name(node.target) else 0)
    if all(isinstance(each, int) for each in sizes) and not isinstance(number, fx.Node):
        node.target, node.args, node.kwargs = aten.full.default, (sizes, number), {"dtype": value.dtype}  # type: ignore[union-attr]


def _cat(node: fx.Node) -> None:
    """Leave out parts without values."""
    tensors, *rest = bind(node).values()
    full = [x for x in tensors if not isinstance(x.meta.get("val"), Tensor) or 0 not in _shape(x)]
    if full:
        node.args, node.kwargs = (full, *rest), {}


# Products and clamps -------------------------------------------------------------------------------------------------


def _contract(node: fx.Node) -> None:
    """Multiply two matrices: the contracted axes last in the first one, first in the second one."""
    bound = list(bind(node).values())
    x, y = bound[:2]
    if not _is_known(node):
        return
    last, first = (
        [axis % len(_shape(value)) for axis in axes]
        for value, axes in zip((x, y), bound[2:] or ([-1], [-1]), strict=True)
    )
    contracted = [_shape(x)[axis] for axis in last]
    sizes = reshape_sizes(node, _shape(node)) if all(isinstance(size, int) for size in contracted) else None
    if sizes is None:
        return
    count = math.prod(contracted)
    rows = _part(node, aten.permute.default, x, [*_others(x, last), *last])
    columns = _part(node, aten.permute.default, y, [*first, *_others(y, first)])
    matrices = (
        _part(node, aten.reshape.default, rows, [-1, count]),
        _part(node, aten.reshape.default, columns, [count, -1]),
    )
    replace_call(node, (aten.matmul.default, matrices), (aten.reshape.default, (..., sizes)))


def _others(value: fx.Node, axes: list[int]) -> list[int]:
    return [axis for axis in range(len(_shape(value))) if axis not in axes]


def _sum_of_product(node: fx.Node) -> None:
    """Spell beta * c + alpha * (x @ y) out where both factors are 1; with a constant y it is a linear layer."""
    bound = bind(node)
    c, x, y = node.args
    is_layer = is_constant(y) or [*map(is_constant, y.all_input_nodes)] == [True]  # type: ignore[union-attr]
    if bound["beta"] == bound["alpha"] == 1 and not is_layer:
        replace_call(node, (aten.add.Tensor, (_part(node, aten.matmul.default, x, y), c)))


def _one_sided_clamp(node: fx.Node) -> None:
    x, bound = node.args
    limits = (bound, None) if node.target is aten.clamp_min.default else (None, bound)
    node.target, node.args = aten.clamp.default, (x, *limits)


def _threshold(node: fx.Node) -> None:
    if bind(node)["threshold"] == bind(node)["value"] == 0:
        node.target, node.args, node.kwargs = aten.relu.default, (node.args[0],), {}


def _for_all(names: str, rule: Rule) -> dict[Any, tuple[Rule, ...]]:
    return dict.fromkeys(overloads(names.split()), (rule,))


SPELLINGS: dict[Any, tuple[Rule, ...]] = {
    **_for_all(" ".join(ALIASES), _alias),
    **_for_all("view.default _unsafe_view.default reshape.default view_as.default reshape_as.default", _reshape),
    **_for_all("flatten.using_ints unflatten.int ravel.default", _reshape),
    **_for_all("atleast_1d.default atleast_2d.default atleast_3d.default", _reshape),
    **_for_all("squeeze.default squeeze.dim squeeze.dims", _squeeze),
    **_for_all("mT.default mH.default numpy_T.default matrix_H.default adjoint.default t.default", _permute),
    **_for_all("swapaxes.default swapdims.default movedim.int movedim.intlist", _permute),
    **_for_all("moveaxis.int moveaxis.intlist", _permute),
    **_for_all("narrow.default", _narrow),
    **_for_all("fliplr.default flipud.default", _flip),
    **_for_all("rot90.default", _rotate),
    **_for_all("channel_shuffle.default native_channel_shuffle.default pixel_unshuffle.default", _regroup),
    **_for_all("zeros_like.default ones_like.default full_like.default", _fill),
    **_for_all("new_zeros.default new_ones.default new_full.default", _fill),
    **_for_all("cat.default", _cat),
    **_for_all("stack.default", _stack),
    **_for_all("hstack.default vstack.default row_stack.default dstack.default column_stack.default", _stack_by_name),
    **_for_all("hsplit.int hsplit.array vsplit.int vsplit.array dsplit.int dsplit.array", _split_by_name),
    **_for_all("inner.default tensordot.default", _contract),
    **_for_all("addmm.default baddbmm.default", _sum_of_product),
    **_for_all("clamp_min.default clamp_max.default", _one_sided_clamp),
    **_for_all("threshold.default", _threshold),
}
