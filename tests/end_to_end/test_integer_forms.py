"""Operators in integer forms: no compute node is left in float, and the runtime computes the reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibrators.calibration import calibrate
from calibrators.placement.place import PlacementOptions
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.ort.coverage import coverage
from runtime_tests.proof import validate
from tests.support.integer_forms import FORMS, between
from tests.support.stored import stored


@pytest.mark.parametrize("name", FORMS)
def test_every_node_is_an_integer_kernel(name: str) -> None:
    model, x = between(name)
    result = calibrate(fold(capture(model, (x,))), [x], method="mse")
    file = stored(result)
    found = coverage(file)
    assert found.float_nodes == ()
    assert FORMS[name][1] <= found.by_op.keys()
    report = validate(file, reference=result, batches=[x])
    report.raise_for_mismatch()
    with torch.no_grad():
        outputs, expected = result.program(x)[0], model(x)
    noise, signal = (outputs - expected).square().mean(), expected.square().mean()
    assert 10 * torch.log10(signal / noise) > 30


def test_a_max_pool_reads_codes_in_any_layout() -> None:
    """torch pools no uint8 images of 128 pixels and more with channels last, the layout that moves produce."""
    torch.manual_seed(0)
    first, up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 3, 2, output_padding=1, groups=2)
    model = nn.Sequential(first, up, nn.Upsample(scale_factor=2), nn.MaxPool2d(2, 2, 1, ceil_mode=True))
    x = torch.randn(4, 3, 8, 8)
    result = calibrate(fold(capture(nn.Sequential(model, nn.Conv2d(4, 2, 1)).eval(), (x,))), [x], method="mse")
    validate(stored(result), reference=result, batches=[x]).raise_for_mismatch()


def test_a_hard_sigmoid_in_float_is_one_operator() -> None:
    model, x = between("hard-swish")
    result = calibrate(fold(capture(model, (x,))), [x], method="mse", placement=PlacementOptions(exclude=("form",)))
    found = coverage(stored(result))
    assert sorted(node.op for node in found.float_nodes) == ["HardSigmoid", "Mul"]


def test_methods_see_constants_as_they_are_stored() -> None:
    """Trained weights make up for the rounding of a constant only if training reads its codes."""
    model, x = between("channels")
    result = calibrate(fold(capture(model, (x,))), [x], method="gptq")
    report = validate(stored(result), reference=result, batches=[x])
    report.raise_for_mismatch()
