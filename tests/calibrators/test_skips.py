"""Identity branches taken out of folded kernels: where, that nothing else changes, what it is worth, and the proof."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calibrators.blocks import partition
from calibrators.calibration import calibrate
from calibrators.forms import to_integer_forms
from calibrators.freeze import CalibrationResult
from calibrators.graph import bind, constant, module_path
from calibrators.numerics import dequantize
from calibrators.place import PlacementOptions
from calibrators.skips import LEAST_SPIKE, TOLERABLE_STEP, split_skips
from exporter.capturing import capture
from exporter.emission import to_onnx
from exporter.folding import fold
from runtime_tests.coverage import coverage
from runtime_tests.lint import lint
from runtime_tests.parity import parity
from tests.networks import NETWORKS, build, randomize
from tests.published_nets import RepVGGBlock

aten = torch.ops.aten

SPIKE = 40.0
"""Times that a spike exceeds the weights around it, as in trained networks."""

FLOAT_ERROR = 1e-6
"""Relative error of float32 sums of a hundred products in another order."""


def spiked(conv: nn.Module, spike: float = SPIKE) -> nn.Module:
    """Random weights of equal magnitude and, in the middle of each group's diagonal, `spike` times as much."""
    weight = conv.weight
    generator = torch.Generator().manual_seed(weight.numel())
    weight.data = torch.randint(2, weight.shape, generator=generator).mul(2.0).sub(1).mul(0.02)
    for channel in range(len(weight)):
        middle = tuple(size // 2 for size in weight.shape[2:])
        weight.data[channel, channel % weight.shape[1]][middle] = 0.02 * spike
    return conv


def forms(model: nn.Module, *shape: int, dynamic: bool = True) -> fx.GraphModule:
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    graph = to_integer_forms(capture(model.eval().requires_grad_(False), x))
    graph.meta["dynamic_batch"] &= dynamic
    return graph


def split(graph: fx.GraphModule, bits: int | None = 4) -> tuple[fx.GraphModule, list[tuple[str, float]]]:
    return split_skips(graph, lambda _: bits)


def branches(graph: fx.GraphModule) -> list[fx.Node]:
    """The identity branches that were taken out."""
    return [node for node in graph.graph.nodes if module_path(node).endswith("skip")]


class Functional(nn.Module):
    """One convolution, called as the subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = spiked(nn.Conv2d(6, 6, 3, padding=1)), nn.Conv2d(6, 6, 1)


class Twice(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.conv(x))))


class Residual(Functional):
    """The result is read three times and returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return x + F.relu(self.other(y)) + torch.sigmoid(y), y


class Unnamed(Functional):
    """A convolution that no module made, as after a fold of the whole network."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight, None, padding=1)


Shape = tuple[int, ...]
IMAGE: Shape = (6, 9, 8)
SPLIT: dict[str, tuple[Callable[[], nn.Module], Shape, int]] = {
    "dense": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1)), IMAGE, 1),
    "without-bias": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, bias=False)), IMAGE, 1),
    "pointwise": (lambda: spiked(nn.Conv2d(6, 6, 1)), IMAGE, 1),
    "large": (lambda: spiked(nn.Conv2d(6, 6, 7, padding=3)), IMAGE, 1),
    "rectangular": (lambda: spiked(nn.Conv2d(6, 6, (1, 5), padding=(0, 2))), IMAGE, 1),
    "dilated": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=2, dilation=2)), IMAGE, 1),
    "same": (lambda: spiked(nn.Conv2d(6, 6, (3, 5), padding="same", dilation=(1, 2))), IMAGE, 1),
    "grouped": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, groups=2)), IMAGE, 1),
    "pairs": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, groups=3)), IMAGE, 1),
    "sequence": (lambda: spiked(nn.Conv1d(6, 6, 3, padding=1)), (6, 11), 1),
    "negative": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1), -SPIKE), IMAGE, 1),
    "before-relu": (lambda: nn.Sequential(spiked(nn.Conv2d(6, 6, 3, padding=1)), nn.ReLU()), IMAGE, 1),
    "stack": (lambda: nn.Sequential(*(spiked(nn.Conv2d(6, 6, 1)) for _ in range(3))), IMAGE, 3),
    "residual": (Residual, IMAGE, 1),
    "unnamed": (Unnamed, IMAGE, 1),
}
WHOLE: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "without-spike": (lambda: nn.Conv2d(6, 6, 3, padding=1), IMAGE),
    "depthwise": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, groups=6)), IMAGE),
    "stride": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, stride=2)), IMAGE),
    "one-stride": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, stride=(1, 2))), IMAGE),
    "valid": (lambda: spiked(nn.Conv2d(6, 6, 3)), IMAGE),
    "padding-without-dilation": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, dilation=2)), IMAGE),
    "even": (lambda: spiked(nn.Conv2d(6, 6, 2, padding=1)), IMAGE),
    "more-outputs": (lambda: spiked(nn.Conv2d(6, 12, 3, padding=1)), IMAGE),
    "more-inputs-grouped": (lambda: spiked(nn.Conv2d(12, 6, 3, padding=1, groups=3)), (12, 5, 5)),
    "transposed": (lambda: spiked(nn.ConvTranspose2d(6, 6, 3, padding=1)), IMAGE),
    "volume": (lambda: spiked(nn.Conv3d(6, 6, 3, padding=1)), (6, 4, 5, 5)),
    "linear": (lambda: nn.Linear(6, 6), (6,)),
}


@pytest.mark.parametrize("dynamic", [True, False], ids=["any-batch", "fixed-batch"])
@pytest.mark.parametrize("name", SPLIT)
def test_the_function_stays_the_same(name: str, dynamic: bool) -> None:
    make, shape, count = SPLIT[name]
    graph = forms(make(), *shape, dynamic=dynamic)
    changed, skips = split(graph)
    assert len(skips) == len(branches(changed)) == count
    assert all(spike == pytest.approx(SPIKE) for _, spike in skips)
    assert changed.meta["dynamic_batch"] == dynamic
    for x in (graph.meta["example"][0], graph.meta["example"][0].flip(0) * 10):
        for found, expected in zip(changed(x), graph(x), strict=True):
            assert float((found - expected).abs().max() / expected.abs().max()) < FLOAT_ERROR


@pytest.mark.parametrize("name", SPLIT)
def test_a_branch_is_a_depthwise_convolution_that_holds_all_of_the_diagonal(name: str) -> None:
    make, shape, _ = SPLIT[name]
    changed, _ = split(forms(make(), *shape))
    for branch in branches(changed):
        bound = bind(branch)
        (total,) = branch.users
        convolution = total.args[0]
        assert total.target is aten.add.Tensor and total.args[1] is branch and isinstance(convolution, fx.Node)
        assert bind(convolution)["input"] is bound["input"] and list(convolution.users) == [total]
        skip, rest = (constant(changed, bind(node)["weight"]) for node in (branch, convolution))
        assert bound["groups"] == len(skip) == skip.numel() == 6
        assert skip.abs().allclose(torch.tensor(0.02 * SPIKE)) and rest.abs().max() < 0.021
        assert (rest == 0).flatten(1).sum(1).tolist() == [1] * 6
        assert not constant(changed, bound["bias"]).any()


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_hide_an_identity_branch_is_left_alone(name: str) -> None:
    make, shape = WHOLE[name]
    graph = forms(make(), *shape)
    assert split(graph, bits=2) == (graph, [])


@pytest.mark.parametrize("name", NETWORKS)
def test_ordinary_networks_are_left_alone(name: str) -> None:
    model, x = build(name)
    graph = to_integer_forms(capture(model, x))
    assert split(graph, bits=2) == (graph, [])


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_step_decides(bits: int) -> None:
    """The branch is taken out where the grid's step would exceed what is around a large spike, and not elsewhere."""
    limit = max(LEAST_SPIKE, TOLERABLE_STEP * 2 ** (bits - 1))
    below, above = (forms(spiked(nn.Conv2d(6, 6, 3, padding=1), factor * limit), *IMAGE) for factor in (0.98, 1.02))
    assert split(below, bits)[1] == []
    assert [spike for _, spike in split(above, bits)[1]] == [pytest.approx(1.02 * limit)]


def test_a_few_channels_do_not_make_a_branch() -> None:
    model = spiked(nn.Conv2d(6, 6, 3, padding=1))
    model.weight.data[:4] = 0.02
    assert split(forms(model, *IMAGE))[1] == []


def test_floats_are_left_alone() -> None:
    graph = forms(spiked(nn.Conv2d(6, 6, 3, padding=1)), *IMAGE)
    assert split(graph, bits=None) == (graph, [])


def test_the_given_graph_stays_as_it_is() -> None:
    graph = forms(Residual(), *IMAGE)
    before, code = graph(graph.meta["example"][0]), graph.code
    changed, _ = split(graph)
    changed(graph.meta["example"][0])
    assert graph.code == code
    assert all(map(torch.equal, graph(graph.meta["example"][0]), before))


# --- weights that several convolutions share


def test_a_shared_weight_stays_shared() -> None:
    """Both parts of it: one rounding for all who use it."""
    graph = forms(Twice(), *IMAGE)
    changed, skips = split(graph)
    assert len(skips) == 1
    assert [len({bind(node)["weight"] for node in nodes}) for nodes in (branches(changed), rests(changed))] == [1, 1]
    assert len(branches(changed)) == 2
    (x,) = graph.meta["example"]
    assert float((changed(x)[0] - graph(x)[0]).abs().max() / graph(x)[0].abs().max()) < FLOAT_ERROR
    result = calibrate(graph, [x], method="minmax", placement=at(4, 4, first_last_bits=None))
    names = [site.name for site in result.placement.sites if site.kind == "weight"]
    assert names == ["conv.weight", "conv.skip.weight"]


def rests(graph: fx.GraphModule) -> list[fx.Node]:
    """The convolutions from which a branch was taken."""
    return [next(iter(branch.users)).args[0] for branch in branches(graph)]  # type: ignore[misc]


class Elsewhere(Functional):
    """The weight is used by a convolution with another stride as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), F.conv2d(x, self.conv.weight, stride=2)


class Penalized(Functional):
    """The weight is read as a value as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.conv.weight.square().sum()


@pytest.mark.parametrize("kind", [Elsewhere, Penalized])
def test_a_weight_that_others_need_whole_stays_whole(kind: type[nn.Module]) -> None:
    graph = forms(kind(), *IMAGE)
    assert split(graph) == (graph, [])


def test_a_shared_weight_of_which_one_user_stays_in_float_stays_whole() -> None:
    graph = forms(Twice(), *IMAGE)
    assert split_skips(graph, lambda node: 4 if node.name == "conv2d" else None) == (graph, [])


# --- whole networks, as they come from folding


class MobileOneLayer(nn.Module):
    """Vasu et al. 2022, training form: two branches of convolution and batch norm, and a batch norm of the input."""

    def __init__(self, i: int, o: int, k: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _ in range(2))
        self.skip = nn.BatchNorm2d(i) if i == o and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = sum(norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True))
        return F.relu(y if self.skip is None else y + self.skip(x))


class Classifier(nn.Module):
    """Blocks and a linear head."""

    def __init__(self, *blocks: nn.Module, channels: int) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def repvgg() -> nn.Module:
    sizes = [(3, 8, 1), (8, 8, 1), (8, 12, 2), (12, 12, 1)]
    return Classifier(*(RepVGGBlock(*size) for size in sizes), channels=12)


def mobileone() -> nn.Module:
    layers = [MobileOneLayer(3, 8, 3)]
    for i, o, stride in ((8, 8, 1), (8, 16, 2)):
        layers += [MobileOneLayer(i, i, 3, stride, i), MobileOneLayer(i, o, 1)]
    return Classifier(*layers, channels=16)


FOLDED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "repvgg": (repvgg, ["blocks.1", "blocks.3"]),
    "mobileone": (mobileone, ["blocks.2"]),
}
"""Networks, and which of their convolutions hide an identity branch that low bits cannot hold."""

WIDTHS = [(4, 4), (2, 4), (3, 3)]


@cache
def folded(name: str) -> tuple[fx.GraphModule, Tensor]:
    """A network whose identity branches are as strong beside the convolutions as training makes them."""
    model = randomize(FOLDED[name][0]())
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(1.0 if path.endswith(("skip", "identity")) else 0.12)
    x = torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    return fold(capture(model, x)), x


def at(weight_bits: int, activation_bits: int, **options: object) -> PlacementOptions:
    return PlacementOptions(weight_bits=weight_bits, activation_bits=activation_bits, **options)  # type: ignore[arg-type]


@cache
def calibrated(name: str, options: PlacementOptions) -> CalibrationResult:
    graph, x = folded(name)
    return calibrate(graph, [x], method="mse", placement=options)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), WIDTHS, ids=["W4A4", "W2A4", "W3A3"])
@pytest.mark.parametrize("name", FOLDED)
def test_the_runtime_computes_it_in_integers(name: str, weight_bits: int, activation_bits: int) -> None:
    """Every integer and every bit, in integer kernels throughout; the ReLU belongs to the kernel of the sum."""
    result, x = calibrated(name, at(weight_bits, activation_bits)), folded(name)[1]
    assert [path for path, _ in result.record["skips"]] == FOLDED[name][1]
    model = onnx_ir.to_proto(to_onnx(result.program, opset=20))
    report = parity(model, result.program, [(x,), (2 * x,)], optimized=True)
    found = report.to_dict()
    assert (found["mismatched"], found["violations"], found["unplanned"]) == (0, 0, {})
    assert found["kernel_values"] > 10_000 and report.outputs_identical
    covered = coverage(model)
    assert covered.integer_macs == 1.0 and covered.float_nodes == ()
    assert covered.by_op["QLinearAdd"] == len(FOLDED[name][1]) and "Relu" not in covered.by_op
    assert lint(model) == []
    written = {value.name for value in model.graph.initializer}
    assert written >= {f"{path}.skip.weight_quantized" for path in FOLDED[name][1]}


@pytest.mark.parametrize(
    "options",
    [{"per_tensor_weights": True, "reduce_range": True}, {"first_last_bits": None}],
    ids=["per-tensor-reduced", "first-and-last"],
)
def test_under_other_options(options: dict[str, object]) -> None:
    result, x = calibrated("repvgg", at(3, 4, **options)), folded("repvgg")[1]
    assert len(result.record["skips"]) == len(FOLDED["repvgg"][1])
    model = onnx_ir.to_proto(to_onnx(result.program, opset=20))
    report = parity(model, result.program, [(x,)], optimized=True)
    assert report.to_dict()["mismatched"] == 0 and report.outputs_identical
    assert coverage(model).float_nodes == () and lint(model) == []


@pytest.mark.parametrize("name", FOLDED)
def test_sites_have_readable_names_and_fitting_grids(name: str) -> None:
    """The branch is the convolution's `skip`; its one weight per channel needs no search, its result keeps 8 bits."""
    result = calibrated(name, at(3, 4))
    sites = result.placement.by_name
    for path in FOLDED[name][1]:
        assert {name.removeprefix(path) for name in sites if name.startswith(f"{path}.")} >= {
            ".weight", ".bias", ".conv2d", ".skip.weight", ".skip.bias", ".skip.conv2d",
        }  # fmt: skip
        assert [sites[f"{path}.{what}"].spec.bits for what in ("weight", "conv2d", "skip.conv2d")] == [3, 8, 8]
        assert result.weights[f"{path}.skip.weight"].codes.abs().unique().tolist() == [127]
    assert len(sites) == len(result.placement.sites)


def test_a_block_stays_one_unit() -> None:
    placement = calibrated("repvgg", at(4, 4)).placement
    weighted = [user for site in placement.sites if site.kind == "weight" for user in site.users]
    blocks = {block.name: len(block.weighted) for block in partition(placement.graph, weighted)}
    assert blocks == {"blocks.0": 1, "blocks.1": 2, "blocks.2": 1, "blocks.3": 2, "head": 1}


def test_only_what_is_quantized_is_split() -> None:
    result = calibrated("repvgg", at(3, 4, exclude=("blocks.3",)))
    assert [path for path, _ in result.record["skips"]] == ["blocks.1"]
    assert calibrated("repvgg", at(3, 4, split_skips=False)).record["skips"] == ()
    assert calibrated("repvgg", at(8, 8)).record["skips"] == ()


def weight_error(result: CalibrationResult, name: str) -> float:
    """Squared error of a weight after rounding."""
    site, coded = result.placement.by_name[name], result.weights[name]
    (node,) = (node for node in result.placement.graph.graph.nodes if node.name == site.node)
    return float((dequantize(coded.codes, coded.qparams) - constant(result.placement.graph, node)).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("name", FOLDED)
def test_the_split_is_worth_more_than_a_bit(name: str, bits: int) -> None:
    """A bit is a factor of four in the error; the branch itself has none to speak of."""
    whole, parted = (calibrated(name, at(bits, 8, split_skips=flag)) for flag in (False, True))
    assert dict(parted.record["skips"]) or (name, bits) == ("mobileone", 6)
    for path in dict(parted.record["skips"]):
        weight, skip = f"{path}.weight", f"{path}.skip.weight"
        assert weight_error(parted, weight) + weight_error(parted, skip) < weight_error(whole, weight) / 4
