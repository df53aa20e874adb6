from __future__ import annotations

import pytest
import torch
from torch import nn

from calibrators.calibration import calibrate
from calibrators.grid.numerics import dequantize, fake_quant
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.measure.noise import Noise


def test_a_layer_adds_the_noise_of_its_weights_and_of_what_it_reads() -> None:
    """Not that of the layers before it: the second layer is given the exact values, rounded to their grid."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    batches = [torch.randn(16, 6) for _ in range(3)]
    result = calibrate(fold(capture(model, batches[0])), batches, method="minmax")
    noise = Noise(result)
    for batch in batches:
        noise.start((batch,))
    sites = result.placement.by_name
    with torch.no_grad():
        read = {"0.weight": torch.cat(batches), "2.weight": torch.relu(model[0](torch.cat(batches)))}
        for (name, exact), layer in zip(read.items(), (model[0], model[2]), strict=True):
            [reader] = sites[name].users
            [source] = [site for site in sites.values() if site.kind == "activation" and reader in site.users]
            stored = result.weights[name]
            rounded = fake_quant(exact, result.qparams_of(source))
            found = nn.functional.linear(rounded, dequantize(stored.codes, stored.qparams), layer.bias)
            expected = layer(exact)
            ratio = float((found - expected).square().sum() / expected.square().sum())
            assert 0 < noise.added()[name] == pytest.approx(ratio, rel=1e-3)
