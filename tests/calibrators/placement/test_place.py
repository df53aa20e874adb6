"""Placement: which values are quantized, who reads the codes, what is shared; include and exclude."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators.errors import InputError
from calibrators.graph.canonical import to_integer_forms
from calibrators.grid.spec import QuantSpec
from calibrators.placement.place import Placement, PlacementOptions, place
from calibrators.targets import get_target
from exporter.frontend.capture import capture
from tests.support.networks import NETWORKS, build, randomize


def placed(model: nn.Module, x: Tensor, **options: object) -> Placement:
    return place(to_integer_forms(capture(model, x)), get_target("ort-cpu"), PlacementOptions(**options))  # type: ignore[arg-type]


def activations(placement: Placement) -> dict[str, str | None]:
    """Name of each activation site -> the site it shares its scale with."""
    return {site.name: site.shares for site in placement.sites if site.kind == "activation"}


def test_residual_network_is_integer_throughout() -> None:
    placement = placed(*build("residual"))
    assert activations(placement) == {
        "x": None,
        "clamp": None,
        "clamp_1": None,
        "point.conv2d": None,
        "add": None,
        "adaptive_avg_pool2d": None,
        "flatten": "adaptive_avg_pool2d",
    }
    sites = placement.by_name
    assert sites["clamp"].clip == (0.0, 6.0)
    assert sites["clamp"].users == ("conv2d_1", "add")
    assert {name for name, site in sites.items() if site.kind == "weight"} == {
        "stem.weight", "depthwise.weight", "point.weight", "head.weight",
    }  # fmt: skip
    assert {site.spec.bits for site in placement.sites if site.kind == "bias"} == {32}


def test_relu_on_codes_that_are_read_twice_shares_their_scale() -> None:
    """`relu(x)` beside `x` cannot be part of the kernel that makes x: it saturates x's codes."""
    placement = placed(*build("pooled"))
    of_codes = [site for site in placement.sites if site.of_codes]
    assert [(site.shares, site.clip) for site in of_codes] == [("mul_1", (0.0, float("inf")))]


def test_max_pool_shares_and_sigmoid_is_fixed() -> None:
    placement = placed(*build("pooled"))
    sites = placement.by_name
    assert sites["max_pool2d"].shares == "mul"
    assert sites["sigmoid"].fixed == (1 / 256, 0)
    assert placement.root(sites["max_pool2d"]).name == "mul"


def test_padding_with_zeros_is_done_on_the_codes() -> None:
    """With another value, which the codes may not hold, it is not; other modes copy codes between equal scales."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 2), nn.ReflectionPad2d(1))
    model += nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConstantPad2d(1, 3.0), nn.Conv2d(4, 2, 1))
    placement = placed(randomize(model), torch.randn(2, 3, 6, 6))
    pads = {site.node: site for site in placement.sites if "pad" in site.node}
    shares = [(site.shares is not None, site.of_codes) for site in pads.values()]
    assert shares == [(True, True), (True, False), (False, False)]


def test_parts_of_a_split_share_the_scale() -> None:
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.first(x).chunk(2, 1)
            return self.first(torch.cat([left, self.second(right)], 1)[:, :3])

    placement = placed(randomize(Shuffle()), torch.randn(2, 3, 4, 4))
    slices = [site for site in placement.sites if site.node.startswith("slice")]
    assert [site.shares for site in slices] == ["first.conv2d", "first.conv2d", "cat"]


def test_transformer_quantizes_linear_inputs_only() -> None:
    placement = placed(*build("transformer"))
    nodes = {node.name: node for node in placement.graph.graph.nodes}
    linear = torch.ops.aten.linear.default
    inputs = {node.args[0].name for node in nodes.values() if node.target is linear}
    behind_convolution = {"x", "embed.conv2d"}
    rest = [s for s in placement.sites if s.kind == "activation" and s.name not in behind_convolution]
    assert {site.node for site in rest} == inputs
    for site in rest:
        assert all(nodes[user].target is linear for user in site.users)


def test_float_reader_of_a_float_value_sees_the_float() -> None:
    """GELU's result feeds a linear layer and a sum: only the layer reads codes."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.first(x))
            return x + self.second(x)

    placement = placed(randomize(Forked()), torch.randn(4, 6))
    assert placement.by_name["gelu"].users == ("linear_1",)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, {8}, id="all-eight"),
        pytest.param({"weight_bits": 4}, {8, 4}, id="edges-stay-at-eight"),
        pytest.param({"weight_bits": 4, "first_last_bits": None}, {4}, id="no-exception"),
        pytest.param({"reduce_range": True}, {7}, id="reduce-range"),
    ],
)
def test_weight_bits(options: dict[str, object], expected: set[int]) -> None:
    placement = placed(*build("residual"), **options)
    assert {site.spec.bits for site in placement.sites if site.kind == "weight"} == expected


class Branches(nn.Module):
    """A residual branch, a concatenation behind which a max pool stands, a global mean; input [n, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(i, 4, 1) for i in (3, 4, 4))
        self.left, self.right, self.mix = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        x = F.max_pool2d(torch.cat([self.left(x), self.right(x)], 1), 2)
        return self.head(self.mix(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("first_last", "edge"), [(6, 6), (8, 8), (None, 4)], ids=["edges-at-six", "edges-at-eight", "no-exception"]
)
def test_activation_bits_are_those_of_what_weighted_operators_read(first_last: int | None, edge: int) -> None:
    """Operands that only sums, concatenations and pools read stay at 8 bits; all that share a scale agree."""
    x = torch.randn(2, 3, 8, 8)
    placement = placed(randomize(Branches()), x, activation_bits=4, first_last_bits=first_last)
    assert {site.name: site.spec.bits for site in placement.sites if site.kind == "activation"} == {
        "x": edge,
        "relu": 4,  # of the stem: read by the branch and by the sum
        "relu_1": 4,  # inside the branch
        "second.conv2d": 8,  # the branch's result: only the sum reads it
        "relu_2": 4,  # the sum
        "left.conv2d": 8,
        "right.conv2d": 8,
        "cat": 4,  # shares with the max pool, which a convolution reads
        "max_pool2d": 4,
        "mix.conv2d": 8,  # only the mean reads it
        "adaptive_avg_pool2d": edge,
        "flatten": edge,
    }


def test_bits_of_gates_and_of_codes_that_are_saturated() -> None:
    """`relu(x)` for a convolution is made from the codes of x, which a sum reads, too: one width for both."""
    sites = placed(*build("pooled"), activation_bits=3).by_name
    assert sites["sigmoid"].spec.bits == sites["sigmoid_1"].spec.bits == 8
    [saturated] = [site for site in sites.values() if site.of_codes]
    assert (saturated.spec.bits, sites["mul_1"].spec.bits) == (3, 3)


def test_everything_of_one_scale_has_one_width() -> None:
    for name in NETWORKS:
        placement = placed(*build(name), activation_bits=4, first_last_bits=6)
        for site in placement.sites:
            assert site.spec.bits == placement.root(site).spec.bits


@pytest.mark.parametrize("per_tensor", [False, True], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("reduce_range", [False, True], ids=["full-range", "reduce-range"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_grid(bits: int, reduce_range: bool, per_tensor: bool) -> None:
    options = {"weight_bits": bits, "reduce_range": reduce_range, "per_tensor_weights": per_tensor}
    placement = placed(*build("mlp"), first_last_bits=None, **options)
    axis, widest = None if per_tensor else 0, 7 if reduce_range else 8
    symmetric = QuantSpec(widest, signed=True, symmetric=True, axis=axis, narrow=True)
    asymmetric = QuantSpec(bits, signed=True, symmetric=False, axis=axis, narrow=False)
    [spec] = {site.spec for site in placement.sites if site.kind == "weight"}
    assert spec == (symmetric if bits >= widest else asymmetric)
    farthest = spec.qmax if spec.symmetric else spec.qmax - spec.qmin  # largest |code - zero_point|
    assert farthest <= 127
    if reduce_range:
        assert 2 * 255 * farthest <= torch.iinfo(torch.int16).max


def test_per_tensor_weights() -> None:
    placement = placed(*build("residual"), per_tensor_weights=True)
    assert {site.spec.axis for site in placement.sites if site.kind == "weight"} == {None}


@pytest.mark.parametrize("pattern", ["depthwise", "conv2d_1", "depth*"], ids=["module", "node", "glob"])
def test_excluded_operator_stays_in_float(pattern: str) -> None:
    placement = placed(*build("residual"), exclude=(pattern,))
    assert "depthwise.weight" not in placement.by_name
    assert "stem.weight" in placement.by_name


def test_included_operator_is_the_only_one() -> None:
    placement = placed(*build("residual"), include=("head",))
    assert {site.name for site in placement.sites if site.kind == "weight"} == {"head.weight"}


def test_pattern_without_match_says_what_there_is() -> None:
    with pytest.raises(InputError, match=r"unknown exclude pattern 'stm'. Did you mean 'stem'"):
        placed(*build("residual"), exclude=("stm",))


def test_nothing_to_quantize() -> None:
    with pytest.raises(InputError, match="nothing to quantize"):
        placed(nn.ReLU(), torch.randn(2, 3))


def test_tied_weights_share_one_site() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.relu(self.layer(x)))

    placement = placed(randomize(Tied()), torch.randn(4, 6))
    weights = [site for site in placement.sites if site.kind == "weight"]
    assert [len(site.users) for site in weights] == [2]
    assert len([site for site in placement.sites if site.kind == "bias"]) == 2


def test_tied_weights_of_the_last_layer_have_its_bits() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.relu(self.layer(F.relu(self.first(x)))))

    sites = placed(randomize(Tied()), torch.randn(4, 6), weight_bits=3, first_last_bits=5).by_name
    assert (sites["first.weight"].spec.bits, sites["layer.weight"].spec.bits) == (5, 5)


def test_site_names_are_unique() -> None:
    for name in ("residual", "pooled", "transformer", "mlp"):
        names = [site.name for site in placed(*build(name)).sites]
        assert len(names) == len(set(names))


class AfterFloats(nn.Module):
    """Linear layers that read what a float operator wrote, and write floats unless they are asked for codes."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.gelu(x)
        return {"scores": self.scores(y), "boxes": self.boxes(y).relu(), "given": y}


def coded(*names: str, **options: object) -> Placement:
    graph = capture(AfterFloats().eval(), torch.randn(4, 6))
    graph.meta["coded_outputs"] = frozenset(names)
    return place(to_integer_forms(graph), get_target("ort-cpu"), PlacementOptions(**options))  # type: ignore[arg-type]


def test_outputs_are_quantized_where_codes_are_asked_for() -> None:
    assert activations(coded()) == {"gelu": None}
    assert activations(coded("scores")) == {"gelu": None, "scores.linear": None}
    placement = coded("scores", "boxes")
    assert activations(placement) == {"gelu": None, "scores.linear": None, "relu": None}
    assert placement.by_name["relu"].clip == (0.0, float("inf"))
    assert placement.by_name["relu"].users == ("output",)


@pytest.mark.parametrize(("names", "exclude"), [(("given",), ()), (("scores",), ("scores",))], ids=["gelu", "excluded"])
def test_outputs_of_float_operators_are_no_codes(names: tuple[str, ...], exclude: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=f"output '{names[0]}' cannot be given as codes, because it comes from"):
        coded(*names, exclude=exclude)


@pytest.mark.parametrize(("bits", "fixed"), [(8, (1 / 255, 0)), (4, None)])
def test_inputs_on_a_grid_keep_it_where_it_has_all_codes(bits: int, fixed: tuple[float, int] | None) -> None:
    graph = to_integer_forms(capture(nn.Conv2d(3, 4, 3).eval(), torch.rand(2, 3, 8, 8)))
    graph.meta["input_grids"] = {"input_1": (1 / 255, 0)}
    options = PlacementOptions(activation_bits=bits, first_last_bits=None)
    (site,) = (site for site in place(graph, get_target("ort-cpu"), options).sites if site.node == "input_1")
    assert site.fixed == fixed
