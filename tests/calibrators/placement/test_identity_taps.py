"""Wide taps of folded identity branches: where, what they are worth, what the file holds, and the proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import onnx_ir
import openvino
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn

from calibrators.calibration import calibrate
from calibrators.errors import InputError
from calibrators.execution.quantizers import Rounding
from calibrators.graph.aten import constant
from calibrators.graph.canonical import to_integer_forms
from calibrators.grid.numerics import dequantize, middle_diagonal
from calibrators.grid.spec import QuantizedTensor
from calibrators.methods.gptq import GPTQ
from calibrators.methods.lapq import LAPQ
from calibrators.methods.qdrop import QDrop
from calibrators.methods.repapq import RepAPQ
from calibrators.placement.identity_taps import LEAST_SPIKE, spike_of
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.place import Placement, PlacementOptions, place
from calibrators.program.freeze import CalibrationResult, freeze
from calibrators.targets import get_target
from exporter.emission import packing
from exporter.emission.build_model import to_onnx
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.ort.coverage import coverage
from runtime_tests.ort.lint import lint
from runtime_tests.ort.saturation import saturation
from runtime_tests.ort.sessions import loads
from runtime_tests.proof import parity
from tests.support.networks import NETWORKS, build, randomize
from tests.support.published_nets import RepVGGBlock
from tests.support.stored import stored

SPIKE = 40.0
"""Times that a spike exceeds the weights around it, as in trained networks."""


def spiked(conv: nn.Module, spike: float = SPIKE) -> nn.Module:
    """Random weights of equal magnitude and, in the middle of each group's diagonal, `spike` times as much."""
    weight = conv.weight
    generator = torch.Generator().manual_seed(weight.numel())
    weight.data = torch.randint(2, weight.shape, generator=generator).mul(2.0).sub(1).mul(0.02)
    for channel in range(len(weight)):
        middle = tuple(size // 2 for size in weight.shape[2:])
        weight.data[channel, channel % weight.shape[1]][middle] = 0.02 * spike
    return conv


def forms(model: nn.Module, *shape: int) -> fx.GraphModule:
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return to_integer_forms(capture(model.eval().requires_grad_(False), x))


def placed(graph: fx.GraphModule, **options: object) -> Placement:
    settings = {"weight_bits": 4, "first_last_bits": None, **options}
    return place(graph, get_target("ort-cpu"), PlacementOptions(**settings))  # type: ignore[arg-type]


def wide(placement: Placement) -> dict[str, int]:
    """Bits of the taps by weight, of those that have their own."""
    return {site.name: site.spec.tap_bits for site in placement.sites if site.spec.tap_bits is not None}


class Functional(nn.Module):
    """One convolution, called as the subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = spiked(nn.Conv2d(6, 6, 3, padding=1)), nn.Conv2d(6, 6, 1)


class Twice(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.conv(x))))


class Elsewhere(Functional):
    """The weight is used by a convolution with another stride as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), F.conv2d(x, self.conv.weight, stride=2)


class Penalized(Functional):
    """The weight is read as a value as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.conv.weight.square().sum()


Shape = tuple[int, ...]
IMAGE: Shape = (6, 9, 8)
WIDE: dict[str, tuple[Callable[[], nn.Module], Shape, int]] = {
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
    "twice": (Twice, IMAGE, 1),
}
NARROW: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "without-spike": (lambda: nn.Conv2d(6, 6, 3, padding=1), IMAGE),
    "depthwise": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, groups=6)), IMAGE),
    "stride": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, stride=2)), IMAGE),
    "one-stride": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, stride=(1, 2))), IMAGE),
    "valid": (lambda: spiked(nn.Conv2d(6, 6, 3)), IMAGE),
    "padding-without-dilation": (lambda: spiked(nn.Conv2d(6, 6, 3, padding=1, dilation=2)), IMAGE),
    "even": (lambda: spiked(nn.Conv2d(6, 6, 2, padding=1)), IMAGE),
    "more-outputs": (lambda: spiked(nn.Conv2d(6, 12, 3, padding=1)), IMAGE),
    "more-inputs-grouped": (lambda: spiked(nn.Conv2d(12, 6, 3, padding=1, groups=3)), (12, 5, 5)),
    "linear": (lambda: spiked(nn.Linear(6, 6)), (6,)),
    "elsewhere": (Elsewhere, IMAGE),
    "penalized": (Penalized, IMAGE),
}


@pytest.mark.parametrize("name", WIDE)
def test_taps_of_identity_branches_are_wide(name: str) -> None:
    make, shape, count = WIDE[name]
    assert list(wide(placed(forms(make(), *shape))).values()) == [8] * count


@pytest.mark.parametrize("name", NARROW)
def test_what_cannot_hide_an_identity_branch_has_none(name: str) -> None:
    make, shape = NARROW[name]
    assert wide(placed(forms(make(), *shape), weight_bits=2)) == {}


@pytest.mark.parametrize("name", NETWORKS)
def test_ordinary_networks_have_none(name: str) -> None:
    model, x = build(name)
    assert wide(placed(to_integer_forms(capture(model, x)), weight_bits=2)) == {}


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_spike_decides_and_eight_bits_are_wide_enough(bits: int) -> None:
    below, above = (forms(spiked(nn.Conv2d(6, 6, 3, padding=1), f * LEAST_SPIKE), *IMAGE) for f in (0.98, 1.02))
    assert wide(placed(below, weight_bits=bits)) == {}
    assert wide(placed(above, weight_bits=bits)) == ({"weight": 8} if bits < 8 else {})
    (weight,) = (node for node in above.graph.nodes if node.name.endswith("weight"))
    assert spike_of(above, weight) == pytest.approx(1.02 * LEAST_SPIKE)


def test_a_few_channels_do_not_make_a_branch() -> None:
    model = spiked(nn.Conv2d(6, 6, 3, padding=1))
    model.weight.data[:4] = 0.02
    assert wide(placed(forms(model, *IMAGE))) == {}


def test_options_and_rules() -> None:
    graph = forms(nn.Sequential(*(spiked(nn.Conv2d(6, 6, 1)) for _ in range(3))), *IMAGE)
    assert wide(placed(graph, wide_taps=False)) == {}
    assert wide(placed(graph, reduce_range=True)) == {"0.weight": 7, "1.weight": 7, "2.weight": 7}
    assert wide(placed(graph, layers=(LayerRule("1", float=True),))) == {"0.weight": 8, "2.weight": 8}
    assert wide(placed(graph, first_last_bits=8)) == {"1.weight": 8}


# --- codes


METHODS = {
    "minmax": "minmax",
    "mse": "mse",
    "entropy": "entropy",
    "gptq": GPTQ(),
    "gptq-act-order": GPTQ(act_order=True),
    "lapq": LAPQ(max_evals=12),
    "qdrop": QDrop(iters=20),
    "repapq": RepAPQ(iters=20),
}


@pytest.mark.parametrize("granularity", ["channel", "tensor", "symmetric"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_the_others_to_their_bits_and_the_taps_to_theirs(name: str, granularity: str) -> None:
    """Taps are hit to half a step although the step suits the others; what the kernel reads lies within 127."""
    graph = forms(spiked(nn.Conv2d(6, 6, 3, padding=1)), *IMAGE)
    rule = LayerRule("*", symmetric=True) if granularity == "symmetric" else LayerRule("*", granularity=granularity)
    options = PlacementOptions(weight_bits=3, first_last_bits=None, layers=(rule,))
    result = calibrate(graph, [graph.meta["example"][0]] * 4, method=METHODS[name], placement=options)
    (coded,) = result.weights.values()
    weight = constant(graph, next(node for node in graph.graph.nodes if node.name.endswith("weight")))
    others = torch.ones(weight.shape, dtype=torch.bool)
    others[middle_diagonal(weight.shape)] = False
    spec, zero_point = coded.qparams.spec, coded.qparams.zero_point
    assert coded.codes[others].min() >= spec.qmin and coded.codes[others].max() <= spec.qmax
    read = coded.codes.int() - zero_point.reshape(-1, 1, 1, 1)
    assert read.abs().max() <= 127 and read[~others].abs().min() > spec.qmax
    error = (dequantize(coded.codes, coded.qparams) - weight)[~others].abs()
    assert (error <= coded.qparams.scale * (1.0 if name in ("qdrop", "repapq", "lapq") else 0.501)).all()
    assert (coded.qparams.scale < 0.02).all(), "a step that reaches the spike would be 0.2"


def test_the_scale_grows_where_a_tap_needs_it() -> None:
    graph = forms(spiked(nn.Conv2d(6, 6, 3, padding=1), 4000.0), *IMAGE)
    for reduce_range, reach in ((False, 127), (True, 63)):
        options = PlacementOptions(weight_bits=4, first_last_bits=None, reduce_range=reduce_range)
        (coded,) = calibrate(graph, [graph.meta["example"][0]], placement=options).weights.values()
        read = coded.codes.int() - coded.qparams.zero_point.reshape(-1, 1, 1, 1)
        assert read.abs().amax((1, 2, 3)).tolist() == [reach] * 6


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_channels_with_nothing_but_a_tap_keep_it(granularity: str) -> None:
    """A pruned convolution beside a live identity branch."""
    model = spiked(nn.Conv2d(6, 6, 3, padding=1))
    others = torch.ones(model.weight.shape, dtype=torch.bool)
    others[middle_diagonal(model.weight.shape)] = False
    pruned = [1, 4] if granularity == "channel" else [*range(6)]
    for channel in pruned:
        model.weight.data[channel][others[channel]] = 0.0
    graph = forms(model, *IMAGE)
    options = at(4, 8, first_last_bits=None, per_tensor_weights=granularity == "tensor")
    (coded,) = calibrate(graph, [graph.meta["example"][0]], placement=options).weights.values()
    assert coded.qparams.spec.tap_bits == 8
    error = (dequantize(coded.codes, coded.qparams) - model.weight).abs()[pruned]
    assert error.max() < 0.01 * 0.02 * SPIKE


def test_codes_off_the_grid_of_their_tap_are_refused() -> None:
    graph = forms(spiked(nn.Conv2d(6, 6, 3, padding=1)), *IMAGE)
    result = calibrate(
        graph, [graph.meta["example"][0]], placement=PlacementOptions(weight_bits=4, first_last_bits=None)
    )
    ((name, coded),) = result.weights.items()
    for index in ((0, 1, 1, 1), (0, 0, 1, 1)):
        codes = coded.codes.clone()
        codes[index] = 120
        chosen = {name: QuantizedTensor(codes, coded.qparams)}
        if index[1]:
            with pytest.raises(InputError, match="the codes of weight"):
                freeze(result.placement, result.activations, chosen)
            finer = replace(coded.qparams, spec=replace(coded.qparams.spec, bits=8))
            with pytest.raises(InputError, match="the codes of weight"):
                freeze(result.placement, result.activations, {name: QuantizedTensor(codes, finer)})
        else:
            assert torch.equal(freeze(result.placement, result.activations, chosen).weights[name].codes, codes)


def test_learned_rounding_starts_as_the_float_weight() -> None:
    graph = forms(spiked(nn.Conv2d(6, 6, 3, padding=1)), *IMAGE)
    result = calibrate(
        graph, [graph.meta["example"][0]], placement=PlacementOptions(weight_bits=4, first_last_bits=None)
    )
    (coded,) = result.weights.values()
    weight = constant(graph, next(node for node in graph.graph.nodes if node.name.endswith("weight")))
    rounding = Rounding([weight], [coded.qparams])
    rounding.soften()
    assert torch.allclose(rounding.weights[0], weight, rtol=1e-3, atol=1e-5)


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
"""Networks, and which of their convolutions hide an identity branch that stands out."""


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


OPTIONS: dict[str, PlacementOptions] = {
    "W4A4": at(4, 4),
    "W2A4": at(2, 4),
    "W3A3": at(3, 3),
    "per-tensor-reduced": at(3, 4, per_tensor_weights=True, reduce_range=True),
    "first-and-last": at(3, 4, first_last_bits=None),
    "per-tensor": at(4, 8, per_tensor_weights=True),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FOLDED)
def test_the_runtime_computes_it_in_integers(name: str, options: str) -> None:
    """Every integer and every bit, in as many integer kernels as without identity branches."""
    result, x = calibrated(name, OPTIONS[options]), folded(name)[1]
    assert [site.removesuffix(".weight") for site in wide(result.placement)] == FOLDED[name][1]
    model = onnx_ir.to_proto(to_onnx(result.program, opset=20))
    report = parity(model, result.program, [(x,), (2 * x,)], optimized=True)
    assert (report.mismatched, report.violations, report.unplanned) == (0, 0, {})
    assert report.kernel_values > 10_000 and report.outputs_identical
    covered = coverage(model)
    assert covered.integer_macs == 1.0 and covered.float_nodes == ()
    assert "QLinearAdd" not in covered.by_op and "Relu" not in covered.by_op
    assert lint(model) == []


def weight_error(result: CalibrationResult, name: str) -> float:
    """Squared error of a weight after rounding."""
    site, coded = result.placement.by_name[name], result.weights[name]
    (node,) = (node for node in result.placement.graph.graph.nodes if node.name == site.node)
    return float((dequantize(coded.codes, coded.qparams) - constant(result.placement.graph, node)).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("name", FOLDED)
def test_wide_taps_are_worth_more_than_a_bit(name: str, bits: int) -> None:
    """A bit is a factor of four in the error."""
    narrow, broad = (calibrated(name, at(bits, 8, wide_taps=flag)) for flag in (False, True))
    assert wide(broad.placement) and not wide(narrow.placement)
    for weight in wide(broad.placement):
        assert weight_error(broad, weight) < weight_error(narrow, weight) / 4


# --- packed


@pytest.fixture
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "OVERHEAD", 0)
    monkeypatch.setattr(packing, "TAP_BYTES", 0)
    monkeypatch.setattr(packing, "TAPS_OVERHEAD", 0)


def test_packing_says_what_it_takes() -> None:
    """Bytes of the file follow stored_bytes, shift and taps included; what would grow stays as it is."""
    for channels in (12, 64):
        layers = (spiked(nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2))
        graph = forms(nn.Sequential(*layers), channels, 5, 5)
        result = calibrate(graph, [graph.meta["example"][0]], placement=at(4, 8, first_last_bits=None))
        size = 9 * channels**2
        saved = len(stored(result, "int8").SerializeToString()) - len(stored(result, "int4").SerializeToString())
        predicted = 2 * (size - packing.stored_bytes(size, 4, channels, "int4"))
        assert (predicted > 0) == (channels == 64)
        assert 0 <= predicted - saved <= 2 * (packing.OVERHEAD + packing.TAPS_OVERHEAD)


@pytest.mark.skipif(not loads(opset=25, ir_version=13), reason="this onnxruntime does not load 2-bit types")
@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize("options", ["W2A4", "W3A3", "per-tensor", "per-tensor-reduced"])
@pytest.mark.parametrize("name", FOLDED)
def test_packed_codes_with_wide_taps_are_the_same_network(name: str, options: str) -> None:
    """In the runtime, code by code, in the file as text, and in OpenVINO, which reads no 2-bit types."""
    result, x = calibrated(name, OPTIONS[options]), folded(name)[1]
    plain = stored(result, "int8")
    [by_text] = ReferenceEvaluator(plain).run(None, {"x": x.numpy()})
    for storage in ("int4", "int2"):
        model = stored(result, storage)
        onnx.checker.check_model(model, full_check=True)
        for path in FOLDED[name][1]:
            types = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
            bits = 2 if (storage, options) == ("int2", "W2A4") else 4
            assert types[f"{path}.weight_quantized_packed"] == f"INT{bits}"
            assert types[f"{path}.weight_quantized_taps"] == "INT8"
        assert coverage(model).by_op == coverage(plain).by_op and coverage(model).integer_macs == 1.0
        report = parity(model, result.program, [(x,)], optimized=True)
        assert report.mismatched == 0 and report.outputs_identical
        [read] = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
        assert np.array_equal(read, by_text)
        assert [finding for finding in lint(model) if finding.severity == "error"] == []
        assert saturation(model) == saturation(plain)
    packed, whole = (in_openvino(stored(result, storage), x) for storage in ("int4", "int8"))
    assert np.allclose(packed, whole, rtol=0, atol=1e-6)


def in_openvino(model: onnx.ModelProto, x: Tensor) -> np.ndarray:
    core = openvino.Core()
    read = core.read_model(model.SerializeToString())
    return core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]


def test_ordinary_codes_are_packed_without_taps() -> None:
    """The diagonal is left to itself only where the codes do not fit otherwise."""
    torch.manual_seed(0)
    graph = forms(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)), 16, 6, 6)
    result = calibrate(graph, [graph.meta["example"][0]], placement=at(4, 8, first_last_bits=None))
    names = {tensor.name for tensor in stored(result, "int4").graph.initializer}
    assert "0.weight_quantized_packed" in names and not any("taps" in name for name in names)
