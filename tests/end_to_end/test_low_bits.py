"""Narrow grids in onnxruntime: the integers of every width are those of the reference, in the kernels of 8 bits."""

from __future__ import annotations

import dataclasses
import functools

import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, fx

from calibrators.calibration import calibrate
from calibrators.grid.spec import QuantizedTensor
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult, freeze
from exporter.emission.build_model import to_onnx
from exporter.frontend.capture import capture
from runtime_tests.ort.lint import lint
from runtime_tests.ort.saturation import saturation
from runtime_tests.proof import parity
from runtime_tests.reference.kernel_plan import plan
from tests.support.networks import NETWORKS, build

WIDTHS = ((2, 2), (2, 4), (3, 3), (4, 4), (4, 8), (8, 4), (7, 7))
"""Bits of weights and activations."""

CASES = [
    *(("residual", *bits) for bits in ((2, 2), (3, 3), (4, 8), (7, 7))),
    *(("pooled", *bits) for bits in ((2, 2), (4, 4), (8, 4))),
    *(("transformer", *bits) for bits in ((2, 4), (4, 4))),
    *(("mlp", *bits) for bits in ((2, 4), (3, 3), (7, 7), (8, 4))),
]
"""Emission takes a second, so every network sees some of the widths and every width some networks."""


@functools.cache
def captured(name: str) -> tuple[fx.GraphModule, Tensor]:
    model, x = build(name, batch=16)
    return capture(model, x), x


@functools.cache
def at_eight_bits(name: str) -> CalibrationResult:
    return calibrated(name)


def calibrated(name: str, **options: object) -> CalibrationResult:
    graph, x = captured(name)
    placement = PlacementOptions(first_last_bits=None, **options)  # type: ignore[arg-type]
    return calibrate(graph, [x], method="mse", placement=placement)


def prove(name: str, result: CalibrationResult) -> onnx.ModelProto:
    """The file of `result`, proved: no integer and no bit of an output differs, in the kernels of 8 bits."""
    _, x = captured(name)
    model = onnx_ir.to_proto(to_onnx(result.program, opset=20))
    report = parity(model, result.program, [(x,), (x * 1.5,)], optimized=True)
    assert (report.mismatched, report.violations, report.unplanned) == (0, 0, {})
    assert report.kernel_values > 500 and report.outputs_identical
    kernels, reference = plan(result.program), plan(at_eight_bits(name).program)
    assert kernels.counts == reference.counts
    assert [(step.site, step.kernel) for step in kernels.steps] == [
        (step.site, step.kernel) for step in reference.steps
    ]
    assert [finding for finding in lint(model) if finding.severity == "error"] == []
    return model


@pytest.mark.parametrize(("name", "weight_bits", "activation_bits"), CASES, ids=lambda value: str(value))
def test_integers_are_those_of_the_reference(name: str, weight_bits: int, activation_bits: int) -> None:
    result = calibrated(name, weight_bits=weight_bits, activation_bits=activation_bits)
    model = prove(name, result)
    assert (weight_bits < 8) == any(coded.qparams.zero_point.any() for coded in result.weights.values())
    assert saturation(model).layers == ()  # none of WIDTHS can saturate 16-bit sums of pairs


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_codes_of_a_method(name: str, generator: torch.Generator) -> None:
    """Any codes and zero points of the grid, no channel like another."""
    given = calibrated(name, weight_bits=3, activation_bits=4)

    def random(site: str, coded: QuantizedTensor) -> QuantizedTensor:
        spec, shapes = coded.qparams.spec, (coded.codes.shape, coded.qparams.zero_point.shape)
        codes, zero_point = (torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator) for shape in shapes)
        return QuantizedTensor(
            codes.to(spec.dtype), dataclasses.replace(coded.qparams, zero_point=zero_point.to(torch.int32))
        )

    weights = {site: random(site, coded) for site, coded in given.weights.items()}
    result = freeze(given.placement, given.activations, weights)
    assert all(torch.equal(result.weights[site].codes, coded.codes) for site, coded in weights.items())
    prove(name, result)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"weight_bits": 2, "activation_bits": 3, "per_tensor_weights": True}, id="per-tensor"),
        pytest.param({"weight_bits": 6, "reduce_range": True}, id="reduce-range-6-bit"),
        pytest.param({"weight_bits": 8, "reduce_range": True}, id="reduce-range-7-bit"),
    ],
)
def test_other_grids(options: dict[str, object]) -> None:
    model = prove("residual", calibrated("residual", **options))
    assert saturation(model).layers == ()


MIXED = {
    "residual": (
        LayerRule("stem", weight_bits=3, granularity="tensor"),
        LayerRule("depthwise", weight_bits=5, activation_bits=2, symmetric=True),
        LayerRule("point", weight_bits=2, activation_bits=6),
        LayerRule("head", weight_bits=4, activation_bits=5, granularity="tensor", symmetric=True),
    ),
    "pooled": (
        LayerRule("conv2d", weight_bits=4, activation_bits=5),
        LayerRule("left", weight_bits=2, activation_bits=3, symmetric=True),
        LayerRule("squeeze", weight_bits=8, activation_bits=2, granularity="tensor"),
        LayerRule("last", weight_bits=7, activation_bits=4, granularity="tensor"),
    ),
    "transformer": (
        LayerRule("*", granularity="tensor"),
        LayerRule("mlp", weight_bits=3, activation_bits=4, symmetric=True),
        LayerRule("mlp.2", granularity="channel", symmetric=False),
        LayerRule("qkv", activation_bits=7),
    ),
    "mlp": (
        LayerRule("layers.0", weight_bits=2, activation_bits=7, granularity="tensor"),
        LayerRule("layers.4", weight_bits=6, activation_bits=3, symmetric=True),
    ),
}
"""Every layer a grid of its own: bits of both kinds, granularity, symmetry."""


@pytest.mark.parametrize("name", MIXED)
def test_layers_of_different_grids(name: str) -> None:
    result = calibrated(name, layers=MIXED[name])
    specs = {site.name: site.spec for site in result.placement.sites if site.kind == "weight"}
    assert {spec.axis for spec in specs.values()} == {None, 0}
    assert {spec.symmetric for spec in specs.values() if spec.bits < 8} == {True, False}
    widths = {site.spec.bits for site in result.placement.sites if site.kind == "activation"}
    assert len(widths) > 1 and len({spec.bits for spec in specs.values()}) > 1
    prove(name, result)


def test_learned_rounding_on_symmetric_and_mixed_grids() -> None:
    graph, x = captured("residual")
    options = {"iters": 20, "batch": 8}
    placement = PlacementOptions(layers=MIXED["residual"])
    result = calibrate(graph, [x], method="qdrop", options=options, placement=placement)
    assert not result.weights["depthwise.weight"].qparams.zero_point.any()
    prove("residual", result)


def test_every_network_and_width_is_tried() -> None:
    assert {name for name, *_ in CASES} == set(NETWORKS)
    assert {(weight, activation) for _, weight, activation in CASES} == set(WIDTHS)
