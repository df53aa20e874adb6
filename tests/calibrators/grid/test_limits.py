"""Limits of pairs of codes: the two packings of a kernel, the smallest scales, and codes that give way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.graph.canonical import to_integer_forms
from calibrators.grid.limits import Limits, coarsened, pairings, within
from calibrators.grid.numerics import dequantize, middle_diagonal, quantize
from calibrators.grid.spec import QParams, QuantSpec
from calibrators.methods.mse import MSE
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.place import PlacementOptions, place
from calibrators.program.freeze import freeze
from calibrators.targets import get_target
from exporter import export
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.ort.saturation import pair_sums
from runtime_tests.ort.sessions import session
from tests.support.networks import build

SHAPES = [(8, 6, 3, 3), (5, 7), (4, 3, 5), (6, 16, 1, 1), (3, 1, 2, 2)]
SYMMETRIC = QuantSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True)
GRIDS = [SYMMETRIC, QuantSpec(bits=8, signed=True, symmetric=True, narrow=True), QuantSpec(bits=7, signed=True, axis=0)]


def limits_of(shape: tuple[int, ...]) -> Limits:
    return Limits(partners=pairings(shape), pair_lowest=-128, pair_highest=128)


def worst(codes: Tensor, qparams: QParams) -> int:
    """Largest magnitude of a pair in the packings that the check of finished files knows."""
    zero_point = qparams.zero_point.reshape(-1, *[1] * (codes.ndim - 1)) if qparams.zero_point.ndim else 0
    centred = (codes.long() - zero_point).numpy()
    packings = [centred.reshape(len(codes), -1), np.moveaxis(centred, 1, -1).reshape(len(codes), -1)]
    return max(int(max(above.max(), -below.min())) for above, below in map(pair_sums, packings))


@pytest.mark.parametrize("spec", GRIDS, ids=["per-channel", "per-tensor", "asymmetric"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coarser_scales_keep_the_limit_and_are_the_smallest(
    shape: tuple[int, ...], spec: QuantSpec, generator: torch.Generator
) -> None:
    weight = torch.randn(shape, generator=generator)
    weight = weight.abs() if spec.bits == 7 else weight
    qparams = MSE().weight(weight, spec)
    assert worst(quantize(weight, qparams), qparams) > 128
    found = coarsened(weight, qparams, limits_of(shape))
    assert worst(quantize(weight, found), found) <= 128
    factors = found.scale / qparams.scale
    assert (factors >= 1).all()
    tighter = QParams(qparams.scale * (1 + 0.97 * (factors - 1)), qparams.zero_point, spec)
    assert worst(quantize(weight, tighter), tighter) >= 127
    assert torch.equal(coarsened(weight, found, limits_of(shape)).scale, found.scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_give_way_where_they_exceed_the_limit(shape: tuple[int, ...], generator: torch.Generator) -> None:
    weight = torch.randn(shape, generator=generator)
    qparams = coarsened(weight, MSE().weight(weight, SYMMETRIC), limits_of(shape))
    up = torch.ceil(weight / qparams.scale.reshape(-1, *[1] * (weight.ndim - 1))).clamp(-127, 127).to(torch.int8)
    found = within(up, weight, qparams, limits_of(shape))
    assert worst(found, qparams) <= 128
    changed = found != up
    assert ((up - found).abs()[changed] <= 2).all()
    nearest = quantize(weight, qparams)
    assert torch.equal(within(nearest, weight, qparams, limits_of(shape)), nearest)
    assert (dequantize(found, qparams) - weight).abs().max() <= 2 * qparams.scale.max()


def test_a_chosen_code_that_exceeds_the_limit_is_noted() -> None:
    model, x = build("mlp", batch=32)
    result = calibrate(fold(capture(model, x)), [x], method="mse")
    name, coded = next(iter(result.weights.items()))
    codes = torch.full_like(coded.codes, 100)
    chosen = {**result.weights, name: type(coded)(codes, coded.qparams)}
    frozen = freeze(result.placement, result.activations, chosen)
    assert worst(frozen.weights[name].codes, coded.qparams) <= 128
    assert [note for note in frozen.record.notes if "exceed 16 bits" in note]


@pytest.mark.parametrize("method", ["mse", "gptq", "qdrop", "lapq"])
@pytest.mark.parametrize("network", ["residual", "transformer"])
def test_an_export_holds_without_vnni(method: str, network: str, tmp_path: object) -> None:
    model, x = build(network, batch=32)
    options = {"qdrop": {"iters": 20}, "lapq": {"samples": 16}}.get(method, {})
    report = export(model, [x], method=method, options=options, out=f"{tmp_path}/out", latency_runs=0)
    assert report["verdict"] == "pass"
    assert report["saturation"]["safe_without_vnni"] and report["saturation"]["checked"] > 0


def test_the_target_with_vnni_limits_nothing(tmp_path: object) -> None:
    model, x = build("residual", batch=32)
    assert isinstance(model, nn.Module)
    found = {
        target: export(model, [x], method="mse", target=target, out=f"{tmp_path}/{target}", latency_runs=0)
        for target in ("ort-cpu", "ort-cpu-vnni")
    }
    limited = found["ort-cpu"]["limited_weights"]
    assert {weight["site"] for weight in limited} >= {"stem.weight", "point.weight"}
    assert all(weight["factor_hi"] > 1 and weight["factor_mean"] >= 1 for weight in limited)
    assert "depthwise.weight" not in {weight["site"] for weight in limited}
    assert not found["ort-cpu-vnni"]["saturation"]["safe_without_vnni"]
    assert "limited_weights" not in found["ort-cpu-vnni"]


@pytest.mark.parametrize(("groups", "limited"), [(1, True), (4, True), (8, False)])
def test_only_depthwise_convolutions_have_kernels_that_hold_every_sum(groups: int, limited: bool) -> None:
    x = torch.randn(16, groups, 6, 6, generator=torch.Generator().manual_seed(0))
    graph = fold(capture(nn.Conv2d(groups, 8, 3, groups=groups), x))
    placement = calibrate(graph, [x], method="minmax").placement
    assert [placement.limits_of(site) is not None for site in placement.weight_of.values()] == [limited]


def test_few_bits_need_no_limit() -> None:
    model, x = build("residual", batch=32)
    placement = PlacementOptions(weight_bits=6, first_last_bits=None)
    result = calibrate(fold(capture(model, x)), [x], method="mse", placement=placement)
    assert all(result.placement.limits_of(site) is None for site in result.placement.weight_of.values())


def test_wide_taps_beside_narrow_weights_are_limited() -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1)
    conv.weight.data = 0.02 * torch.randn(conv.weight.shape, generator=generator).sign()
    conv.weight.data[middle_diagonal(conv.weight.shape)] = 0.8
    x = torch.randn(32, 6, 8, 8, generator=generator)
    placement = PlacementOptions(weight_bits=4, activation_bits=8, first_last_bits=None)
    graph = fold(capture(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(6, 4, 1)), x))
    found = {
        target: calibrate(graph, [x], method="mse", placement=placement, target=target)
        for target in ("ort-cpu", "ort-cpu-vnni")
    }
    (site,) = (site for site in found["ort-cpu"].placement.weight_of.values() if site.spec.tap_bits)
    coded, free = (found[target].weights[site.name] for target in ("ort-cpu", "ort-cpu-vnni"))
    assert worst(coded.codes, coded.qparams) <= 128 < worst(free.codes, free.qparams)


def by_layer(report: dict[str, object]) -> list[str]:
    found = report["unsigned_weights"]
    assert isinstance(found, list)
    return found


def test_unsigned_weights_are_the_same_integers_without_limits(tmp_path: Path) -> None:
    """uint8 codes with zero point 128 give the codes and outputs of the target that sets no limit."""
    model, x = build("residual", batch=32)
    settings = {"unsigned": {"portable": "uint8"}, "free": {"target": "ort-cpu-vnni"}}
    reports = {
        name: export(model, [x], method="mse", out=tmp_path / name, latency_runs=0, **given)
        for name, given in settings.items()
    }
    assert reports["unsigned"]["verdict"] == "pass"
    assert reports["unsigned"]["saturation"]["safe_without_vnni"]
    assert not reports["free"]["saturation"]["safe_without_vnni"]
    assert "limited_weights" not in reports["unsigned"]
    assert "depthwise.weight" not in by_layer(reports["unsigned"])
    assert {"stem.weight", "point.weight"} <= {*by_layer(reports["unsigned"])}
    files = {name: onnx.load(tmp_path / name / "model.onnx") for name in reports}
    codes = {
        name: {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer} for name, model in files.items()
    }
    for name in by_layer(reports["unsigned"]):
        signed, stored = codes["free"][f"{name}_quantized"], codes["unsigned"][f"{name}_quantized"]
        assert (signed.dtype, stored.dtype) == (np.int8, np.uint8)
        assert np.array_equal(signed.astype(int) + 128, stored)
        (zero_point,) = (n.input[2] for n in files["unsigned"].graph.node if n.input[0] == f"{name}_quantized")
        assert (codes["unsigned"][zero_point] == 128).all()
    programs = [session(tmp_path / name / "model.onnx") for name in reports]
    outputs = [found.run(None, {found.get_inputs()[0].name: x.numpy()}) for found in programs]
    assert all(np.array_equal(one, other) for one, other in zip(*outputs, strict=True))


def test_a_rule_stores_single_layers_unsigned() -> None:
    model, x = build("residual", batch=32)
    graph = fold(capture(model, x))
    placement = place(
        to_integer_forms(graph), get_target("ort-cpu"), PlacementOptions(layers=(LayerRule("point", portable="uint8"),))
    )
    weights = {site.name: site.unsigned for site in placement.sites if site.kind == "weight"}
    assert {name for name, unsigned in weights.items() if unsigned} == {"point.weight"}


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("ort-cpu-vnni", {}),
        ("ort-cpu", {"weight_bits": 4, "first_last_bits": None}),
        ("ort-cpu", {"reduce_range": True}),
    ],
    ids=["vnni", "4-bit", "7-bit"],
)
def test_weights_that_no_limit_concerns_stay_signed(target: str, options: dict[str, object]) -> None:
    model, x = build("residual", batch=32)
    graph = to_integer_forms(fold(capture(model, x)))
    placement = place(graph, get_target(target), PlacementOptions(portable="uint8", **options))
    assert not any(site.unsigned for site in placement.sites)
