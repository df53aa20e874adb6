"""The network and data that ship with the package: good enough, small enough, in training form, data never mixed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from calibrators import calibrate
from exporter import capture, emit, fold
from exporter.demo.model import CALIBRATION, HELD_OUT, WEIGHTS, calibration, digits, evaluation, network
from exporter.demo.train import accuracy, train
from exporter.frontend.load import load_model
from exporter.inputs.open import open_data
from runtime_tests.ort.lint import lint

REQUIRED_ACCURACY = 0.97
"""Accuracy that the demo promises on images that the network never saw; the shipped weights reach more."""


def test_the_shipped_weights_classify_held_out_digits() -> None:
    model = load_model("exporter.demo.model:network")
    assert accuracy(model) >= REQUIRED_ACCURACY


def test_the_shipped_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 1_000_000


def test_every_branch_is_there_and_its_statistics_were_trained() -> None:
    model = network()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 2 * len(model.blocks) + 2  # two blocks keep their shape and have an identity branch
    for norm in norms:
        assert norm.running_mean.abs().max() > 0
        assert (norm.running_var - 1).abs().max() > 0
        assert (norm.weight - 1).abs().max() > 0


def test_calibration_and_evaluation_share_no_image() -> None:
    (training, _), (held_out, labels) = digits()
    assert len(training) + len(held_out) == 1797
    assert not {image.tobytes() for image in training} & {image.tobytes() for image in held_out}
    assert set(labels.tolist()) == set(range(10))


def test_data_streams_afresh_and_is_clean() -> None:
    for source, count in ((calibration, CALIBRATION), (evaluation, HELD_OUT)):
        data = open_data(source).named(("image",)).with_labels()
        assert [sum(len(batch) for batch in data) for _ in range(2)] == [count, count]
        assert not data.notes
        x = data.example().inputs[0].numpy()
        assert x.dtype == np.float32
        assert 0 <= x.min() <= x.max() <= 1


def test_the_linter_finds_nothing_in_the_file_of_the_demo(tmp_path: Path) -> None:
    images = torch.from_numpy(digits()[0][0][:64])
    result = calibrate(fold(capture(load_model("exporter.demo.model:network"), images)), [images])
    emit(result, tmp_path / "model.onnx")
    assert lint(tmp_path / "model.onnx", load=True) == []


def batch_loss(model: nn.Module) -> float:
    """Cross entropy on training images with the statistics of the batch: running ones need more than an epoch."""
    (images, labels), _ = digits()
    with torch.no_grad():
        logits = model.train()(torch.from_numpy(images[:256]))
    return float(nn.functional.cross_entropy(logits, torch.from_numpy(labels[:256])))


def test_training_is_deterministic_and_learns() -> None:
    first, second = train(seed=1, epochs=1), train(seed=1, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert batch_loss(first) < math.log(5)  # better than knowing that it is one of five digits; log(10) is guessing
