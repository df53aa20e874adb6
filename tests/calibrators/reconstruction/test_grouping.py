"""Which units are trained jointly: the published groupings, and what may go wrong."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import fx

from calibrators.calibration import calibrate
from calibrators.errors import InputError
from calibrators.execution.blocks import Block, partition
from calibrators.graph.aten import constant
from calibrators.graph.canonical import to_integer_forms
from calibrators.grid.numerics import quantize
from calibrators.placement.place import PlacementOptions, place
from calibrators.program.freeze import CalibrationResult
from calibrators.reconstruction.grouping import by_boundary, by_capacity, by_loss, capacities, join, parse_groups
from calibrators.record import Grouping
from calibrators.targets import get_target
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from tests.support.networks import build
from tests.support.published_nets import PUBLISHED

MRECG_CURVE = [1.0, 1.5, 7.0, 4.0, 5.1, 7.4, 5.2, 7.4, 8.1, 9.4, 7.2, 10.0, 14.5, 6.8, 10.9, 16.7, 10.7]
"""Losses of MobileNetV2's units, read off the plot in the authors' repository."""


@functools.cache
def units(name: str) -> tuple[fx.GraphModule, tuple[Block, ...], dict[str, int]]:
    graph = to_integer_forms(fold(capture(PUBLISHED[name]().eval(), torch.randn(2, 3, 64, 64))))
    sites = place(graph, get_target("ort-cpu"), PlacementOptions()).sites
    weighted = [user for site in sites if site.kind == "weight" for user in site.users]
    return graph, partition(graph, weighted), dict.fromkeys(weighted, 1)


def test_falls_of_the_published_curve() -> None:
    assert sorted(by_loss(MRECG_CURVE)) == [2, 5, 9, 12, 15]
    assert by_loss(MRECG_CURVE, 2) == [12, 15]


def test_steady_losses_join_nothing() -> None:
    assert by_loss([1.0, 1.1, 1.2, 1.19]) == []
    assert by_loss([1.0]) == []


def test_capacities_of_resnet18() -> None:
    """Weights, times 1.6 in layers with a stride (golden numbers of the method's note, with one bit per weight)."""
    graph, blocks, bits = units("resnet18")
    wanted = [15_053, 73_728, 73_728, 278_528, 294_912, 1_114_112, 1_179_648, 4_456_448, 4_718_592, 512_000]
    assert [round(c) for c in capacities(graph, blocks, bits)] == wanted


def test_capacity_ratios_find_the_published_boundaries_of_resnet50() -> None:
    graph, blocks, bits = units("resnet50")
    names = [block.name for block in blocks]
    pairs = by_capacity(capacities(graph, blocks, bits), 3)
    assert sorted((names[i], names[i + 1]) for i in pairs) == [
        ("layer1.2", "layer2.0"),
        ("layer2.3", "layer3.0"),
        ("layer3.5", "layer4.0"),
    ]


def test_boundaries_are_where_shapes_change() -> None:
    graph, blocks, _ = units("resnet18")
    assert [blocks[i + 1].name for i in by_boundary(graph, blocks)] == ["layer2.0", "layer3.0", "layer4.0"]


@pytest.mark.parametrize("pairs", [[], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 0]])
@pytest.mark.parametrize("largest", [1, 2, 3])
def test_groups_cover_every_unit_once_in_order(pairs: list[int], largest: int) -> None:
    groups = join(10, pairs, largest)
    assert [unit for group in groups for unit in group] == list(range(10))
    assert max(map(len, groups)) <= largest
    if largest == 1 or not pairs:
        assert groups == [[unit] for unit in range(10)]


def test_most_important_pairs_win() -> None:
    assert join(10, [4, 3, 5], 2) == [[0], [1], [2], [3], [4, 5], [6], [7], [8], [9]]


def test_hand_written_groups() -> None:
    assert parse_groups("2-3, 5-7", 9) == [2, 5, 6]
    assert parse_groups("4", 9) == []


@pytest.mark.parametrize("text", ["2-9", "3-2", "a-b", "1-2-3", "0-2,1-3"])
def test_hand_written_groups_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="groups"):
        parse_groups(text, 9)


@pytest.mark.parametrize(
    ("method", "options", "fewer"),
    [
        ("mrecg", {"groups": "0-1"}, 1),
        ("qdrop", {"groups": "0-1"}, 1),
        ("mrecg", {"granularity": "block"}, 0),
        ("mrecg", {"granularity": "modcap", "joined": 9}, 0),
        ("mrecg", {"granularity": "loss", "joined": 1, "group": 2}, None),
    ],
)
def test_the_method_trains_joined_units(method: str, options: dict[str, object], fewer: int | None) -> None:
    model, x = build("residual", batch=16)
    graph = fold(capture(model, x))
    placement = PlacementOptions(weight_bits=3, activation_bits=4)
    options = {"iters": 4, "chain": 1, **options}
    result = calibrate(graph, [(x,)], method=method, options=options, placement=placement)
    before, after = len(result.record.reconstruction.grouping.units_before), len(result.record.reconstruction.units)
    assert before - after == fewer if fewer is not None else before - after in (0, 1)
    if options.get("granularity") == "loss":
        assert len(result.record.reconstruction.grouping.losses) == before


def residual(method: str, options: dict[str, object], **more: object) -> tuple[CalibrationResult, torch.Tensor]:
    model, x = build("residual", batch=16)
    graph = fold(capture(model, x))
    placement = PlacementOptions(weight_bits=3, activation_bits=4)
    options = {"iters": 4, "chain": 1, **options}
    return calibrate(graph, [(x[:8],), (x[8:],)], method=method, options=options, placement=placement, **more), x


def test_the_curve_after_is_measured_at_every_original_unit() -> None:
    result, x = residual("mrecg", {"groups": "0-1"})
    grouping, units = result.record.reconstruction.grouping, result.record.reconstruction.units
    assert grouping.groups == ((0, 1),)
    assert len(grouping.losses_after) == len(grouping.units_before) == len(units) + 1
    assert grouping.losses is None
    # where a joined unit ends, training measured the same error on its own way through the network
    ends = [grouping.losses_after[i] for i in range(1, len(units) + 1)]
    assert ends == pytest.approx([unit.after for unit in units], rel=1e-4)
    with torch.no_grad():
        (wanted,), (y,) = result.placement.graph(x), result.program(x)
    assert ends[-1] == pytest.approx(float((y - wanted).square().sum() / wanted.square().sum()), rel=1e-4)
    assert grouping.losses_after[0] > 0


def test_the_curve_before_is_made_for_the_picture_on_request() -> None:
    result, _ = residual("mrecg", {"groups": "0-1", "probe": 1.0}, explain=True)
    alone, _ = residual("qdrop", {})
    grouping = result.record.reconstruction.grouping
    assert grouping.losses == tuple(unit.after for unit in alone.record.reconstruction.units)


def test_units_alone_have_no_second_curve() -> None:
    result, _ = residual("mrecg", {"granularity": "block"}, explain=True)
    grouping = result.record.reconstruction.grouping
    assert grouping == Grouping("block", grouping.units_before)


def test_joining_nothing_is_the_base() -> None:
    joined, _ = residual("mrecg", {"granularity": "modcap", "joined": 9})
    alone, _ = residual("qdrop", {})
    assert joined.record.reconstruction.grouping.groups is None
    assert all(torch.equal(c.codes, alone.weights[name].codes) for name, c in joined.weights.items())


def test_the_first_member_of_a_group_learns_from_the_last() -> None:
    """With the error of the group's output alone, rounding of its first layer still moves."""
    result, _ = residual("mrecg", {"groups": "0-1", "iters": 100})
    first = next(site for site in result.placement.sites if site.kind == "weight")
    coded = result.weights[first.name]
    node = next(n for n in result.placement.graph.graph.nodes if n.name == first.node)
    rounded = quantize(constant(result.placement.graph, node), coded.qparams)
    assert bool((coded.codes != rounded).any())
