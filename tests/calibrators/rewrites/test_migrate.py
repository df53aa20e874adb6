"""Migration: the function stays, errors fall, factors go where nothing else sees them, the rest is told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calibrators.calibration import calibrate
from calibrators.errors import DataError
from calibrators.graph.aten import bind, constant, infer_shapes, layer_name
from calibrators.graph.canonical import to_integer_forms
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.place import Placement, PlacementOptions, place
from calibrators.record import Migration
from calibrators.rewrites.carriers import find_values
from calibrators.rewrites.migrate import migrate
from calibrators.targets import get_target
from exporter.emission.build_model import emit
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.proof import parity
from tests.support.architectures import construct
from tests.support.networks import randomize

aten = torch.ops.aten

SAME = 1e-9
"""Relative difference of two float64 computations of one function."""
WIDTH, TOKENS, HEADS = 12, 6, 3
FEW = PlacementOptions(weight_bits=4, activation_bits=4, first_last_bits=4)


def spread(channels: int = WIDTH, seed: int = 0) -> Tensor:
    """Factors of a hundredfold, in random order."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    return torch.linspace(-2.3, 2.3, channels, dtype=torch.float64).exp()[order]


class Uneven(nn.Module):
    """A norm whose channels differ a hundredfold, before what `reads` them."""

    def __init__(self, norm: nn.Module, reads: nn.Module) -> None:
        super().__init__()
        self.norm, self.reads = norm, reads

    def forward(self, x: Tensor) -> Tensor:
        return self.reads(self.norm(x))


class Projections(nn.Module):
    """Three linear layers that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, size) for size in (4, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


class Residual(nn.Module):
    """A residual that reads the norm's output too, as in post-norm encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class Attention(nn.Module):
    """Attention of three heads with one layer for q, k and v; `masks` keeps a constant from passing."""

    def __init__(self, masks: bool = False) -> None:
        super().__init__()
        self.masks, self.qkv, self.proj = masks, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        y = (weights.square() if self.masks else weights) @ v
        return self.proj(y.transpose(1, 2).reshape(n, t, c))


class Gated(nn.Module):
    """The MLP of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mlp(nn.Module):
    """Two layers with an activation between."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(WIDTH, 8), activation, nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Blended(nn.Module):
    """The weights of a softmax average over parts of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.weights, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 9), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.up(x).reshape(-1, 3, 4)
        weights = self.weights(x).reshape(-1, 3, 3).softmax(-1)
        return self.down((weights @ parts).reshape(-1, 4))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(x)))


def layer_norm(**options: bool) -> nn.Module:
    return nn.LayerNorm(WIDTH, **options)


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, str | None]]] = {
    "layer-norm": (lambda: Uneven(layer_norm(), nn.Linear(WIDTH, 5)), {"reads": "norm"}),
    "norm-without-bias": (lambda: Uneven(layer_norm(bias=False), nn.Linear(WIDTH, 5)), {"reads": "norm"}),
    "rms-norm": (lambda: Uneven(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 5)), {"reads": "norm"}),
    "several-readers": (
        lambda: Uneven(layer_norm(), Projections()),
        {"reads.q": "norm", "reads.k": "norm", "reads.v": "norm"},
    ),
    "residual": (lambda: Uneven(layer_norm(), Residual()), {"reads.fc": None}),
    "attention": (lambda: Uneven(layer_norm(), Attention()), {"reads.qkv": "norm", "reads.proj": "reads.qkv"}),
    "masked": (lambda: Uneven(layer_norm(), Attention(masks=True)), {"reads.qkv": "norm", "reads.proj": "reads.qkv"}),
    "gated": (
        lambda: Uneven(nn.RMSNorm(WIDTH), Gated()),
        {"reads.gate": "norm", "reads.up": "norm", "reads.down": "reads.up"},
    ),
    "relu": (lambda: Uneven(layer_norm(), Mlp(nn.ReLU())), {"reads.up": "norm", "reads.down": "reads.up"}),
    "gelu": (lambda: Uneven(layer_norm(), Mlp(nn.GELU())), {"reads.up": "norm", "reads.down": None}),
    "pooled": (lambda: Uneven(layer_norm(), Pooled()), {"reads.fc": "norm"}),
}
"""Networks, and what takes the factors in for every layer with a changed input: None for an added product."""


class Pooled(nn.Module):
    """The mean over all tokens, before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(1))


def uneven(model: nn.Module) -> nn.Module:
    """Random weights; norms and layers before others write channels that differ a hundredfold, and `down` evens out."""
    model = randomize(model)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
            weight.copy_(spread())
        if name.endswith(("up", "qkv")):
            weight.mul_(spread(len(weight), 1)[:, None])
        if name.endswith("down"):
            weight.div_(spread(weight.shape[1], 1))
    return model.eval()


def inputs() -> Tensor:
    return torch.randn(16, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def placed(model: nn.Module, options: PlacementOptions = FEW) -> Placement:
    """Placed in float32, as integer kernels ask for; the graph then computes in float64."""
    placement = place(to_integer_forms(capture(model, inputs())), get_target("ort-cpu"), options)
    graph = copy.deepcopy(placement.graph).double()
    graph.meta["example"] = tuple(x.double() for x in graph.meta["example"])
    graph.meta["other_examples"] = [tuple(x.double() for x in each) for each in graph.meta["other_examples"]]
    infer_shapes(graph)
    return replace(placement, graph=graph)


def difference(before: fx.GraphModule, after: fx.GraphModule, x: Tensor) -> float:
    """Largest difference of an output, relative to the largest output."""
    with torch.no_grad():
        a, b = before(x)[0], after(x)[0]
    return float((a - b).abs().max() / a.abs().max())


def carriers(record: Migration) -> dict[str, str | None]:
    return {reader: value.carrier for value in record.values for reader in value.readers}


@pytest.mark.parametrize("name", NETS)
def test_the_function_stays_and_errors_fall(name: str) -> None:
    build, expected = NETS[name]
    placement, x = placed(uneven(build())), inputs().double()
    changed, record = migrate(placement, [(x,)])
    assert carriers(record) == expected
    assert all(value.error_after < value.error_before for value in record.values)
    assert all(value.factor_hi / value.factor_lo > 1.5 for value in record.values)
    assert difference(placement.graph, changed, x) < SAME
    assert difference(placement.graph, changed, 3 * x.flip(0) - 1) < SAME, "also on other data"


def test_channels_of_a_norm_become_alike_and_its_readers_make_up_for_it() -> None:
    placement, x = placed(uneven(Uneven(layer_norm(), nn.Linear(WIDTH, 5)))), inputs().double()
    changed, _ = migrate(placement, [(x,)])
    before, after = (
        next(node for node in graph.graph.nodes if node.target is aten.layer_norm.default)
        for graph in (placement.graph, changed)
    )
    old, new = (constant(g, bind(n)["weight"]) for g, n in ((placement.graph, before), (changed, after)))
    assert float(old.abs().max() / old.abs().min()) > 90 and float(new.abs().max() / new.abs().min()) < 15
    layers = [next(n for n in g.graph.nodes if n.target is aten.linear.default) for g in (placement.graph, changed)]
    weights = [constant(g, bind(n)["weight"]) for g, n in zip((placement.graph, changed), layers, strict=True)]
    torch.testing.assert_close(weights[0] * old, weights[1] * new)


def test_queries_and_keys_keep_their_weights() -> None:
    placement, x = placed(uneven(Attention())), inputs().double()
    changed, record = migrate(placement, [(x,)])
    (value,) = (value for value in record.values if value.carrier == "qkv")
    assert value.readers == ("proj",) and value.shifted
    (old, old_bias), (new, new_bias) = (
        [constant(g, bind(n)[name]) for name in ("weight", "bias")]
        for g in (placement.graph, changed)
        for n in [next(node for node in g.graph.nodes if node.target is aten.linear.default)]
    )
    ratio = new / old  # the columns may have changed as well, by one factor each
    torch.testing.assert_close(ratio[: 2 * WIDTH], ratio[:1].expand(2 * WIDTH, -1))
    assert not torch.allclose(ratio[2 * WIDTH :], ratio[:1].expand(WIDTH, -1))
    assert torch.equal(old_bias[: 2 * WIDTH], new_bias[: 2 * WIDTH]) or record.values[0].carrier != "qkv"


def test_constants_pass_only_where_rows_of_attention_add_up_to_one() -> None:
    for masks in (False, True):
        placement = placed(uneven(Attention(masks)))
        found = {layer_name(value.readers[0]): value.carrier for value in find_values(placement.graph)}
        carrier = found["proj"]
        assert not isinstance(carrier, str) and carrier.shifts is not masks


def test_channels_that_mix_carry_nothing() -> None:
    placement = placed(Blended())
    found = {layer_name(value.readers[0]): value.carrier for value in find_values(placement.graph)}
    assert found["down"] == "channels of up mix, or are read elsewhere"


def test_what_stays_is_told() -> None:
    placement, x = placed(uneven(Uneven(nn.Tanh(), nn.Linear(WIDTH, 5)))), inputs().double()
    changed, record = migrate(placement, [(x,)])
    assert not record.values and difference(placement.graph, changed, x) == 0
    (skipped,) = record.skipped
    assert skipped.where == "reads" and skipped.why.startswith("tanh of norm takes no factors, and ")


def test_weights_with_one_scale_carry_nothing() -> None:
    rule = LayerRule("reads.up", granularity="tensor")
    placement = placed(uneven(Uneven(layer_norm(), Mlp(nn.ReLU()))), FEW.model_copy(update={"layers": (rule,)}))
    _, record = migrate(placement, [(inputs().double(),)])
    assert carriers(record) == {"reads.up": "norm"}
    assert [(each.where, each.why) for each in record.skipped] == [
        ("reads.down", "the constants of reads.up have one scale")
    ]


def test_shared_weights_float_layers_and_wide_values_stay() -> None:
    placement, x = placed(uneven(Tied())), inputs().double()
    assert migrate(placement, [(x,)])[1] == Migration((), ())
    for rule in (LayerRule("reads.up", float=True), LayerRule("reads.up", activation_bits=16)):
        model = uneven(Uneven(layer_norm(), Mlp(nn.ReLU())))
        placement, x = placed(model, FEW.model_copy(update={"layers": (rule,)})), inputs().double()
        assert "norm" not in carriers(migrate(placement, [(x,)])[1]).values()


def test_nothing_moves_where_the_rounding_of_weights_decides() -> None:
    model = uneven(Uneven(layer_norm(), nn.Linear(WIDTH, 5)))
    rule = LayerRule("reads", weight_bits=2, activation_bits=8)
    placement, x = placed(model, FEW.model_copy(update={"layers": (rule,)})), inputs().double()
    _, record = migrate(placement, [(x,)])
    assert [each.where for each in record.skipped] == ["reads"]
    assert "of weights" in record.skipped[0].why


def test_a_norm_without_constants_gets_some() -> None:
    model = nn.Sequential(layer_norm(elementwise_affine=False), nn.Linear(WIDTH, 5))
    placement, x = placed(randomize(model)), inputs().double()
    x = x * spread() ** 2 + 5 * spread(seed=1)  # of 16 samples, channels keep an offset
    changed, record = migrate(placement, [(x,)])
    assert carriers(record) == {"1": "0"} and record.values[0].shifted
    assert difference(placement.graph, changed, x) < SAME


def test_the_choice_does_not_depend_on_how_the_data_is_read_again() -> None:
    placement, x = placed(uneven(Uneven(layer_norm(), nn.Linear(WIDTH, 5)))), inputs().double()
    assert migrate(placement, [(x,)])[1] == migrate(placement, [(x,)])[1]


def test_constants_come_in_one_order_in_every_process() -> None:
    """The file follows it; an order of a set would depend on the hashes of names, which differ between processes."""
    placement, x = placed(uneven(Uneven(layer_norm(), nn.Linear(WIDTH, 5)))), inputs().double()
    graph, _ = migrate(placement, [(x,)])
    constants = [node.target for node in graph.graph.nodes if node.op == "get_attr"]
    assert constants == ["norm_weight", "norm_bias", "reads_weight", "reads_bias"]


def test_data_that_is_read_once_is_refused() -> None:
    model = uneven(Uneven(layer_norm(), nn.Linear(WIDTH, 5)))
    x = inputs()

    def once() -> Iterator[Tensor]:
        yield x

    with pytest.raises(DataError, match="empty when read again"):
        calibrate(fold(capture(model, x)), once(), method="minmax", prepare=("migrate",))


def test_the_file_computes_the_calibrated_integers(tmp_path: Path) -> None:
    """Factors inside norms and weights, and an added product, in a file that is proved."""
    model = uneven(Uneven(layer_norm(), Mlp(nn.GELU())))
    x = inputs()
    graph = fold(capture(model, x))
    plain, moved = (calibrate(graph, [x], method="mse", placement=FEW, prepare=names) for names in ((), ("migrate",)))
    assert moved.record.preparation is not None and moved.record.preparation.migrate is not None
    assert None in carriers(moved.record.preparation.migrate).values()
    exact = graph(x)[0]
    errors = [float((result.program(x)[0] - exact).square().sum()) for result in (plain, moved)]
    assert errors[1] < 0.5 * errors[0]
    path = tmp_path / "model.onnx"
    emit(moved, path)
    report = parity(path, moved.program, [(x,)], optimized=True)
    assert report.kernel_mismatched == 0 and report.values > 0


@pytest.mark.parametrize("name", ["encoder", "gpt", "vit", "swin"])
def test_architectures(name: str) -> None:
    """Whatever attention looks like: the function is that of the network, in float32 and its rounding."""
    model, sample = construct(name)
    graph = to_integer_forms(fold(capture(model, sample)))
    placement = place(graph, get_target("ort-cpu"), FEW)
    changed, record = migrate(placement, [sample])
    assert record.values or record.skipped
    with torch.no_grad():
        pairs = zip(graph(*sample), changed(*sample), strict=True)
        assert all(np.allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-4 * float(a.abs().max())) for a, b in pairs)
