"""Rules for layers: what they match, who wins, what several readers of one value or weight get, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.errors import InputError, UnknownNameError
from calibrators.graph.canonical import to_integer_forms
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.place import FIRST_LAST, Placement, PlacementOptions, place
from calibrators.program.freeze import CalibrationResult
from calibrators.targets import get_target
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from tests.support.networks import build, randomize
from tests.support.published_nets import RepVGGBlock


def rule(match: str, **settings: Any) -> LayerRule:
    return LayerRule(match, **settings)


def placed(model: nn.Module, x: Tensor, *layers: LayerRule, **options: Any) -> Placement:
    graph = to_integer_forms(capture(model, x))
    return place(graph, get_target("ort-cpu"), PlacementOptions(layers=layers, **options))


def chain(*layers: LayerRule, **options: Any) -> Placement:
    """Four linear layers that read one another: a.0, a.2, b.0, b.2."""
    model = nn.Sequential()
    for name in "ab":
        model.add_module(name, nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()))
    return placed(randomize(model), torch.randn(4, 6), *layers, **options)


def weight_bits(placement: Placement) -> dict[str, int]:
    return {s.name.removesuffix(".weight"): s.spec.bits for s in placement.sites if s.kind == "weight"}


def input_bits(placement: Placement) -> dict[str, int]:
    """Bits of what each layer with weights reads, by the name of the layer."""
    sites = placement.sites
    layer = {user: s.name.removesuffix(".weight") for s in sites if s.kind == "weight" for user in s.users}
    return {layer[user]: s.spec.bits for s in sites if s.kind == "activation" for user in s.users if user in layer}


# --- what matches, and who wins --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        pytest.param("a", {"a.0": 3, "a.2": 3}, id="a-parent"),
        pytest.param("a.*", {"a.0": 3, "a.2": 3}, id="glob"),
        pytest.param("*.0", {"a.0": 3, "b.0": 3}, id="glob-over-modules"),
        pytest.param("b.2", {"b.2": 3}, id="module"),
        pytest.param("linear_1", {"a.2": 3}, id="node"),
        pytest.param("linear", {"a.0": 3, "a.2": 3, "b.0": 3, "b.2": 3}, id="operator"),
    ],
)
def test_what_a_glob_matches(match: str, expected: dict[str, int]) -> None:
    rest = dict.fromkeys(("a.0", "a.2", "b.0", "b.2"), 8)
    placement = chain(rule(match, weight_bits=3, activation_bits=3))
    assert weight_bits(placement) == input_bits(placement) == rest | expected


def test_later_rules_win_setting_by_setting() -> None:
    placement = chain(
        rule("*", weight_bits=5, activation_bits=5), rule("b", weight_bits=3), rule("b.2", activation_bits=2)
    )
    assert weight_bits(placement) == {"a.0": 5, "a.2": 5, "b.0": 3, "b.2": 3}
    assert input_bits(placement) == {"a.0": 5, "a.2": 5, "b.0": 5, "b.2": 2}
    assert set(weight_bits(chain(rule("b", weight_bits=3), rule("*", weight_bits=5))).values()) == {5}


def test_first_and_last_layer_are_the_first_rule() -> None:
    """It wins over the bits of all layers, and any rule of the user over it."""
    without = chain(weight_bits=4, activation_bits=4, first_last_bits=7)
    assert weight_bits(without) == input_bits(without) == {"a.0": 7, "a.2": 4, "b.0": 4, "b.2": 7}
    assert [(r.match, r.settings, r.layers) for r in without.rules] == [
        (FIRST_LAST, {"weight_bits": 7, "activation_bits": 7}, ("a.0", "b.2"))
    ]
    rules = rule("a.0", weight_bits=2), rule("b.2", weight_bits=3, activation_bits=6)
    placement = chain(*rules, weight_bits=4, activation_bits=4, first_last_bits=7)
    assert weight_bits(placement) == {"a.0": 2, "a.2": 4, "b.0": 4, "b.2": 3}
    assert input_bits(placement) == {"a.0": 7, "a.2": 4, "b.0": 4, "b.2": 6}
    assert [(r.match, r.layers) for r in placement.rules] == [
        (FIRST_LAST, ("a.0",)),  # its activation bits; of b.2 nothing is left
        ("a.0", ("a.0",)),
        ("b.2", ("b.2",)),
    ]
    assert chain(first_last_bits=None).rules == ()


def test_granularity_and_symmetry_of_single_layers() -> None:
    rules = rule("a", granularity="tensor"), rule("a.2", symmetric=True), rule("b.0", granularity="channel")
    placement = chain(*rules, weight_bits=4, first_last_bits=None, per_tensor_weights=True)
    specs = {site.name: site.spec for site in placement.sites if site.kind == "weight"}
    axes = {name: spec.axis for name, spec in specs.items()}
    assert axes == {"a.0.weight": None, "a.2.weight": None, "b.0.weight": 0, "b.2.weight": None}
    assert [name for name, spec in specs.items() if spec.symmetric] == ["a.2.weight"]
    assert (specs["a.2.weight"].qmin, specs["a.2.weight"].qmax) == (-7, 7)
    assert (specs["b.0.weight"].qmin, specs["b.0.weight"].qmax) == (-8, 7)


# --- float -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "layers", "expected"),
    [
        pytest.param({}, (rule("a", float=True),), {"b.0", "b.2"}, id="rule"),
        pytest.param({}, (rule("a", float=True), rule("a.0", float=False)), {"a.0", "b.0", "b.2"}, id="taken-back"),
        pytest.param({"include": ("a",)}, (), {"a.0", "a.2"}, id="include"),
        pytest.param({"include": ("a",), "exclude": ("a.0",)}, (), {"a.2"}, id="exclude-after-include"),
        pytest.param({"exclude": ("a",)}, (rule("a.0", float=False),), {"a.0", "b.0", "b.2"}, id="rule-after-exclude"),
        pytest.param({"include": ("a",)}, (rule("b.0", float=False, weight_bits=3),), {"a.0", "a.2", "b.0"}, id="both"),
    ],
)
def test_include_and_exclude_are_rules(
    options: dict[str, Any], layers: tuple[LayerRule, ...], expected: set[str]
) -> None:
    assert set(weight_bits(chain(*layers, **options))) == expected


def test_float_layers_are_told() -> None:
    rules = {r.match: (r.settings, r.layers) for r in chain(rule("b.2", float=True), exclude=("a.0",)).rules}
    assert rules["a.0"] == ({"float": True}, ("a.0",))
    assert rules["b.2"] == ({"float": True}, ("b.2",))
    assert rules[FIRST_LAST][1] == ("a.2", "b.0")  # of those that are quantized


# --- several readers -------------------------------------------------------------------------------------------------


class Forked(nn.Module):
    """Two convolutions read one value, a third its max pool, which shares the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.pooled = (nn.Conv2d(i, 4, 1) for i in (3, 4, 4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.max_pool2d(self.left(x) + self.right(x), 2) + self.pooled(F.max_pool2d(x, 2))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        pytest.param({"left": 3}, 6, id="one-narrow"),
        pytest.param({"left": 3, "right": 4}, 6, id="two-narrow"),
        pytest.param({"left": 3, "right": 4, "pooled": 2}, 4, id="all"),
        pytest.param({"pooled": 7}, 7, id="through-the-pool"),
    ],
)
def test_the_widest_reader_of_a_scale_decides(bits: dict[str, int], expected: int) -> None:
    rules = [rule(name, activation_bits=width) for name, width in bits.items()]
    placement = placed(randomize(Forked()), torch.randn(2, 3, 4, 4), *rules, activation_bits=6)
    found = input_bits(placement)
    assert {found[name] for name in ("left", "right", "pooled")} == {expected}
    missed = [name for name, width in bits.items() if width < expected]
    assert [note.split(":")[0] for note in placement.notes] == missed
    assert all(f"input keeps {expected} bits" in note for note in placement.notes)


def test_layers_with_one_weight_get_the_finest_grid_that_any_asks_for() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.inner(F.relu(self.inner(F.relu(self.first(x)))))))

    rules = [
        rule("linear_1", weight_bits=3, granularity="tensor", symmetric=True, activation_bits=3),
        rule("linear_2", weight_bits=5, granularity="tensor", symmetric=True, activation_bits=4),
    ]
    placement = placed(randomize(Tied()), torch.randn(4, 6), *rules)
    spec = placement.by_name["inner.weight"].spec
    assert (spec.bits, spec.axis, spec.symmetric) == (5, None, True)
    assert [site.spec.bits for site in placement.sites if site.kind == "activation"] == [8, 3, 4, 8]
    assert placement.notes == ("inner: its weight keeps 5 bits, because another layer shares the weight",)
    spec = placed(randomize(Tied()), torch.randn(4, 6), rules[0], weight_bits=5).by_name["inner.weight"].spec
    assert (spec.bits, spec.axis, spec.symmetric) == (5, 0, False)


def test_a_rule_for_a_kernel_with_an_identity_branch_leaves_its_taps_wide() -> None:
    model = randomize(nn.Sequential(RepVGGBlock(3, 8, 1), RepVGGBlock(8, 8, 1), RepVGGBlock(8, 12, 2)))
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_(1.0 if path.endswith("identity") else 0.12)
    x = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    graph = fold(capture(model, x))
    convolutions = [n.name for n in to_integer_forms(graph).graph.nodes if n.target is torch.ops.aten.conv2d.default]
    options = PlacementOptions(layers=(rule(convolutions[1], weight_bits=3, activation_bits=4),))
    result = calibrate(graph, [x], placement=options)
    assert [site.name for site in result.placement.sites if site.spec.tap_bits == 8] == ["1.weight"]
    assert weight_bits(result.placement) == {"0": 8, "1": 3, "2": 8}
    assert input_bits(result.placement) == {"0": 8, "1": 4, "2": 8}
    assert result.placement.notes == ()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        pytest.param({}, ["sets nothing", "weight_bits"], id="nothing"),
        pytest.param({"weight_bits": 1}, ["weight_bits = 1 ", "2 to 8"], id="too-narrow"),
        pytest.param({"activation_bits": 9}, ["activation_bits = 9 ", "2 to 8, or 16"], id="too-wide"),
        pytest.param({"weight_bits": 16}, ["weight_bits = 16 ", "2 to 8."], id="wide-weight"),
        pytest.param({"weight_bits": True}, ["weight_bits = True ", "whole number"], id="bool"),
        pytest.param({"weight_bits": 4.0}, ["weight_bits = 4.0 ", "whole number"], id="fraction"),
        pytest.param({"granularity": "row"}, ["'row'", "tensor, channel or block"], id="granularity"),
        pytest.param({"symmetric": "yes"}, ["symmetric = 'yes' ", "true or false"], id="symmetric"),
        pytest.param({"float": 1}, ["float = 1 ", "true or false"], id="float"),
        pytest.param(
            {"float": True, "weight_bits": 4}, ["float", "weight_bits", "exclude each other"], id="float-bits"
        ),
        pytest.param({"weight_bits": 8, "symmetric": False}, ["8 bits", "zero point"], id="asymmetric-8-bit"),
    ],
)
def test_a_rule_that_cannot_be(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        rule("stages.*", **settings)
    assert all(part in str(caught.value) for part in ["'stages.*'", *parts]), str(caught.value)


@pytest.mark.parametrize("match", ["", " ", 3], ids=["empty", "blank", "number"])
def test_a_rule_needs_a_glob(match: Any) -> None:
    with pytest.raises(InputError, match="should be a glob"):
        rule(match, weight_bits=4)


def test_a_glob_without_match_names_near_misses() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown layers pattern 'dephtwise'\. Did you mean 'depthwise'"):
        placed(*build("residual"), rule("dephtwise", weight_bits=4))


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param((rule("add", activation_bits=4),), id="no-weights"),
        pytest.param((rule("depthwise", float=True), rule("depthwise", weight_bits=4)), id="float-layer"),
    ],
)
def test_a_rule_that_applies_to_no_match_names_the_layers_it_could(layers: tuple[LayerRule, ...]) -> None:
    with pytest.raises(InputError, match=r"matches no quantized layer with weights.* stem, .*point, head"):
        placed(*build("residual"), *layers)


@pytest.mark.parametrize("reduce_range", [False, True], ids=["8-bit", "7-bit"])
def test_the_widest_weights_have_no_zero_point(reduce_range: bool) -> None:
    """Also where the bits come from elsewhere: here from the first and last layer."""
    bits = 7 if reduce_range else 8
    placement = chain(rule("linear", symmetric=False), weight_bits=4, reduce_range=reduce_range)
    expected = f"a.0: its weight stays symmetric, because only weights below {bits} bits have a zero point"
    assert expected in placement.notes and placement.by_name["a.0.weight"].spec.symmetric
    specs = chain(rule("a.2", symmetric=False), weight_bits=4, reduce_range=reduce_range).by_name
    assert not specs["a.2.weight"].spec.symmetric


@pytest.mark.parametrize("options", [{"weight_bits": 9}, {"activation_bits": 0}, {"first_last_bits": 1}], ids=str)
def test_widths_of_all_layers_are_checked_too(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="should be a whole number from 2 to 8"):
        chain(**options)


# --- range methods ---------------------------------------------------------------------------------------------------


def test_a_rule_names_the_range_method_of_its_layers() -> None:
    model, x = build("residual", batch=16)
    graph = capture(model, x[:2])
    plain, told, everywhere = (
        calibrate(graph, [x], method=method, placement=PlacementOptions(weight_bits=4, layers=rules))
        for method, rules in (("mse", ()), ("mse", (rule("point", method="minmax"),)), ("minmax", ()))
    )
    scales, before, other = map(scales_of, (told, plain, everywhere))
    chosen = {site for site, readers in told.placement.readers.items() if readers == ("conv2d_2",)}
    assert len(chosen) == 2 and "point.weight" in chosen, "its weight and what it reads"
    for name, scale in scales.items():
        assert torch.equal(scale, (other if name in chosen else before)[name]), name
    assert not any(torch.equal(before[name], other[name]) for name in chosen)


def scales_of(result: CalibrationResult) -> dict[str, Tensor]:
    weights = {name: coded.qparams.scale for name, coded in result.weights.items()}
    return weights | {name: qparams.scale for name, qparams in result.activations.items()}


def test_methods_of_whole_networks_are_no_range_methods() -> None:
    model, x = build("residual", batch=4)
    for name, message in (("qdrop", "takes a range method: aciq"), ("minmx", "Did you mean 'minmax'")):
        with pytest.raises(InputError, match=message):
            calibrate(capture(model, x), [x], placement=PlacementOptions(layers=(rule("point", method=name),)))
    with pytest.raises(InputError, match="name of a range method"):
        rule("point", method="")
