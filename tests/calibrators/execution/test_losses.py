"""Prediction losses against float64 NumPy, and the messages where they do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibrators.errors import InputError
from calibrators.execution.losses import prediction_loss

ROUNDING = 1e-6
"""Squares and means in float32; logits are taken to float64."""


@pytest.fixture
def pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Float and quantized logits, [6, 4] each."""
    floats = torch.randn(6, 4, generator=generator) * 3
    return floats, floats + torch.randn(6, 4, generator=generator)


def log_softmax(x: Tensor, temperature: float = 1.0) -> NDArray[np.float64]:
    scaled = x.double().numpy() / temperature
    return np.asarray(scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence(pair: tuple[Tensor, Tensor], temperature: float) -> None:
    p, q = (log_softmax(x, temperature) for x in pair)
    expected = (np.exp(p) * (p - q)).sum(1)
    loss = prediction_loss("kl", [pair[0]], temperature=temperature)
    assert loss([pair[1]], 0).numpy() == pytest.approx(expected)
    assert loss([pair[0]], 0).abs().max() < ROUNDING


def test_cross_entropy(pair: tuple[Tensor, Tensor]) -> None:
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    expected = -log_softmax(pair[1])[np.arange(6), labels.numpy()]
    assert prediction_loss("ce", [pair[0]], labels)([pair[1]], 0).numpy() == pytest.approx(expected)


def test_error_is_relative_to_the_energy_of_each_output(generator: torch.Generator) -> None:
    floats = [torch.randn(6, 2, 3, generator=generator) * 10, torch.randn(6, 5, generator=generator)]
    outputs = [floats[0] * 1.1, floats[1] * 0.8]
    squares = [(f.double() ** 2).flatten(1).mean(1) / (f.double() ** 2).mean() for f in floats]
    expected = (0.01 * squares[0] + 0.04 * squares[1]) / 2
    assert prediction_loss("mse", floats)(outputs, 0).numpy() == pytest.approx(expected.numpy(), rel=ROUNDING)


@pytest.mark.parametrize("name", ["kl", "ce", "mse"])
def test_samples_may_come_in_parts(pair: tuple[Tensor, Tensor], name: str) -> None:
    loss = prediction_loss(name, [pair[0]], torch.tensor([0, 3, 1, 2, 2, 0]))
    parts = torch.cat([loss([pair[1][:2]], 0), loss([pair[1][2:]], 2)])
    assert torch.equal(parts, loss([pair[1]], 0))


@pytest.mark.parametrize(
    ("shape", "other"), [((6, 4), "kl"), ((6, 1), "mse"), ((6, 4, 2), "mse")], ids=["logits", "scalar", "map"]
)
def test_the_shape_of_the_outputs_chooses(shape: tuple[int, ...], other: str, generator: torch.Generator) -> None:
    floats = torch.randn(shape, generator=generator)
    outputs = floats + 0.1
    assert torch.equal(prediction_loss("auto", [floats])([outputs], 0), prediction_loss(other, [floats])([outputs], 0))


@pytest.mark.parametrize(
    ("name", "shapes", "labels", "message"),
    [
        (
            "kl",
            [(6, 4, 2)],
            None,
            r"loss 'kl' needs outputs of shape \[n, classes\], but the model returns \[n, 4, 2\]",
        ),
        ("ce", [(6, 4), (6, 4)], [0] * 6, r"loss 'ce' needs one output of shape"),
        ("ce", [(6, 4)], None, r"loss 'ce' needs labels, but the calibration data has none"),
        ("ce", [(6, 4)], [0, 1, 2], r"6 samples, but there are 3 labels from 0 to 2"),
        ("ce", [(6, 4)], [0, 1, 2, 3, 4, 0], r"one label from 0 to 3 .* labels from 0 to 4"),
    ],
    ids=["map", "two-outputs", "no-labels", "few-labels", "unknown-class"],
)
def test_what_does_not_fit_is_refused(
    name: str, shapes: list[tuple[int, ...]], labels: list[int] | None, message: str
) -> None:
    floats = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(InputError, match=message):
        prediction_loss(name, floats, torch.tensor(labels) if labels else None)
