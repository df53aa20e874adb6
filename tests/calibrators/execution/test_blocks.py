"""Blocks: the published partitions, frontiers of several tensors, and blocks that chained are the whole graph."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import combinations, groupby, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from calibrators.execution.blocks import Block, _divide, extract, merge, partition
from calibrators.graph.aten import constant, infer_shapes, shape_of
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from tests.support.architectures import construct
from tests.support.networks import NETWORKS, build, randomize
from tests.support.published_nets import PUBLISHED, RepVGG, conv_bn

aten = torch.ops.aten
WEIGHTED = {aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input, aten.linear.default}
UNLIMITED = 1000


def weights_of(graph: fx.GraphModule) -> list[str]:
    """fx names of the convolutions and linear layers."""
    return [node.name for node in graph.graph.nodes if node.target in WEIGHTED]


def captured(model: nn.Module, *shapes: tuple[int, ...], batch: int = 2) -> fx.GraphModule:
    generator = torch.Generator().manual_seed(0)
    return capture(randomize(model), [torch.randn(batch, *shape, generator=generator) for shape in shapes])


@cache
def published(name: str) -> fx.GraphModule:
    return capture(PUBLISHED[name]().eval(), torch.zeros(2, 3, 64, 64))


@cache
def known(name: str) -> fx.GraphModule:
    """A captured and folded network of tests.support.networks or tests.support.architectures."""
    model, inputs = build(name) if name in NETWORKS else construct(name)
    return fold(capture(model, inputs))


@cache
def folded_repvgg() -> fx.GraphModule:
    return fold(captured(RepVGG((8, 8, 12, 16), (1, 2, 4, 2), 5), (3, 32, 32)))


def calls(graph: fx.GraphModule) -> list[str]:
    return [node.name for node in graph.graph.nodes if node.op == "call_function"]


def chained(graph: fx.GraphModule, blocks: Iterable[Block], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The graph's outputs, made block by block; a value is there only if an earlier block returned it."""
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    values = dict(zip(names, inputs, strict=True))
    for block in blocks:
        made = extract(graph, block)(*(values[name] for name in block.inputs))
        values |= dict(zip(block.outputs, made, strict=True))
    return [values[node.name] for node in graph.graph.output_node().args[0]]  # type: ignore[union-attr, misc]


def assert_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def samples(graph: fx.GraphModule) -> list[list[Tensor]]:
    """The example, and where the batch is free three samples."""
    example = list(graph.meta["example"])
    return [example, [torch.cat([x, x.flip(0)])[:3] for x in example]] if graph.meta["dynamic_batch"] else [example]


def assert_partition(graph: fx.GraphModule, blocks: Sequence[Block], weighted: Sequence[str]) -> None:
    """Every call and every weighted node once and in order, and chained blocks compute the graph."""
    assert [name for block in blocks for name in block.nodes] == calls(graph)
    assert [name for block in blocks for name in block.weighted] == list(weighted)
    assert all(block.weighted for block in blocks)
    assert len({block.name for block in blocks}) == len(blocks)
    batch = graph.meta["example"][0].shape[0]
    nodes = {node.name: node for node in graph.graph.nodes}
    crossing = [nodes[name] for block in blocks for name in block.inputs if nodes[name].op == "call_function"]
    assert all(shape_of(node)[0] == batch for node in crossing)
    for inputs in samples(graph):
        assert_same(chained(graph, blocks, inputs), graph(*inputs))


# --- the published partitions

OPERATORS = {
    "resnet18": [1, 2, 2, 3, 2, 3, 2, 3, 2, 1],
    "resnet50": [1, 4, 3, 3, 4, 3, 3, 3, 4, 3, 3, 3, 3, 3, 4, 3, 3, 1],
    "regnetx600m": [1, 4, 4, 3, 3, 4, 3, 3, 3, 3, 4, 3, 3, 3, 3, 3, 3, 1],
    "mobilenetv2": [*[3] * 17, 2],
}
PARAMETERS = {"resnet18": 11_689_512, "resnet50": 25_557_032, "regnetx600m": 6_196_040, "mobilenetv2": 3_504_872}
WEIGHTS = {
    "resnet18": [9_408, 73_728, 73_728, 229_376, 294_912, 917_504, 1_179_648, 3_670_016, 4_718_592, 512_000],
    "mobilenetv2": [
        1_664, 4_704, 8_208, 9_360, 14_016, 14_016, 20_160, 52_608, 52_608, 52_608, 64_896, 115_776, 115_776, 152_640,
        315_840, 315_840, 469_440, 1_689_600,
    ],
}  # fmt: skip


CASES = [*((name, "folded") for name in PUBLISHED), ("mobilenetv2", "training")]


@pytest.mark.parametrize(("name", "form"), CASES, ids=["-".join(case) for case in CASES])
def test_published_partitions(name: str, form: str) -> None:
    training = published(name)
    assert sum(p.numel() for p in training.parameters()) == PARAMETERS[name]
    graph = fold(training) if form == "folded" else training
    blocks = partition(graph, weights_of(graph))
    assert [len(block.weighted) for block in blocks] == OPERATORS[name]
    assert all(len(block.inputs) == len(block.outputs) == 1 for block in blocks)
    nodes = {node.name: node for node in graph.graph.nodes}
    weights = [sum(constant(graph, nodes[name].args[1]).numel() for name in block.weighted) for block in blocks]  # type: ignore[arg-type]
    assert sum(weights) == sum(p.numel() for p in training.parameters() if p.ndim > 1)
    assert weights == WEIGHTS.get(name, weights)
    assert_same(chained(graph, blocks, graph.meta["example"]), graph(*graph.meta["example"]))


def test_blocks_are_named_by_their_modules() -> None:
    def names(name: str) -> list[str]:
        return [block.name for block in partition(published(name), weights_of(published(name)))]

    assert names("resnet18") == ["conv1", *(f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)), "fc"]
    inner = [f"features.{index}" for index in range(2, 18)]
    assert names("mobilenetv2") == ["features.0..features.1", *inner, "features.18..classifier"]


@pytest.mark.parametrize(
    ("chain", "sizes"),
    [
        pytest.param(1, [1] * 10, id="layers"),
        pytest.param(2, [2, 2, 2, 2, 2], id="pairs"),
        pytest.param(3, [3, 3, 3, 1], id="threes"),
        pytest.param(4, [3, 4, 3], id="stages"),
        pytest.param(100, [10], id="whole"),
    ],
)
def test_plain_chain_breaks_between_stages(chain: int, sizes: list[int]) -> None:
    """A folded RepVGG: ten operators, stages of 1, 2, 4, 2 and the classifier; few blocks first, then stages."""
    graph = folded_repvgg()
    weighted = weights_of(graph)
    blocks = partition(graph, weighted, chain=chain)
    assert [len(block.weighted) for block in blocks] == sizes
    assert_partition(graph, blocks, weighted)


def test_unfolded_branches_are_blocks() -> None:
    graph = captured(RepVGG((8, 8), (1, 2), 5), (3, 16, 16))
    blocks = partition(graph, weights_of(graph))
    assert [block.name for block in blocks] == ["stage0", "stage1.0", "stage1.1", "linear"]


def test_transformer_is_cut_at_the_residual_sums() -> None:
    graph = known("transformer")
    blocks = partition(graph, weights_of(graph), chain=1)
    assert [block.name for block in blocks] == ["embed", "qkv..proj", "mlp", "head"]
    sums = [node for node in graph.graph.nodes if node.target is aten.add.Tensor]
    assert blocks[1].outputs == blocks[2].inputs == (sums[0].name,)
    assert blocks[2].nodes.index(sums[1].name) == len(blocks[2].nodes) - 2  # the mean over tokens stays with it


def test_operators_that_are_not_quantized_count_as_weightless() -> None:
    graph = known("transformer")
    weighted = weights_of(graph)
    without_first_and_last = partition(graph, weighted[1:-1])
    assert [block.name for block in without_first_and_last] == ["qkv..proj", "mlp"]
    assert_partition(graph, without_first_and_last, weighted[1:-1])
    (only,) = partition(graph, [weighted[2]])
    assert list(only.nodes) == calls(graph)
    assert only.inputs == ("x",)


# --- whatever network


STRUCTURES = [*NETWORKS, "shufflenet", "densenet", "unet", "pyramid", "detector", "two-inputs", "efficientnet", "gpt",
              "vit", "lstm", "odd", "slices"]  # fmt: skip
LIMITS = [(1, 1), (3, 3), (3, 16)]


@pytest.mark.parametrize("name", STRUCTURES)
def test_chained_blocks_are_the_whole(name: str) -> None:
    graph = known(name)
    weighted = weights_of(graph)
    for chain, largest in LIMITS:
        assert_partition(graph, partition(graph, weighted, chain=chain, largest=largest), weighted)


@pytest.mark.parametrize("name", ["densenet", "vit", "odd", "detector"])
def test_merged_neighbours_are_both(name: str) -> None:
    graph = known(name)
    weighted = weights_of(graph)
    blocks = partition(graph, weighted, chain=1, largest=1)
    assert len(blocks) > 2
    for count in range(1, len(blocks) + 1):
        for start in range(len(blocks) - count + 1):
            whole = merge(graph, blocks[start : start + count])
            assert_partition(graph, [*blocks[:start], whole, *blocks[start + count :]], weighted)
    everything = merge(graph, blocks)
    assert everything.inputs == tuple(node.name for node in graph.graph.nodes if node.op == "placeholder")
    returned = {node.name for node in graph.graph.output_node().all_input_nodes if node.op == "call_function"}
    assert set(everything.outputs) == returned


def test_merging_needs_neighbours() -> None:
    graph = folded_repvgg()
    blocks = partition(graph, weights_of(graph), chain=1)
    assert merge(graph, blocks[2:4]).name == "stage1.1..stage2.0"
    assert merge(graph, [merge(graph, blocks[1:3]), *blocks[3:5]]).name == "stage1.0..stage2.1"
    assert merge(graph, blocks[4:5]) == blocks[4]
    for wrong in ([], [blocks[1], blocks[3]], [blocks[3], blocks[2]], [blocks[1], blocks[1]]):
        with pytest.raises(ValueError, match="not consecutive blocks"):
            merge(graph, wrong)


def reordered(graph: fx.GraphModule, seed: int) -> fx.GraphModule:
    """The same graph with its calls in a random topological order."""
    chooser = random.Random(seed)
    waiting = [node for node in graph.graph.nodes if node.op == "call_function"]
    copies: dict[fx.Node, fx.Node] = {}
    new = fx.Graph()
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            copies[node] = new.node_copy(node)
    while waiting:
        node = chooser.choice([node for node in waiting if copies.keys() >= set(node.all_input_nodes)])
        copies[node] = new.node_copy(node, copies.__getitem__)
        waiting.remove(node)
    new.output(fx.map_arg(graph.graph.output_node().args[0], copies.__getitem__))
    shuffled = fx.GraphModule(graph, new)
    shuffled.meta = dict(graph.meta)
    return shuffled


@pytest.mark.parametrize("name", [*NETWORKS, "shufflenet", "unet", "detector", "two-inputs", "efficientnet", "vit"])
def test_order_of_branches_does_not_matter(name: str) -> None:
    graph = known(name)
    weighted = weights_of(graph)
    expected = [set(block.weighted) for block in partition(graph, weighted, chain=1, largest=UNLIMITED)]
    for seed in range(5):
        shuffled = reordered(graph, seed)
        blocks = partition(shuffled, weighted, chain=1, largest=UNLIMITED)
        assert [set(block.weighted) for block in blocks] == expected
        assert_same(chained(shuffled, blocks, graph.meta["example"]), graph(*graph.meta["example"]))


def test_two_inputs_meet_in_one_block() -> None:
    graph = known("two-inputs")
    first, second = partition(graph, weights_of(graph), chain=1)
    assert set(first.inputs) == {node.name for node in graph.graph.nodes if node.op == "placeholder"}
    assert len(first.weighted) == 2
    assert len(second.weighted) == 1


class Heads(nn.Module):
    """A trunk of two layers that is returned as well, and two heads of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv_bn(3, 8), conv_bn(8, 8))
        self.left, self.right = (nn.Sequential(conv_bn(8, 8), nn.Conv2d(8, 2, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.trunk(x)
        return self.left(x), x, self.right(x)


def test_heads_are_one_block_unless_too_large() -> None:
    graph = fold(captured(Heads(), (3, 6, 6)))
    weighted = weights_of(graph)
    together = partition(graph, weighted)
    assert [block.name for block in together] == ["trunk", "left..right"]
    assert len(together[1].outputs) == 2
    apart = partition(graph, weighted, largest=2)
    assert [block.name for block in apart] == ["trunk", "left", "right"]
    assert apart[0].outputs == apart[1].inputs == apart[2].inputs  # passes by the left head
    assert_partition(graph, apart, weighted)


class Features(nn.Module):
    """A chain that returns every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(conv_bn(3 if i == 0 else 8, 8) for i in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def test_returned_features_do_not_prevent_cuts() -> None:
    graph = fold(captured(Features(), (3, 6, 6)))
    blocks = partition(graph, weights_of(graph), chain=2)
    assert [len(block.weighted) for block in blocks] == [2, 2]
    assert [len(block.outputs) for block in blocks] == [2, 2]
    assert [len(block.inputs) for block in blocks] == [1, 1]
    assert_partition(graph, blocks, weights_of(graph))


# --- several tensors at the frontier


class Dense(nn.Module):
    """Layers that each read the concatenation of all before: no cut between the stem and the classifier."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        inputs = [8 + 4 * i for i in range(layers)]
        self.layers = nn.ModuleList(nn.Sequential(conv_bn(i, 16), nn.Conv2d(16, 4, 3, 1, 1)) for i in inputs)
        self.head = nn.Linear(8 + 4 * layers, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1).mean((2, 3)))


def test_dense_block_is_divided_between_its_layers() -> None:
    """Within a layer a wide tensor crosses beside the features; between layers the features alone, not yet joined."""
    graph = fold(captured(Dense(12), (3, 6, 6)))
    weighted = weights_of(graph)
    stem, *middle, head = partition(graph, weighted, chain=1, largest=10)
    assert [len(block.weighted) for block in middle] == [4, 10, 10]  # few bytes: as early as three blocks can
    features = [stem.outputs[0], *(block.weighted[i] for block in middle for i in range(1, len(block.weighted), 2))]
    assert [len(block.inputs) for block in middle] == [1, 3, 8]
    for block in middle[1:]:
        assert list(block.inputs) == features[: len(block.inputs)]
    assert middle[0].outputs == tuple(features[1:3])
    assert head.weighted == (weighted[-1],)
    assert_partition(graph, [stem, *middle, head], weighted)


class Hourglass(nn.Module):
    """A U-Net of `depth` levels with two convolutions each, on the way down and on the way up."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        widths = [4 << level for level in range(depth + 1)]

        def double(i: int, o: int) -> nn.Module:
            return nn.Sequential(conv_bn(i, o, 3), conv_bn(o, o, 3))

        self.down = nn.ModuleList(double(i, o) for i, o in pairwise([3, *widths]))
        self.up = nn.ModuleList(double(i + o, o) for o, i in reversed(list(pairwise(widths))))
        self.last = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for up in self.up:
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return self.last(x)


def test_unet_is_divided_where_few_bytes_cross() -> None:
    graph = fold(captured(Hourglass(3), (3, 16, 16)))
    weighted = weights_of(graph)
    whole = partition(graph, weighted, chain=2, largest=UNLIMITED)
    assert [block.name for block in whole] == ["down.0", "down.1..up.1", "up.2", "last"]
    blocks = partition(graph, weighted, chain=2, largest=6)
    assert [block.name for block in blocks] == ["down.0", "down.1..down.2", "down.3..up.1", "up.2", "last"]
    assert [len(block.inputs) for block in blocks] == [1, 1, 3, 1, 1]
    assert_partition(graph, blocks, weighted)


class Streams(nn.Module):
    """Two chains that never meet and are written operator by operator: no single tensor is ever alone."""

    def __init__(self, depth: int, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.left, self.right = (nn.ModuleList(nn.Linear(6, 6) for _ in range(depth)) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for left, right in zip(self.left, self.right, strict=True):
            x, y = left(x), right(y)
            x, y = self.activation(x), self.activation(y)
        return x, y


def test_network_without_cuts() -> None:
    graph = captured(Streams(5), (6,), (6,))
    weighted = weights_of(graph)
    assert [len(block.weighted) for block in partition(graph, weighted, chain=1)] == [10]
    blocks = partition(graph, weighted, largest=4)
    assert [len(block.weighted) for block in blocks] == [4, 4, 2]
    assert [len(block.inputs) for block in blocks] == [2, 2, 2]
    assert_partition(graph, blocks, weighted)


@pytest.mark.parametrize("largest", [1, 2, 3])
def test_clip_stays_with_its_operator(largest: int) -> None:
    """Between `left(x)` and its ReLU stands `right(y)`: no block begins there, whatever the limit."""
    graph = captured(Streams(5), (6,), (6,))
    blocks = partition(graph, weights_of(graph), largest=largest)
    assert [len(block.weighted) for block in blocks] == [2] * 5
    home = {name: block for block in blocks for name in block.nodes}
    clips = [node for node in graph.graph.nodes if node.target is aten.relu.default]
    assert all(home[node.name] is home[node.args[0].name] for node in clips)


def test_equal_boundaries_leave_activations_with_their_operators() -> None:
    graph = captured(Streams(5, torch.sigmoid), (6,), (6,))
    blocks = partition(graph, weights_of(graph), largest=2)
    assert [len(block.weighted) for block in blocks] == [2] * 5
    nodes = {node.name: node for node in graph.graph.nodes}
    assert all(nodes[name].target is aten.sigmoid.default for block in blocks for name in block.outputs)


class Bottlenecks(nn.Module):
    """A residual branch whose tensors have 1, 9, 5 and 1 channels between five layers."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise([4, 1, 9, 5, 1, 4])))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_local_minima_are_worth_another_block() -> None:
    graph = captured(Bottlenecks(), (4,))
    weighted = weights_of(graph)
    blocks = partition(graph, weighted, largest=3)
    assert [len(block.weighted) for block in blocks] == [1, 3, 1]
    assert_partition(graph, blocks, weighted)


# --- what is no edge


class Tokens(nn.Module):
    """A position made from no input, read by three layers, and a token repeated for every sample late in the net."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.token = nn.Parameter(torch.zeros(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(6) * 0.1
        x = F.relu(self.first(x + position))
        x = F.relu(self.second(x + position))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.last(F.relu(self.third(x)) + position)


def test_constants_and_the_batch_size_cross_nothing() -> None:
    graph = captured(Tokens(), (5, 6))
    targets = Counter(node.target for node in graph.graph.nodes)
    assert targets[aten.arange.default] == targets[aten.sym_size.int] == 1
    weighted = weights_of(graph)
    blocks = partition(graph, weighted, chain=1)
    assert [len(block.inputs) for block in blocks] == [len(block.outputs) for block in blocks] == [1] * 4
    assert_partition(graph, blocks, weighted)
    taken = {node.name for node in extract(graph, blocks[2]).graph.nodes}
    assert "arange" in taken  # made in the first block, and here again
    size = next(node for node in graph.graph.nodes if node.target is aten.sym_size.int)
    assert size.args[0].op == "placeholder"
    asked = [node for node in extract(graph, blocks[1]).graph.nodes if node.name == size.name]
    assert [node.args[0].name for node in asked] == list(blocks[1].inputs)  # of its own input


def test_asking_for_the_batch_size_is_no_reading() -> None:
    """Its size is all that the last block wants of `relu`: joined with its reader, the value is gone."""
    inner = fx.Graph()
    x, token, weight = inner.placeholder("x"), inner.get_attr("token"), inner.get_attr("weight")
    for _ in range(2):
        x = inner.call_function(aten.relu.default, (inner.call_function(aten.linear.default, (x, weight)),))
    y = inner.call_function(aten.linear.default, (x, weight))
    early = next(node for node in inner.nodes if node.target is aten.relu.default)
    size = inner.call_function(aten.sym_size.int, (early, 0))
    expanded = inner.call_function(aten.expand.default, (token, [size, -1]))
    inner.output((inner.call_function(aten.add.Tensor, (y, expanded)),))
    graph = fx.GraphModule({"token": torch.ones(1, 4), "weight": torch.eye(4)}, inner)
    graph.meta = {"example": (torch.randn(2, 4),), "dynamic_batch": True}
    infer_shapes(graph)
    weighted = weights_of(graph)
    first, second, third = partition(graph, weighted, chain=1)
    assert size.name in third.nodes
    assert first.outputs == (early.name,)
    merged = merge(graph, [first, second])
    assert merged.outputs == third.inputs == second.outputs
    assert_partition(graph, [merged, third], weighted)


class Queries(nn.Module):
    """A layer on a learned token, the same for every sample, that two later layers' results are added to."""

    def __init__(self, is_first: bool) -> None:
        super().__init__()
        self.first, self.query, self.second, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.token, self.is_first = nn.Parameter(torch.zeros(1, 6)), is_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.is_first else self.first(x)
        query = self.query(self.token.expand(x.shape[0], -1))
        x = self.first(x) if self.is_first else x
        x = F.relu(self.second(x) + query)
        return self.last(x) + query


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
def test_layer_on_constants_is_computed_once_in_a_block_that_reads(is_first: bool) -> None:
    graph = captured(Queries(is_first), (6,))
    weighted = weights_of(graph)
    blocks = partition(graph, weighted, largest=1)
    assert [len(block.weighted) for block in blocks] == [2, 1, 1]
    assert_partition(graph, blocks, weighted)
    assert all(block.inputs for block in blocks)
    extracted = [node.name for block in blocks for node in extract(graph, block).graph.nodes]
    assert [extracted.count(name) - sum(name in block.inputs for block in blocks) for name in weighted] == [1] * 4


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x)).transpose(0, 1)
        return self.third(F.relu(self.second(x)).transpose(0, 1))


def test_tensor_with_samples_elsewhere_is_no_cut() -> None:
    graph = captured(TimeMajor(), (5, 6))
    weighted = weights_of(graph)
    blocks = partition(graph, weighted, chain=1)
    assert [len(block.weighted) for block in blocks] == [1, 1, 1]
    assert blocks[1].inputs == ("relu",)  # the transpose behind it lies in the block that undoes it
    assert_partition(graph, blocks, weighted)


# --- one block as a graph


def test_extracted_block_keeps_names_meta_and_memory() -> None:
    graph = known("residual")
    nodes = {node.name: node for node in graph.graph.nodes}
    for block in partition(graph, weights_of(graph), chain=1):
        inner = extract(graph, block)
        placeholders = [node for node in inner.graph.nodes if node.op == "placeholder"]
        assert tuple(node.name for node in placeholders) == block.inputs
        assert tuple(calls(inner)) == block.nodes
        assert tuple(node.name for node in inner.graph.output_node().args[0]) == block.outputs  # type: ignore[union-attr]
        for node in inner.graph.nodes:
            if node.op == "output":
                continue
            assert node.meta == nodes[node.name].meta
            if node.op == "get_attr":
                assert constant(inner, node).data_ptr() == constant(graph, nodes[node.name]).data_ptr()
        assert not list(inner.parameters())  # buffers: moving the block to a device leaves the graph where it is


def test_block_without_samples_cannot_tell_the_batch_size() -> None:
    graph = captured(Tokens(), (5, 6))
    size = next(node.name for node in graph.graph.nodes if node.target is aten.sym_size.int)
    with pytest.raises(ValueError, match="block 'size' needs the batch size"):
        extract(graph, Block("size", (size,), (), (size,), ()))


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"weighted": []}, "no node is weighted", id="none"),
        pytest.param(
            {"weighted": ["conv2d", "nothing"]}, r"no calls that reach an output: \['nothing'\]", id="unknown"
        ),
        pytest.param({"weighted": ["x"]}, r"no calls that reach an output: \['x'\]", id="input"),
        pytest.param({"weighted": ["conv2d"], "chain": 0}, "at least one weighted operator", id="chain"),
        pytest.param({"weighted": ["conv2d"], "largest": 0}, "at least one weighted operator", id="largest"),
    ],
)
def test_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(known("residual"), **arguments)  # type: ignore[arg-type]


# --- properties


def random_graph(steps: Sequence[tuple[str, int, int]], inputs: int, returned: Sequence[int]) -> fx.GraphModule:
    """A graph of linear layers, ReLUs and sums on [2, 4], each of one or two earlier values; the last is a layer."""
    graph = fx.Graph()
    values = [graph.placeholder(f"input_{index}") for index in range(inputs)]
    generator = torch.Generator().manual_seed(len(steps))
    attributes: dict[str, Tensor] = {}

    def linear(x: fx.Node) -> fx.Node:
        name = f"weight_{len(attributes)}"
        attributes[name] = torch.randn(4, 4, generator=generator)
        return graph.call_function(aten.linear.default, (x, graph.get_attr(name)))

    for kind, a, b in steps:
        left, right = values[a % len(values)], values[-1 - b % len(values)]
        if kind == "linear":
            values.append(linear(right))
        elif kind == "relu":
            values.append(graph.call_function(aten.relu.default, (right,)))
        else:
            values.append(graph.call_function(aten.add.Tensor, (left, right)))
    values.append(linear(values[-1]))
    results = {values[-1]: None} | {values[inputs + index % (len(values) - inputs)]: None for index in returned}
    graph.output(tuple(results))
    graph.eliminate_dead_code()
    module = fx.GraphModule(attributes, graph)
    example = tuple(torch.randn(2, 4, generator=generator) for _ in range(inputs))
    module.meta = {"example": example, "dynamic_batch": True}
    infer_shapes(module)
    return module


GRAPHS = st.builds(
    random_graph,
    st.lists(st.tuples(st.sampled_from(["linear", "relu", "add"]), st.integers(0, 30), st.integers(0, 3)), max_size=25),
    st.integers(1, 2),
    st.lists(st.integers(0, 25), max_size=2),
)


def atoms_by_reachability(graph: fx.GraphModule, weighted: Sequence[str]) -> list[set[str]]:
    """Weighted nodes by the number of cuts above them; a cut is on every path from an input to an unread result."""
    nodes = [node for node in graph.graph.nodes if node.op in ("placeholder", "call_function")]
    output = graph.graph.output_node()
    ends = {node for node in nodes if set(node.users) == {output}}

    def below(starts: Iterable[fx.Node], without: fx.Node | None = None) -> set[fx.Node]:
        found, waiting = set(), [node for node in starts if node is not without]
        while waiting:
            node = waiting.pop()
            if node not in found and node is not output:
                found.add(node)
                waiting += [user for user in node.users if user is not without]
        return found

    sources = [node for node in nodes if node.op == "placeholder" and set(node.users) - {output}]
    cuts = [node for node in nodes if node.op == "call_function" and not below(sources, node) & ends]
    depth = Counter({name: 0 for name in weighted})
    for cut in cuts:
        depth.update(node.name for node in below(cut.users) if node.name in depth)
    in_order = sorted(weighted, key=depth.__getitem__)
    return [set(group) for _, group in groupby(in_order, key=depth.__getitem__)]


@settings(deadline=None, max_examples=60)
@given(GRAPHS, st.integers(1, 4), st.integers(0, 100))
def test_any_graph(graph: fx.GraphModule, limit: int, seed: int) -> None:
    weighted = weights_of(graph)
    atoms = atoms_by_reachability(graph, weighted)
    shuffled = reordered(graph, seed)
    for each in (graph, shuffled):
        single = partition(each, weighted, chain=1, largest=UNLIMITED)
        assert [set(block.weighted) for block in single] == atoms
    blocks = partition(graph, weighted, chain=limit, largest=limit)
    assert_partition(graph, blocks, weighted)
    merged = merge(graph, blocks[seed % len(blocks) :])
    assert_partition(graph, [*blocks[: seed % len(blocks)], merged], weighted)
    runs = ["".join(group) for _, group in groupby("s" if len(atom) == 1 else "b" for atom in atoms)]
    chains = sum(-(-len(run) // limit) for run in runs if run[0] == "s")
    plain = partition(graph, weighted, chain=limit, largest=UNLIMITED)
    assert len(plain) == chains + sum(len(run) for run in runs if run[0] == "b")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.none() | st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=9), st.integers(1, 4))
def test_division_is_the_cheapest(prices: list[tuple[int, int] | None], limit: int) -> None:
    """Against all possible ways to break the row."""
    allowed = [index + 1 for index, price in enumerate(prices) if price is not None]

    def cost(breaks: tuple[int, ...]) -> tuple[object, ...]:
        ends = [0, *breaks, len(prices) + 1]
        excess = sum(max(0, b - a - limit) for a, b in pairwise(ends))
        paid = [price for index in breaks if (price := prices[index - 1])]
        return excess, sum(p[0] for p in paid), sum(p[1] for p in paid), [-index for index in breaks]

    every = [breaks for count in range(len(allowed) + 1) for breaks in combinations(allowed, count)]
    assert _divide(prices, limit) == list(min(every, key=cost))
