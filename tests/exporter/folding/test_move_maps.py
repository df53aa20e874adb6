"""Per-channel maps reach the weighted operators from which moves separate them; every result against the module."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from tests.exporter.folding.test_fold_regions import BATCH_NORM, CONV2D, LINEAR, Function, bn, counts, folded, trained

aten = torch.ops.aten


def conv(cin: int, cout: int, k: int = 3, groups: int = 1, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, k, padding=k // 2, groups=groups, bias=bias)


def by_token(m, x):
    y = m.linear(x)
    return m.norm(y.flatten(0, 1)).reshape_as(y)


def mixed(m, x):
    return m.norm(torch.cat([m.a(x[:, :4]), m.b(x[:, 4:])], 1))


def pooled(m, x):
    return m.norm(torch.cat([m.a(x), m.pool(x)], 1)).relu()


def layer_scale(m, x):
    return (m.a(x).flatten(2).transpose(1, 2) * m.scale).relu()


def shuffled(m, x):
    return m.norm(m.a(x).reshape(-1, 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2))


def attention(m, x):
    tokens = m.norm(x).flatten(2).transpose(1, 2)
    return m.linear(tokens) + x.flatten(2).transpose(1, 2)


def halves(m, x):
    first, second = (m.norm(x) * m.scale).chunk(2, 1)
    return m.a(first) + m.b(second)


MOVED = {
    "linear-flatten-norm": (by_token, lambda: {"linear": nn.Linear(9, 8), "norm": nn.BatchNorm1d(8)}, {LINEAR: 1}),
    "cat-norm": (
        mixed,
        lambda: {"a": conv(4, 4, 3, 4), "b": conv(4, 4, 5, 4), "norm": bn(8)},
        {CONV2D: 2, aten.slice.Tensor: 2, aten.cat.default: 1},
    ),
    "permute-scale": (
        layer_scale,
        lambda: {"a": conv(8, 6), "scale": torch.randn(6)},
        {CONV2D: 1, aten.reshape.default: 1, aten.transpose.int: 1, aten.relu.default: 1},
    ),
    "shuffle-norm": (
        shuffled,
        lambda: {"a": conv(8, 8), "norm": bn(8)},
        {CONV2D: 1, aten.reshape.default: 2, aten.transpose.int: 1},
    ),
    "norm-permute-linear": (
        attention,
        lambda: {"norm": bn(8), "linear": nn.Linear(8, 8)},
        {LINEAR: 1, aten.reshape.default: 2, aten.transpose.int: 2, aten.add.Tensor: 1},
    ),
    "norm-scale-chunk": (
        halves,
        lambda: {"norm": bn(8), "scale": torch.randn(8, 1, 1), "a": conv(4, 6, 1), "b": conv(4, 6, 1, bias=True)},
        {CONV2D: 2, aten.chunk.default: 1, operator.getitem: 2, aten.add.Tensor: 1},
    ),
}


@pytest.mark.parametrize(("forward", "parts", "left"), MOVED.values(), ids=MOVED.keys())
def test_moved_map_folds(forward, parts, left) -> None:
    torch.manual_seed(0)
    module = trained(Function(forward, **parts()))
    graph = folded(module, *((2, 5, 9) if forward is by_token else (2, 8, 9, 10)))
    assert counts(graph) == left
    assert graph.meta["fold"].refused == ()


def test_the_branch_that_takes_nothing_in_keeps_its_part_of_the_norm() -> None:
    module = trained(Function(pooled, a=conv(8, 6), pool=nn.MaxPool2d(3, 1, 1), norm=bn(14)))
    graph = folded(module, 2, 8, 9, 9)
    (norm,) = (node for node in graph.graph.nodes if node.target is BATCH_NORM)
    assert norm.args[0].target is aten.max_pool2d.default
    assert counts(graph)[CONV2D] == 1


def two_activations(m, x):
    return m.norm(torch.cat([m.a(x).relu(), x.sigmoid()], 1))


def read_twice(m, x):
    y = m.a(x)
    return m.norm(torch.cat([y, m.b(x)], 1))[:, :4] + y


def padded_reader(m, x):
    first, second = m.norm(x).chunk(2, 1)
    return m.a(first) + m.b(second)


def unequal_rows(m, x):
    return m.a(x).flatten(2) * m.scale


STAYS = {
    "activations-in-cat": (two_activations, lambda: {"a": conv(8, 4), "norm": bn(12)}),
    "padding-after-offset": (padded_reader, lambda: {"norm": bn(8), "a": conv(4, 6), "b": conv(4, 6)}),
    "factor-by-place": (unequal_rows, lambda: {"a": conv(8, 4), "scale": torch.rand(81) + 0.5}),
}


@pytest.mark.parametrize(("forward", "parts"), STAYS.values(), ids=STAYS.keys())
def test_map_stays_where_nothing_takes_it_in(forward, parts) -> None:
    graph = folded(trained(Function(forward, **parts())), 2, 8, 9, 9)
    assert counts(graph)[BATCH_NORM] + counts(graph)[aten.mul.Tensor] == 1


def test_the_branch_that_is_read_elsewhere_keeps_its_part_of_the_norm() -> None:
    graph = folded(trained(Function(read_twice, a=conv(8, 4), b=conv(8, 4), norm=bn(8))), 2, 8, 9, 9)
    (norm,) = (node for node in graph.graph.nodes if node.target is BATCH_NORM)
    assert len(norm.args[1].users) == 1
    assert counts(graph)[CONV2D] == 2
