"""Statistics that folded operators keep of their outputs, against NumPy's means and deviations of the outputs.

Every batch norm gets the true statistics of its input, measured on the batch that the outputs are measured on. Then
each entry must hold of the value it is kept at, whatever was rewritten in between.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calibrators.calibration import calibrate
from calibrators.execution.blocks import Block, extract, merge, partition
from calibrators.graph.batch_norm import EXPECTED, expected_outputs
from calibrators.graph.canonical import to_integer_forms
from calibrators.placement.place import PlacementOptions
from exporter.emission.build_model import to_onnx
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from exporter.frontend.reference import export_program, save_reference
from tests.exporter.folding.test_fold_regions import Function, RepMixer, Sum, bn, conv_bn, diverse_branches, mobileone

ROUNDING = 1e-9
"""Of values near 1 in float64, behind norms that amplify a nearly dead channel a thousand times."""

aten = torch.ops.aten


class Recorder(fx.Interpreter):
    """Keeps every value."""

    def run_node(self, n: fx.Node) -> Any:
        self.values = getattr(self, "values", {})
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def per_channel(value: Tensor) -> np.ndarray:
    """[channels, samples and cells]."""
    array = value.detach().numpy()
    return np.moveaxis(array, 1, 0).reshape(array.shape[1], -1)


def norms_of(model: nn.Module) -> list[Any]:
    return [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


def drawn(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, its norms with random gains and shifts."""
    generator = torch.Generator().manual_seed(5)
    model = model.double().eval().requires_grad_(False)
    for norm in norms_of(model):
        if norm.affine:
            norm.weight.copy_(torch.randn(norm.num_features, generator=generator, dtype=torch.float64))
            norm.bias.copy_(torch.randn(norm.num_features, generator=generator, dtype=torch.float64))
    return model


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """The model, its norms with the true statistics for x."""

    def measure(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        seen = per_channel(inputs[0])
        norm.running_mean, norm.running_var = torch.from_numpy(seen.mean(1)), torch.from_numpy(seen.var(1))

    hooks = [norm.register_forward_pre_hook(measure) for norm in norms_of(model)]
    model(x)
    for hook in hooks:
        hook.remove()
    return model


def batch(*shape: int) -> Tensor:
    """Correlated channels with means of their own."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(6, *shape, generator=generator, dtype=torch.float64)
    return x + 0.5 * x.roll(1, 1) + torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) / shape[0]


def folded(model: nn.Module, *shape: int) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(len(shape))
    x = batch(*(shape or (4, 12, 10)))
    return fold(capture(settled(drawn(model), x), x)), x


def check_all(graph: fx.GraphModule, x: Tensor) -> set[str]:
    """Every entry holds; returns the names of the values that have one."""
    recorder = Recorder(graph)
    recorder.run(x)
    known = expected_outputs(graph)
    for name, expected in known.items():
        seen = per_channel(recorder.values[name])
        assert np.allclose(expected.mean.numpy(), seen.mean(1), rtol=ROUNDING, atol=ROUNDING), name
        if expected.std is not None:
            assert np.allclose(expected.std.numpy(), seen.std(1), rtol=ROUNDING, atol=ROUNDING), name
    return set(known)


def only(graph: fx.GraphModule) -> Any:
    (expected,) = expected_outputs(graph).values()
    return expected


# Folds ---------------------------------------------------------------------------------------------------------------


def faint(conv: nn.Module) -> nn.Module:
    """Channels whose variance is far below eps, and one that is zero."""
    conv.weight.data[:2] *= 1e-4
    conv.weight.data[2] = 0
    return conv


def combined(forward: Callable[..., Tensor], **parts: Any) -> nn.Module:
    return Function(forward, a=conv_bn(4, 4, 3), b=bn(4), s=torch.linspace(-2, 3, 4)[:, None, None])


ONE_NORM: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: conv_bn(4, 6, 3), ()),
    "stride": (lambda: conv_bn(4, 6, 3, 2), ()),
    "without-affine": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), bn(6, affine=False)), ()),
    "below-eps": (lambda: nn.Sequential(faint(nn.Conv2d(4, 6, 3, bias=False)), bn(6)), ()),
    "scaled": (lambda: combined(lambda m, x: m.s * m.a(x)), ()),
    "arithmetic": (lambda: combined(lambda m, x: -(1 - 2 * m.a(x) / m.s) - m.s), ()),
    "twice": (lambda: combined(lambda m, x: (lambda y: y - m.s * y)(m.a(x))), ()),
    "two-in-a-row": (lambda: nn.Sequential(conv_bn(4, 6, 3), bn(6)), ()),
    "norm-of-a-sum": (lambda: nn.Sequential(Sum(conv_bn(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Identity()), bn(4)), ()),
    "sequence": (lambda: nn.Sequential(nn.Conv1d(4, 6, 5, padding=2), nn.BatchNorm1d(6)), (4, 13)),
    "volume": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4)), (2, 5, 4, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), (5,)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), bn(6)), ()),
    "transposed-small": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 1, 3), bn(6)), ()),
    "unequal-padding": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 6, 3, 2), bn(6)), ()),
}


@pytest.mark.parametrize("name", ONE_NORM)
def test_one_norm_gives_mean_and_deviation(name: str) -> None:
    make, shape = ONE_NORM[name]
    graph, x = folded(make(), *shape)
    assert len(check_all(graph, x)) == 1
    assert aten.batch_norm.default not in {node.target for node in graph.graph.nodes}
    assert only(graph).std is not None and len(only(graph).gains) == 1


def last_norms(branches: nn.Module) -> list[nn.Module]:
    """Last layer of every branch."""
    return [branch[-1] if isinstance(branch, nn.Sequential) else branch for branch in branches.branches]


SEVERAL: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], list[nn.Module]], float]] = {
    "repvgg": (lambda: Sum(conv_bn(4, 4, 3), conv_bn(4, 4, 1), bn(4)), last_norms, 1.0),
    "repvgg-stride": (lambda: Sum(conv_bn(4, 6, 3, 2), conv_bn(4, 6, 1, 2)), last_norms, 1.0),
    "mobileone": (lambda: mobileone(4, 3, 1, 4), last_norms, 1.0),
    "mobileone-pointwise": (lambda: mobileone(4, 1, 1, 1), last_norms, 1.0),
    "diverse-branches": (lambda: diverse_branches(4), last_norms, 1.0),
    "difference": (lambda: combined(lambda m, x: 3 * (m.a(x) - m.b(x)) + 1), lambda m: [m.a[1], m.b], 3.0),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_norms_give_the_mean_and_what_each_adds(name: str) -> None:
    make, norms, factor = SEVERAL[name]
    model = make()
    graph, x = folded(model)
    assert len(check_all(graph, x)) == 1
    seen: list[np.ndarray] = []
    for norm in norms(model):
        norm.register_forward_hook(lambda _, __, y: seen.append(factor * per_channel(y).std(1)))
    model(x)
    gains = [gain.numpy() for gain in only(graph).gains]
    assert len(gains) == len(seen) > 1
    assert only(graph).std is None
    for gain in gains:
        assert any(np.allclose(gain, each, rtol=ROUNDING, atol=ROUNDING) for each in seen)


def test_side_by_side_norms_do_not_mix() -> None:
    graph, x = folded(Function(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=conv_bn(4, 2, 1), b=conv_bn(4, 3, 1)))
    assert len(check_all(graph, x)) == 1
    first, second = (gain.numpy() for gain in only(graph).gains)
    assert only(graph).std is not None
    assert (first != 0).tolist() == [True, True, False, False, False] and (second != 0).tolist() == [
        False,
        False,
        *[True] * 3,
    ]


def test_mean_passes_a_convolution_behind_the_norm() -> None:
    model = nn.Sequential(conv_bn(4, 16, 3), nn.Conv2d(16, 2, 1))
    graph, x = folded(model)
    assert len(check_all(graph, x)) == 1
    assert only(graph).std is None and only(graph).gains == ()


def test_mean_is_that_of_the_interior() -> None:
    """The kernel behind the norm sees beta, 0.75; in the wide border what the norm makes of zeros, 0.25."""
    before, norm, after = nn.Conv2d(4, 16, 1, bias=False), bn(16, eps=0.0), nn.Conv2d(16, 2, 3, 2)
    norm.bias.data.fill_(0.75)
    norm.running_mean.fill_(0.5)
    model = nn.Sequential(before, norm, nn.ConstantPad2d((30, 0, 0, 7), 0.25), after).double().eval()
    graph = fold(capture(model, batch(4, 12, 10)))
    assert graph.meta["fold"].regions == 1
    taps = after.weight.detach().numpy().sum((2, 3))  # [2, 16]
    seen = taps @ np.full(16, 0.75) + after.bias.detach().numpy()
    assert np.allclose(only(graph).mean.numpy(), seen, rtol=ROUNDING)


def test_mean_passes_a_pool_behind_the_norm() -> None:
    graph, x = folded(nn.Sequential(nn.Conv2d(4, 6, 1), bn(6), nn.AvgPool2d(2)))
    assert graph.meta["fold"].regions == 1
    assert len(check_all(graph, x)) == 1
    assert only(graph).gains == ()


NOTHING: dict[str, Callable[[], nn.Module]] = {
    "identity-beside": lambda: Sum(conv_bn(4, 4, 3), nn.Identity()),
    "convolution-beside": lambda: Sum(conv_bn(4, 4, 3), nn.Conv2d(4, 4, 1)),
    "repmixer": lambda: RepMixer(4),
    "subsampled-identity": lambda: Function(lambda m, x: m.conv(x) + x[:, :, ::2, ::2], conv=conv_bn(4, 4, 3, 2)),
    "norm-before-1x1": lambda: nn.Sequential(bn(4), nn.Conv2d(4, 6, 1)),
    "norm-before-kernel": lambda: nn.Sequential(bn(4), nn.Conv2d(4, 6, 3, 2)),
    "no-norm": lambda: nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.Conv2d(16, 4, 3, padding=1)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_known_where_a_part_passes_no_norm(name: str) -> None:
    graph, _ = folded(NOTHING[name]())
    assert graph.meta["fold"].regions == 1
    assert expected_outputs(graph) == {}


def test_entries_have_the_type_of_the_model_and_outlive_another_fold() -> None:
    graph = fold(capture(conv_bn(4, 6, 3).eval(), torch.randn(2, 4, 8, 8)))
    assert [each.mean.dtype for each in expected_outputs(graph).values()] == [torch.float32]
    assert only(fold(graph)).mean is not None
    assert only(fold(graph)).std.equal(only(graph).std)


# Rewrites ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Blocks with identity branches, a norm that cannot be folded, upsampling, a linear layer along the width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(4, 6, 3)
        self.blocks = nn.ModuleList(Sum(conv_bn(6, 6, 3), conv_bn(6, 6, 1), bn(6)) for _ in range(3))
        self.norm, self.up = bn(6), nn.Sequential(nn.ConvTranspose2d(6, 5, 2, 2), bn(5))
        self.last, self.across = conv_bn(5, 5, 3), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.stem(x)))
        for block in self.blocks:
            x = F.relu(block(x))
        return self.across(self.last(F.relu(self.up(x))))


def net() -> tuple[fx.GraphModule, Tensor]:
    graph, x = folded(Net())
    assert len(check_all(graph, x)) == 6
    return graph, x


def targets(graph: fx.GraphModule) -> dict[str, Any]:
    return {node.name: node.target for node in graph.graph.nodes}


def test_entries_follow_their_values_into_integer_forms() -> None:
    """The unfolded norm becomes known as a convolution; the outputs of a transposed one move after its activation."""
    graph, x = net()
    before = check_all(graph, x)
    forms = to_integer_forms(graph)
    after = check_all(forms, x)
    kinds = targets(forms)
    assert {name for name in before if targets(graph)[name] is aten.conv2d.default} < after
    assert sorted(str(kinds[name]) for name in after) == ["aten.conv2d.default"] * 6
    assert list(kinds.values()).count(aten.conv2d.default) == 7, "one is a part of the transposed convolution"
    assert check_all(graph, x) == before


def test_a_linear_layer_on_the_last_axis_leaves_its_input_known_and_the_flat_copy_unknown() -> None:
    graph, x = folded(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Linear(9, 2)), 4, 11)
    forms = to_integer_forms(graph)
    assert aten.reshape.default in targets(forms).values()
    assert {targets(forms)[name] for name in check_all(forms, x)} == {aten.conv1d.default}


def spiked() -> tuple[fx.GraphModule, Tensor]:
    """The net in integer forms, with strong identity branches in two of its blocks."""
    torch.manual_seed(2)
    model, x = drawn(Net()), batch(4, 12, 10)
    for block in model.blocks[:2]:
        for branch in block.branches[:2]:
            branch[1].weight.mul_(1e-2)
        block.branches[2].weight.copy_(torch.linspace(2, 3, 6))
    return to_integer_forms(fold(capture(settled(model, x), x))), x


def test_blocks_share_out_the_entries_and_merging_brings_them_together() -> None:
    graph, x = spiked()
    convolutions = [node.name for node in graph.graph.nodes if node.target is aten.conv2d.default]
    blocks = partition(graph, convolutions, chain=2)
    assert len(blocks) > 2
    shares = [set(expected_outputs(extract(graph, block))) for block in blocks]
    assert sum(map(len, shares)) == len(set().union(*shares)) and set().union(*shares) == check_all(graph, x)
    whole: Block = merge(graph, blocks)
    assert check_all(extract(graph, whole), x) == check_all(graph, x)


# Files ---------------------------------------------------------------------------------------------------------------


def test_methods_see_the_entries_and_files_do_not(tmp_path: Path) -> None:
    """The reference program and the ONNX file have the same bytes with and without them."""
    torch.manual_seed(0)
    model, x = nn.Sequential(conv_bn(3, 8, 3), nn.ReLU(), Sum(conv_bn(8, 8, 3), bn(8))).eval(), torch.randn(4, 3, 8, 8)
    graph = fold(capture(model, x))
    bare = fold(capture(model, x))
    for node in bare.graph.nodes:
        node.meta.pop(EXPECTED, None)
    written = []
    for each, entries in ((graph, 2), (bare, 0)):
        result = calibrate(each, [x], method="minmax", placement=PlacementOptions(weight_bits=4))
        assert len(expected_outputs(result.placement.graph)) == entries
        save_reference(export_program(result.program), tmp_path / "reference.pt2")
        onnx = onnx_ir.to_proto(to_onnx(result.program, opset=20)).SerializeToString(deterministic=True)
        written.append(((tmp_path / "reference.pt2").read_bytes(), onnx))
    assert written[0] == written[1]
