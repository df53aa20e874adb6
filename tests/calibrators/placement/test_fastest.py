from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from calibrators.errors import InputError
from calibrators.graph.canonical import to_integer_forms
from calibrators.graph.operators import OPERATORS
from calibrators.grid.costs import Cost, Costs, Work, kind_of_convolution
from calibrators.grid.x86_costs import X86_COSTS
from calibrators.placement import fastest
from calibrators.placement.fastest import faster_in_float, predicted
from calibrators.placement.integer_values import Placer
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.place import PlacementOptions, place
from calibrators.targets import get_target
from exporter import capture, fold
from tests.support.networks import ThinBlocks

TARGET = get_target("ort-cpu")


class Wide(nn.Sequential):
    """Dense convolutions of many channels, which integers compute much faster."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3))


def graph_of(model: nn.Module, size: int = 32) -> fx.GraphModule:
    torch.manual_seed(0)
    return to_integer_forms(fold(capture(model.eval(), (torch.randn(2, 3, size, size),))))


@pytest.fixture(scope="module")
def thin() -> fx.GraphModule:
    return graph_of(ThinBlocks(), size=48)


def placer_of(graph: fx.GraphModule) -> Placer:
    operators = [node for node in graph.graph.nodes if node.op == "call_function"]
    weighted = frozenset(node for node in operators if node.target in TARGET.weighted)
    return Placer(graph, TARGET, frozenset(node.name for node in operators), weighted)


def layers_of(placement: Any) -> list[str]:
    return [site.name for site in placement.sites if site.kind == "weight"]


def test_layers_that_are_slow_in_integers_stay_in_float_and_are_told(thin: fx.GraphModule) -> None:
    placement = place(thin, TARGET)
    whole = place(thin, TARGET, PlacementOptions(placement="integer"))
    assert 0 < len(layers_of(placement)) < len(layers_of(whole)) == 8
    assert whole.notes == ()
    [note] = placement.notes
    assert f"{8 - len(layers_of(placement))} layers left in float" in note and "placement='integer'" in note
    assert "blocks.0.0" in {rule.match: rule.layers for rule in placement.rules}["placement = fastest"]


def test_nothing_changes_where_integers_are_faster() -> None:
    graph = graph_of(Wide())
    assert faster_in_float(placer_of(graph), X86_COSTS) is None
    assert place(graph, TARGET).sites == place(graph, TARGET, PlacementOptions(placement="integer")).sites


def test_little_time_is_not_worth_a_change() -> None:
    assert faster_in_float(placer_of(graph_of(ThinBlocks(blocks=1), size=12)), X86_COSTS) is None


def test_the_choice_is_the_same_every_time(thin: fx.GraphModule) -> None:
    first, second = (faster_in_float(placer_of(thin), X86_COSTS) for _ in range(2))
    assert first == second and first is not None and first.ms < first.integer_ms


def test_layers_that_the_user_names_stay_quantized(thin: fx.GraphModule) -> None:
    options = PlacementOptions(layers=(LayerRule("blocks.1.0", weight_bits=4),))
    assert any("blocks.1.0" in name for name in layers_of(place(thin, TARGET, options)))
    assert not any("blocks.1.0" in name for name in layers_of(place(thin, TARGET)))


def test_a_layer_is_quantized_even_where_all_are_faster_in_float(thin: fx.GraphModule) -> None:
    costs = {**X86_COSTS, "linear": Costs(integer=Cost(node=1e6))}
    left = faster_in_float(placer_of(thin), costs)
    assert left is not None
    rest = placer_of(thin).without(left.nodes)
    assert len(rest.weighted) == 1


def test_further_rules_leave_the_balance_as_it_is(thin: fx.GraphModule) -> None:
    """One layer more in float, near the balance, would take the whole network with it."""
    whole = place(thin, TARGET, PlacementOptions(placement="integer"))
    layer, *others = layers_of(whole)
    before = replace(whole, options=PlacementOptions())
    rule = before.matching(LayerRule(layer.removesuffix(".weight"), float=True), "auto")
    assert layers_of(before.again([rule])) == others
    assert len(layers_of(place(thin, TARGET, PlacementOptions(), [rule]))) < len(others)


def test_the_last_layer_may_not_be_left_in_float(thin: fx.GraphModule) -> None:
    placement = place(thin, TARGET)
    [layer] = layers_of(placement)
    with pytest.raises(InputError, match="nothing is left"):
        placement.again([placement.matching(LayerRule(layer.removesuffix(".weight"), float=True), "auto")])


@pytest.mark.parametrize("name", ["ort-arm", "ort-web"])
def test_a_target_without_costs_changes_nothing(name: str, thin: fx.GraphModule) -> None:
    assert len(layers_of(place(thin, get_target(name)))) == 8


def test_the_cut_is_as_good_as_the_best_of_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "GAIN", -1.0)
    monkeypatch.setattr(fastest, "LEAST_SAVING", -1e12)
    placer = placer_of(graph_of(ThinBlocks(channels=24, blocks=2), size=24))
    names = sorted(node.name for node in placer.weighted)
    choices = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names)))
    best = min(predicted(placer.without(frozenset(choice)), X86_COSTS) for choice in choices)
    left = faster_in_float(placer, X86_COSTS)
    assert left is not None
    assert 1e6 * left.ms <= best * 1.1  # changes of layout between two operators are estimated in the cut


class Gates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid() + (x * 0.5 + 0.5).clamp(0.0, 1.0)


def test_operators_that_are_one_in_float_cost_once() -> None:
    graph = graph_of(Gates())
    found = dict(fastest._steps(graph.graph.nodes))
    assert sorted(kind for kind in found.values() if kind != fastest.FREE) == ["hard sigmoid", "silu"]
    assert [node.target for node, kind in found.items() if kind == fastest.FREE] == [
        torch.ops.aten.sigmoid.default,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.mul.Tensor,
    ]


def test_a_linear_layer_stays_quantized_if_its_relu_is_read_as_floats() -> None:
    graph = graph_of(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1024), nn.ReLU(), nn.Tanh()))
    assert faster_in_float(placer_of(graph), X86_COSTS) is None


def test_a_float_max_pool_before_a_quantizer_runs_on_codes_and_is_slow() -> None:
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 10, 3), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Conv2d(10, 16, 3)), size=96)
    placer = placer_of(graph)
    first, second = (node.name for node in graph.graph.nodes if node in placer.weighted)
    pool = frozenset({first, "leaky_relu", "max_pool2d"})
    assert predicted(placer.without(pool), X86_COSTS) > predicted(placer.without(pool | {second}), X86_COSTS) + 1e5
    left = faster_in_float(placer, X86_COSTS)
    assert left is None or not (first in left.nodes and second not in left.nodes)


def test_rows_of_the_table_are_operators_or_kinds() -> None:
    kinds = {"dense", "pointwise", "depthwise", "uneven depthwise", "grouped", "linear"}
    around = {"quantize", "dequantize", "layout", "max pool of planes", *fastest._COMPOSED}
    known = {*OPERATORS, *kinds, *around, "sigmoid.default", "relu.default", "cat.default", "maximum.default"}
    assert X86_COSTS.keys() <= known
    assert all(cost.of(Work(1e4, 1e6, 1e4, 1e3)) >= 0 for row in X86_COSTS.values() for cost in vars(row).values())


@pytest.mark.parametrize(
    ("weight", "groups", "kind"),
    [
        ((8, 3, 3, 3), 1, "dense"),
        ((8, 3, 1, 1), 1, "pointwise"),
        ((32, 1, 3, 3), 32, "depthwise"),
        ((20, 1, 3, 3), 20, "uneven depthwise"),
        ((32, 4, 3, 3), 8, "grouped"),
    ],
)
def test_convolutions_have_a_row_for_each_of_their_kernels(weight: tuple[int, ...], groups: int, kind: str) -> None:
    assert kind_of_convolution(weight, groups) == kind and kind in X86_COSTS


def test_work_counts_rounded_channels_and_gathered_values() -> None:
    work = Work.of_product((1, 20, 5, 5), (20, 3, 3, 3), 1)
    assert work == Work(elements=500, macs=25 * 32 * 27, gathered=25 * 27, runs=25 * 9)
    assert Work.of_product((1, 20, 5, 5), (20, 1, 3, 3), 20) == Work(elements=500, macs=25 * 20 * 9)
