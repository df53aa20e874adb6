"""Activations of 16 bits for single layers: int16 in the file, float kernels around them, integer kernels elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from exporter.emission.build_model import WIDE_OPSET, emit, to_onnx
from exporter.frontend.capture import capture
from runtime_tests.ort.coverage import coverage
from runtime_tests.ort.lint import lint
from runtime_tests.ort.sessions import session
from runtime_tests.parity.results import Level, legal_rate
from runtime_tests.proof import parity
from runtime_tests.reference.execute import FLOAT
from tests.support.networks import build, randomize
from tests.support.noise import noise_of

FINE_SQNR_DB = 70.0
"""Far below the 98 dB of 16 bits over a uniform value, for ranges are wider than their values; far above 8 bits: 50."""


class Moves(nn.Module):
    """Codes that are padded, clipped, enlarged, pooled, cut and joined; input [n, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.padded, self.left, self.right = (nn.Conv2d(i, 4, 1) for i in (3, 4, 4, 4))
        self.cut, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.padded(F.pad(F.relu6(self.stem(x)), (0, 1, 0, 1)))
        x = torch.cat([self.left(F.relu(x)), self.right(x) + x], 1)
        x = F.max_pool2d(F.interpolate(x, scale_factor=2), 3)
        first, second = self.cut(x[:, :2]), torch.sigmoid(x[:, 4:])
        return self.head(torch.cat([first, second], 1))


def network(name: str) -> tuple[nn.Module, Tensor]:
    if name != "moves":
        return build(name, batch=32)
    return randomize(Moves()), torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def calibrated(name: str, *layers: str, **options: object) -> tuple[CalibrationResult, Tensor]:
    model, x = network(name)
    rules = tuple(LayerRule(layer, activation_bits=16) for layer in layers)
    placement = PlacementOptions(layers=rules, **options)  # type: ignore[arg-type]
    return calibrate(capture(model, x), [x], placement=placement), x


def compared(result: CalibrationResult, x: Tensor, *, optimized: bool = True) -> tuple[onnx.ModelProto, Level]:
    model = onnx_ir.to_proto(to_onnx(result.program, opset=WIDE_OPSET))
    return model, parity(model, result.program, [(torch.cat([x, 1.5 * x]),)], optimized=optimized)


@pytest.mark.parametrize("optimized", [True, False], ids=["optimized", "unoptimized"])
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("residual", "depthwise"),
        ("residual", "head"),
        ("pooled", "left"),
        ("pooled", "last"),
        ("transformer", "proj"),
        ("mlp", "layers.2"),
        ("moves", "padded"),
        ("moves", "left"),
        ("moves", "cut"),
        ("moves", "head"),
        ("moves", "*"),
    ],
)
def test_the_runtime_computes_the_reference(name: str, layer: str, optimized: bool) -> None:
    """Float where 16 bits stand, with single steps at rare ties; exact in all other kernels, which are as planned."""
    result, x = calibrated(name, layer)
    model, report = compared(result, x, optimized=optimized)
    assert (report.violations, report.unplanned, report.kernel_mismatched) == (0, {}, 0)
    wide_names = {site.name for site in result.placement.by_name.values() if site.spec.is_wide}
    wide = [site for site in report.nodes if site.site in wide_names]
    assert wide and all(
        site.rate == legal_rate(site.kernel, bits=16) and site.kernel in (FLOAT, "QuantizeLinear") for site in wide
    )
    if optimized and layer != "*":
        assert report.kernel_values > 100
    assert {finding.rule for finding in lint(model)} == {"wide-activation"}


def test_codes_of_the_input_are_the_formula_of_onnx() -> None:
    result, x = calibrated("residual", "stem")
    model, _ = compared(result, x)
    (codes,) = session(model, probes=["x_quantized"]).run(["x_quantized"], {"x": x.numpy()})
    qparams = result.activations["x"]
    exact = np.rint(x.numpy() / qparams.scale.numpy()) + int(qparams.zero_point)
    assert codes.dtype == np.int16
    assert np.array_equal(codes, np.clip(exact, -(2**15), 2**15 - 1))
    assert len(np.unique(codes)) > 2**10


def test_it_is_the_escape_of_a_layer_that_needs_precision() -> None:
    """Measured at the input of the network, before which there is no other noise."""
    noise = []
    for layers in ((), ("stem",)):
        result, x = calibrated("residual", *layers)
        noise.append(noise_of(result, (x,))["x"])
    assert noise[0] < FINE_SQNR_DB - 10 < FINE_SQNR_DB < noise[1]


def test_coverage_says_why_and_counts_the_rest() -> None:
    result, x = calibrated("residual", "depthwise")
    covered = coverage(compared(result, x)[0])
    reasons = {node.name: node.why for node in covered.float_nodes if node.macs}
    assert reasons == dict.fromkeys(("stem.Conv", "depthwise.Conv"), "16-bit activations have no integer kernels")
    assert 0 < covered.integer_macs < 1


@pytest.mark.parametrize(("layers", "opset"), [((), 20), (("head",), 21)], ids=["narrow", "wide"])
def test_only_wide_activations_raise_the_opset(layers: tuple[str, ...], opset: int, tmp_path: Path) -> None:
    result, _ = calibrated("residual", *layers)
    assert emit(result, tmp_path / "m.onnx").opset_imports[""] == opset


def test_one_wide_reader_widens_all_and_is_told() -> None:
    result, _ = calibrated("pooled", "left", activation_bits=4)
    sites = result.placement.by_name
    assert sites["mul"].spec == sites["max_pool2d"].spec == result.placement.target.wide_activation
    assert result.placement.notes == (
        "right: its input keeps 16 bits, because another layer shares the value or its scale",
    )


def test_methods_that_train_take_it() -> None:
    model, x = network("residual")
    rules = (LayerRule("*", weight_bits=3, activation_bits=4), LayerRule("point", activation_bits=16))
    options = {"iters": 20, "batch": 8}
    result = calibrate(
        capture(model, x), [x], method="qdrop", options=options, placement=PlacementOptions(layers=rules)
    )
    _, report = compared(result, x)
    assert (report.violations, report.unplanned, report.kernel_mismatched) == (0, {}, 0)
