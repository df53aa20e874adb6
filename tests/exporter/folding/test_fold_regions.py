"""Folding of captured graphs: what folds, into what, what is refused and why; every result against the module."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from calibrators.errors import ModelError
from calibrators.graph.aten import constant, module_path
from exporter.folding.fold_regions import FoldReport, fold
from exporter.frontend.capture import capture
from tests.support.probe import dense, is_affine, probe, spread

PROOF = 1e-9
"""The product's own gate for float64 folds; a wrong fold is off by 1e-3 or more."""
FLOAT32 = 1e-4
"""Relative L2 difference of two float32 evaluation orders of a small network: 1e-6 typical, wide margin for cancelling
branches with random statistics."""

aten = torch.ops.aten
CONV2D, BATCH_NORM, LINEAR = aten.conv2d.default, aten.batch_norm.default, aten.linear.default


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode with batch norms as training leaves them: none at its default, some gammas negative."""
    generator = torch.Generator().manual_seed(seed)
    for each in module.modules():
        if isinstance(each, (nn.BatchNorm1d, nn.BatchNorm2d)) and each.track_running_stats:
            n = each.num_features
            each.running_mean = torch.randn(n, generator=generator)
            each.running_var = torch.rand(n, generator=generator) + 0.2
            if each.affine:
                each.weight.data = torch.randn(n, generator=generator)
                each.bias.data = torch.randn(n, generator=generator)
    return module.eval()


def counts(graph: torch.fx.GraphModule) -> Counter:
    return Counter(node.target for node in graph.graph.nodes if node.op == "call_function")


def folded(module: nn.Module, *shape: int) -> torch.fx.GraphModule:
    """Capture and fold; the result equals the module in float32, whole and on the border ring, for two sizes."""
    x = torch.randn(*(shape or (2, 4, 13, 10)), generator=torch.Generator().manual_seed(1))
    graph = fold(capture(module, x))
    report = graph.meta["fold"]
    assert isinstance(report, FoldReport)
    assert report.max_rel_error <= PROOF
    assert report.macs_after <= report.macs_before
    for batch in (1, 3):
        x = torch.randn(batch, *x.shape[1:], generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected, (got, *_) = module(x), graph(x)
        inner = (..., slice(3, -3), slice(3, -3))
        ring = torch.ones_like(expected, dtype=torch.bool)
        if expected.ndim == 4 and min(expected.shape[2:]) > 6:
            ring[inner] = False
            assert (got - expected)[~ring].norm() <= FLOAT32 * expected[~ring].norm()
        assert (got - expected)[ring].norm() <= FLOAT32 * expected[ring].norm()
    return graph


def only_convolution(graph: torch.fx.GraphModule) -> torch.fx.Node:
    (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
    assert node.target is CONV2D
    assert node.args[2] is not None, "the bias is always present"
    return node


def why(graph: torch.fx.GraphModule) -> str:
    """Reason of the only refusal."""
    (refusal,) = graph.meta["fold"].refused
    return refusal.why


def bn(channels: int, **options) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def conv_bn(cin, cout, k, stride=1, groups=1, *, dilation=1):
    sides = (k, k) if isinstance(k, int) else k
    padding = tuple(dilation * (side // 2) for side in sides)
    conv = nn.Conv2d(cin, cout, k, stride, padding, dilation=dilation, groups=groups, bias=cin != cout)
    return nn.Sequential(conv, bn(cout))


class Sum(nn.Module):
    """Sum of branches of one input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


class Function(nn.Module):
    """A forward written as a function of the module's parts and the input."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                self.register_buffer(name, part)
            else:
                self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


class RepMixer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.skip = bn(dim), bn(dim)
        self.dw, self.dw1 = conv_bn(dim, dim, 3, groups=dim), conv_bn(dim, dim, 1, groups=dim)
        self.gamma = nn.Parameter(torch.randn(dim, 1, 1))

    def forward(self, x):
        return x + self.gamma * (self.dw(x) + self.dw1(x) + self.skip(x) - self.norm(x))


class PadWithBias(nn.Module):
    """Batch norm padded with what it makes of a zero, so that 1x1 + norm may stand before a convolution."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.bn, self.width = bn(channels), width

    def forward(self, x):
        y = F.pad(self.bn(x), [self.width] * 4)
        t = self.bn.weight.detach() / torch.sqrt(self.bn.running_var + self.bn.eps)
        value = (self.bn.bias.detach() - self.bn.running_mean * t).view(1, -1, 1, 1)
        y[:, :, 0 : self.width, :] = value
        y[:, :, -self.width :, :] = value
        y[:, :, :, 0 : self.width] = value
        y[:, :, :, -self.width :] = value
        return y


class PartlyFilled(nn.Module):
    """The last row of the border is left as it was padded: no border of one value."""

    def __init__(self, end: int | None) -> None:
        super().__init__()
        self.end = end
        self.register_buffer("value", torch.full((1, 4, 1, 1), 0.3))

    def forward(self, x):
        y = F.pad(x, [2] * 4)
        y[:, :, :2, :] = self.value
        y[:, :, -2 : self.end, :] = self.value
        y[:, :, :, :2] = self.value
        y[:, :, :, -2:] = self.value
        return y


@pytest.mark.parametrize("end", [None, -1])
def test_a_border_is_filled_up_to_its_end(end: int | None) -> None:
    folded(nn.Sequential(conv_bn(4, 4, 3), PartlyFilled(end), nn.Conv2d(4, 4, 3)).eval())


def diverse_branches(c: int) -> nn.Module:
    return Sum(
        conv_bn(c, c, 3),
        conv_bn(c, c, 1),
        nn.Sequential(nn.Conv2d(c, c, 1, bias=False), PadWithBias(1, c), nn.AvgPool2d(3, 1), bn(c)),
        nn.Sequential(nn.Conv2d(c, c, 1, bias=False), PadWithBias(1, c), nn.Conv2d(c, c, 3, bias=False), bn(c)),
    )


def mobileone(c: int, k: int, stride: int, groups: int) -> nn.Module:
    branches = [conv_bn(c, c, k, stride, groups) for _ in range(3)]
    branches += [conv_bn(c, c, 1, stride, groups)] if k > 1 else []
    branches += [bn(c)] if stride == 1 else []
    return Sum(*branches)


# Blocks that become one convolution --------------------------------------------------------------------------------

ONE_CONVOLUTION = {
    "conv-bn": (lambda: conv_bn(4, 6, 3), "conv2d 3x3 s1 g1"),
    "conv-bn-stride": (lambda: conv_bn(4, 6, 3, stride=2), "conv2d 3x3 s2 g1"),
    "conv-bn-dilated": (lambda: conv_bn(4, 6, 3, dilation=2), "conv2d 3x3 s1 d2 g1"),
    "conv-bn-groups": (lambda: conv_bn(4, 6, 3, groups=2), "conv2d 3x3 s1 g2"),
    "even-kernel": (lambda: nn.Sequential(nn.Conv2d(4, 4, (2, 4), padding=1), bn(4)), "conv2d 2x4 s1 g1"),
    "bn-before-1x1": (lambda: nn.Sequential(bn(4), nn.Conv2d(4, 6, 1)), "conv2d 1x1 s1 g1"),
    "bn-before-valid": (lambda: nn.Sequential(bn(4), nn.Conv2d(4, 6, 3, 2)), "conv2d 3x3 s2 g1"),
    "bn-without-affine": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), bn(6, affine=False)), "conv2d 3x3 s1 g1"),
    "repvgg": (lambda: Sum(conv_bn(4, 4, 3), conv_bn(4, 4, 1), bn(4)), "conv2d 3x3 s1 g1"),
    "repvgg-stride": (lambda: Sum(conv_bn(4, 6, 3, 2), conv_bn(4, 6, 1, 2)), "conv2d 3x3 s2 g1"),
    "qarepvgg": (
        lambda: nn.Sequential(Sum(conv_bn(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Identity()), bn(4)),
        "conv2d 3x3 s1 g1",
    ),
    "mobileone-depthwise": (lambda: mobileone(4, 3, 1, 4), "conv2d 3x3 s1 g4"),
    "mobileone-stride": (lambda: mobileone(4, 3, 2, 4), "conv2d 3x3 s2 g4"),
    "mobileone-pointwise": (lambda: mobileone(4, 1, 1, 1), "conv2d 1x1 s1 g1"),
    "acnet": (lambda: Sum(conv_bn(4, 6, 3), conv_bn(4, 6, (1, 3)), conv_bn(4, 6, (3, 1))), "conv2d 3x3 s1 g1"),
    "acnet-stride": (
        lambda: Sum(conv_bn(4, 6, 3, 2), conv_bn(4, 6, (1, 3), 2), conv_bn(4, 6, (3, 1), 2)),
        "conv2d 3x3 s2 g1",
    ),
    "diverse-branches": (lambda: diverse_branches(4), "conv2d 3x3 s1 g1"),
    "repmixer": (lambda: RepMixer(4), "conv2d 3x3 s1 g4"),
    "replk": (lambda: Sum(conv_bn(4, 4, 7, groups=4), conv_bn(4, 4, 3, groups=4)), "conv2d 7x7 s1 g4"),
    "unireplk": (
        lambda: Sum(*(conv_bn(4, 4, k, groups=4, dilation=d) for k, d in ((7, 1), (5, 1), (3, 2), (3, 3)))),
        "conv2d 7x7 s1 g4",
    ),
    "repvit": (
        lambda: nn.Sequential(Sum(conv_bn(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=4), nn.Identity()), bn(4)),
        "conv2d 3x3 s1 g4",
    ),
    "groups-meet": (lambda: Sum(conv_bn(8, 8, 3, groups=2), conv_bn(8, 8, 1, groups=4), bn(8)), "conv2d 3x3 s1 g2"),
    "average-branch": (lambda: Sum(nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1)), "conv2d 3x3 s1 g1"),
    "subsampled-identity": (
        lambda: Function(lambda m, x: m.conv(x) + x[:, :, ::2, ::2], conv=conv_bn(4, 4, 3, 2)),
        "conv2d 3x3 s2 g1",
    ),
    "kxk-1x1-cheaper": (lambda: nn.Sequential(conv_bn(4, 16, 3), nn.Conv2d(16, 2, 1)), "conv2d 3x3 s1 g1"),
    "1x1-kxk": (
        lambda: nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.Conv2d(16, 4, 3, padding=1)),
        "conv2d 3x3 s1 g1",
    ),
    "input-padded-1x1-bn-kxk": (
        lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 16, 1), bn(16), nn.Conv2d(16, 4, 3)),
        "conv2d 3x3 s1 g1",
    ),
    "same-padding": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding="same"), bn(6)), "conv2d 3x3 s1 g1"),
    "arithmetic": (
        lambda: Function(
            lambda m, x: -(1 - 2 * m.conv(x) / m.d) - m.d, conv=nn.Conv2d(4, 4, 3), d=torch.rand(4, 1, 1) + 1
        ),
        "conv2d 3x3 s1 g1",
    ),
    "in-place-and-zero": (
        lambda: Function(lambda m, x: _accumulate(m, x), a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1)),
        "conv2d 3x3 s1 g1",
    ),
    "depth-concat": (
        lambda: Function(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=conv_bn(4, 2, 1), b=conv_bn(4, 3, 1)),
        "conv2d 1x1 s1 g1",
    ),
}


def _accumulate(m, x):
    out = 0
    out = out + m.a(x)
    out += F.dropout(m.b(x), training=m.training)
    return out.contiguous()


@pytest.mark.parametrize(("make", "kernel"), ONE_CONVOLUTION.values(), ids=ONE_CONVOLUTION.keys())
def test_block_becomes_one_convolution(make, kernel):
    torch.manual_seed(0)
    block = trained(make())
    channels = next((m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d)), 4)
    graph = folded(block, 2, channels, 13, 10)
    node = only_convolution(graph)
    report = graph.meta["fold"]
    assert [region.kernel for region in report.folded] == [kernel]
    assert report.refused == ()
    _equals_probe(block, graph, node, channels)


def _equals_probe(block: nn.Module, graph: torch.fx.GraphModule, node: torch.fx.Node, channels: int) -> None:
    """Kernel and bias of the folded convolution are those that impulses draw from the module in float64."""
    double = copy.deepcopy(block).double()

    def run(x):
        with torch.no_grad():
            return double(torch.from_numpy(x)).numpy()

    stride, padding, dilation, groups = (*node.args[3:], [1, 1], [0, 0], [1, 1], 1)[:4]
    weight = constant(graph, node.args[1]).double().numpy()
    weight = spread(dense(weight, groups), dilation)
    expected, bias = probe(
        run, channels=channels, kernel=weight.shape[2:], stride=tuple(stride), padding=tuple(padding)
    )
    stored = 2.0**-24  # half a step of the float32 that weights are stored in
    assert is_affine(run, (1, channels, 11, 12))
    assert np.abs(weight - expected).max() <= 2 * stored * np.abs(expected).max()
    assert np.abs(constant(graph, node.args[2]).numpy() - bias).max() <= 2 * stored * np.abs(bias).max()


# Other operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_linear_batch_norm_and_cheaper_linear_chain(affine):
    block = trained(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, affine=affine), nn.Linear(7, 3)))
    graph = folded(block, 2, 5)
    assert counts(graph) == {LINEAR: 1}
    assert [region.kernel for region in graph.meta["fold"].folded] == ["linear 5->3"]


def test_linear_bottleneck_is_not_expanded():
    graph = folded(nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 16)), 2, 16)
    assert counts(graph) == {LINEAR: 2}
    assert "cost guard" in why(graph)


def test_transformer_layer_scale_is_absorbed_beside_the_residual():
    def forward(m, x):
        return x + m.gamma * m.fc2(F.gelu(m.fc1(m.norm(x))))

    parts = {"norm": nn.LayerNorm(6), "fc1": nn.Linear(6, 12), "fc2": nn.Linear(12, 6)}
    graph = folded(Function(forward, gamma=torch.randn(6), **parts).eval(), 2, 5, 6)
    assert counts(graph) == {aten.layer_norm.default: 1, LINEAR: 2, aten.gelu.default: 1, aten.add.Tensor: 1}
    (region,) = graph.meta["fold"].folded
    assert region.where == "fc2"


def test_conv1d_branches_fold():
    block = trained(Sum(*(nn.Sequential(nn.Conv1d(4, 4, k, padding=k // 2), nn.BatchNorm1d(4)) for k in (5, 3, 1))))
    graph = folded(block, 2, 4, 13)
    assert counts(graph) == {aten.conv1d.default: 1}


@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "grouped"])
def test_transposed_convolution_takes_in_its_batch_norm(groups):
    transposed = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=groups)
    graph = folded(trained(nn.Sequential(transposed, bn(6))))
    assert counts(graph) == {aten.conv_transpose2d.input: 1}
    assert graph.meta["fold"].folded[0].kernel == f"conv_transpose2d 3x3 s2 g{groups}"


def test_unequal_padding_stays_an_explicit_pad():
    graph = folded(trained(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 6, 3, 2), bn(6))))
    assert counts(graph) == {aten.constant_pad_nd.default: 1, CONV2D: 1}


def test_reflect_padding_is_a_root():
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
    assert counts(folded(trained(nn.Sequential(conv, bn(6))))) == {aten.pad.default: 1, CONV2D: 1}


def test_partial_sum_beside_a_nonlinear_branch():
    def forward(m, x):
        return m.a(x) + torch.relu(m.c(x)) + m.b(x) + x

    graph = folded(trained(Function(forward, a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1), c=conv_bn(4, 4, 3))))
    assert counts(graph) == {CONV2D: 2, aten.relu.default: 1, aten.add.Tensor: 1}


def test_two_groups_and_a_sum_of_sums():
    def forward(m, x):
        y = torch.relu(x)
        inner = m.a(x) + m.d(y) - m.b(x) + 2 * m.e(y)
        return torch.relu(inner) + x + inner + m.c(x)

    block = trained(Function(forward, **{name: conv_bn(4, 4, 3) for name in "abcde"}))
    graph = folded(block)
    assert counts(graph) == {CONV2D: 3, aten.relu.default: 2, aten.add.Tensor: 3}


def test_partial_sum_leaves_out_what_costs_more():
    graph = folded(trained(Sum(conv_bn(8, 8, 3), conv_bn(8, 8, 5, groups=8), conv_bn(8, 8, 1))), 2, 8, 13, 10)
    assert counts(graph) == {CONV2D: 2, aten.add.Tensor: 1}
    assert sorted(region.kernel for region in graph.meta["fold"].folded) == ["conv2d 3x3 s1 g1", "conv2d 5x5 s1 g8"]


def test_shared_weights_fold_at_each_call():
    block = trained(
        Function(lambda m, x: m.b(torch.relu(m.a(m.c(x)))) + m.a(m.c(-x)), c=nn.Conv2d(4, 4, 3), a=bn(4), b=bn(4))
    )
    assert counts(folded(block))[CONV2D] == 2

    def forward(m, x):
        return m.a(m.conv(x)) * torch.sigmoid(m.b(m.conv(x[:, :, ::2, ::2])).mean())

    graph = folded(trained(Function(forward, conv=nn.Conv2d(4, 4, 3), a=bn(4), b=bn(4))))
    assert counts(graph)[BATCH_NORM] == 0
    assert len({node.args[1] for node in graph.graph.nodes if node.target is CONV2D}) == 2


def test_batch_norm_goes_to_the_convolution_before_it():
    graph = folded(trained(nn.Sequential(nn.Conv2d(4, 4, 5, groups=4), bn(4), nn.Conv2d(4, 16, 1))))
    assert [(region.where, region.kernel) for region in graph.meta["fold"].folded] == [("0", "conv2d 5x5 s1 g4")]


# Refusals ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "3x3-3x3": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)), {CONV2D: 2}, "border rule"),
    "biased-1x1-padded-3x3": (
        lambda: nn.Sequential(conv_bn(4, 16, 1), nn.Conv2d(16, 4, 3, 1, 1)),
        {CONV2D: 2},
        "border rule",
    ),
    "bn-padded-3x3": (
        lambda: nn.Sequential(bn(4), nn.Conv2d(4, 4, 3, 1, 1)),
        {BATCH_NORM: 1, CONV2D: 1},
        "border rule",
    ),
    "avgpool-border": (
        lambda: Sum(conv_bn(4, 4, 3), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        {CONV2D: 1, aten.avg_pool2d.default: 1, aten.add.Tensor: 1},
        "count_include_pad=False",
    ),
    "avgpool-ceil": (
        lambda: nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), bn(4)),
        {aten.avg_pool2d.default: 1, BATCH_NORM: 1},
        "ceil_mode",
    ),
    "relu-between": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), bn(4)),
        {CONV2D: 1, aten.relu.default: 1, BATCH_NORM: 1},
        "aten.relu.default",
    ),
    "used-elsewhere": (
        lambda: Function(
            lambda m, x: m.bn(m.c(x)) * torch.sigmoid(m.c2(m.c(x))),
            c=_Once(nn.Conv2d(4, 4, 3)),
            bn=bn(4),
            c2=nn.Identity(),
        ),
        {CONV2D: 1, BATCH_NORM: 1, aten.sigmoid.default: 1, aten.mul.Tensor: 1},
        "also used elsewhere",
    ),
    "no-running-statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), bn(4, track_running_stats=False)),
        {CONV2D: 1, BATCH_NORM: 1},
        "without running statistics",
    ),
    "not-finite": (
        lambda: nn.Sequential(_with_nan(nn.Conv2d(4, 4, 3)), bn(4)),
        {CONV2D: 1, BATCH_NORM: 1},
        "not finite",
    ),
    "data-dependent-gate": (
        lambda: Function(
            lambda m, x: m.g * (m.c(x) * torch.sigmoid(x)), c=nn.Conv2d(4, 4, 3, padding=1), g=torch.randn(4, 1, 1)
        ),
        {CONV2D: 1, aten.mul.Tensor: 2, aten.sigmoid.default: 1},
        "no convolution or linear layer next to it: its input comes from aten.mul.Tensor",
    ),
    "sizes-differ": (
        lambda: Function(lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(4, 4, 3, 2, 1), b=nn.Conv2d(4, 4, 2, 2)),
        {CONV2D: 2, aten.add.Tensor: 1},
        "only for some input sizes",
    ),
}


class _Once(nn.Module):
    """Calls its module once and hands the same value to every caller."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.value = module, None

    def forward(self, x):
        if self.value is None or self.value[0] is not x:
            self.value = (x, self.module(x))
        return self.value[1]


def _with_nan(conv: nn.Conv2d) -> nn.Conv2d:
    conv.weight.data[0, 0, 0, 0] = float("nan")
    return conv


@pytest.mark.parametrize(("make", "expected", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_a_reason(make, expected, reason):
    torch.manual_seed(0)
    graph = fold(capture(trained(make()), torch.randn(2, 4, 12, 10)))
    assert counts(graph) == expected
    assert reason in why(graph)


def test_nothing_is_refused_where_nothing_looks_linear():
    graph = folded(trained(nn.Sequential(conv_bn(4, 4, 3), nn.ReLU(), conv_bn(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2))))
    assert graph.meta["fold"].refused == ()


def test_near_dead_channel_folds_and_an_overflowing_one_is_refused():
    block = trained(conv_bn(4, 4, 3))
    block[1].running_var[1] = 0.0
    graph = fold(capture(block, torch.randn(2, 4, 9, 9)))
    assert counts(graph) == {CONV2D: 1}
    block[1].weight.data[1] = 1e38
    graph = fold(capture(block, torch.randn(2, 4, 9, 9)))
    assert "overflows" in why(graph)


def test_mutating_graph_is_an_error():
    graph = capture(conv_bn(4, 4, 3), torch.randn(2, 4, 9, 9))
    node = next(node for node in graph.graph.nodes if node.target is BATCH_NORM)
    with graph.graph.inserting_after(node):
        graph.graph.call_function(aten.relu_.default, (node,))
    with pytest.raises(ModelError, match="writes into its input"):
        fold(graph)


# The graph around the folds ----------------------------------------------------------------------------------------


def test_interior_value_that_is_an_output_stays():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3), bn(4)

        def forward(self, x):
            y = self.conv(x)
            return y, self.bn(y)

    model, x = trained(Two()), torch.randn(2, 4, 9, 9)
    graph = fold(capture(model, x))
    assert "also used elsewhere" in why(graph)
    for expected, got in zip(model(x), graph(x), strict=True):
        assert torch.equal(expected, got)


def test_input_is_untouched_and_unused_parameters_are_gone():
    model, x = trained(nn.Sequential(mobileone(4, 3, 1, 4), nn.ReLU())), torch.randn(2, 4, 9, 9)
    graph = capture(model, x)
    before = [str(node) + str(node.args) for node in graph.graph.nodes]
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    small = fold(graph)
    assert [str(node) + str(node.args) for node in graph.graph.nodes] == before
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
    assert sum(value.numel() for value in small.state_dict().values()) == 4 * 9 + 4
    assert "fold" not in graph.meta


def test_folded_graph_exports_again_with_a_free_batch():
    graph = fold(capture(trained(nn.Sequential(conv_bn(4, 4, 3), nn.ReLU())), torch.randn(2, 4, 9, 9)))
    again = torch.export.export(
        graph, (torch.randn(2, 4, 9, 9),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    assert again.module()(torch.randn(5, 4, 9, 9))[0].shape == (5, 4, 7 + 2, 7 + 2)


def test_folding_twice_changes_nothing():
    once = fold(capture(trained(Sum(conv_bn(4, 4, 3), conv_bn(4, 4, 1))), torch.randn(2, 4, 9, 9)))
    twice = fold(once)
    assert counts(twice) == counts(once)
    assert twice.meta["fold"].regions == 0


def test_regions_and_nodes_are_named_by_their_modules():
    parts = {"stem": conv_bn(4, 4, 3), "first": nn.ReLU(), "mixer": RepMixer(4), "second": nn.ReLU()}
    net = nn.Sequential(OrderedDict(parts, block=Sum(conv_bn(4, 4, 3), bn(4))))
    graph = folded(trained(net))
    assert [region.where for region in graph.meta["fold"].folded] == ["stem.0", "mixer", "block"]
    assert [module_path(node) for node in graph.graph.nodes if node.target is CONV2D] == ["stem.0", "mixer", "block"]
    assert "stem_0_weight" in dict(graph.named_buffers())


def test_folded_norms_are_told_with_what_they_multiply_by():
    """An identity branch that saw little variance stands out; what a norm makes of 1 and of 0 is the oracle."""
    block = trained(Sum(conv_bn(4, 4, 3), bn(4), nn.BatchNorm2d(4, affine=False)))
    block.branches[1].running_var.mul_(1e-4)
    (region,) = folded(block).meta["fold"].folded
    found = {norm.where: norm for norm in region.norms}
    modules = {name: each for name, each in block.named_modules() if isinstance(each, nn.BatchNorm2d)}
    assert found.keys() == modules.keys() and len(found) == 3
    for name, module in modules.items():
        with torch.no_grad():
            gains = (module(torch.ones(1, 4, 1, 1)) - module(torch.zeros(1, 4, 1, 1))).abs().flatten()
        assert found[name].gain == pytest.approx(float(gains.median()), rel=1e-5)
        assert found[name].largest_gain == pytest.approx(float(gains.max()), rel=1e-5)
        assert found[name].least_variance == pytest.approx(float(module.running_var.min()))
    assert found["branches.1"].gain > 10 * max(found[name].gain for name in found if name != "branches.1")


def test_macs_are_counted_per_sample():
    graph = folded(trained(conv_bn(4, 6, 3)), 2, 4, 9, 9)
    report = graph.meta["fold"]
    assert report.macs_after == 9 * 9 * 6 * 4 * 9
    assert report.macs_before == report.macs_after + 9 * 9 * 6
    assert report.folded[0].nodes == 2


def test_constants_and_no_op_views_are_folded_away():
    def forward(m, x):
        weight = (m.w * 2.0 + torch.eye(4)[:, :, None, None]).contiguous()
        y = F.conv2d(x.reshape(x.shape[0], 4, x.shape[2], x.shape[3]).permute(0, 1, 2, 3), weight)
        return y.expand(-1, -1, -1, -1).to(torch.float32).clone() * 1.0 + 0

    graph = folded(Function(forward, w=torch.randn(4, 4, 1, 1)).eval())
    assert counts(graph) == {CONV2D: 1}


def test_constants_that_depend_on_each_other_are_folded_away():
    def forward(m, x):
        doubled = m.w * 2.0
        return F.conv2d(x * doubled, (doubled + 1.0) * torch.ones(4, 4, 1, 1))

    module = Function(forward, w=torch.randn(1, 4, 1, 1)).eval()
    graph, x = folded(module), torch.randn(2, 4, 9, 9)
    assert counts(graph) == {CONV2D: 1}
    torch.testing.assert_close(graph(x)[0], module(x))


def test_slices_that_change_the_shape_for_other_batches_stay():
    graph = folded(Function(lambda m, x: x[:2].relu()).eval())
    assert counts(graph)[aten.slice.Tensor] == 1


def test_a_view_of_a_view_is_one_and_vanishes_where_it_gives_the_old_shape():
    graph = folded(Function(lambda m, x: x.flatten(1).view(-1, 4, 13, 10).relu()).eval())
    assert counts(graph) == {aten.relu.default: 1}
    graph = folded(Function(lambda m, x: x.flatten(1).view(-1, 40, 13).relu()).eval())
    assert counts(graph) == {aten.reshape.default: 1, aten.relu.default: 1}


# Random linear networks --------------------------------------------------------------------------------------------

CHANNELS = 4
OPERATORS = [
    "conv3",
    "conv1",
    "depthwise",
    "dilated",
    "grouped",
    "norm",
    "scale",
    "shift",
    "negate",
    "average",
    "add",
    "relu",
]


class Random(nn.Module):
    """Operators on earlier values, the last two values added up."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        c = CHANNELS
        make = {
            "conv3": lambda: nn.Conv2d(c, c, 3, padding=1),
            "conv1": lambda: nn.Conv2d(c, c, 1, bias=False),
            "depthwise": lambda: nn.Conv2d(c, c, 5, padding=2, groups=c),
            "dilated": lambda: nn.Conv2d(c, c, 3, padding=2, dilation=2),
            "grouped": lambda: nn.Conv2d(c, c, (1, 3), padding=(0, 1), groups=2, bias=False),
            "norm": lambda: bn(c),
            "average": lambda: nn.AvgPool2d(3, 1, 1),
        }
        self.parts = nn.ModuleList(make.get(name, nn.Identity)() for name, _, _ in steps)
        self.register_buffer("vector", torch.linspace(-1, 2, c)[:, None, None])

    def forward(self, x):
        values = [x]
        for part, (name, first, second) in zip(self.parts, self.steps, strict=True):
            a, b = values[first % len(values)], values[second % len(values)]
            other = {
                "scale": lambda a, b: self.vector * a,
                "shift": lambda a, b: a - self.vector,
                "negate": lambda a, b: -a,
                "add": lambda a, b: a + b,
                "relu": lambda a, b: torch.relu(a),
            }
            values.append(other[name](a, b) if name in other else part(a))
        return values[-1] + values[-2]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(OPERATORS), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9))
def test_random_networks_keep_their_values_in_float64(steps):
    torch.manual_seed(0)
    model = trained(Random(steps)).double()
    x = torch.randn(2, CHANNELS, 9, 8, dtype=torch.float64)
    graph = fold(capture(model, x))
    with torch.no_grad():
        expected, got = model(x), graph(x)[0]
    assert graph.meta["fold"].max_rel_error <= PROOF
    assert graph.meta["fold"].macs_after <= graph.meta["fold"].macs_before
    assert (got - expected).abs().max() <= PROOF * expected.abs().max().clamp(min=1e-3)
