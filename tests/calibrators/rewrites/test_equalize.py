"""Equalization and absorption: the function stays, ranges agree, what does not qualify is left alone and told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from calibrators.calibration import calibrate
from calibrators.errors import UnknownNameError
from calibrators.graph.aten import bind, constant
from calibrators.graph.batch_norm import expected_outputs
from calibrators.graph.canonical import to_integer_forms
from calibrators.placement.place import PlacementOptions
from calibrators.record import Absorption, Equalization, Preparation
from calibrators.rewrites.absorb import absorb
from calibrators.rewrites.equalize import CONVERGED, equalize
from calibrators.rewrites.prepare import prepare_graph
from exporter.emission.build_model import to_onnx
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.proof import parity
from tests.support.networks import build, randomize

aten = torch.ops.aten

SAME = 1e-9
"""Relative difference of two float64 computations of one function."""

UNEVEN = 3.5
"""Channels of a test network differ by factors of exp(-UNEVEN) to exp(UNEVEN): a thousandfold."""

Array = NDArray[np.float64]


def uneven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and biases whose channels have very different ranges, in float64."""
    model = randomize(model, seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            rows = spread(len(module.weight), generator)
            module.weight.mul_(rows.reshape(-1, *[1] * (module.weight.ndim - 1)))
            if module.bias is not None:
                module.bias.mul_(rows)
    return model


def spread(channels: int, generator: torch.Generator) -> Tensor:
    """Factors from one end to the other, in random order."""
    factors = torch.linspace(-UNEVEN, UNEVEN, channels, dtype=torch.float64).exp()
    return factors[torch.randperm(channels, generator=generator)]


def forms(model: nn.Module, *shape: int) -> tuple[fx.GraphModule, Tensor]:
    """Captured, batch norms folded where there are any, in integer forms."""
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x.to(next(model.parameters()).dtype)
    graph = capture(model.eval(), x)
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return to_integer_forms(fold(graph) if has_norms else graph), x


def difference(before: fx.GraphModule, after: fx.GraphModule, x: Tensor) -> float:
    """Largest difference of an output, relative to the largest output."""
    pairs = list(zip(before(x), after(x), strict=True))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def weighted(graph: fx.GraphModule) -> list[fx.Node]:
    targets = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)
    return [node for node in graph.graph.nodes if node.target in targets]


def weight_of(graph: fx.GraphModule, index: int) -> Array:
    return constant(graph, bind(weighted(graph)[index])["weight"]).numpy()


def pairs_of(record: Equalization | Absorption) -> list[tuple[str, str]]:
    return [(pair.first, pair.second) for pair in record.pairs]


def reasons(record: Equalization | Absorption) -> dict[str, str]:
    return {each.where: each.why for each in record.skipped}


class Shuffle(nn.Module):
    """Channels of three groups change places, as ShuffleNet does it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 3, 2, *x.shape[2:]).transpose(1, 2).reshape(-1, 6, *x.shape[2:])


class TokenMlp(nn.Module):
    """Two linear layers on tokens: each stands between reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


IMAGE = (3, 8, 8)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "dense": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1)), IMAGE, 1),
    "no-activation": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, bias=False, padding=1)), IMAGE, 1),
    "triple": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1)
        ),
        IMAGE,
        2,
    ),
    "multiplier": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 4, 1)),
        IMAGE,
        2,
    ),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3), nn.ReLU(), nn.Conv2d(9, 4, 1)
        ),
        IMAGE,
        2,
    ),
    "shuffled": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Shuffle(), nn.Conv2d(6, 4, 3, groups=2)),
        IMAGE,
        1,
    ),
    "sequence": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.LeakyReLU(0.2), nn.Conv1d(6, 5, 3)), (3, 11), 1),
    "pooled": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 1), nn.AvgPool2d(3, padding=1),
            nn.ZeroPad2d(1), nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        ),
        IMAGE,
        3,
    ),
    "upsampled": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Upsample(scale_factor=2.0), nn.Conv2d(6, 5, 3)),
        IMAGE,
        1,
    ),
    "flattened": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)), IMAGE, 1),
    "linear": (
        lambda: nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)),
        (10,),
        2,
    ),
    "tokens": (TokenMlp, (5, 6), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_the_function_is_the_same(name: str) -> None:
    make, shape, count = NETS[name]
    graph, x = forms(uneven(make()), *shape)
    changed, record = equalize(graph)
    assert len(record.pairs) == count
    assert difference(graph, changed, x) < SAME
    factors = [getattr(pair, key) for pair in record.pairs for key in ("factor_lo", "factor_hi")]
    assert max(factors) / min(factors) > 10, "there was something to equalize"
    assert equalize(changed)[1].sweeps == 1, "and it is done"


def literal(weights: list[Array], biases: list[Array], groups: list[int], sources: list[list[int]]) -> list[Array]:
    """Nagel et al., eq. 11, pair after pair and channel after channel, until all ranges agree to 1e-12.

    A range is no less than a third of the channel's bias.
    """
    weights, biases = [weight.copy() for weight in weights], [bias.copy() for bias in biases]
    for _ in range(3000):
        worst = 1.0
        for index, source in enumerate(sources):
            first, second = weights[index], weights[index + 1]
            per_group, outputs = second.shape[1], len(second) // groups[index + 1]

            def kernel(o: int, j: int, second: Array = second) -> Array:
                return second[o, j : j + 1]

            for channel in range(len(first)):
                read = [
                    kernel(o, position % per_group)
                    for position, origin in enumerate(source)
                    if origin == channel
                    for o in range(position // per_group * outputs, (position // per_group + 1) * outputs)
                ]
                r1 = max(np.abs(first[channel]).max(), abs(biases[index][channel]) / 3)
                r2 = max(np.abs(part).max() for part in read)
                s = np.sqrt(r1 * r2) / r2
                first[channel] /= s
                biases[index][channel] /= s
                for part in read:
                    part *= s
                worst = max(worst, s, 1 / s)
        if worst < 1 + 1e-12:
            return weights
    raise AssertionError("no end")


@pytest.mark.parametrize(
    ("name", "groups", "sources"),
    [
        ("dense", [1, 1], [list(range(6))]),
        ("triple", [1, 6, 1], [list(range(6))] * 2),
        ("multiplier", [1, 6, 1], [list(range(6)), list(range(12))]),
        ("grouped", [1, 3, 1], [list(range(6)), list(range(9))]),
        ("shuffled", [1, 2], [[0, 2, 4, 1, 3, 5]]),
        ("flattened", [1, 1], [[feature // 36 for feature in range(216)]]),
        ("linear", [1, 1, 1], [list(range(16)), list(range(8))]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_are_those_of_the_literal_iteration(name: str, groups: list[int], sources: list[list[int]]) -> None:
    make, shape, _ = NETS[name]
    graph, _ = forms(uneven(make()), *shape)
    layers = range(len(groups))
    biases = [constant(graph, bind(weighted(graph)[index])["bias"]).numpy() for index in layers]
    expected = literal([weight_of(graph, index) for index in layers], biases, groups, sources)
    changed, _ = equalize(graph)
    for index, weight in enumerate(expected):
        ratio = weight_of(changed, index) / weight
        assert np.abs(np.log(ratio)).max() < 20 * CONVERGED, "the last sweep moves less than that; chains add up"


def test_the_ranges_of_a_depthwise_triple_agree() -> None:
    """The closed form for triples whose biases do not matter: the geometric mean of the three."""
    model = uneven(NETS["triple"][0]())
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.zero_()
    graph, _ = forms(model, *IMAGE)

    def ranges(graph: fx.GraphModule) -> Array:
        one, two, three = (np.abs(weight_of(graph, index)) for index in range(3))
        return np.stack([one.max((1, 2, 3)), two.max((1, 2, 3)), three.max((0, 2, 3))])

    before, after = ranges(graph), ranges(equalize(graph)[0])
    assert np.abs(np.log(after / before.prod(0) ** (1 / 3))).max() < 10 * CONVERGED
    assert np.abs(np.log(before / before.prod(0) ** (1 / 3))).max() > 1


def test_channels_without_weights_keep_their_factor() -> None:
    model = uneven(NETS["dense"][0]())
    model[0].weight[1] = 0.0
    model[2].weight[:, 4] = 0.0
    graph, x = forms(model, *IMAGE)
    changed, _ = equalize(graph)
    assert difference(graph, changed, x) < SAME
    first, second = weight_of(changed, 0), weight_of(changed, 1)
    assert np.array_equal(first[4], weight_of(graph, 0)[4]) and np.array_equal(second[:, 1], weight_of(graph, 1)[:, 1])


def test_the_record_tells_factors_and_precision() -> None:
    graph, _ = forms(uneven(NETS["dense"][0]()), *IMAGE)
    changed, record = equalize(graph)
    factor = (weight_of(graph, 0) / weight_of(changed, 0))[:, 0, 0, 0]
    told = {"first": "0", "second": "2", "channels": 6, "factor_lo": factor.min(), "factor_hi": factor.max()}
    for key, each in (("precision_before", graph), ("precision_after", changed)):
        ranges = np.abs(weight_of(each, 0)).max((1, 2, 3)), np.abs(weight_of(each, 1)).max((0, 2, 3))
        told[key] = float(np.mean(ranges[0] / ranges[0].max() * ranges[1] / ranges[1].max()))
    assert [asdict(pair) for pair in record.pairs] == [pytest.approx(told)]
    assert told["precision_after"] > 1.1 * told["precision_before"]


# --- what is left alone


class Residual(nn.Module):
    """`stem` is read by `a` and by the sum, `b` by the sum alone; only a -> b is a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.b(F.relu(self.a(x)))))


class Tied(nn.Module):
    """One convolution called twice, behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(F.relu(self.conv(self.stem(x)))))


class Returned(nn.Module):
    """The result of the first layer is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return y, self.b(F.relu(y))


class Mixed(nn.Module):
    """Channels go into space: what the second layer reads as one channel are several of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).permute(0, 2, 1, 3).reshape(-1, 6, 8, 8))


def between(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 1), activation, nn.Conv2d(6, 4, 1))


LEFT: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str]], dict[str, str]]] = {
    "relu6": (lambda: between(nn.ReLU6()), [], {"0": "clip to 0 ... 6"}),
    "silu": (lambda: between(nn.SiLU()), [], {"0": "2 readers"}),
    "gelu": (lambda: between(nn.GELU()), [], {"0": "gelu comes after it"}),
    "residual": (
        Residual, [("a", "b")], {"stem": "2 readers", "b": "add comes after it", "head": "output of the model"},
    ),
    "tied": (Tied, [], {"stem": "the next layer, conv, shares its weight", "conv": "reads its weight too"}),
    "returned": (Returned, [], {"a": "2 readers", "b": "output of the model"}),
    "mixed": (Mixed, [], {"a": "channels mix"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_qualify_is_left_alone_and_told(name: str) -> None:
    make, pairs, told = LEFT[name]
    graph, x = forms(uneven(make()), *IMAGE)
    changed, record = equalize(graph)
    assert pairs_of(record) == pairs
    assert all(part in reasons(record)[where] for where, part in told.items()), reasons(record)
    assert difference(graph, changed, x) < SAME
    touched = {layer for pair in pairs for layer in pair}
    for index, node in enumerate(weighted(graph)):
        layer = node.meta["nn_module_stack"][list(node.meta["nn_module_stack"])[-1]][0]
        same = np.array_equal(weight_of(graph, index), weight_of(changed, index))
        assert same == (layer not in touched), layer


# --- what batch norms knew


def normed(*modules: nn.Module) -> tuple[fx.GraphModule, Tensor]:
    return forms(uneven(nn.Sequential(*modules)), *IMAGE)


def test_expected_outputs_are_scaled_along() -> None:
    graph, _ = normed(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    changed, _ = equalize(graph)
    factor = torch.from_numpy(weight_of(graph, 0) / weight_of(changed, 0))[:, 0, 0, 0]
    before, after = (list(expected_outputs(each).values()) for each in (graph, changed))
    assert len(before) == len(after) == 2
    assert torch.allclose(after[0].mean * factor, before[0].mean) and factor.max() / factor.min() > 10
    assert torch.allclose(after[0].gains[0] * factor, before[0].gains[0])
    assert torch.equal(after[1].mean, before[1].mean) and torch.equal(after[1].gains[0], before[1].gains[0])


def test_an_almost_constant_channel_is_not_blown_up() -> None:
    """Weight decay leaves such channels: next to no weights, and a bias, which equalizing blows up ten thousandfold."""

    def net(deviation: float) -> tuple[fx.GraphModule, Tensor]:
        layers = (nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
        model = randomize(nn.Sequential(*layers)).double()
        norm = model[1]
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.fill_(1.0)
        norm.bias.fill_(0.0)
        norm.weight[2], norm.bias[2] = deviation, 1.0
        return forms(model, *IMAGE)

    for deviation, grown in ((1 / 3, 1.0), (1e-8, 1.0 / (3 * 1e-8))):
        graph, x = net(deviation)
        changed, _ = equalize(graph)
        assert difference(graph, changed, x) < SAME
        before, after = (np.abs(weight_of(each, 0)[2]).max() for each in (graph, changed))
        read = np.abs(weight_of(changed, 1)[:, 2]).max()
        assert read / after == pytest.approx(grown, rel=1e-2), "the range of the first counts that many times"
        assert 0.1 < before / after < 10


def test_nor_is_one_of_which_no_batch_norm_tells() -> None:
    """The bias tells: three ranges of the weights are its share that may vary."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))).double()
    first = model[0]
    assert isinstance(first, nn.Conv2d) and first.bias is not None
    first.weight[2] *= 1e-8 / first.weight[2].abs().max()
    first.bias[2] = 1.0
    graph, x = forms(model, *IMAGE)
    changed, _ = equalize(graph)
    assert difference(graph, changed, x) < SAME
    after, read = np.abs(weight_of(changed, 0)[2]).max(), np.abs(weight_of(changed, 1)[:, 2]).max()
    assert read / after == pytest.approx(1 / (3 * 1e-8), rel=1e-2)


class Between(nn.Module):
    """Two linear layers with a function between them that may mix channels."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(8, 12), nn.Linear(width, 4), function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.function(self.first(x)))
        return y


@pytest.mark.parametrize(
    ("function", "width"),
    [
        (lambda x: x.reshape(-1, 6, 2).amax(-1), 6),
        (lambda x: x.reshape(-1, 4, 3).amax(-1), 4),
        (lambda x: x.reshape(-1, 4, 3).mean(-1), 4),
        (lambda x: F.avg_pool1d(x.unsqueeze(1), 3).squeeze(1), 4),
        (lambda x: F.max_pool1d(x.unsqueeze(1), 2).squeeze(1), 6),
        (lambda x: F.adaptive_avg_pool1d(x.unsqueeze(1), 1).squeeze(1), 1),
    ],
    ids=["maxout-2", "maxout-3", "mean", "avg-pool", "max-pool", "global"],
)
def test_what_mixes_channels_ends_a_link(function: Callable[[Tensor], Tensor], width: int) -> None:
    graph, x = forms(uneven(Between(function, width)), 8)
    changed, record = equalize(graph)
    assert record.pairs == () and reasons(record)["first"] == "channels mix before the next layer"
    assert difference(graph, changed, x) == 0


def biased(*behind: nn.Module, width: int = 6, gamma: float = 0.1) -> tuple[fx.GraphModule, Tensor]:
    """A layer whose even channels stay near 5 and whose odd ones near 0, by its batch norm; then `behind`."""
    model = randomize(nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), *behind)).double()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.weight.fill_(gamma)
    norm.bias.copy_(torch.tensor([5.0, 0.1]).repeat(width // 2))
    return forms(model, *IMAGE)


ABSORBED: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "conv": lambda: (nn.ReLU(), nn.Conv2d(6, 4, 3)),
    "strided": lambda: (nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2)),
    "grouped": lambda: (nn.LeakyReLU(), nn.Conv2d(6, 4, 3, groups=2)),
    "depthwise": lambda: (nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)),
    "pooled": lambda: (nn.ReLU(), nn.MaxPool2d(3, padding=1), nn.AvgPool2d(2), nn.Conv2d(6, 4, 1)),
    "linear": lambda: (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, bias=False)),
    "flattened": lambda: (nn.ReLU(), nn.Flatten(), nn.Linear(384, 4)),
    "shuffled": lambda: (nn.ReLU(), Shuffle(), nn.Conv2d(6, 4, 3)),
}


@pytest.mark.parametrize("name", ABSORBED)
def test_absorption_is_exact_above_the_constant(name: str) -> None:
    """All values of the even channels lie above 5 - 3 * 0.1 for these inputs; the odd ones are left as they are."""
    graph, x = biased(*ABSORBED[name]())
    x = 0.02 * x
    values = {}
    changed, record = absorb(graph)
    (pair,) = record.pairs
    assert (pair.absorbed, pair.channels, pair.exact) == (3, 6, False)
    assert pair.largest == pytest.approx(4.7, abs=1e-3)
    for key, each in (("before", graph), ("after", changed)):
        conv = weighted(each)[0]
        values[key] = F.conv2d(x, *(constant(each, bind(conv)[name]) for name in ("weight", "bias")))
    assert float(values["before"][:, ::2].min()) > pair.largest, "the premise"
    moved = (values["before"] - values["after"]).mean((0, 2, 3))
    assert torch.allclose(moved, torch.tensor([pair.largest, 0.0], dtype=torch.float64).repeat(3))
    assert difference(graph, changed, x) < SAME


def test_below_the_constant_the_bound_holds() -> None:
    """Inputs that push every channel far below zero change the result by the bound and no more."""
    graph, x = biased(nn.ReLU(), nn.Conv2d(6, 1, 3))
    changed, record = absorb(graph)
    gap = float((graph(1e4 * x)[0] - changed(1e4 * x)[0]).abs().max())
    assert 0.01 < gap <= record.pairs[0].worst


def test_the_mean_change_is_that_of_normal_values() -> None:
    """One channel, weight 1: the mean of max(x, c) - max(x, 0), integrated over a normal x."""
    graph, _ = biased(nn.ReLU(), nn.Conv2d(2, 1, 1), width=2)
    weight = abs(weight_of(graph, 1)[0, 0, 0, 0])
    _, record = absorb(graph)
    std = float(next(iter(expected_outputs(graph).values())).gains[0][0])
    z = np.linspace(-8, 8, 400_001)
    x, c = 5 + std * z, 5 - 3 * std
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    change = ((np.maximum(x, c) - np.maximum(x, 0)) * density).sum() * (z[1] - z[0])
    assert record.pairs[0].mean == pytest.approx(weight * change, rel=1e-4)


def test_without_an_activation_it_is_exact_everywhere() -> None:
    graph, x = biased(nn.MaxPool2d(2), nn.Conv2d(6, 4, 3))
    changed, record = absorb(graph)
    assert record.pairs[0].exact and record.pairs[0].worst == 0.0
    assert difference(graph, changed, 100 * x) < SAME
    assert torch.allclose(next(iter(expected_outputs(changed).values())).mean[::2], torch.tensor(0.3).double(), 1e-2)


def test_branches_may_vary_together() -> None:
    """Two norms of deviation 1 added up can deviate by 2: from a mean of 5, nothing is left three times below."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 6, 1, bias=False) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[0](self.convs[0](x)) + self.norms[1](self.convs[1](x))

    def record(gamma: float) -> Absorption:
        model = randomize(nn.Sequential(Branches(), nn.ReLU(), nn.Conv2d(6, 4, 1))).double()
        for norm in model[0].norms:
            norm.weight.fill_(gamma)
            norm.bias.fill_(2.5)
        return absorb(forms(model, *IMAGE)[0])[1]

    assert reasons(record(1.0))["0"] == "no channel stays above zero"
    assert record(0.5).pairs[0].largest == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize(
    ("behind", "why"),
    [
        (lambda: (nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)), "the input of 3 is padded with zeros"),
        (lambda: (nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(6, 4, 3)), "the input of 4 is padded with zeros"),
        (lambda: (nn.ReLU(), nn.AvgPool2d(3, padding=1), nn.Conv2d(6, 4, 1)), "the input of 4 is padded with zeros"),
        (lambda: (nn.ReLU6(), nn.Conv2d(6, 4, 1)), "clip to 0 ... 6"),
    ],
    ids=["convolution-pads", "pad", "pool-pads", "relu6"],
)
def test_where_a_constant_cannot_pass_nothing_is_absorbed(
    behind: Callable[[], tuple[nn.Module, ...]], why: str
) -> None:
    graph, x = biased(*behind())
    changed, record = absorb(graph)
    assert record.pairs == () and why in reasons(record)["0"]
    assert difference(graph, changed, x) == 0.0


def test_without_batch_norms_nothing_is_absorbed() -> None:
    graph, _ = forms(uneven(NETS["dense"][0]()), *IMAGE)
    _, record = absorb(graph)
    assert record.pairs == () and reasons(record)["0"] == "no batch norm tells the range of its values"


# --- from end to end


def test_names_are_checked_and_their_order_does_not_matter() -> None:
    graph, _ = biased(nn.ReLU(), nn.Conv2d(6, 4, 1))
    assert prepare_graph(graph, ()) == (graph, Preparation())
    first, second = (prepare_graph(graph, names)[1] for names in (("cle", "absorb"), ("absorb", "cle")))
    assert first.cle is not None and first == second
    assert first.absorb.pairs[0].largest != pytest.approx(4.7, abs=1e-2), "of the equalized values"
    with pytest.raises(UnknownNameError, match=r"unknown preparation 'cles'\. Did you mean 'cle'"):
        prepare_graph(graph, ("cles",))


def small() -> tuple[fx.GraphModule, Tensor]:
    """A folded float32 network with a depthwise triple, a residual sum and a linear head.

    The channels of the triple are large where the next layer has small weights for them, so that all of them count.
    """

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [(3, 8, 3, 1), (8, 8, 3, 8), (8, 8, 1, 1), (8, 8, 1, 1)]
            self.convs = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2, groups=g) for i, o, k, g in layers)
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in layers)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            for index in range(3):
                x = F.relu(self.norms[index](self.convs[index](x)))
            x = x + F.relu(self.norms[3](self.convs[3](x)))
            return self.head(x.mean((2, 3)))

    model, generator = randomize(Net()), torch.Generator().manual_seed(1)
    for index in range(2):
        factor = spread(8, generator).float()
        model.norms[index].weight.mul_(factor)
        model.norms[index].bias.mul_(factor)
        axis = 0 if index == 0 else 1
        model.convs[index + 1].weight.div_(factor.reshape([-1 if axis == i else 1 for i in range(4)]))
    x = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(5))
    return fold(capture(model, x)), x


def output_error(prepare: tuple[str, ...]) -> float:
    """Squared error of the quantized network's output relative to its energy, weights with one scale per tensor."""
    graph, x = small()
    options = PlacementOptions(per_tensor_weights=True)
    result = calibrate(graph, [x], method="minmax", placement=options, prepare=prepare)
    assert (result.record.preparation is None) == (not prepare)
    y, y_q = graph(x)[0], result.program(x)[0]
    return float((y - y_q).square().sum() / y.square().sum())


def test_equalized_weights_survive_one_scale_per_tensor() -> None:
    assert output_error(("cle",)) < output_error(()) / 10


@pytest.mark.parametrize("per_tensor", [True, False], ids=["tensor", "channel"])
def test_the_runtime_computes_it_in_integers(per_tensor: bool) -> None:
    graph, x = small()
    placement = PlacementOptions(per_tensor_weights=per_tensor)
    result = calibrate(graph, [x], method="mse", placement=placement, prepare=("cle", "absorb"))
    assert [pair.second for pair in result.record.preparation.cle.pairs] == ["convs.1", "convs.2"]
    report = parity(onnx_ir.to_proto(to_onnx(result.program, opset=20)), result.program, [(x,)], optimized=True)
    assert report.mismatched == 0 and report.kernel_values > 1000
    assert report.outputs_identical


@pytest.mark.parametrize("name", ["cle", "absorb"])
def test_grids_are_those_of_the_network_as_it_was(name: str) -> None:
    """Bits, granularity and names of all sites, also for the layers that have new constants."""
    model = randomize(
        nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)
        )
    )
    model[1].weight.fill_(0.1)
    model[1].bias.fill_(5.0)
    graph, x = forms(model, *IMAGE)
    placement = PlacementOptions(weight_bits=4, first_last_bits=None)
    plain, prepared = (calibrate(graph, [x], placement=placement, prepare=names) for names in ((), (name,)))
    assert getattr(prepared.record.preparation, name).pairs
    sites = [
        [(site.name, site.kind, site.spec, site.users) for site in each.placement.sites] for each in (plain, prepared)
    ]
    assert sites[0] == sites[1] and {spec.bits for _, kind, spec, _ in sites[0] if kind == "weight"} == {4}


@pytest.mark.parametrize("name", ["residual", "pooled", "transformer", "mlp"])
def test_any_network_is_prepared(name: str) -> None:
    """Whatever stands in it: the function is that of the network, in float32 and its rounding."""
    model, x = build(name)
    graph = to_integer_forms(fold(capture(model, x)))
    changed, _ = prepare_graph(graph, ("cle", "absorb"))
    assert difference(graph, changed, x) < 1e-5
